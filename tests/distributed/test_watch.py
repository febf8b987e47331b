"""A process that stands still is named, with everybody's stacks in files, and the run ends with code 75."""

import functools
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY, Program, _be_the_program, fork

import main_pretrain
from moco.distributed import spawn, watch
from moco.distributed.launch_plan import LaunchPlan
from moco.distributed.watch import FIRST_STEP, Note, Watcher, pulse, who_is_behind
from moco.train.pretraining import Trainer

HANG = ["--hang-minutes", 0.06]  # 3.6 s, and three times as long in the first step


def notes(*places: tuple[int, int, str] | None, looks: int = 7) -> list[Note | None]:
    return [place and Note(looks, *place, f"host{r}, process {r}") for r, place in enumerate(places)]


@pytest.mark.parametrize(
    ("now", "silent", "named", "others"),
    [
        (notes((5, 9, "q backward"), (5, 4, "waiting for images")), [], [1], "q backward"),
        (notes((5, 9, "q backward"), (5, 4, "a step")), [0], [0], "a step"),
        (notes((5, 9, "q backward"), (4, 30, "optimizer"), (5, 9, "q backward")), [], [1], "q backward"),
        (notes((5, 1, "waiting for images"), (5, 1, "waiting for images")), [], [0, 1], ""),
        (notes((5, 9, "q backward"), None), [], [1], "q backward"),
    ],
)
def test_who_is_behind(now, silent, named, others):
    before = [note if r in silent else note and note._replace(looks=4) for r, note in enumerate(now)]
    sentence = who_is_behind(before, now)
    behind, _, waiting = sentence.partition("; the others: ")
    assert [int(r) for r in re.findall(r"rank (\d+)", behind)] == named
    assert waiting == others
    if now[named[0]]:
        assert f"step {now[named[0]].step}: {now[named[0]].doing}" in behind
    assert sentence.startswith("no sign of life from" if silent or None in now else "no progress of")


@pytest.fixture
def looking(monkeypatch):
    """``looking(limit, [(seconds, do), ...])``: whether a look at this process found that it stands still; ``do()``
    after so many seconds."""

    class Found(Exception):
        pass

    def look(limit: float, script: list) -> bool:
        clock, left = [0.0], iter(script)

        def wait(_seconds: float) -> bool:
            seconds, do = next(left, (0.0, None))
            clock[0] += seconds
            if do is not None:
                do()
            return not seconds

        watcher = Watcher(limit, "", print)
        monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        monkeypatch.setattr(watcher, "ended", SimpleNamespace(wait=wait))

        def end(sentence: str) -> None:
            raise Found(sentence)

        monkeypatch.setattr(watcher, "_end", end)
        try:
            watcher._look()
        except Found:
            return True
        return False

    yield look
    pulse.reset()


def begin(step: int):
    return lambda: pulse.begin_step(step)


def test_when_a_process_stands_still(looking):
    still = [(5.0, None)]
    assert looking(100, [(5.0, begin(0)), (5.0, begin(1)), *still * 21])
    assert not looking(100, [(5.0, begin(2)), *still * 15, (5.0, lambda: pulse.note("optimizer")), *still * 15])
    assert not looking(100, [(5.0, begin(3)), (90.0, None), (90.0, None)])  # it was stopped itself, and goes on
    with pulse.training():
        pulse.begin_step(4)
    assert not looking(100, still * 100)  # an evaluation may last
    pulse.reset()
    first = [(5.0, begin(0)), *still * int(20 * FIRST_STEP - 2)]
    assert not looking(100, first)  # it may compile
    assert looking(100, still * 2 + first[1:] + still * 4)


def hasty(words: list[str], out: Path) -> None:
    spawn.EXIT_GRACE_SECONDS = 1.0
    _be_the_program(words, out, None, {})


class Hasty(Program):
    """A program that does not wait for processes that do not end by themselves."""

    def __init__(self, out: Path, *words: object):
        self.out = out
        out.write_text("")
        self.process = fork(hasty, [*map(str, words)], out)


@pytest.mark.dist
@pytest.mark.parametrize(("states", "minutes", "named"), [
    ([2, 1, 0], 0.001, "rank 5, 6 has not met the others 0.003 minutes after the start"), ([2, 2, 2], 0.001, ""),
    ([2, 1, 0], 0.0, ""),
])  # fmt: skip
def test_a_process_that_stands_still_before_it_meets_the_others_is_named(states, minutes, named):
    context = multiprocessing.get_context("fork")
    child, reports = context.Process(target=time.sleep, args=(1.0,)), context.SimpleQueue()
    child.start()
    late = functools.partial(spawn._late, states, LaunchPlan("spawn", rank=4), minutes, time.monotonic())
    code = spawn._wait({child: 0}, late, reports)
    child.kill()
    child.join()
    assert code == (75 if named else 0)
    if named:
        assert reports.get() == (75, f"{named}; go on with --resume auto.")
    assert reports.empty()


@pytest.mark.dist
def test_a_stopped_process_is_named_and_the_run_starts_again(image_folder, tmp_path):
    folder = tmp_path / "run"
    words = [*TINY, *HANG, "--nproc", 2, "--steps", 30_000, "--epochs", 10_000, "-p", 1, "--save-dir", folder]
    program = Hasty(tmp_path / "out", *words, "--max-restarts", 1, image_folder)
    try:
        program.wait_for("images/s", 3)
        stopped = program.pid_of_rank(1)
        os.kill(stopped, signal.SIGSTOP)
        program.wait_for("restart 1 of 1")
        assert not Path(f"/proc/{stopped}").exists()
        (told,) = [line for line in program.text.splitlines() if line.startswith("error: ")]
        assert re.search(
            rf"for 0.06 minutes no sign of life from rank 1 \(\S+, process {stopped}\), last in step \d+:", told
        )
        assert "; the others: " in told
        (stacks,) = folder.glob("hang_*_rank*.txt")  # who is stopped can write none
        assert stacks.name.endswith("_rank0.txt")
        assert "in worker" in stacks.read_text()  # the main thread, wherever it is
        program.wait_for("images/s", program.text.count("images/s") + 1)
        assert "Traceback" not in program.text
    finally:
        program.process.kill()


def blocking(args) -> int:
    """A worker whose third batch never comes."""
    original = Trainer._noted

    def noted(self, batches):
        for number, batch in enumerate(original(self, batches)):
            if number == 2:
                os.mkfifo(os.path.join(args.save_dir, "pipe"))
                open(os.path.join(args.save_dir, "pipe")).close()
            yield batch

    Trainer._noted = noted
    return main_pretrain.worker(args)


@pytest.mark.dist
def test_one_process_that_waits_for_images_for_ever(image_folder, tmp_path, start):
    program = start(*TINY, *HANG, "--epochs", 1, "--save-dir", tmp_path / "run", image_folder, main=blocking)
    assert program.end() == 75, program.text
    assert re.search(
        r"\nerror: for 0.06 minutes no progress of this process \(.*\), last in step 2: waiting for images\. The "
        r"stacks of who answers are in .*hang_00000002_rank\*\.txt; go on with --resume auto\.\n$",
        program.text,
    )
    (stacks,) = (tmp_path / "run").glob("hang_*")
    assert "in noted" in stacks.read_text()
