"""When a run is saved and when not: what is not finite never takes the place of a good checkpoint."""

import math
import os
import shutil
import threading
from collections import OrderedDict

import pytest
import torch
from conftest import SYNCO, TINY, differences, load, records
from support.finetuning import tune
from support.probing import probe_once
from torch import nn

from moco import files, run_folder
from moco.errors import UserError
from moco.eval import finetune
from moco.models.moco import MoCo
from moco.train import checkpoint
from moco.train.pretraining import Trainer
from moco.train.saving import Saver, first_not_finite, on_host


def saved(folder) -> list[str]:
    return run_folder.runs_checkpoints(str(folder))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(bad):
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"a": layer.state_dict(), "b": [torch.zeros(0), torch.arange(3)], "c": "text", "d": torch.full((2,), 3e38)}
    state |= {"half": torch.ones(2, dtype=torch.bfloat16), "optimizer": optimizer.state_dict(), "heads": []}
    assert first_not_finite(state) == first_not_finite({}) == ""
    state["heads"] = [{"diverged": True, "layer": torch.tensor([bad])}]
    assert first_not_finite(state) == ""
    optimizer.state[layer.bias]["momentum_buffer"][1] = bad
    assert first_not_finite({**state, "optimizer": optimizer.state_dict()}) == "optimizer.state.1.momentum_buffer"
    state["half"][1] = bad
    assert first_not_finite(state) == "half"


def test_a_state_that_is_not_finite_is_not_written():
    told, made = [], []
    saver = Saver(line=told.append)
    saver.write({"queue": torch.tensor([math.inf])}, made.append)
    assert made == []
    assert told == ["warning: not saved, as queue is not finite; older checkpoints stay as they are"]
    saver.write({"queue": torch.ones(1)}, made.append)
    assert len(made) == len(told) == 1


def spoil(steps: set[int], monkeypatch) -> None:
    """The losses of these steps, counted from 0, are not finite."""
    forward = MoCo.forward

    def spoiled(self, views, ids, epoch, draw, step):
        out = forward(self, views, ids, epoch, draw, step)
        return out._replace(loss=out.loss * math.nan) if step in steps else out

    monkeypatch.setattr(MoCo, "forward", spoiled)


def test_while_steps_are_bad_nothing_is_saved_and_nothing_goes(image_folder, tmp_path, in_process, monkeypatch, capsys):
    """Three steps an epoch: the second epoch ends with bad ones, the fourth with the run."""
    spoil({4, 5, 11}, monkeypatch)
    words = [*TINY, "--epochs", 4, "--keep", 1, "--max-bad-steps", 9, image_folder]
    assert in_process(*words, "--save-dir", tmp_path / "one") == 0
    said = capsys.readouterr().out
    assert said.count("not saved, as the newest 2 steps were not finite") == 1
    assert saved(tmp_path / "one") == ["checkpoint_0002.pth.tar", "checkpoint_0003.pth.tar"]  # both, as the last is bad
    assert load(tmp_path / "one")["run"]["bad_steps"] == 1
    assert in_process(*words, "--max-minutes", 0, "--resume", "auto", "--save-dir", tmp_path / "two") == 75
    for step in range(2, 7):  # a stop saves the last good state, and counts on
        assert in_process(*words, "--max-minutes", 0, "--resume", "auto", "--save-dir", tmp_path / "two") == 75
        state = load(tmp_path / "two")
        assert (state["run"]["step"], state["run"]["bad_steps"]) == (step, max(0, step - 4))
    assert saved(tmp_path / "two")[-3:] == [
        "checkpoint_0001_step_00000004.pth.tar", "checkpoint_0001_step_00000005.pth.tar", "checkpoint_0001.pth.tar"
    ]  # fmt: skip
    assert in_process(*words, "--resume", "auto", "--save-dir", tmp_path / "two") == 0
    assert differences(load(tmp_path / "one"), load(tmp_path / "two")) == []


def test_a_diverged_run_keeps_its_last_good_checkpoint(image_folder, tmp_path, in_process, monkeypatch, capsys):
    """A weight that becomes infinite by a step that was finite, at the end of the second epoch."""
    after_step = Trainer.after_step

    def diverge(self, before):
        after_step(self, before)
        if self.progress.step == 6:
            next(self.model.encoder_q.parameters()).data[0] = math.inf

    monkeypatch.setattr(Trainer, "after_step", diverge)
    words = [*TINY, "--epochs", 4, "--keep", 1, image_folder, "--save-dir", tmp_path]
    assert in_process(*words) == 3
    assert "not saved, as state_dict.module.encoder_q" in capsys.readouterr().out
    assert saved(tmp_path) == ["checkpoint_0000.pth.tar"]
    assert (tmp_path / "latest").read_text() == "checkpoint_0000.pth.tar\n"
    assert in_process(*words[:-1], tmp_path / "none", "--epochs", 2) == 0  # at a run's end the code is what it was
    assert saved(tmp_path / "none") == ["checkpoint_0000.pth.tar"]
    assert os.path.exists(tmp_path / "none" / "log.jsonl")


