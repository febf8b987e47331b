"""A run that was interrupted and resumed is the run that was not: the same bits in every entry of its checkpoint."""

import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import SYNCO, TINY, differences, load, records
from torch import nn

from moco.methods import negatives
from moco.models.moco import MoCo
from moco.train import setup

STOP_AFTER_EACH_STEP = ["--max-minutes", "0", "--resume", "auto"]


def steps_of(save_dir: Path) -> int:
    return load(save_dir)["run"]["step"]


def interrupted(in_process, save_dir: Path, words: list, steps: int) -> None:
    """Train with an interruption after every single step."""
    for step in range(1, steps + 1):
        assert in_process(*words, *STOP_AFTER_EACH_STEP, "--save-dir", save_dir) == 75
        assert steps_of(save_dir) == step


class Dropped(nn.Module):
    """An encoder with dropout, so that the global random state matters."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.dropout, self.built = encoder, nn.Dropout(0.3), encoder.built
        self.head_name = f"encoder.{encoder.head_name}"

    def forward(self, images):
        return self.dropout(self.encoder(images))


CASES = {
    "moco": [],
    "synco": SYNCO,
    "accum 2, symmetric": [*SYNCO, "--accum", 2, "-b", 4, "--symmetric"],
    "mochi, bf16": ["--mochi", 8, 4, 6, "--hard-start-epoch", 1, "--amp", "bf16", "--size", 32],
    "last short batch, no shuffle": ["--no-drop-last", "-b", 9, "--bn-splits", 1, "--no-shuffle-bn"],
    "cosine over steps": ["--steps", 5, "--cos"],
    "starts in steps, accum 2": [
        "--mochi",
        8,
        4,
        6,
        "--hard-start-epoch",
        0,
        "--accum",
        2,
        "-b",
        4,
        "--type-starts",
        "mixup=4steps",
        "interpolation=2steps",
    ],
    "no BatchNorm": ["-a", "test_vit", "--mlp", "--stem", "imagenet"],
}


@pytest.mark.parametrize("case", CASES)
def test_interrupted_after_every_step_is_uninterrupted(case, image_folder, tmp_path, in_process):
    words = [image_folder, *TINY, "--epochs", 2, "--schedule", 1, *CASES[case]]
    assert in_process(*words, "--save-dir", tmp_path / "one") == 0
    whole = load(tmp_path / "one")
    interrupted(in_process, tmp_path / "many", words, whole["run"]["step"])
    assert differences(whole, load(tmp_path / "many")) == []
    assert whole["run"]["step"] == (5 if case == "cosine over steps" else 6)


def test_a_start_in_steps_is_exact_inside_an_epoch(image_folder, tmp_path, in_process, monkeypatch):
    kinds, draw = [], negatives.draw
    monkeypatch.setattr(negatives, "draw", lambda rows, *a: kinds.append([r.kind for r in rows]) or draw(rows, *a))
    words = [image_folder, *TINY, "--epochs", 2, *CASES["starts in steps, accum 2"], "--save-dir", tmp_path]
    assert in_process(*words) == 0
    assert kinds == [[]] * 4 + [["interpolation"]] * 4 + [["mixup", "interpolation"]] * 4  # two batches a step


def test_the_comparison_sees_another_seed_and_a_lost_entry(image_folder, tmp_path, in_process):
    """Else the tests of this file could pass on anything."""
    for seed in (3, 4):
        words = [*TINY, "--steps", 1, "--seed", seed, "--save-dir", tmp_path / str(seed), image_folder]
        assert in_process(*words) == 0
    one, other = load(tmp_path / "3"), load(tmp_path / "4")
    found = differences(one, other)
    assert ".state_dict.module.queue" in found
    assert ".run.seed" in found
    assert any(name.startswith(".optimizer.state") for name in found)
    lost = {**one, "run": {k: v for k, v in one["run"].items() if k != "draw"}}
    assert differences(one, lost) == [".run.draw"]


def test_dropout_draws_the_same_after_an_interruption(image_folder, tmp_path, in_process, monkeypatch):
    build = setup.build_encoder
    monkeypatch.setattr(setup, "build_encoder", lambda *a, **k: Dropped(build(*a, **k)))
    words = [*TINY, "--steps", 4, image_folder]
    assert in_process(*words, "--save-dir", tmp_path / "one") == 0
    interrupted(in_process, tmp_path / "many", words, 4)
    assert differences(load(tmp_path / "one"), load(tmp_path / "many")) == []


def test_a_skipped_step_and_a_bad_image_are_remembered(image_folder, tmp_path, in_process, monkeypatch):
    """After a bad step the key encoder owes nothing; the count of bad steps and images goes on."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in image_folder.glob("train/*/*.png"):
        os.link(path, pictures / f"{path.parent.name}{path.name}")
    (pictures / "broken.png").write_bytes(b"no picture")
    forward = MoCo.forward

    def spoiled(self, views, ids, epoch, draw, step):
        out = forward(self, views, ids, epoch, draw, step)
        return out._replace(loss=out.loss * float("nan")) if draw in (2, 3) else out

    monkeypatch.setattr(MoCo, "forward", spoiled)
    words = [*TINY, "--epochs", 2, pictures]
    assert in_process(*words, "--save-dir", tmp_path / "one") == 0
    interrupted(in_process, tmp_path / "many", words, 6)
    whole = load(tmp_path / "one")
    assert differences(whole, load(tmp_path / "many")) == []
    assert len(whole["run"]["bad_images"]["seen"]) == 1
    assert (whole["run"]["bad_steps"], whole["run"]["ema_due"]) == (0, True)


def test_scaler_of_fp16_goes_on(image_folder, tmp_path, in_process):
    words = [*TINY, "--size", 32, "--amp", "fp16", "--steps", 3, image_folder]
    assert in_process(*words, "--save-dir", tmp_path / "one") == 0
    interrupted(in_process, tmp_path / "many", words, 3)
    whole = load(tmp_path / "one")
    assert differences(whole, load(tmp_path / "many")) == []
    assert whole["scaler"]["scale"] > 0


def test_a_run_in_fp32_goes_on_in_fp16(image_folder, tmp_path, in_process):
    words = [*TINY, "--size", 32, "--save-dir", tmp_path, image_folder]
    assert in_process(*words, "--steps", 1) == 0
    assert load(tmp_path)["scaler"] == {}
    assert in_process(*words, "--steps", 2, "--amp", "fp16", "--resume", "auto") == 0
    assert steps_of(tmp_path) == 2


def test_the_log_continues_without_gaps_or_repeats(image_folder, tmp_path, in_process):

    words = [*TINY, "--epochs", 2, "--save-dir", tmp_path, image_folder]
    interrupted(in_process, tmp_path, words, 6)
    lines = records(tmp_path)
    assert [r["step"] for r in lines if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_epochs_of_another_length_are_counted_in_epochs(image_folder, tmp_path, in_process):
    """3 steps an epoch, then 1: the run ends after its epochs, not when its steps reach the new total."""
    words = [*TINY, "--save-dir", tmp_path, image_folder]
    assert in_process(*words, "--epochs", 2) == 0
    assert in_process(*words, "--epochs", 4, "-b", 24, "--resume", "auto") == 0
    state = load(tmp_path)
    assert (state["epoch"], state["run"]["step"]) == (4, 6 + 2)


def test_a_finished_run_stays_as_it_is(image_folder, tmp_path, in_process):
    words = [*TINY, "--steps", 2, "--save-dir", tmp_path, image_folder]
    assert in_process(*words) == 0
    before = (tmp_path / "latest").read_text(), sorted(p.name for p in tmp_path.glob("*.tar"))
    assert in_process(*words, "--resume", "auto") == 0
    assert before == ((tmp_path / "latest").read_text(), sorted(p.name for p in tmp_path.glob("*.tar")))


def test_the_seed_of_the_checkpoint_is_kept(image_folder, tmp_path, in_process):
    words = [*TINY, "--save-dir", tmp_path, image_folder]
    assert in_process(*words, "--steps", 1) == 0
    assert in_process(*words, "--steps", 2, "--seed", 77, "--resume", "auto") == 0
    assert load(tmp_path)["run"]["seed"] == 3


# --------------------------------------------------------------------------------------- workers and processes


@pytest.mark.dist
def test_loader_workers_make_no_difference(image_folder, tmp_path, start, in_process):
    words = [*TINY, *SYNCO, "--epochs", 2, image_folder]
    assert in_process(*words, "--save-dir", tmp_path / "one") == 0
    for stop in (["--max-minutes", "0"], []):
        program = start(*words, "-j", 2, "--resume", "auto", *stop, "--save-dir", tmp_path / "two")
        assert program.end() == (75 if stop else 0), program.text
    assert differences(load(tmp_path / "one"), load(tmp_path / "two")) == []


@pytest.mark.dist
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_resume_inside_an_epoch_and_at_its_end(workers, image_folder, tmp_path, start):
    words = [*TINY, *SYNCO, "--nproc", 2, "-j", workers, "--epochs", 2, image_folder]
    program = start(*words, "--save-dir", tmp_path / "one")
    assert program.end() == 0, program.text
    last = ["--resume", "auto", "--save-minutes", "1e-9"]  # after each step, when the main process asks the other
    stops = ([*STOP_AFTER_EACH_STEP], [*STOP_AFTER_EACH_STEP], [*STOP_AFTER_EACH_STEP], last)
    for number, stop in enumerate(stops, 1):
        program = start(*words, *stop, "--save-dir", tmp_path / "two")
        assert program.end() == (75 if number < 4 else 0), program.text
        assert steps_of(tmp_path / "two") == (number if number < 4 else 6)
    assert program.text.count("_step_00000004") == program.text.count("_step_00000005") == 1
    assert differences(load(tmp_path / "one"), load(tmp_path / "two")) == []


@pytest.mark.dist
def test_a_signal_inside_an_epoch_loses_nothing(image_folder, tmp_path, start):
    """SIGUSR1 wherever it falls; then SIGTERM, which a scheduler sends to end the job."""
    words = [*TINY, *SYNCO, "--epochs", 60, "--save-every", 100, image_folder]
    whole = start(*words, "--save-dir", tmp_path / "one")
    for number, code in ((signal.SIGUSR1, 75), (signal.SIGTERM, 143)):
        program = start(*words, "--resume", "auto", "--save-dir", tmp_path / "two")
        program.wait_for("top1", 8)
        os.kill(program.pid, number)
        assert program.end() == code, program.text
    assert 16 <= steps_of(tmp_path / "two") < 180
    assert start(*words, "--resume", "auto", "--save-dir", tmp_path / "two").end() == 0
    assert whole.end() == 0
    assert differences(load(tmp_path / "one"), load(tmp_path / "two")) == []


# -------------------------------------------------------------------------------------------------- upstream's


def test_a_square_queue_of_moco_resumes_as_it_was_and_that_is_said(image_folder, tmp_path, in_process, capsys):
    words = [*TINY, "--no-mask-same-image", "--moco-k", 16, image_folder]  # C is 16 too
    assert in_process(*words, "--epochs", 1, "--save-dir", tmp_path / "one") == 0
    torch.save(upstreams(load(tmp_path / "one"), "MoCo"), tmp_path / "theirs.pth.tar")
    more = ["--epochs", 2, "--save-dir"]
    assert in_process(*words, *more, tmp_path / "one", "--resume", "auto") == 0
    capsys.readouterr()
    assert in_process(*words, *more, tmp_path / "two", "--resume", tmp_path / "theirs.pth.tar") == 0
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if line.startswith("K equals C") and "taken as MoCo's, (C, K)" in line]
    assert [line for line in told if "theirs.pth.tar does not say what its run's settings were" in line]
    one, two = (upstreams(load(tmp_path / name), "SynCo") for name in ("one", "two"))
    assert differences(one, two) == []


@pytest.mark.parametrize("layout", ["MoCo", "SynCo"])
def test_published_files_resume(layout, image_folder, tmp_path, in_process):
    """A file as upstream writes it: no run, no ids, its queue's orientation, an optimizer of an older torch."""
    words = [*TINY, "--no-mask-same-image", image_folder]
    assert in_process(*words, "--epochs", 1, "--save-dir", tmp_path / "one") == 0
    torch.save(upstreams(load(tmp_path / "one"), layout), tmp_path / "theirs.pth.tar")
    assert in_process(*words, "--epochs", 2, "--resume", "auto", "--save-dir", tmp_path / "one") == 0
    words += ["--save-dir", tmp_path / "two", "--resume", tmp_path / "theirs.pth.tar"]
    assert in_process(*words, "--epochs", 1) == 0
    assert list((tmp_path / "two").glob("*.tar")) == []  # nothing was left to do
    assert in_process(*words, "--epochs", 2) == 0
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert (two["epoch"], two["run"]["step"]) == (2, 6)
    assert differences(upstreams(one, layout), upstreams(two, layout)) == []


def upstreams(ours: dict, layout: str) -> dict:
    entries = {k: v for k, v in ours["state_dict"].items() if k != "module.queue_ids"}
    if layout == "MoCo":
        entries["module.queue"] = entries["module.queue"].T.contiguous()
    groups = []
    for group in ours["optimizer"]["param_groups"]:
        old = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "params")
        groups.append({name: group[name] for name in old})
    optimizer = {"state": ours["optimizer"]["state"], "param_groups": groups}
    return {"epoch": ours["epoch"], "arch": ours["arch"], "state_dict": entries, "optimizer": optimizer}
