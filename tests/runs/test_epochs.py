"""What `epoch` and `step` mean in the records and events of all three programs."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY
from support.finetuning import TINY as TUNE
from support.probing import TINY as PROBE

import main_lincls
import main_pretrain
import main_semisup
from moco import cli, distributed

PROGRAMS = {  # worker, parser, name of the log, flags: 3 steps an epoch
    "pretrain": (main_pretrain.worker, cli.parse_pretrain, "log",
                 [*TINY, "-b", 4, "--accum", 2, "--knn-every", 1, "--knn-k", 3, "--retrieval-every", 1]),
    "lincls": (main_lincls.worker, cli.parse_lincls, "lincls", [*PROBE, "-p", 1]),
    "semisup": (main_semisup.worker, cli.parse_semisup, "semisup", [*TUNE, "-p", 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_epoch_is_the_one_that_step_belongs_to_also_after_a_stop_inside_one(name, image_folder, tmp_path, alone):
    """Three stops, each after one more step, the last at an epoch's end, then the rest."""
    worker, parse, log, flags = PROGRAMS[name]

    def run(*more: object) -> int:
        words = [*flags, "--epochs", 2, "--save-dir", tmp_path, *more, image_folder]
        return distributed.launch(worker, parse([*map(str, words)]))

    stops = [run("--max-minutes", 0), *(run("--max-minutes", 0, "--resume", "auto") for _ in range(2))]
    assert [*stops, run("--resume", "auto")] == [75, 75, 75, 0]
    records = [json.loads(line) for line in (tmp_path / f"{log}.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (tmp_path / f"{log}_events.jsonl").read_text().splitlines()]
    assert {r["step"] for r in records} == {1, 2, 3, 4, 5, 6}
    assert [r["epoch"] for r in records + events] == [max(0, r["step"] - 1) // 3 for r in records + events]
    measured = [r for r in records if "finished_epochs" in r]
    assert [r["finished_epochs"] for r in measured] == [r["epoch"] + 1 for r in measured]
    assert {r["epoch"] for r in measured} == {0, 1}
    assert [e["step"] for e in events if e["kind"] == "begin"] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_evaluation_that_was_recorded_and_not_saved_is_recorded_once(name, image_folder, tmp_path, alone):
    """Stopped behind the last step of an epoch, continued, and killed between the two."""
    worker, parse, log, flags = PROGRAMS[name]
    one, two = tmp_path / "one", tmp_path / "two"

    def run(folder: Path, *more: object) -> int:
        words = [*flags, "--epochs", 2, "--save-dir", folder, "--resume", "auto", *more, image_folder]
        return distributed.launch(worker, parse([*map(str, words)]))

    assert [run(one, "--max-minutes", 0) for _ in range(3)] == [75] * 3
    shutil.copytree(one, two)
    assert run(one) == 0
    written = (one / f"{log}.jsonl").read_text().splitlines(keepends=True)
    (two / f"{log}.jsonl").write_text("".join(line for line in written if json.loads(line)["step"] <= 3))
    assert run(two) == 0

    def places(folder: Path) -> list[tuple]:
        records = [json.loads(line) for line in (folder / f"{log}.jsonl").read_text().splitlines()]
        return [(r["step"], r.get("finished_epochs"), sorted(r)) for r in records]

    assert places(two) == places(one)
    assert [place[1] for place in places(two)].count(1) == (3 if name == "pretrain" else 1)  # k-NN, retrieval, RankMe
