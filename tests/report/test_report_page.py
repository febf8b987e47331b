"""The page of a report in a browser: curves, switches, text that stays text; and without plotly."""

import json
import re

import pytest
from PIL import Image
from support.logs import BEGIN, EPOCHS, FINISHED, event, words_of, write_log

from moco.report import __main__ as report
from moco.report import page, plotly

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def two(tmp_path):
    """Two runs, one with a name that would be an element."""
    warned = [event("warning", 1.0, 2, 0, f"{EVIL} again") for _ in range(3)]
    write_log(tmp_path / "runs" / "a", *EPOCHS, events=[BEGIN, *warned, FINISHED], settings={"lr": 0.1, "moco_k": 64})
    older = [{"step": r["step"], "epoch": r["epoch"], "loss_ratio": 0.5} for r in EPOCHS]
    write_log(tmp_path / "runs" / EVIL, *older, "garbage\n", settings={"lr": 0.2, "moco_k": 64})
    return tmp_path / "runs"


def written(folder, *words):
    assert report.main([str(folder), *map(str, words)]) == 0
    return folder / "report.html"


DRAWN = "[...document.querySelector('.plot').data].map(trace => [trace.name, [...trace.x], trace.opacity ?? 1])"


def test_curves_are_drawn_switched_smoothed_and_hidden(two, browse):
    tab = browse(written(two))
    tab.wait_for_selector(".plot .main-svg")
    name = EVIL.replace("<", "&lt;")  # as plotly is told it, which reads markup
    steps = [1, 2, 3, 4]
    assert tab.evaluate(DRAWN) == [[name, steps, 1], ["a", steps, 1]]
    tab.select_option("#align", "epoch")
    assert tab.evaluate(DRAWN)[0] == [name, [0.5, 1, 1.5, 2], 1]
    tab.select_option("#align", "time")
    assert tab.evaluate(DRAWN) == [["a", [10, 20, 30, 40], 1]]  # the other has no times
    tab.fill("#smooth", "0.5")
    assert [trace[2] for trace in tab.evaluate(DRAWN)] == [0.25, 1]
    tab.uncheck("#runs [data-line='1']")
    assert tab.evaluate(DRAWN) == []
    tab.reload()
    tab.wait_for_selector(".plot .main-svg")
    assert tab.evaluate(DRAWN) == []  # what was chosen outlives the page
    assert tab.input_value("#align") == "time"


def test_steps_of_an_older_version_before_a_resumption_are_not_drawn_over_time(tmp_path, browse):
    older = [{name: r[name] for name in ("step", "epoch", "loss_ratio")} for r in EPOCHS[:2]]
    write_log(tmp_path, *older, *EPOCHS[2:], events=[event("begin", 125.0, 2, 0, resumed="x")])
    tab = browse(written(tmp_path, "--align", "time"))
    tab.wait_for_selector(".plot .main-svg")
    assert [trace[1] for trace in tab.evaluate(DRAWN)] == [[None, None, 5, 15]]
    said = "log.jsonl has no times before step 3 (an older version wrote that part); that part is not drawn over time."
    assert said in tab.inner_text("body")


def test_what_users_named_stays_text_and_nothing_is_sent_away(two, browse):
    tab = browse(written(two), dark=True, width=500)
    tab.wait_for_selector(".plot .main-svg")
    assert tab.locator(".became ~ img, table img, .plot img").count() == 0
    assert tab.locator("#runs label").first.text_content() == EVIL
    buttons = tab.eval_on_selector_all(".modebar-btn", "found => found.map(one => one.dataset.title)")
    assert not [title for title in buttons if "hare" in title or "loud" in title or "dit" in title]
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert tab.evaluate(overflow) == 0  # what is wide scrolls by itself
    tab.set_viewport_size({"width": 500, "height": 50})
    tab.reload()
    tab.wait_for_function("window.Plotly")
    drawn = "[...document.querySelectorAll('.plot')].every(plot => plot.data)"
    assert not tab.evaluate(drawn)  # those below are drawn when they come into sight,
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")  # or onto paper
    assert tab.evaluate(drawn)


