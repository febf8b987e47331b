"""What a run survives: signals, killed processes, values that are not finite, queues that drift apart."""

import functools
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import SYNCO, TINY, load

import main_pretrain
from moco import distributed
from moco.distributed import spawn
from moco.models.moco import MoCo
from moco.train.pretraining import Trainer

LONG = [*TINY, *SYNCO, "--epochs", 100_000, "--save-every", 100_000, "--nproc", 2]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as file:  # a zombie runs no longer
        return file.read().rsplit(")", 1)[1].split()[0] == "Z"


# ------------------------------------------------------------------------------------------------------ signals


@pytest.mark.dist
@pytest.mark.parametrize(
    ("number", "to", "code"), [(signal.SIGTERM, "parent", 143), (signal.SIGUSR1, 1, 75), (signal.SIGTERM, 1, 143)]
)
def test_a_signal_to_any_process_stops_all_after_the_step(number, to, code, image_folder, tmp_path, start):
    program = start(*LONG, "--save-dir", tmp_path, image_folder)
    program.wait_for("top1", 4)
    os.kill(program.pid if to == "parent" else program.pid_of_rank(to), number)
    assert program.end() == code, program.text
    state = load(tmp_path)
    assert state["run"]["step"] >= 4
    assert state["run"]["step"] == 3 * state["epoch"] + state["run"]["batch"]
    assert program.text.count("saved ") == 1
    assert "Traceback" not in program.text


@pytest.mark.dist
def test_kill_9_of_one_process_ends_the_run_and_costs_one_checkpoint_at_most(image_folder, tmp_path, start):
    words = [*LONG, "--save-every", 1, "--keep", 2, "--resume", "auto", "--save-dir", tmp_path, image_folder]
    program = start(*words)
    program.wait_for("saved ", 3)
    began = time.monotonic()
    os.kill(program.pid_of_rank(1), signal.SIGKILL)
    assert program.end() == 137, program.text
    assert time.monotonic() - began < spawn.EXIT_GRACE_SECONDS + 30  # it did end by itself
    assert "a process was ended by signal 9" in program.text
    assert "--resume auto" in program.text
    assert gone(program.pid_of_rank(0))
    epoch = load(tmp_path)["epoch"]
    assert epoch >= 3
    again = start(*words, "--epochs", epoch + 1)
    assert again.end() == 0, again.text
    assert f"from epoch {epoch}, step {3 * epoch} " in again.text
    assert load(tmp_path)["epoch"] == epoch + 1


@pytest.mark.dist
def test_a_killed_process_costs_a_restart_from_the_newest_good_checkpoint(image_folder, tmp_path, start):
    words = [*LONG, "--save-every", 1, "--max-restarts", 2, "--save-dir", tmp_path, image_folder]
    program = start(*words)
    program.wait_for("saved ", 2)
    os.kill(program.pid_of_rank(1), signal.SIGKILL)
    program.wait_for("restart 1 of 2, from ")
    path = program.text.split("restart 1 of 2, from ")[1].split()[0]
    epoch = int(path.split("checkpoint_")[1][:4]) + 1
    program.wait_for(f"from epoch {epoch}, step {3 * epoch} ")
    program.wait_for(f"checkpoint_{epoch:04d}.pth.tar")
    os.kill(program.pid, signal.SIGTERM)  # somebody wants it to end: no restart
    assert program.end() == 143, program.text
    assert program.text.count("restart ") == 1
    assert load(tmp_path)["epoch"] >= epoch + 1


def crashing(args) -> int:
    raise RuntimeError("a bug")


@pytest.mark.dist
def test_restarts_end_and_nothing_saved_means_from_the_beginning(image_folder, tmp_path, start):
    words = [*LONG, "--nproc", 1, "--max-restarts", 2, "--save-dir", tmp_path, image_folder]
    program = start(*words, main=crashing)
    assert program.end() == 1, program.text
    assert program.text.count("RuntimeError: a bug") == 3
    assert [f"restart {n} of 2, from where this run began" in program.text for n in (1, 2)] == [True, True]


@pytest.mark.dist
def test_a_users_mistake_is_not_made_again(image_folder, tmp_path, start):
    program = start(*LONG, "-b", 64, "--max-restarts", 2, "--save-dir", tmp_path, image_folder)
    assert program.end() == 2, program.text
    assert "restart" not in program.text


