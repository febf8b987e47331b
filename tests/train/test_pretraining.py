"""The parts of the training loop that need no run: where it stands, its plan, its stops, what it calls odd."""

import json
import math
import os
import re
import signal

import pytest
import torch
from conftest import SYNCO, TINY, records, wait_until
from timm.scheduler.cosine_lr import CosineLRScheduler

from moco import signals
from moco.cli.methods import SYNCO_KINDS
from moco.data import EpochSampler
from moco.errors import UserError
from moco.train.plan import Progress, TrainPlan, batch_shape
from moco.train.pretraining import pick_amp
from moco.train.stop import StopRequest


def plan(**changes) -> TrainPlan:
    given = {"epochs": 200, "steps_per_epoch": 10, "total_steps": 2000, "lr": 0.03, "cosine": False}
    return TrainPlan(**{**given, "milestones": [120, 160], **changes})


# -------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(("epoch", "share"), [(0, 1), (119, 1), (120, 0.1), (159, 0.1), (160, 0.01), (199, 0.01)])
def test_steps_of_moco_v1(epoch, share):
    assert plan().lr_at(epoch, 10 * epoch) == pytest.approx(0.03 * share)


def test_cosine_of_moco_v2_has_one_value_an_epoch():
    """adjust_learning_rate of main_moco.py: lr *= 0.5 * (1 + cos(pi * epoch / epochs))."""
    cosine = plan(cosine=True)
    for epoch in range(200):
        expected = 0.03 * 0.5 * (1.0 + math.cos(math.pi * epoch / 200))
        assert cosine.lr_at(epoch, 10 * epoch) == cosine.lr_at(epoch, 10 * epoch + 9) == pytest.approx(expected)


def test_by_step_the_schedule_moves_every_step():
    cosine = plan(cosine=True, steps=40, total_steps=40)
    assert [cosine.lr_at(0, s) for s in (0, 20, 40)] == pytest.approx([0.03, 0.015, 0])
    steps = plan(steps=40, total_steps=40, milestones=[30])
    assert [steps.lr_at(3, s) for s in (0, 29, 30)] == pytest.approx([0.03, 0.03, 0.003])