# ------------------------------------------------------------------------------------------------- inside an epoch


def entries_of_log(folder) -> list[dict]:
    """Without what the clock decides."""
    left = {"images_per_second", "wait_share", "eta_seconds"}
    return [{name: value for name, value in r.items() if name not in left} for r in records(folder)]


@pytest.fixture
def written(monkeypatch):
    """Names of the checkpoints that are written, and ``copies``: a folder to copy each to."""
    names, original = [], checkpoint.save

    def save(state, folder, *more):
        path = original(state, folder, *more)
        names.append(os.path.basename(path))
        if os.path.isdir(f"{folder}-copies"):
            shutil.copy(path, f"{folder}-copies")
        return path

    monkeypatch.setattr(checkpoint, "save", save)
    return names


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("words", [["--save-steps", 2], ["--save-minutes", 1e-9]], ids=["steps", "minutes"])
def test_saves_inside_an_epoch_change_nothing(words, beside, image_folder, tmp_path, in_process, written, monkeypatch):
    given = [*TINY, *SYNCO, "--epochs", 2, "--save-every", 2, "-p", 2, "--cos", image_folder]
    assert in_process(*given, "--save-dir", tmp_path / "one") == 0
    assert written == ["checkpoint_0001.pth.tar"]
    written.clear()
    original = Saver.__init__
    monkeypatch.setattr(Saver, "__init__", lambda self, *a, **k: original(self, *a, **{**k, "beside": beside}))
    (tmp_path / "two-copies").mkdir()
    assert in_process(*given, *words, "--save-dir", tmp_path / "two") == 0
    numbers = (2, 4) if words[0] == "--save-steps" else (1, 2, 3, 4, 5)
    inside = [f"checkpoint_{number // 3:04d}_step_{number:08d}.pth.tar" for number in numbers]
    assert written == [*inside, "checkpoint_0001.pth.tar"]
    assert saved(tmp_path / "two") == ["checkpoint_0001.pth.tar"]  # as after stops
    one = (tmp_path / "one" / "checkpoint_0001.pth.tar").read_bytes()
    assert differences(load(tmp_path / "one"), load(tmp_path / "two")) == []
    assert len(one) == len((tmp_path / "two" / "checkpoint_0001.pth.tar").read_bytes())
    assert entries_of_log(tmp_path / "one") == entries_of_log(tmp_path / "two")
    for name in inside:  # each of them is the run
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(tmp_path / "two-copies" / name, folder)
        assert in_process(*given, "--resume", "auto", "--save-dir", folder) == 0
        assert differences(load(tmp_path / "one"), load(folder)) == []


class Killed(Exception):
    """As if the process were gone."""


def killed_after(number: int, monkeypatch, owner=checkpoint, name: str = "save_one") -> None:
    """The ``number``-th call from now on is the last thing that the process does."""
    left, original = [number], getattr(owner, name)

    def call(*words, **more):
        made = original(*words, **more)
        left[0] -= 1
        if not left[0]:
            monkeypatch.setattr(owner, name, original)
            raise Killed
        return made

    monkeypatch.setattr(owner, name, call)