def test_the_page_says_what_differs_what_was_warned_and_what_is_left_out(two):
    text = words_of(written(two))
    assert "Settings in which the runs differ (pretraining) setting <img src=x onerror=alert(1)> a --lr 0.2 0.1" in text
    assert "--moco-k" not in text
    assert f"Warnings run epoch step warning times a 0 2 {EVIL} again 3" in text
    assert f"{EVIL}: 1 line of log.jsonl cannot be read and is left out." in text
    assert f"{EVIL}: log.jsonl has no times (an older version wrote it); it is not drawn over time." in text
    assert "finished after step 4 (epoch 1), exit code 0" in text


def test_one_run_is_compared_with_the_defaults(tmp_path):
    write_log(
        tmp_path,
        *EPOCHS,
        settings={"batch_size": 64, "moco_m": 0.999, "type_starts": {}, "unknown": 1, "save_dir": "x"},
    )
    text = words_of(written(tmp_path))
    assert "setting value default --batch-size 64 256" in text
    assert "--moco-m" not in text and "--save-dir" not in text


def test_a_flag_of_two_spellings_has_one_default(tmp_path):
    write_log(tmp_path, *EPOCHS, log="semisup", settings={"epochs": 5, "schedule": None})
    assert "setting value default --epochs 5 – " in words_of(written(tmp_path)) + " "
    write_log(tmp_path, *EPOCHS, log="semisup", settings={"schedule": [1, 2]})
    assert "setting value default --schedule 1 2 –" in words_of(written(tmp_path))


def test_counts_are_numbers_of_a_table():
    assert page._is_number("4,000") and page._is_number("1.5 ± 0.2") and not page._is_number("cached")


def test_a_picture_that_is_also_a_page_has_a_relative_link_to_it(two, browse):
    folder = two / "a #1" / "map"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "embedding.png")
    (two / "lr_find.png").write_bytes((folder / "embedding.png").read_bytes())
    (folder / "embedding.html").write_text("<!DOCTYPE html><title>the map</title>")
    tab = browse(written(two))
    assert tab.locator(".pictures figure").count() == 2
    assert [link.get_attribute("href") for link in tab.locator(".pictures a").all()] == ["a%20%231/map/embedding.html"]
    assert tab.evaluate("document.querySelector('.pictures a').href") == (folder / "embedding.html").as_uri()


def test_without_plotly_the_curves_are_pictures(two, browse, monkeypatch):
    monkeypatch.setattr(plotly, "packed", lambda: "")
    tab = browse(written(two))
    assert "pip install plotly makes them interactive" in tab.inner_text("body")
    assert tab.locator(".panel img").count() == 3
    assert tab.evaluate("[...document.querySelectorAll('.panel img')].every(image => image.naturalWidth > 500)")
    assert not tab.locator("#controls").count()
    tab = browse(written(two.parent / "runs" / EVIL, "--align", "time"))
    assert "no run has this over time" in tab.inner_text(".panel")


def test_a_watched_page_reads_itself_again(two, browse, monkeypatch):
    monkeypatch.setattr(plotly, "packed", lambda: "")
    found = page.of([str(two)])
    found.again = 0.2
    path = two / "again.html"
    page.write(found, str(path))
    tab = browse(path)
    tab.wait_for_event("load")


def test_watching_ends_with_the_runs(tmp_path, monkeypatch, capsys):
    """A run that is at work for two looks."""
    write_log(tmp_path, *EPOCHS, events=[BEGIN])
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            write_log(tmp_path, *EPOCHS, events=[BEGIN, FINISHED])

    monkeypatch.setattr(report.time, "sleep", sleep)
    monkeypatch.setattr("moco.owner.look_at", lambda *_: ("alive", "process 1 on here", 0.0))
    path = written(tmp_path, "--watch", "7")
    assert slept == [7.0, 7.0]
    assert capsys.readouterr().out.splitlines() == [
        f"{path} is written every 7 s until the runs end; Ctrl-C ends this command, not the runs", f"1 run: {path}"
    ]  # fmt: skip
    data = re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert data and json.loads(data[1])["again"] is None


def test_a_long_log_is_thinned_and_says_so(tmp_path):
    records = ({"step": i, "epoch": 0, "loss": 5.0 + (i == 3000)} for i in range(9000))
    write_log(tmp_path, *records)
    text = written(tmp_path).read_text()
    assert "log.jsonl has 9,000 records; a curve shows about 2,000 of them, the least and the largest value" in text
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert data
    (curve,) = json.loads(data[1])["panels"][0]["curves"]
    assert len(curve["y"]) < 2100 and 6 in curve["y"]
