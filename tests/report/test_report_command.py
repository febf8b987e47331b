"""moco report: which runs it finds in folders, and what it says of others."""

import os

import pytest
from support.logs import write_log

from moco.report import __main__ as report
from moco.report import runs


def test_runs_below_a_folder_are_found_and_named_apart(tmp_path):
    write_log(tmp_path / "sweep" / "lr=1", {"step": 1, "loss": 2.0})
    write_log(tmp_path / "sweep" / "lr=2", {"step": 1, "loss": 3.0})
    write_log(tmp_path / "sweep" / "lr=2", {"step": 1, "acc1": 50.0}, log="lincls")
    found = runs.find([str(tmp_path)])
    assert [run.name for run in found] == ["lr=1", "lr=2 (pretraining)", "lr=2 (linear probe)"]
    assert [list(run.figures["loss"][1]) for run in found[:2]] == [[2.0], [3.0]]


def test_damaged_lines_are_counted_and_a_line_being_written_is_not(tmp_path):
    lines = ['{"step": 1, "loss": 2.0}\n', '{"step": 2, "lo\n', "[]\n", '{"loss": 1}\n', '{"step": 3, "loss": null}\n']
    write_log(tmp_path, *lines, '{"step": 4, "lo')
    (run,) = runs.find([str(tmp_path)])
    assert (run.records, run.damaged) == (2, 3)
    assert list(run.figures["loss"][0]) == [1.0, 3.0]


@pytest.mark.parametrize("name", ["log.jsonl", "log_events.jsonl", "log_settings.json", "results.csv", "embedding.png"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_at(name, tmp_path):
    write_log(tmp_path / "sound", {"step": 1, "loss": 2.0})
    write_log(tmp_path / "odd", {"step": 1, "loss": 2.0})
    (tmp_path / "odd" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "odd" / name)
    assert report.main([str(tmp_path)]) == 0
    assert "sound" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "empty",
            "holds no log of a run (log.jsonl, lincls.jsonl, semisup.jsonl) and no results; give the folder of a run, "
            "or a folder of runs.",
        ),
        ("absent", "is missing; give the folder of a run, or a folder of runs."),
        ("file", "is a file; give the folder of a run, or a folder of runs."),
    ],
)
def test_what_is_no_run_is_one_sentence(name, sentence, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert report.main([str(tmp_path / name)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / name} {sentence}\n"