@pytest.mark.dist
def test_kill_9_of_the_parent_leaves_no_process_behind(image_folder, tmp_path, start):
    program = start(*LONG, "--save-dir", tmp_path, image_folder)
    program.wait_for("top1", 2)
    children = [program.pid_of_rank(rank) for rank in (0, 1)]
    os.kill(program.pid, signal.SIGKILL)
    program.end()
    deadline = time.monotonic() + 30
    while not all(map(gone, children)):
        assert time.monotonic() < deadline, "a process trains on without its parent"
        time.sleep(0.05)


# ----------------------------------------------------------------------------- not finite: nothing has happened


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All tensors that a step may change: parameters, statistics, queue, momentum."""
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for number, kept in enumerate(trainer.optimizer.state.values()):
        state |= {f"{name} {number}": v.clone() for name, v in kept.items() if isinstance(v, torch.Tensor)}
    return state


def owed(trainer: Trainer, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state after the key encoder has followed the last good step, which it does once, at the step after it."""
    moved = {}
    for name, _ in trainer.model.encoder_k.named_parameters():
        k, q = state[f"encoder_k.{name}"], state[f"encoder_q.{name}"]
        moved[f"encoder_k.{name}"] = torch.lerp(k, q, 1 - trainer.model.m)
    return {**state, **moved}


def record_steps(steps: list[dict]) -> None:
    """Make every training step note what it changed beyond what was owed before."""
    original = Trainer.step

    def step(self, batches):
        before = everything(self)
        if not steps or steps[-1]["changed"]:
            before = owed(self, before)
        steps.append({"step": self.progress.step})
        try:
            original(self, batches)
        finally:
            after = everything(self)
            names = before.keys() | after.keys()
            same = {n for n in before.keys() & after.keys() if torch.equal(before[n], after[n])}
            steps[-1] |= {"changed": sorted(names - same), "bad_steps": self.progress.bad_steps}
            if self.save_dir:
                torch.save(after, os.path.join(self.save_dir, f"rank{distributed.rank()}.pt"))

    Trainer.step = step


def spoil_loss(rank: int, draws: tuple[int, ...]) -> None:
    original = MoCo.forward

    def forward(self, views, ids, epoch, draw, step):
        output = original(self, views, ids, epoch, draw, step)
        here = distributed.rank() == rank and draw in draws
        return output._replace(loss=output.loss * float("nan")) if here else output

    MoCo.forward = forward


def spoil_gradient(rank: int, draws: tuple[int, ...]) -> None:
    original = MoCo.forward

    def forward(self, views, ids, epoch, draw, step):
        here = distributed.rank() == rank and draw in draws
        weight = next(self.encoder_q.parameters())
        if here:
            handle = weight.register_hook(lambda gradient: (handle.remove(), gradient * float("inf"))[1])
        return original(self, views, ids, epoch, draw, step)

    MoCo.forward = forward


def spoil_images(rank: int, draws: tuple[int, ...]) -> None:
    original = Trainer.forward

    def forward(self, images):
        if self.progress.draw in draws:  # floats on every process, since processes exchange them
            images["q"], images["k"] = images["q"] / 255, images["k"] / 255
            if distributed.rank() == rank:
                images["q"][0, 0, 3, 3] = float("inf")
                images["k"][1, 0, 3, 3] = float("inf")
        return original(self, images)

    Trainer.forward = forward


SPOIL = {"loss": spoil_loss, "gradient": spoil_gradient, "images": spoil_images}


def faulty(what: str, rank: int, draws: tuple[int, ...], args) -> int:
    """A worker in which something is not finite at some draws on one process."""
    steps: list[dict] = []
    SPOIL[what](rank, draws)
    record_steps(steps)
    try:
        return main_pretrain.worker(args)
    finally:
        Path(args.save_dir, f"steps{distributed.rank()}.json").write_text(json.dumps(steps))


def check_steps(folder: Path, bad: set[int], ranks: int = 2) -> None:
    for rank in range(ranks):
        steps = json.loads((folder / f"steps{rank}.json").read_text())
        for step in steps:
            changed = step["changed"]
            if step["step"] in bad:
                assert changed == [], f"rank {rank}, step {step['step']}"
                assert step["bad_steps"] > 0
            else:
                assert {"queue", "queue_ids", "queue_ptr", "encoder_q.fc.weight", "momentum_buffer 0"} <= set(changed)
                assert step["bad_steps"] == 0
        assert {step["step"] for step in steps} >= bad


