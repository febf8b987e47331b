"""The picture of a sweep: its title, its axis, the selected setting's test figure; and results.csv read back."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from moco import files
from moco.sweep import report, results, spec


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws a sweep of these settings, whose trials have the figures of a function; the figure, and its results.csv."""
    kept = []
    original = files.write_figure
    monkeypatch.setattr(files, "write_figure", lambda figure, *more: (kept.append(figure), original(figure, *more)))

    def draw(settings, values, group_by=(), select="val_acc1", seeds=2, mode="max"):
        stage = spec.Stage([select], {"val-only": True}, mode) if select else None
        tests = spec.Stage(["acc1"], {})
        made = spec.Spec("x.yml", "a/main.py", {}, settings, None, [*range(seeds)], [*group_by], stage, tests,
                         spec.Run(), str(tmp_path))  # fmt: skip
        chosen = []
        for stage in made.stages:
            for trial in made.trials(stage, chosen if stage is tests and select else None):
                os.makedirs(trial.folder)
                found = json.dumps({stage.metrics[0]: values(trial.settings, trial.seed, stage is tests)})
                Path(trial.folder, "result.json").write_text(found)
            chosen = chosen or report.selected(made)
        report.write_tables(made, chosen)
        assert (tmp_path / "results.png").stat().st_size > 5000
        return kept.pop(), (tmp_path / "results.csv").read_text()

    return draw


def stars(figure) -> list[tuple]:
    """(x, y) of every star."""
    lines = (line for axis in figure.axes for line in axis.lines)
    return [tuple(map(float, np.ravel(line.get_xydata()))) for line in lines if line.get_marker() == "*"]


def test_a_rate_is_a_logarithmic_axis_and_the_selected_one_has_its_test_figure_and_spread(drawn):
    settings = [{"lr": lr, "percent": p} for p, lr in itertools.product([1, 10], [30, 0.1, 3])]
    figure, text = drawn(
        settings, lambda s, seed, test: 50 + s["percent"] - abs(s["lr"] - 3) / 9 + 2 * seed + 5 * test, ["percent"]
    )
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.1", "3", "30"]
    assert [y for _, y in stars(figure)] == [57.0, 66.0]
    assert all(2.5 < x < 4 for x, _ in stars(figure))
    assert [note.get_text() for note in axis.texts] == ["57.00 ± 1.41", "66.00 ± 1.41"]
    bars = [bar.get_segments()[0][:, 1] for bar in axis.collections]  # of two lines and of their stars
    assert sum(np.ptp(bar) == pytest.approx(2 * 2**0.5) for bar in bars) == 4
    title = figure.get_suptitle()
    assert "main.py: sweep of lr; mean ± standard deviation over 2 seeds" in title
    assert "highest val_acc1, for each percent:\npercent 1, lr 3\npercent 10, lr 3" in title
    legend = [item.get_text() for item in figure.legends[0].get_texts()]
    assert legend == ["percent 1", "percent 10", "one seed", "test: acc1 of a selected setting"]
    found = results.read(text)
    assert found is not None
    assert (found.names, found.choice, found.tests, found.seeds) == (["lr", "percent"], "val_acc1", ["acc1"], 2)
    reported = {(s.values["lr"], s.values["percent"]): s.tests["acc1"].summary() for s in found.settings if s.reported}
    assert reported == {("3", "1"): "57.00 ± 1.41", ("3", "10"): "66.00 ± 1.41"}
    assert not found.unfinished


def test_many_words_are_rows_in_the_files_order(drawn):
    methods, augmentations = ["synco", "moco", "a $method$ with quite a long name"], ["v2", "v1", "cifar"]
    settings = [{"method": m, "aug": a} for m, a in itertools.product(methods, augmentations)]
    figure, _ = drawn(settings, lambda s, seed, test: 40 + len(s["method"]) + seed)
    (axis,) = figure.axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels[:4] == [
        "method synco, aug v2",
        "method synco, aug v1",
        "method synco, aug cifar",
        "method moco, aug v2",
    ]
    assert len(labels) == 9
    assert r"\$method\$" in figure.get_suptitle()
    assert stars(figure)[0][0] == 40 + len(methods[2]) + 0.5


def test_figures_of_other_units_have_a_panel_of_their_own(drawn):
    figure, _ = drawn([{"lr": 1}, {"lr": 2}], lambda s, seed, test: 70 if test else s["lr"], select="val_loss",
                      seeds=1, mode="min")  # fmt: skip
    above, below = figure.axes
    assert (above.get_ylabel(), below.get_ylabel()) == ("val_loss (selection)", "acc1 (test), %")
    assert above.get_xscale() == "linear"
    assert [y for _, y in stars(figure)] == [70]
    assert [note.get_text() for note in below.texts] == ["70.00"]
    assert "one seed\nSelected by the lowest val_loss: lr 1" in figure.get_suptitle()


def test_without_a_selection_or_without_figures_the_title_says_so(drawn):
    figure, text = drawn([{"lr": 1}], lambda s, seed, test: 70 + seed, select=None)
    assert "Nothing was selected." in figure.get_suptitle()
    assert stars(figure) == []
    found = results.read(text)
    assert found is not None and (found.choice, found.settings[0].tests["acc1"].summary()) == ("", "70.50 ± 0.71")


def test_a_sweep_without_any_figure_is_drawn(drawn):
    figure, _ = drawn([{"lr": 1}, {"lr": 3}], lambda s, seed, test: None)
    assert "Nothing is selected yet" in figure.get_suptitle()
