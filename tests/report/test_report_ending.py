"""What the report says of a run's end: from its events, and of one without an end from the lock of its folder."""

import json
import os
import time

import pytest
from support.logs import BEGIN, EPOCHS, FINISHED, event, write_log

from moco import owner
from moco.report import ending, runs


def told(folder, *events, log="log"):
    write_log(folder, *EPOCHS, log=log, events=list(events))
    (run,) = runs.find([str(folder)])
    return ending.ending(run)


@pytest.mark.parametrize(
    ("last", "state", "text"),
    [
        (FINISHED, "finished", "finished after step 4 (epoch 1), exit code 0"),
        (event("end", 1.0, 3, 1, "stopped: again", reason="max-minutes", exit_code=75, next="again"), "stopped",
         "stopped by the time limit (--max-minutes) after step 3 (epoch 1), exit code 75"),
        (event("end", 1.0, 3, 1, reason="signal SIGTERM", exit_code=143, next="again"), "stopped",
         "stopped by signal SIGTERM after step 3 (epoch 1), exit code 143"),
        (event("end", 1.0, 3, 1, "no room", reason="error", exit_code=75, next="again"), "failed",
         "failed after step 3 (epoch 1), exit code 75: no room"),
        ({"kind": "end", "reason": 5, "step": "x", "exit_code": [], "next": {}}, "stopped",
         "stopped by 5 after step 4 (epoch 1)"),
    ],
)  # fmt: skip
def test_a_run_that_said_how_it_ended(last, state, text, tmp_path):
    found = told(tmp_path, BEGIN, last)
    assert (found.state, found.text) == (state, text)
    assert found.next in ("again", "", "{}")


def test_a_measure_in_one_go_has_no_place(tmp_path):
    assert told(tmp_path, BEGIN, event("end", reason="finished", exit_code=0), log="lr_find").text == (
        "finished, exit code 0"
    )


def test_a_run_that_goes_on_after_an_end_has_not_ended(tmp_path):
    found = told(tmp_path, BEGIN, FINISHED, event("begin", 300.0, resumed="x", command="moco pretrain --resume auto"))
    assert (found.state, found.next) == ("killed", "moco pretrain --resume auto")
    assert found.text == "killed after step 4 (epoch 1): its process is gone and has recorded no end"
    assert told(tmp_path, BEGIN).next == "moco pretrain DIR --resume auto"


@pytest.mark.parametrize(
    ("command", "following"),
    [("moco pretrain --overwrite -- '-my DIR'", "moco pretrain --resume auto -- '-my DIR'"),
     ("python main_lincls.py --resume old.pth.tar DIR", "python main_lincls.py DIR --resume auto"),
     ("moco pretrain 'DIR", ""), (5, ""), (None, "")],
)  # fmt: skip
def test_what_continues_a_killed_run_is_its_command_as_a_run_that_was_stopped_says_it(command, following, tmp_path):
    assert told(tmp_path, event("begin", resumed=None, command=command)).next == following


@pytest.mark.parametrize(("log", "kind"), [("log", ""), ("lincls", "result"), ("knn", "knn")])
def test_a_living_owner_is_at_work_and_its_file_is_left_alone(log, kind, tmp_path):
    owner.hold(str(tmp_path), kind)
    try:
        (path,) = tmp_path.glob("owner*.json")
        os.utime(path, ns=(5, 5))
        found = told(tmp_path, BEGIN, log=log)
        assert found.state == "running"
        assert f"process {os.getpid()} on " in found.text
        assert path.stat().st_mtime_ns == 5
    finally:
        owner.release()


def test_an_owner_elsewhere_is_judged_by_its_signs_of_life(tmp_path):
    away = {"host": "far\x1b", "machine": "0" * 12, "pid": 7, "started": 1, "since": "today"}
    (tmp_path / "owner.json").write_text(json.dumps({**away, "id": "a"}))
    assert told(tmp_path, BEGIN).state == "running"
    os.utime(tmp_path / "owner.json", (0, time.time() - 7 * 3600))
    found = told(tmp_path, BEGIN)
    assert found.state == "unknown" and found.text.endswith("; no sign of life for 7.0 h")
    (tmp_path / "owner.json").write_text("no JSON")
    assert "an unnamed process" in told(tmp_path, BEGIN).text


def test_a_log_of_an_older_version_says_nothing_of_its_end(tmp_path):
    found = told(tmp_path)
    assert found.state == "unknown"
    assert "an older version wrote this log" in found.text
