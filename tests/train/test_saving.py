"""When a run is saved and when not: what is not finite never takes the place of a good checkpoint."""

import math
import os

import pytest
import torch
from conftest import TINY, differences, load
from torch import nn

from moco import files
from moco.models.moco import MoCo
from moco.train.pretraining import Trainer
from moco.train.saving import Saver, first_not_finite


def saved(folder) -> list[str]:
    return files.runs_checkpoints(str(folder))


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
    assert told == ["not saved, as queue is not finite; older checkpoints stay as they are"]
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
    assert in_process(*words, "--max-minutes", 0, "--resume", "auto", "--save-dir", tmp_path / "two") == 0
    for step in range(2, 7):  # a stop saves the last good state, and counts on
        assert in_process(*words, "--max-minutes", 0, "--resume", "auto", "--save-dir", tmp_path / "two") == 0
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
