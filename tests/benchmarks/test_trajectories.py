"""The comparison of two checkouts: what a record holds, and what counts as a difference."""

import copy
import json
import math
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT

RUN = {
    "log": {"log.jsonl step 1 loss": 2.5, "log.jsonl step 2 loss": 2.25, "log.jsonl step 2 lr": 0.03},
    "results": {"knn.json: knn": 50.0},
    "tensors": {"a.pth.tar: queue": "torch.float32 [2] 00ff", "a.pth.tar: queue_ptr": "torch.int64 [1] 0f0f"},
    "entries": {"a.pth.tar: epoch": 1, "a.pth.tar: run/batches": 2},
}


@pytest.fixture
def verdict(script, tmp_path, capsys):
    """``verdict(change)``: exit code and first line when ``change`` was made to the record."""

    def compare(change) -> tuple[int, str]:
        after = copy.deepcopy(RUN)
        change(after)
        for name, run in (("before", RUN), ("after", after)):
            (tmp_path / name).write_text(json.dumps({"runs": {"moco/1": run}}))
        code = script("accuracy.trajectories").main(["compare", str(tmp_path / "before"), str(tmp_path / "after")])
        return code, capsys.readouterr().out.splitlines()[0]

    return compare


def test_equal_records_are_equal(verdict):
    code, line = verdict(lambda run: None)
    assert code == 0
    assert "moco/1" in line and "equal: log 3, results 1, tensors 2, entries 2" in line


def test_the_last_bit_of_a_loss_is_a_difference(verdict):
    moved = math.nextafter(2.25, 3)
    code, line = verdict(lambda run: run["log"].update({"log.jsonl step 2 loss": moved}))
    assert code == 1
    assert f"DIFFERS: log.jsonl step 2 loss: 2.25 != {moved}" in line


def test_a_moved_or_missing_tensor_is_a_difference(verdict):
    code, line = verdict(lambda run: run["tensors"].update({"a.pth.tar: queue": "torch.float32 [2] 00fe"}))
    assert (code, "DIFFERS: a.pth.tar: queue: torch.float32 [2] 00ff != torch.float32 [2] 00fe" in line) == (1, True)
    code, line = verdict(lambda run: run["tensors"].pop("a.pth.tar: queue_ptr"))
    assert (code, "only BEFORE has a.pth.tar: queue_ptr" in line) == (1, True)
    code, line = verdict(lambda run: run["tensors"].update(more="torch.float32 [2] 00fe"))
    assert (code, "only AFTER has more" in line) == (1, True)


def test_a_note_of_one_side_is_told_and_other_entries_differ(verdict):
    code, line = verdict(lambda run: run["entries"].update({"a.pth.tar: run/new": 1}))
    assert code == 0
    assert line.endswith("; only AFTER has a.pth.tar: run/new")
    assert verdict(lambda run: run["entries"].update({"a.pth.tar: run/batches": 3}))[0] == 1
    assert verdict(lambda run: run["entries"].update({"a.pth.tar: epoch": 2}))[0] == 1
    assert verdict(lambda run: run["entries"].pop("a.pth.tar: epoch"))[0] == 1


def test_a_missing_or_failed_run_is_a_difference(script):
    differences = script("accuracy.trajectories").differences
    assert differences(RUN, None)[0] == ["only BEFORE has this run"]
    assert differences(RUN, {"failed": "exit code 2: no"})[0] == ["AFTER: exit code 2: no"]


def test_a_digest_sees_one_bit_the_type_and_the_shape(script):
    digest, one = script("accuracy.trajectories").digest, torch.ones(2, 3)
    moved = one.clone()
    moved[1, 2] = math.nextafter(1, 2) + 1e-7
    assert digest(one) == digest(one.t().contiguous().t())  # whatever the layout in memory
    assert len({digest(x) for x in (one, moved, one.double(), one.view(3, 2), one.int(), torch.tensor(1.0))}) == 6


def test_a_log_is_read_by_step_without_what_the_machine_decides(script, tmp_path):
    rows = [{"step": 7, "epoch": 0, "loss": 2.5, "images_per_second": 9.0}, {"step": 7, "epoch": 0, "knn": 50.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert script("accuracy.trajectories").read(tmp_path)["log"] == {
        "log.jsonl step 7 epoch": 0,
        "log.jsonl step 7 loss": 2.5,
        "log.jsonl step 7 epoch'": 0,
        "log.jsonl step 7 knn": 50.0,
    }


def test_a_run_recorded_twice_is_equal(script, tmp_path, capsys):
    """A real run of this checkout: 20 losses, the tensors of its checkpoints."""
    trajectories = script("accuracy.trajectories")
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    given = [Namespace(out=file, checkout=ROOT, only=["dcl/1"], parallel=1) for file in files]
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(trajectories.record, given)] == [0, 0]
    run = json.loads(files[0].read_text())["runs"]["dcl/1"]
    assert sum(name.endswith(" loss") for name in run["log"]) == 20
    weights = [name for name in run["tensors"] if "checkpoint_0001.pth.tar: state_dict/module.encoder_q." in name]
    assert len(weights) > 20
    assert trajectories.main(["compare", *map(str, files)]) == 0
    assert f"moco is {ROOT / 'moco'}" in capsys.readouterr().out
