"""Every run leaves report.html, however it ends, and that never decides how it ends."""

import pytest
from conftest import TINY
from support import finetuning, probing
from support.logs import words_of

from moco import owner
from moco.train.runlog import RunLog


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--epochs", 1], 0, "finished after step 3 (epoch 0), exit code 0"),
        (["--max-minutes", 0], None, "stopped by the time limit (--max-minutes) after step"),
        (["--lr", "1e30", "--max-bad-steps", 2], 3, "failed after step"),
    ],
    ids=["finished", "stopped", "failed"],
)
def test_a_pretraining_leaves_a_page(words, code, says, image_folder, tmp_path, in_process, capsys):
    ended = in_process(*TINY, "--save-dir", tmp_path, *words, image_folder)
    assert code is None or ended == code, capsys.readouterr()
    text = words_of(tmp_path / "report.html")
    assert says in text
    assert "Loss relative to chance" in text or code != 0
    assert "--moco-dim 16 128" in text


def test_a_page_that_cannot_be_written_is_one_warning(image_folder, tmp_path, in_process, capsys):
    (tmp_path / "report.html").mkdir()
    assert in_process(*TINY, "--save-dir", tmp_path, "--steps", 1, image_folder) == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if "report.html" in line]
    assert len(warned) == 1 and warned[0].startswith(f"warning: {tmp_path / 'report.html'} is not written: ")
    (tmp_path / "report.html").rmdir()
    assert in_process(*TINY, "--save-dir", tmp_path, "--steps", 1, "--overwrite", "--no-report", image_folder) == 0
    assert not (tmp_path / "report.html").exists()


def test_probes_and_tunings_leave_one_too(image_folder, tmp_path, restored):
    probing.probe_once(image_folder, tmp_path, "--epochs", 1, "--features", "cached")
    probing.probe_once(image_folder, tmp_path, "--knn")
    finetuning.tune(image_folder, tmp_path / "tuned", "--train-percent", 100, "--epochs", 1)
    text = words_of(tmp_path / "report.html")
    for part in ("(linear probe)", "(k-NN)", "Linear probe Loss", "Top-1 accuracy"):
        assert part in text, part
    assert "Fine-tuning Loss" in words_of(tmp_path / "tuned" / "report.html")


def test_what_comes_at_the_end_sees_the_end_and_still_holds_the_folder(tmp_path, capsys):
    found = []

    def work(name):
        lines = (tmp_path / "log_events.jsonl").read_text().splitlines()
        found.append((name, '"kind": "end"' in lines[-1], (tmp_path / "owner.json").exists()))
        return "a page"

    owner.hold(str(tmp_path))
    log = RunLog(str(tmp_path), tensorboard=False)
    log.at_end(work, "x")
    with pytest.raises(ZeroDivisionError), log:
        raise ZeroDivisionError
    assert found == [("x", True, True)]
    assert capsys.readouterr().out == "written: a page\n"
    assert not (tmp_path / "owner.json").exists()