def test_a_warm_up_counted_in_steps_then_the_cosine_of_timm():
    """The public MoCHi code's schedule, CosineLRScheduler over all steps with a tenth of them before it; ours rises to
    where the cosine is then instead of jumping there."""
    warmed = plan(cosine=True, steps=200, total_steps=200, warm_steps=20, warm_from=1e-4)
    rate = torch.optim.SGD([torch.zeros(1)], lr=0.03)
    peer = CosineLRScheduler(rate, t_initial=200, warmup_t=20, warmup_lr_init=1e-4, t_in_epochs=False)
    for step in range(20, 200):
        peer.step_update(step)
        assert warmed.lr_at(step // 10, step) == pytest.approx(rate.param_groups[0]["lr"], rel=1e-9)
    top = warmed.lr_at(2, 20)
    for step in range(20):
        assert warmed.lr_at(step // 10, step) == pytest.approx(1e-4 + (top - 1e-4) * step / 20)
    by_epoch = plan(cosine=True, warm_steps=25)
    assert by_epoch.lr_at(2, 24) < by_epoch.lr_at(2, 25) == plan(cosine=True).lr_at(2, 25)


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        (["--epochs", 2, "--hard-start-epoch", 1], True),
        (["--epochs", 2, "--hard-start-epoch", 2], False),
        (["--steps", 3, "--hard-start-epoch", 1], False),  # three steps an epoch
        (["--epochs", 2, "--type-starts", *(f"{kind}=6steps" for kind in SYNCO_KINDS.values())], False),
        (["--method", "supcon", "--epochs", 1, "--hard-start-epoch", 3], False),
    ],
)
def test_synthetic_negatives_that_never_start_are_warned_of_first(
    words, starts, image_folder, tmp_path, in_process, capsys
):
    assert in_process(image_folder, *TINY, *SYNCO, *words, "--save-dir", tmp_path) == 0
    said = capsys.readouterr().out.splitlines()
    recipe = next(i for i, line in enumerate(said) if line.startswith("synthetic negatives per query, from its 8 hard"))
    assert ("warning: the synthetic negatives never start, as this run ends after" in said[recipe + 1]) != starts
    assert recipe < next(i for i, line in enumerate(said) if line.startswith("Epoch ["))
    masses = [json.loads(line)["synthetic_mass"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert any(masses) == starts


def test_a_stopped_run_says_how_to_go_on_and_a_finished_one_that_it_is(image_folder, tmp_path, in_process, capsys):
    words = [image_folder, *TINY, "--epochs", 1, "--save-dir", tmp_path, "--resume", "auto"]
    assert in_process(*words, "--max-minutes", 0) == 75
    said = capsys.readouterr().out
    last = r"stopped after 1 of 3 steps of epoch 0 by --max-minutes: loss 0\.\d+ of chance; continue with --resume auto"
    assert re.fullmatch(last, said.splitlines()[-1])
    assert in_process(*words) == 0
    assert "the run is finished" not in capsys.readouterr().out
    assert in_process(*words, "--wd", 0.1) == 0
    assert "\nthe run is finished: nothing is trained, " in capsys.readouterr().out


def test_a_run_says_which_of_two_schedules_it_takes(image_folder, tmp_path, in_process, capsys):
    file = tmp_path / "recipe.yml"
    file.write_text("schedule: [1]\nmethod: mochi\ntype-starts: [mixup=1]\n")
    words = [*TINY, "--config", file, "--n-hard", 8, "--plateau", 3, "--method", "moco", "--steps", 1]
    assert in_process(*words, image_folder, "--save-dir", tmp_path) == 0
    said = capsys.readouterr().out
    assert "\n--plateau of the command line, in the place of the file's --schedule\n" in said
    assert "\nthe file's --type-starts of mixup is dropped: none is drawn\n" in said


@pytest.mark.parametrize(
    ("words", "terms", "said"),
    [([], 1, "ln(1+K)"), (["--symmetric"], 2, "2 ln(1+K)"),
     (["--method", "supcon", "--base-temperature", "0.035", "--symmetric"], 4, "4 ln(1+K)")],
)  # fmt: skip
def test_a_log_line_names_what_the_loss_is_a_share_of(words, terms, said, image_folder, tmp_path, in_process, capsys):
    assert in_process(*TINY, "--steps", 1, *words, image_folder, "--save-dir", tmp_path) == 0
    (record,) = records(tmp_path)
    assert record["loss_ratio"] == pytest.approx(record["loss"] / (terms * math.log(21)))
    line = f"loss {record['loss']:.4f} ({record['loss_ratio']:.3f} of {said}) top1"
    assert line in capsys.readouterr().out


def test_a_run_warms_up_by_steps(image_folder, tmp_path, in_process):
    words = [*TINY, "--steps", 6, "--cos", "--opt", "adamw", "--lr", 0.004, "--warm-steps", 2, "--warm-from", 0.001]
    assert in_process(*words, image_folder, "--save-dir", tmp_path) == 0
    found = records(tmp_path)
    cosine = [0.002 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    rises = [0.001, (0.001 + cosine[2]) / 2]
    assert [record["lr"] for record in found if "lr" in record] == pytest.approx([*rises, *cosine[2:]])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--warm-steps", "6"], "--warm-steps 6 must end before the run's 6 steps do."),
        (["--warm-steps", "0"], "--warm-steps must be at least 1, not 0."),
        (["--warm-steps", "2", "--warm"], "--warm counts epochs and --warm-steps steps; give one of them."),
    ],
)
def test_a_warm_up_that_cannot_be_is_one_sentence(words, sentence, image_folder, tmp_path, in_process, capsys):
    try:
        code = in_process(*TINY, "--steps", 6, *words, image_folder, "--save-dir", tmp_path)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert sentence in capsys.readouterr().err


def test_steps_left():
    epochs = plan(epochs=4, accum=2)
    assert epochs.steps_left(Progress(0)) == 40
    assert epochs.steps_left(Progress(0, epoch=3, batch=18, step=77)) == 1  # 77: earlier epochs had other lengths
    assert epochs.steps_left(Progress(0, epoch=4, step=12)) == 0
    steps = plan(steps=25, total_steps=25)
    assert steps.steps_left(Progress(0, epoch=2, batch=4, step=24)) == 1


# -------------------------------------------------------------------------------------------------- where it is


SHAPE = {"images": 90, "images a batch": 4, "batches a step": 2, "processes": 4, "steps an epoch": 10}
OURS = {
    "epoch": 7, "seed": 5, "batch": 4, "step": 72, "draw": 144, "ema_due": False, "bad_steps": 2,
    "bad_images": {"seen": [3]}, "plateau": {}, "losses": [], "batches": SHAPE,
}  # fmt: skip


def test_progress_is_what_was_saved():
    at = Progress.resumed(OURS, 1, SHAPE, plan(accum=2))
    assert at == Progress(5, 7, 4, 72, 144, False, 2, {"seen": [3]})
    assert {**at.entries(), "epoch": 7} == {k: OURS[k] for k in OURS if k != "batches"}


@pytest.mark.parametrize("what", SHAPE)
def test_the_rest_of_an_epoch_needs_the_same_batches(what):
    now = {**SHAPE, what: 7}
    with pytest.raises(UserError, match=f"inside epoch 7 with .*{SHAPE[what]} {what}.*7 {what}"):
        Progress.resumed(OURS, 1, now, plan(accum=2))
    # at an epoch's end all is free
    assert Progress.resumed({**OURS, "batch": 0}, 1, now, plan(accum=2)).step == 72


def test_what_decides_a_batch():
    sampler = EpochSampler(90, 4, seed=0, world=2, rank=1)
    expected = {"images": 90, "images a batch": 4, "batches a step": 2, "processes": 2, "steps an epoch": 11}
    assert batch_shape(sampler, 2) == expected


def test_upstreams_files_know_only_the_epoch():
    at = Progress.resumed({"epoch": 3}, 8, SHAPE, plan(accum=2))
    assert at == Progress(8, 3, 0, 30, 60)


# ------------------------------------------------------------------------------------------------------- stops


def test_signals_ask_to_stop_and_the_largest_code_counts():
    with signals.listening():
        stop = StopRequest(None)
        assert stop.asked() == 0  # from now on signals are noted
        for number, asked in ((signal.SIGUSR1, 76), (signal.SIGHUP, 130), (signal.SIGINT, 131), (signal.SIGTERM, 144)):
            os.kill(os.getpid(), number)
            wait_until(lambda asked=asked: stop.asked() == asked)
        os.kill(os.getpid(), signal.SIGUSR1)  # a later warning does not take SIGTERM back
        wait_until(lambda: len(signals.noted()) == 5)
        assert (stop.asked(), stop.exit_code()) == (144, 143)


def test_the_time_limit(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("moco.train.stop.time.monotonic", lambda: now[0])
    stop = StopRequest(0.5)
    now[0] += 29
    assert stop.asked() == 0
    now[0] += 2
    assert (stop.asked(), stop.exit_code()) == (76, 75)
    assert [stop.reason(code) for code in (75, 129, 130, 143)] == [
        "max-minutes", "signal SIGHUP", "signal SIGINT", "signal SIGTERM"
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- oddities


def test_amp_by_name():
    cpu = torch.device("cpu")
    assert pick_amp("off", cpu) is None
    assert pick_amp("bf16", cpu) is torch.bfloat16
    assert pick_amp("fp16", cpu) is torch.float16
    assert pick_amp("auto", cpu) in (None, torch.bfloat16)


def test_no_16_bits_where_they_give_garbage():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_amp("auto", cpu, broken="layer4.conv1") is None
    assert pick_amp("off", cpu, broken="layer4.conv1") is None
    assert pick_amp("bf16", gpu, broken="layer4.conv1") is torch.bfloat16
    with pytest.raises(UserError, match=r"--amp bf16: layer4.conv1 .* --amp off"):
        pick_amp("bf16", cpu, broken="layer4.conv1")
