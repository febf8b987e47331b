"""Images, loader processes and disks that go and come back: the run is the one without the outage."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SYNCO, TINY, differences, load, records
from torch.utils.data import dataloader

import main_lincls
import main_pretrain
import main_semisup
from moco import cli, files, run_folder
from moco.data import EpochSampler, Loader, TwoViews, get_preset, make_loader
from moco.data import loader as loader_module
from moco.data.sources import away
from moco.data.sources.base import FileSource
from moco.data.sources.files import open_folder
from moco.errors import OutageError, UserError
from moco.eval import finetune, linear_fit
from moco.train import checkpoint, loop, outage, pretraining
from moco.train.runlog import RunLog
from moco.train.stop import StopRequest

OF_THE_CLOCK = ("images_per_second", "wait_share", "eta_seconds")


@pytest.fixture
def pictures(image_folder, tmp_path) -> Path:
    """Images that may go."""
    return Path(shutil.copytree(image_folder, tmp_path / "pictures"))


@pytest.fixture
def quick(monkeypatch) -> None:
    """Nobody waits for long."""
    monkeypatch.setattr(outage, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(away, "REST_SECONDS", 0.02)
    monkeypatch.setattr(away, "PAUSES", (0.01,))
    waiting = dataloader._MultiProcessingDataLoaderIter._try_get_data  # 5 s between looks at the loader's processes
    monkeypatch.setattr(waiting, "__defaults__", (0.2,))


@pytest.fixture
def hooks(monkeypatch) -> Iterator[Callable]:
    """``hooks(owner, name, call)``: ``call(result, *arguments)`` after each call of a function."""

    def hook(owner: Any, name: str, call: Callable) -> None:
        original = getattr(owner, name)

        def hooked(*given: Any, **named: Any) -> Any:
            made = original(*given, **named)
            call(made, *given)
            return made

        monkeypatch.setattr(owner, name, hooked)

    return hook


class Mover:
    """Takes a folder away, and brings it back when the run says that it waits."""

    def __init__(self, folder: Path, hooks: Callable) -> None:
        self.folder, self.hidden, self.times = folder, folder.with_name("elsewhere"), 0
        hooks(RunLog, "line", self.heard)

    def take(self) -> None:
        self.folder.rename(self.hidden)
        self.folder.mkdir()  # the mount point stays

    def heard(self, _: None, log: RunLog, text: str) -> None:
        if "waiting up to" in text:
            self.bring()

    def bring(self) -> None:
        self.folder.rmdir()
        self.hidden.rename(self.folder)
        self.times += 1


def told(folder: Path) -> list[dict]:
    return [{k: v for k, v in one.items() if k not in OF_THE_CLOCK} for one in records(folder)]


def assert_equal(one: Path, other: Path) -> None:
    assert differences(load(one), load(other)) == []
    assert told(one) == told(other)


CASES = {
    "moco": (1, ["--plateau", 1]),
    "workers": (3, [*SYNCO, "-j", 2, "-p", 3]),
    "accum 2, views on the device": (1, [*SYNCO, "--accum", 2, "-b", 4, "--symmetric", "--aug-device", "gpu"]),
    "fp16": (2, ["-p", 2, "--size", 32, "--amp", "fp16"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_when_the_images_are_back(case, pictures, tmp_path, in_process, monkeypatch, hooks, quick):
    look, more = CASES[case]
    monkeypatch.setattr(loop, "steps_between_looks", lambda *given: look)
    words = [pictures, *TINY, "--epochs", 2, *more]
    assert in_process(*words, "--save-dir", tmp_path / "one") == 0
    mover = Mover(pictures / "train" / "red", hooks)

    def after(_: None, trainer: pretraining.Trainer, before: int) -> None:
        if trainer.progress.step in (1, 3) and mover.times == trainer.progress.step // 2 and not mover.hidden.exists():
            mover.take()  # in the middle of an epoch and at the end of one

    hooks(pretraining.Trainer, "after_step", after)
    assert in_process(*words, "--save-dir", tmp_path / "two") == 0
    assert mover.times == (1 if case == "workers" else 2)  # who had loaded the whole epoch in advance
    assert_equal(tmp_path / "one", tmp_path / "two")


def test_a_run_that_waits_in_vain_ends_saved_and_goes_on(pictures, tmp_path, in_process, hooks, quick, capsys):
    words = [pictures, *TINY, "--epochs", 2, "--save-every", 2]
    assert in_process(*words, "--save-dir", tmp_path / "one") == 0
    mover = Mover(pictures / "train" / "red", hooks)
    hooks(
        pretraining.Trainer,
        "after_step",
        lambda _, t, before: t.progress.step == 4 and not mover.times and mover.take(),
    )
    capsys.readouterr()
    words += ["--save-dir", tmp_path / "two"]
    assert in_process(*words, "--data-patience", 0) == 75
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "train/red is missing or empty, for 0 minutes (--data-patience); the run is saved: the same command" in error
    assert load(tmp_path / "two")["run"]["step"] == 4
    mover.bring()
    assert in_process(*words, "--resume", "auto") == 0
    assert_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("patience", "sentence"),
    [
        (outage.Patience(), "DIR is missing or empty; type the command again when the images are back"),
        (
            outage.Patience.of(1e-3, None, print, saves=False),
            "DIR is missing or empty, for 0.001 minutes (--data-patience); type the command again when the images are "
            "back",
        ),
        (
            outage.Patience.of(0, None, print),
            "DIR is missing or empty, for 0 minutes (--data-patience); the run is saved: the same command with "
            "--resume auto goes on",
        ),
    ],
)
def test_only_of_a_run_that_is_saved_it_is_said(patience, sentence, quick, capsys):
    with pytest.raises(OutageError) as raised:
        patience.wait("", lambda: "DIR is missing or empty")
    assert str(raised.value) == sentence
    assert "saved" not in capsys.readouterr().out


def test_who_waits_answers_those_who_want_the_run_to_end(
    pictures, tmp_path, in_process, monkeypatch, hooks, quick, capsys
):
    mover = Mover(pictures / "train" / "red", hooks)
    hooks(pretraining.Trainer, "after_step", lambda _, t, before: t.progress.step == 2 and mover.take())
    monkeypatch.setattr(mover, "bring", lambda: monkeypatch.setattr(StopRequest, "asked", lambda self: 1 + 143))
    assert in_process(pictures, *TINY, "--epochs", 2, "--save-dir", tmp_path / "run") == 143
    assert "stopped while waiting, as" in capsys.readouterr().err
    assert load(tmp_path / "run")["run"]["step"] == 2


def test_k_nn_waits_too_and_the_run_is_saved_first(pictures, tmp_path, in_process, hooks, quick):
    words = [pictures, *TINY, "--knn-every", 1, "--knn-k", 3, "--save-every", 2, "--epochs", 2]
    assert in_process(*words, "--save-dir", tmp_path / "one") == 0
    mover, kept = Mover(pictures / "val" / "red", hooks), []
    hooks(mover, "bring", lambda _: kept.append(run_folder.runs_checkpoints(str(tmp_path / "two"))))
    hooks(pretraining.Trainer, "after_step", lambda _, t, before: t.progress.step == 3 and mover.take())
    assert in_process(*words, "--save-dir", tmp_path / "two") == 0
    assert kept == [["checkpoint_0001_step_00000003.pth.tar"]]
    assert_equal(tmp_path / "one", tmp_path / "two")


SHORT = ["-a", "test_resnet", "--size", "16", "-b", "8", "-j", "0", "--epochs", "2", "-p", "2", "--seed", "3"]
PROGRAMS = {
    "probe": (main_lincls, cli.parse_lincls, linear_fit.ProbeRun, ["--lr", "1", "3"]),
    "tuning": (main_semisup, cli.parse_semisup, finetune.Tuner, ["--train-percent", "100", "--val-share", "0.2"]),
}


@pytest.mark.parametrize("look", [1, 2])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_probe_and_a_fine_tuning_wait(name, look, pictures, tmp_path, monkeypatch, alone, restored, hooks, quick):
    """Inside an epoch, between its training and its evaluation, and at its first step."""
    main, parse, owner, more = PROGRAMS[name]
    for module in (loop, linear_fit):
        monkeypatch.setattr(module, "steps_between_looks", lambda *given: look)
    one, two, steps = tmp_path / "one", tmp_path / "two", []
    main.worker(parse([*SHORT, *more, "--save-dir", str(one), str(pictures)]))
    mover = Mover(pictures, hooks)

    def count(*_: object) -> None:
        steps.append(len(steps))
        if len(steps) in (1, 5) and not mover.hidden.exists():
            mover.take()

    hooks(owner, "_step", count)
    main.worker(parse([*SHORT, *more, "--save-dir", str(two), str(pictures)]))
    assert mover.times == 2
    assert told(one) == told(two)
    names = [path.name for path in one.glob("*.pth.tar")]
    assert [d for name in names for d in differences(files.read(str(one / name)), files.read(str(two / name)))] == []
    assert len(names) >= 2


def unreachable(folder: Path, args: Any) -> int | None:
    """A worker whose second process finds its images on a server that does not answer, while there is a file ``down``
    in ``folder``."""
    from moco import distributed

    contents = FileSource.contents
    away.PAUSES, away.REST_SECONDS, outage.LOOK_SECONDS = (0.01,), 0.02, 0.1

    def read(self: FileSource, index: int) -> bytes:
        if (folder / "down").exists():
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), self.paths[index])
        return contents(self, index)

    def down(_: object, trainer: pretraining.Trainer, before: int) -> None:
        if trainer.progress.step == 4 and (folder / "once").exists():
            (folder / "once").rename(folder / "down")

    if distributed.rank() == 1:
        FileSource.contents = read
        after_step = pretraining.Trainer.after_step
        pretraining.Trainer.after_step = lambda *given: down(after_step(*given), *given)  # type: ignore[method-assign]
    return main_pretrain.worker(args)


@pytest.mark.dist
def test_two_processes_wait_for_the_images_of_one(image_folder, tmp_path, start):
    words = [*TINY, *SYNCO, "--nproc", 2, "--epochs", 2, image_folder]
    assert start(*words, "--save-dir", tmp_path / "one").end() == 0
    (tmp_path / "once").write_text("")
    program = start(*words, "--save-dir", tmp_path / "two", main=functools.partial(unreachable, tmp_path))
    program.wait_for("waiting up to 10 minutes")
    assert load(tmp_path / "two")["run"]["step"] == 4
    (tmp_path / "down").unlink()
    assert program.end() == 0, program.text
    assert "Stale file handle" in program.text
    assert_equal(tmp_path / "one", tmp_path / "two")


def gone_for_two_starts(folder: Path, args: Any) -> int:
    """A worker whose images go, and are not there when it begins anew; at the third start they are."""
    starts = len(list(folder.glob("start*")))
    (folder / f"start{starts}").write_text("")
    if starts < 2:
        raise (UserError if starts else OutageError)("no images")
    return 0


def test_who_does_not_ask_for_black_batches_gets_none(image_folder, tmp_path, quick):
    folder = shutil.copytree(image_folder / "train", tmp_path / "train")
    source = open_folder(str(folder))
    for workers in (0, 1):
        loader = make_loader(TwoViews(source, get_preset("cifar"), 16, 0), EpochSampler(24, 8, 0), workers)
        batches = iter(loader)
        assert len(next(batches)["index"]) == 8
        (folder).rename(tmp_path / "away")
        with pytest.raises(OutageError, match=str(folder)):
            list(chain(batches, loader))  # the process may have read the rest of the epoch before
        with pytest.raises(OutageError, match=str(folder)):
            list(loader)
        (tmp_path / "away").rename(folder)


@pytest.mark.dist
def test_a_restart_without_images_is_the_same_outage(image_folder, tmp_path, start):
    words = [*TINY, "--nproc", 1, "--max-restarts", 2, "--data-patience", 0, "--save-dir", tmp_path, image_folder]
    program = start(*words, main=functools.partial(gone_for_two_starts, tmp_path))
    assert program.end() == 0, program.text
    assert program.text.count("restart ") == 2


@pytest.mark.parametrize("when", [1, 3])  # in the middle of an epoch, and between two
def test_a_loaders_process_that_is_killed_costs_nothing(when, image_folder, tmp_path, in_process, hooks, quick, capsys):
    words = [image_folder, *TINY, *SYNCO, "-j", 1, "--epochs", 2, "-b", 4, "--steps", 8]
    assert in_process(*words, "--save-dir", tmp_path / "one") == 0
    loaders, killed = [], []
    hooks(Loader, "__iter__", lambda _, loader: loaders.append(loader))

    def kill(_: object, trainer: pretraining.Trainer, before: int) -> None:
        if trainer.progress.step == 2 * when and not killed:
            (process,) = loaders[0]._iterator._workers
            killed.append(process)
            os.kill(process.pid, signal.SIGKILL)
            process.join()

    hooks(pretraining.Trainer, "after_step", kill)
    assert in_process(*words, "--save-dir", tmp_path / "two") == 0
    captured = capsys.readouterr()
    told_of = "a loader's process was ended by signal 9, perhaps for want of memory"
    assert f"{told_of}; going on" in captured.out if when == 1 else f"{told_of}; others take" in captured.err
    assert_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("when", [1, 3])
@pytest.mark.parametrize(
    ("error", "text"),
    [(ConnectionResetError, "cut off"), (EOFError, ""), (RuntimeError, "Pin memory thread exited unexpectedly")],
)
def test_a_connection_that_breaks_before_the_killed_process_is_gone_tells_of_it(
    error, text, when, image_folder, tmp_path, in_process, hooks, quick, monkeypatch, capsys
):
    """The system closes what a process has open a moment before others can see that it has ended."""
    words = [image_folder, *TINY, *SYNCO, "-j", 1, "--epochs", 2, "-b", 4, "--steps", 8]
    assert in_process(*words, "--save-dir", tmp_path / "one") == 0
    loaders: list[Loader] = []
    hooks(Loader, "__iter__", lambda _, loader: loaders.append(loader))
    next_data = dataloader._MultiProcessingDataLoaderIter._next_data
    dying: list[int] = []

    def take(batches: Any) -> Any:
        if len(dying) == 1:
            dying.append(0)
            threading.Timer(0.2, os.kill, (dying[0], signal.SIGKILL)).start()
            raise error(text)
        return next_data(batches)

    def kill(_: object, trainer: pretraining.Trainer, before: int) -> None:
        if trainer.progress.step == 2 * when and not dying:
            dying.append(loaders[0]._iterator._workers[0].pid)

    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter, "_next_data", take)
    hooks(pretraining.Trainer, "after_step", kill)
    assert in_process(*words, "--save-dir", tmp_path / "two") == 0
    assert "a loader's process was ended by signal 9, perhaps for want of memory; going on" in capsys.readouterr().out
    assert_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError])
def test_a_broken_connection_where_no_process_is_gone_is_no_outage(error, image_folder, monkeypatch, quick):
    monkeypatch.setattr(loader_module, "PARTING_SECONDS", 0.1)

    def cut_off(_: Any) -> Any:
        raise error("cut off")

    source = open_folder(str(image_folder / "train"))
    for workers in (0, 1):
        loader = make_loader(TwoViews(source, get_preset("cifar"), 16, 0), EpochSampler(24, 8, 0), workers)
        batches = iter(loader)
        next(batches)
        with monkeypatch.context() as patched:
            patched.setattr(dataloader._BaseDataLoaderIter, "__next__", cut_off)
            with pytest.raises(error, match="cut off"):
                next(batches)


def test_a_loaders_process_that_always_dies_ends_the_run(
    image_folder, tmp_path, in_process, monkeypatch, quick, capsys
):
    contents = FileSource.contents

    def read(self: FileSource, index: int) -> bytes:
        if torch.utils.data.get_worker_info():
            signal.signal(signal.SIGBUS, signal.SIG_DFL)  # without torch's last words
            os.kill(os.getpid(), signal.SIGBUS)
        return contents(self, index)

    monkeypatch.setattr(FileSource, "contents", read)
    assert in_process(image_folder, *TINY, "-j", 1, "--save-dir", tmp_path) == 75
    error = capsys.readouterr().err
    assert "the loader's processes need more shared memory than there is (/dev/shm, " in error
    assert "Traceback" not in error


def test_a_save_that_the_disk_refuses_is_tried_again(
    image_folder, tmp_path, in_process, monkeypatch, quick, full_disk, capsys
):
    words = [image_folder, *TINY, "--epochs", 2]
    assert in_process(*words, "--save-dir", tmp_path / "one") == 0
    tries: list[str] = []
    write = checkpoint.write

    def refused(state: dict, path: str) -> None:
        tries.append(path)
        with full_disk(100_000) if len(tries) == 2 else contextlib.nullcontext():
            write(state, path)

    monkeypatch.setattr(checkpoint, "write", refused)
    assert in_process(*words, "--save-dir", tmp_path / "two") == 0
    said = capsys.readouterr().out
    assert "checkpoint_0001.pth.tar cannot be written ([Errno 27] File too large); make room" in said
    assert "Trying again for up to 10 minutes" in said
    assert len(tries) == 3
    assert_equal(tmp_path / "one", tmp_path / "two")


def test_a_disk_that_stays_full_ends_the_run_and_the_file_before_is_whole(
    image_folder, tmp_path, in_process, monkeypatch, full_disk, capsys
):
    write = checkpoint.write

    def refused(state: dict, path: str) -> None:
        with full_disk(100_000) if state["epoch"] == 2 else contextlib.nullcontext():
            write(state, path)

    monkeypatch.setattr(checkpoint, "write", refused)
    assert in_process(*TINY, "--epochs", 3, "--data-patience", 0, "--save-dir", tmp_path, image_folder) == 75
    assert capsys.readouterr().err.count("\n") == 1
    assert load(tmp_path)["epoch"] == 1
    assert run_folder.runs_checkpoints(str(tmp_path)) == ["checkpoint_0000.pth.tar"]