PROBE = ["--epochs", 2, "--lr", 0.3, 0.1, "--opt", "adamw", "-p", 1]
TUNE = ["--val-share", 0.1, "--ema", 0.5, "-p", 1]
PROGRAMS = {"probe": (probe_once, "checkpoint.pth.tar", PROBE), "tune": (tune, finetune.CHECKPOINT, TUNE)}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_probe_and_a_fine_tuning_are_saved_inside_an_epoch(program, image_folder, tmp_path, monkeypatch):
    run, name, words = PROGRAMS[program]
    whole = run(image_folder, tmp_path / "whole", *words)
    whole.pop("settings", None)
    one = files.read(str(tmp_path / "whole" / name))
    for number, more in ((4, ["--save-minutes", 1e-9]), (1, ["--save-steps", 1])):  # an epoch has three steps
        killed_after(number, monkeypatch)
        with pytest.raises(Killed):
            run(image_folder, tmp_path / program, *words, *more, "--resume", "auto")
        state = files.read(str(tmp_path / program / name))
        assert (state["epoch"], state["run"]["batch"]) == (1, 2 - number // 4)
    again = run(image_folder, tmp_path / program, *words, *more, "--resume", "auto")
    assert {key: again[key] for key in whole} == whole
    assert differences(one, files.read(str(tmp_path / program / name))) == []
    assert entries_of_log(tmp_path / "whole") == entries_of_log(tmp_path / program)


@pytest.mark.parametrize("stopped", [False, True])
def test_what_was_due_when_a_run_ended_is_measured_after_the_resume(
    stopped, image_folder, tmp_path, in_process, monkeypatch
):
    """k-NN, RankMe and retrieval of the first epoch, which its checkpoint came before; once."""
    words = [*TINY, "--epochs", 2, "--knn-every", 1, "--knn-k", 3, "--retrieval-every", 2, image_folder]
    assert in_process(*words, "--save-dir", tmp_path / "one") == 0
    measured = {"knn", "head/ami", "rankme"}
    assert [sorted(set(r) & measured) for r in records(tmp_path / "one") if "loss" not in r] == [
        ["knn"], ["rankme"], ["knn"], ["head/ami"], ["rankme"]
    ]  # fmt: skip
    words += ["--resume", "auto", "--save-dir", tmp_path / "two"]
    for _ in range(3 * stopped):
        assert in_process(*words, "--max-minutes", 0) == 75
    for number in range(2 - stopped):  # after either checkpoint
        killed_after(1, monkeypatch, checkpoint, "save")
        with pytest.raises(Killed):
            in_process(*words)
        assert len(records(tmp_path / "two")) == (3 if number + stopped == 0 else 8)
    for _ in range(2):
        assert in_process(*words) == 0
        assert entries_of_log(tmp_path / "one") == entries_of_log(tmp_path / "two")
    assert differences(load(tmp_path / "one"), load(tmp_path / "two")) == []


# --------------------------------------------------------------------------------------------- beside the training


def test_a_copy_gives_the_same_file(tmp_path):
    """Strides, views of a larger memory, shared memory, numbers, what is no tensor."""
    layer, memory = nn.Linear(3, 2), torch.arange(12.0)
    state = {"epoch": 3, "run": {"seed": 5, "ids": [1, (2, None)], "text": "a"}, "layer": layer.state_dict()}
    state |= {"last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), "row": memory[3:6], "all": memory}
    state |= {"tied": [layer.weight.detach(), layer.bias.detach()], "none": torch.zeros(0), "half": memory.half()}
    copied = on_host(state)
    assert differences(state, copied) == []
    assert isinstance(copied["layer"], OrderedDict) and copied["layer"]._metadata == state["layer"]._metadata
    assert copied["tied"][0].data_ptr() == copied["layer"]["weight"].data_ptr() != layer.weight.data_ptr()
    for name, value in (("one", state), ("two", copied)):
        files.write(value, str(tmp_path / name))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    before = {**copied, "all": copied["all"].clone()}
    memory.zero_()
    state["run"]["ids"].append(3)
    assert differences(before, copied) == []
    assert copied["run"]["ids"] == [1, (2, None)]


def test_two_writes_are_never_under_way_and_an_error_is_raised_by_the_next(tmp_path):
    gate, order = threading.Event(), []

    def slow(state):
        order.append(f"begin {state['number']}")
        gate.wait(60)
        order.append(f"end {state['number']}")

    def failing(state):
        raise UserError("the disk is full")

    saver = Saver(beside=True)
    saver.write({"number": 1}, slow)
    threading.Timer(0.1, gate.set).start()
    order.append("trained on")
    saver.write({"number": 2}, slow, last=True)
    order.remove("trained on")  # it came before or after the thread began
    assert order == ["begin 1", "end 1", "begin 2", "end 2"]
    saver.write({}, failing)
    with pytest.raises(UserError, match="the disk is full"):
        saver.write({"number": 3}, slow)
    assert len(order) == 4
    with pytest.raises(UserError, match="the disk is full"):
        saver.write({}, failing, last=True)
    with pytest.raises(UserError, match="the disk is full"), saver:
        saver.write({}, failing)
    told = []
    saver = Saver(line=told.append, beside=True)
    saver.write({}, failing)
    with pytest.raises(KeyError), saver:
        raise KeyError
    assert told == ["warning: the last checkpoint was not written: the disk is full"]