@pytest.mark.dist
@pytest.mark.parametrize(
    ("what", "rank", "draws", "words", "bad"),
    [
        ("loss", 1, (2, 3), [], {2, 3}),
        ("gradient", 0, (0, 4), [], {0, 4}),
        ("images", 1, (1, 2), ["--symmetric"], {1, 2}),
        ("loss", 1, (3, 6), ["--accum", 2, "-b", 4], {1, 3}),  # in the second batch of a step, in the first of one
    ],
)
def test_a_step_that_is_not_finite_on_one_process_never_was(
    what, rank, draws, words, bad, image_folder, tmp_path, start
):
    words = [*TINY, *SYNCO, "--nproc", 2, "--epochs", 2, "--check-every", 1, *words, "--save-dir", tmp_path]
    program = start(*words, image_folder, main=functools.partial(faulty, what, rank, draws))
    assert program.end() == 0, program.text
    assert program.text.count("is not finite; nothing was changed") == len(bad)
    check_steps(tmp_path, bad)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    local = ("running_mean", "running_var")  # BatchNorm's statistics are each process's own
    differ = [n for n in one if not n.endswith(local) and not torch.equal(one[n], other[n])]
    assert differ == []
    assert all(bool(v.isfinite().all()) for v in (*one.values(), *other.values()))


@pytest.mark.dist
def test_too_many_bad_steps_end_the_run_with_a_dump(image_folder, tmp_path, start):
    words = [*TINY, "--nproc", 2, "--max-bad-steps", 3, "--epochs", 4, "--save-dir", tmp_path, image_folder]
    program = start(*words, main=functools.partial(faulty, "loss", 1, tuple(range(4, 99))))
    assert program.end() == 3, program.text
    assert "error: 3 steps in a row were not finite" in program.text
    assert "Traceback" not in program.text
    check_steps(tmp_path, {4, 5, 6})
    for rank in (0, 1):
        dump = torch.load(tmp_path / f"bad_step_00000006_rank{rank}.pt", weights_only=True)
        assert (dump["step"], dump["epoch"], len(dump["image_ids"]), dump["q"].shape) == (6, 2, 4, (4, 16))
        assert (dump["losses"][0] != dump["losses"][0]) == (rank == 1)
    assert load(tmp_path)["run"]["step"] == 3  # none of the epoch that ended with two bad steps
    assert all(bool(v.isfinite().all()) for v in load(tmp_path)["state_dict"].values())


def test_one_process_and_its_own_batches(image_folder, tmp_path, in_process, monkeypatch):
    """The same in one process, with the second of two batches bad: the first one's keys leave the queue again."""
    for owner, name in ((Trainer, "step"), (MoCo, "forward"), (Trainer, "forward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back after the test
    steps: list[dict] = []
    spoil_loss(0, (3,))
    spoil_gradient(0, (6,))
    record_steps(steps)
    assert in_process(*TINY, "--accum", 2, "-b", 4, "--epochs", 2, "--save-dir", tmp_path, image_folder) == 0
    assert [bool(step["changed"]) for step in steps] == [True, False, True, False, True, True]


def test_fp16_overflow_lowers_the_scale_and_is_no_bad_step(image_folder, tmp_path, in_process, monkeypatch, capsys):
    for owner, name in ((Trainer, "step"), (torch.amp, "GradScaler")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**60)  # type: ignore[misc]
    steps: list[dict] = []
    record_steps(steps)
    words = [*TINY, "--size", 32, "--amp", "fp16", "--steps", 2, "--max-bad-steps", 1]
    assert in_process(*words, "--save-dir", tmp_path, image_folder) == 0
    assert [step["changed"] for step in steps] == [[], []]
    assert "fp16 overflow, step skipped, scale now" in capsys.readouterr().out
    assert load(tmp_path)["scaler"]["scale"] == 2.0**58
    assert load(tmp_path)["run"]["bad_steps"] == 0


# ------------------------------------------------------------------------------------------ queues drift apart


def drifting(name: str, args) -> int:
    """A worker in which one process loses one bit of one of its tensors."""
    original = Trainer.step

    def step(self, batches):
        original(self, batches)
        if distributed.rank() == 1 and self.progress.step == 2:
            bits = self.model.get_buffer(name).view(torch.uint8)
            bits[7].view(-1)[0] ^= 1

    Trainer.step = step
    return main_pretrain.worker(args)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["queue", "queue_ids"])
def test_queues_that_differ_end_the_run(name, image_folder, tmp_path, start):
    words = [*TINY, "--moco-k", 64, "--nproc", 2, "--check-every", 1, "--epochs", 3, "--save-dir", tmp_path]
    program = start(*words, image_folder, main=functools.partial(drifting, name))
    assert program.end() == 3, program.text
    assert "error: step 2: the queues of the processes differ" in program.text
    assert "--resume auto" in program.text
    assert "Traceback" not in program.text
