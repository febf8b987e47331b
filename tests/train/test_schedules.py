"""Rates and optimizers of the three mains: floors, plateaus, betas, and what a state of another optimizer comes to."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, SYNCO, TINY, differences, load, records
from support.finetuning import tune
from support.networks import OWN
from support.probing import probe_once
from support.probing import state_of as probe_state
from torch import nn

from moco import cli
from moco.cli.methods import negatives_config
from moco.cli.pretrain import pretrain_schedule
from moco.cli.training import schedule_config
from moco.config import OptimizerConfig, ScheduleConfig
from moco.data import EpochSampler
from moco.errors import UserError
from moco.eval import finetune, linear
from moco.train.optimizers import Plateau, build_optimizer, no_decay_for_bias_and_norm
from moco.train.plan import Progress, TrainPlan, count_epochs, learning_rate, make_plan
from moco.train.pretraining import Trainer

pytestmark = pytest.mark.usefixtures("restored")
PARSE = {"pretrain": cli.parse_pretrain, "lincls": cli.parse_lincls, "semisup": cli.parse_semisup}


# -------------------------------------------------------------------------------------------------------- cosine


def test_a_cosine_with_a_floor_is_supcontrasts():
    """adjust_learning_rate of its util.py: eta_min = lr * rate^3."""
    floor = 0.5 * 0.1**3
    rates = [learning_rate(0.5, e, 1000, cosine=True, milestones=[], floor=floor) for e in range(1001)]
    for epoch, rate in enumerate(rates):
        assert rate == pytest.approx(floor + (0.5 - floor) * (1 + math.cos(math.pi * epoch / 1000)) / 2, rel=1e-12)
    assert (rates[0], rates[-1]) == (pytest.approx(0.5), pytest.approx(floor))


@pytest.mark.parametrize("name", ["supcon_cifar10", "supcon_cifar100", "simclr_cifar10", "simclr_cifar100"])
def test_the_recipes_end_where_supcontrast_does(name):
    args = cli.parse_pretrain(["--config", str(ROOT / "configs" / f"{name}.yml")])
    assert args.min_lr == pytest.approx(args.lr * 0.1**3)
    plan = make_plan(1, None, pretrain_schedule(args))
    assert plan.lr_at(1000, 1000) == pytest.approx(5e-4)
    assert plan.lr_at(10, 10) == pytest.approx(5e-4 + (0.5 - 5e-4) * (1 + math.cos(math.pi / 100)) / 2)  # warmup_to


def test_milestones_of_a_decay_of_ones_own():
    """main_linear.py of SupContrast: x0.2 at 60, 75 and 90."""
    args = cli.parse_lincls(["DIR", "--lr_decay_epochs", "60,75,90", "--lr_decay_rate", "0.2"])
    heads = [linear.LinearClassifier(nn.Linear(3, 2), OptimizerConfig(lr=lr)) for lr in (5.0, 1.0)]
    plan = count_epochs(1, schedule_config(args, args.epochs))
    for epoch, share in ((0, 1), (59, 1), (60, 0.2), (75, 0.04), (99, 0.008)):
        linear.set_rates(heads, plan, Progress(0, epoch))
        assert [head.rate for head in heads] == pytest.approx([5 * share, share])


def supcontrasts_rates(lr: float, warm_from: float, warm_epochs: int, steps: int, epochs: int, milestones: list[int],
                       decay: float, cosine: bool) -> list[float]:  # fmt: skip
    """Every step's rate by its parse_option, adjust_learning_rate and warmup_learning_rate, written anew; epochs from
    1, but the cosine's phase is ours, whose epochs are counted from 0. Its cosine ends at lr * decay^3."""
    floor = lr * decay**3

    def bent(share: float) -> float:
        return floor + (lr - floor) * (1 + math.cos(math.pi * share)) / 2

    warm_to = bent(warm_epochs / epochs) if cosine else lr
    found = []
    for epoch in range(1, epochs + 1):
        of_epoch = bent((epoch - 1) / epochs) if cosine else lr * decay ** sum(epoch > m for m in milestones)
        for batch in range(steps):
            if epoch <= warm_epochs:
                share = (batch + (epoch - 1) * steps) / (warm_epochs * steps)
                found.append(warm_from + share * (warm_to - warm_from))
            else:
                found.append(of_epoch)
    return found


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("milestones", [[2, 6], [3, 5], [4, 6]])  # inside the warm-up, at its end, after it
def test_every_step_of_a_warm_up_has_supcontrasts_rate(milestones, cosine):
    """In pretraining, the probe and fine-tuning: a milestone inside lowers the rate once the warm-up is over."""
    lr, steps, epochs, warm = 0.05, 5, 7, {"warm_epochs": 3, "warm_from": 0.01}
    wanted = supcontrasts_rates(lr, *reversed(warm.values()), steps, epochs, milestones, 0.1, cosine)
    whole = make_plan(steps, None, ScheduleConfig(epochs, None, lr, cosine, milestones, min_lr=lr * 1e-3, **warm))
    by_steps = replace(whole, warm_epochs=0, warm_steps=15)
    head = linear.LinearClassifier(nn.Linear(3, 2), OptimizerConfig(lr=lr))
    probe = count_epochs(steps, ScheduleConfig(epochs, None, 1.0, cosine, milestones, min_lr=lr * 1e-3, **warm))
    tuner = tuner_of(replace(probe, milestones=() if cosine else milestones), lr)
    for step, rate in enumerate(wanted):
        assert whole.lr_at(step // steps, step) == by_steps.lr_at(step // steps, step) == pytest.approx(rate)
        linear.set_rates([head], probe, Progress(0, *divmod(step, steps)))
        assert head.rate == pytest.approx(rate)
        tuner.progress.epoch, tuner.progress.batch = divmod(step, steps)
        tuner._set_rates()
        assert tuner.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def tuner_of(plan: TrainPlan, lr: float) -> finetune.Tuner:
    """What sets the rates of fine-tuning, around a network of one layer."""
    model: Any = nn.Linear(3, 2)
    none: Any = None
    optimizer = torch.optim.SGD(model.parameters(), lr)
    return finetune.Tuner(model, optimizer, none, plan, Progress(0), none, none, {}, none, [lr])


def test_a_milestone_where_the_warm_up_ends():
    """lr .05 from .01 over 50 steps, a milestone at the end: the last warm step has .0492, the next one .005."""
    plan = make_plan(50, None, ScheduleConfig(2, None, 0.05, False, (1,), warm_epochs=1))
    assert [plan.lr_at(0, 49), plan.lr_at(1, 50)] == pytest.approx([0.0492, 0.005])


def test_a_probe_warms_up_step_by_step(hard_folder, tmp_path):
    """Each rate on a line to its own value; a milestone at the end of the warm-up lowers it from there on."""
    words = ["--features", "cached", "--lr", 0.3, 3, "--epochs", 3, "--schedule", 2, "-p", 1]
    probe_once(hard_folder, tmp_path, *words, "--warm", "--warm-epochs", 2, "--warm-from", 0.1)
    found = [r for r in map(json.loads, (tmp_path / "lincls.jsonl").read_text().splitlines()) if "lr/lr3" in r]
    assert len(found) == 9  # three steps an epoch
    for step, record in enumerate(found):
        for rate in (0.3, 3):
            wanted = 0.1 + (rate - 0.1) * step / 6 if step < 6 else rate / 10
            assert record[f"lr/lr{rate}"] == pytest.approx(wanted)


def test_fine_tuning_by_main_ces_schedule(folder, tmp_path):
    """Up to the full rates, then down at each milestone, the first one at the warm-up's end, both parts in proportion;
    of another schedule it does not go on."""
    words = ["--train-percent", 50, "--lr-classifier", 0.2, "--lr-backbone", 0.1, "-p", 1, "--lr_decay_epochs", "1,3",
             "--lr_decay_rate", 0.5, "--warm", "--warm_epochs", 1, "--trial", 5, "--save_freq", 2]  # fmt: skip
    tune(folder, tmp_path, "--epochs", 4, *words, "--val-share", 0.1, "--val-only")
    found = [r for r in records(tmp_path / "trial_5") if "lr_backbone" in r]
    steps = len(found) // 4
    assert len(found) == 4 * steps
    for step, record in enumerate(found):
        t = step / steps
        wanted = 0.01 + (0.2 - 0.01) * t if t < 1 else 0.2 * 0.5 ** ((t >= 1) + (t >= 3))
        assert record["lr_classifier"] == pytest.approx(wanted)
        assert record["lr_backbone"] == pytest.approx(wanted / 2)
    kept = sorted(path.name for path in (tmp_path / "trial_5").glob("checkpoint_semisup_*"))
    assert kept == ["checkpoint_semisup_0001.pth.tar", "checkpoint_semisup_0003.pth.tar"]
    with pytest.raises(UserError, match="--schedule 1 3 and this one has none"):
        tune(folder, tmp_path, "--epochs", 4, *words, "--val-share", 0.1, "--val-only", "--cosine", "--resume", "auto")


def test_fine_tuning_ends_at_the_floor_with_all_rates_in_proportion(folder, tmp_path):
    words = ["--train-percent", 50, "--warmup-epochs", 1, "--lr-classifier", 0.2, "--lr-backbone", 0.1, "-p", 1]
    tune(folder, tmp_path, "--epochs", 3, "--min-lr", 0.05, "--val-share", 0.1, "--val-only", *words)
    found = [r for r in records(tmp_path) if "lr_backbone" in r]
    steps = len(found) // 3
    for step, record in enumerate(found):
        t = step / steps
        rest = max(0.0, t - 1) / 2
        wanted = min(1.0, t) * (0.05 + (0.2 - 0.05) * (1 + math.cos(math.pi * rest)) / 2)
        assert record["lr_classifier"] == pytest.approx(wanted)
        assert record["lr_backbone"] == pytest.approx(wanted / 2)


# ------------------------------------------------------------------------------------------------------- plateau


def rule(losses: list[float], patience: int, lowest: float, changes: tuple[int, ...]) -> list[float]:
    """The factor in each epoch: ReduceLROnPlateau's rule as a loop, one more entry than losses."""
    factor, best, bad, factors = 1.0, math.inf, 0, [1.0]
    for epoch, loss in enumerate(losses):
        if epoch in changes:
            best, bad = math.inf, 0
        if loss < best * (1 - 1e-4):
            best, bad = loss, 0
        else:
            bad += 1
        if bad > patience:
            factor, bad = max(0.1 * factor, lowest), 0
        factors.append(factor)
    return factors


@pytest.mark.parametrize("changes", [(), (3,)])
@pytest.mark.parametrize("patience", [0, 1])
def test_a_plateau_follows_the_rule_and_forgets(patience, changes):
    losses = [5.0, 4.0, 4.0, 6.0, 6.0, 5.9, 6.0, 6.1, 5.8, 5.8, 5.8]
    plateau, factors = Plateau(patience, lowest=0.004, falling=True), [1.0]
    for epoch, loss in enumerate(losses):
        if epoch in changes:
            plateau.forget()
        plateau.note(loss)
        factors.append(plateau.factor)
    assert factors == pytest.approx(rule(losses, patience, 0.004, changes))
    assert factors[-1] < 0.2


@pytest.mark.parametrize(
    ("words", "changes"),
    [([*OWN, "--method", "simclr"], ()), ([*TINY, *SYNCO, "--hard-start-epoch", 3], (1, 3))],
    ids=["simclr", "synco"],
)
def test_a_run_follows_its_mean_loss(words, changes, image_folder, tmp_path, in_process, capsys):
    words = [*words, "--plateau", 0, "--lr", 1e-6, "--min-lr", 1e-8, "--epochs", 6, image_folder]
    assert in_process(*words, "--save-dir", tmp_path / "whole") == 0
    log = records(tmp_path / "whole")
    epochs = [[r for r in log if r["epoch"] == epoch and "loss" in r] for epoch in range(6)]
    means = [sum(r["loss"] for r in records) / len(records) for records in epochs]
    factors = rule(means, 0, 0.01, changes)
    for records_, factor in zip(epochs, factors, strict=False):
        assert [r["lr"] for r in records_] == pytest.approx([1e-6 * factor] * len(records_))
    assert factors[5] == pytest.approx(0.01)  # it dropped twice and met the floor
    assert capsys.readouterr().out.count("has not fallen for more than 0 epochs; the rate drops to 1e-0") == 2
    if changes:
        return
    words += ["--save-dir", tmp_path / "parts"]
    assert in_process(*words, "--max-minutes", 1e-9) == 75
    assert load(tmp_path / "parts")["run"]["losses"][0][1] == 1  # inside the first epoch
    for epochs in (3, 6):
        assert in_process(*words, "--epochs", epochs, "--resume", "auto") == 0
    assert differences(load(tmp_path / "whole"), load(tmp_path / "parts")) == []


def test_fine_tuning_by_a_plateau_has_no_cosine_and_a_floor(folder, tmp_path):
    """Rates too low to change a single answer: the accuracy never rises."""
    words = ["--train-percent", 50, "--lr-classifier", 1e-9, "--lr-backbone", 5e-10, "-p", 1, "--val-share", 0.1]
    tune(folder, tmp_path, "--epochs", 4, *words, "--val-only", "--plateau", 0, "--min-lr", 4e-11)
    found = [r for r in records(tmp_path) if "lr_backbone" in r]
    steps = len(found) // 4
    for step, record in enumerate(found):
        wanted = (1e-9, 1e-9, 1e-10, 4e-11)[step // steps]
        assert record["lr_classifier"] == pytest.approx(wanted)
        assert record["lr_backbone"] == pytest.approx(wanted / 2)


def test_an_epochs_mean_loss_is_of_its_own_good_steps_on_all_processes(monkeypatch):
    """Three epochs as one of two processes sees them; the other's loss is 6 in each of its two steps."""
    judged: list[float] = []
    run: Any = SimpleNamespace(
        progress=Progress(0), plan=make_plan(2, None, ScheduleConfig(3, patience=3)), losses=torch.zeros(2).double(),
        plateau=SimpleNamespace(note=judged.append, factor=1.0), _queue_had_random_rows=lambda: False,
        model=SimpleNamespace(STATS=("loss",)), sums=torch.zeros(3), one=torch.ones(()),
    )  # fmt: skip
    other = torch.tensor([12.0, 2.0]).double()
    monkeypatch.setattr("moco.train.pretraining.distributed.mean_over_ranks", lambda mine: (mine + other) / 2)
    for losses in ([3.0, math.nan, 5.0], [1.0], [math.inf]):
        for loss in losses:
            run.bad = torch.tensor(not math.isfinite(loss))
            run.last_outputs = [SimpleNamespace(loss=torch.tensor(loss), statistics={})]
            Trainer.count(run, torch.tensor(1.0))
        Trainer._follow_plateau(run)
    assert judged == pytest.approx([20 / 4, 13 / 3, 12 / 2])


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("DIR --method supcon", ()),
        ("DIR --hard-start-epoch 7", ()),
        ("DIR --method synco --hard-stop-epoch 90 --type-starts noise=20", (10, 90, 20)),
    ],
)
def test_when_the_loss_becomes_another(words, changes):
    assert pretrain_schedule(cli.parse_pretrain(words.split())).changes == changes


def test_a_loss_that_changes_inside_an_epoch_spoils_its_mean_and_no_other():
    words = "DIR --method synco --type-starts noise=4steps mixup=9steps adversarial=12"
    args = cli.parse_pretrain(words.split())
    assert negatives_config(args).last_start() == (12, 9)
    plan = make_plan(3, None, pretrain_schedule(args))
    assert plan.change_steps == (4, 9)  # inside epoch 1, and at the start of epoch 3
    spoiled = [epoch for epoch in range(6) if plan.changed_before(3 * (epoch + 1))]
    assert spoiled == [1, 2, 3]  # 1 is of both losses, so 2 is the first of its own, and 3 is another again


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("K", "n", "drop_last"), [(0, 20, True), (16, 20, True), (17, 20, True), (41, 20, False)])
def test_an_epoch_counts_once_the_queue_holds_keys_alone(K, n, drop_last, symmetric):
    sampler = EpochSampler(n, 8, 0, drop_last=drop_last)
    enqueued, batches = 0, [len(keys) * (1 + symmetric) for keys in sampler]
    run: Any = SimpleNamespace(sampler=sampler, model=SimpleNamespace(K=K, symmetric=symmetric), progress=Progress(0))
    for _ in range(5):
        before = enqueued
        for run.progress.batch, keys in enumerate(batches, 1):
            enqueued += keys
            run.progress.draw += 1
            assert Trainer._queue_had_random_rows(run) == (before < K)


def test_a_plateau_has_no_milestones():
    plan = pretrain_schedule(cli.parse_pretrain(["DIR", "--plateau", "3"]))
    assert (plan.patience, plan.milestones, plan.cosine) == (3, (), False)


@pytest.mark.parametrize("main", ["pretrain", "semisup"])
@pytest.mark.parametrize(
    ("file", "words", "outcome"),
    [
        ("plateau: 3\nschedule: [3, 4]", "", "--plateau and --schedule are two schedules; give one of them."),
        ("plateau: 3\ncos: true", "", "--plateau and --cos are two schedules; give one of them."),
        ("plateau: 3\nschedule: [3]", "--schedule 5", (None, [5], False)),
        ("plateau: 3\nlr-decay-rate: 0.3", "", "--plateau drops rates 10x; leave it out"),
        ("plateau: 3", "--schedule 5 6 --lr-decay-rate 0.2", (None, [5, 6], False)),
        ("plateau: 3", "--lr_decay_epochs 5,6", (None, [5, 6], False)),
        ("schedule: [3, 4]\nlr-decay-rate: 0.2", "--plateau 5", (5, None, False)),
        ("schedule: [3, 4]\ncos: true", "--plateau 5", (5, None, False)),
        ("plateau: 3\ncos: false", "", (3, "default", False)),
    ],
)
def test_of_a_files_plateau_and_a_schedule_the_typed_one_wins(main, file, words, outcome, tmp_path, capsys):
    (tmp_path / "recipe.yml").write_text(file)
    words = ["--config", str(tmp_path / "recipe.yml"), *words.split(), "DIR"]
    if isinstance(outcome, str):
        with pytest.raises(SystemExit, match="2"):
            PARSE[main](words)
        assert outcome in capsys.readouterr().err
        return
    args, (plateau, schedule, cosine) = PARSE[main](words), outcome
    assert (args.plateau, args.cos, args.lr_decay_rate) == (plateau, cosine, 0.2 if "--lr-decay-rate" in words else 0.1)
    assert schedule in (args.schedule, "default")
    assert len(args.notes) == (schedule != "default")


def test_a_resumed_plateau_has_its_own_runs_patience_and_floor():
    one, other = Plateau(5, lowest=0.5, falling=True), Plateau(1, lowest=0.01, falling=True)
    for loss in (3.0, 4.0):
        one.note(loss)
    other.load_state_dict(one.state_dict())
    for loss, factor in ((2.9, 1.0), (3.0, 1.0), (3.0, 0.1), (3.0, 0.1), (3.0, 0.01)):
        other.note(loss)
        assert other.factor == pytest.approx(factor)


# ---------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", ["adamw", "lookahead_adamw"])
def test_betas_reach_the_optimizer(name):
    for betas, wanted in ((None, (0.9, 0.999)), ((0.8, 0.98), (0.8, 0.98))):
        optimizer = build_optimizer(OptimizerConfig(name, 0.1, betas=betas), [nn.Parameter(torch.ones(2))])
        assert [group["betas"] for group in optimizer.param_groups] == [wanted]


@pytest.mark.parametrize(
    ("name", "betas", "said"),
    [
        ("sgd", [0.9, 0.99], "--opt-betas gives 2 numbers and --opt sgd has none"),
        ("lookahead_lars", [0.9, 0.99], "--opt lookahead_lars has none"),
        ("adamw", [0.9], "--opt-betas gives 1 numbers and --opt adamw has 2."),
        ("adan", [0.9, 0.99], "--opt adan has 3"),
    ],
)
def test_betas_that_do_not_fit_are_one_sentence(name, betas, said):
    with pytest.raises(UserError, match=said):
        build_optimizer(OptimizerConfig(name, 0.1, 0.9, 0.0, betas=betas), [nn.Parameter(torch.ones(2))])


def test_a_head_with_another_optimizer_is_that_optimizers():
    torch.manual_seed(0)
    layer, x, labels = nn.Linear(5, 3), torch.randn(8, 5), torch.arange(8) % 3
    mine = nn.Linear(5, 3)
    mine.load_state_dict(layer.state_dict())
    config = OptimizerConfig("adamw", 0.1, weight_decay=0.02, betas=(0.8, 0.9), clip=1e-3)
    head = linear.LinearClassifier(layer, config)
    theirs = torch.optim.AdamW(mine.parameters(), 0.1, betas=(0.8, 0.9), weight_decay=0.02)
    for _ in range(4):
        head.step(x, labels)
        theirs.zero_grad()
        nn.functional.cross_entropy(mine(x), labels).backward()
        nn.utils.clip_grad_norm_(mine.parameters(), 1e-3)
        theirs.step()
    torch.testing.assert_close(layer.weight, mine.weight)
    torch.testing.assert_close(layer.bias, mine.bias)


def test_a_probe_with_adamw_and_a_cosine(hard_folder, tmp_path):
    """Each of two rates equals its own run; going on with another optimizer is refused."""
    words = ["--opt", "adamw", "--cos", "--min-lr", 1e-3, "--features", "cached"]
    probe_once(hard_folder, tmp_path / "several", *words, "--lr", 0.1, 0.01, "--epochs", 2)
    with pytest.raises(UserError, match="--features cached and this one has views, --opt adamw and sgd: give the same"):
        probe_once(hard_folder, tmp_path / "several", "--lr", 0.1, 0.01, "--epochs", 3, "--resume", "auto")
    alone = probe_once(hard_folder, tmp_path / "alone", *words, "--lr", 0.01, "--epochs", 2)
    state, heads = probe_state(tmp_path / "alone"), probe_state(tmp_path / "several")["heads"]
    assert differences(heads[1]["optimizer"], state["optimizer"]) == []
    assert heads[1]["best_acc1"] == alone["best_acc1"]
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-3 + 0.5 * (0.01 - 1e-3))


def test_a_pretraining_refuses_the_state_of_another_optimizer(image_folder, tmp_path, in_process, capsys):
    words = [*TINY, "--save-dir", tmp_path, image_folder]
    assert in_process(*words, "--steps", 1) == 0
    state = load(tmp_path)
    del state["run"]["flags"]  # as in files from before they held them
    torch.save(state, tmp_path / "old.pth.tar")
    old = ["--resume", tmp_path / "old.pth.tar"]
    assert in_process(*words, "--steps", 2, *old, "--opt", "adamw") == 2
    error = capsys.readouterr().err
    assert "does not fit this run's optimizer: it was written with another --opt; give that one" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lookahead_adamw"])
def test_vectors_are_spared_as_if_decay_were_0_for_them(name):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    images, decayed = torch.randn(5, 3, 4, 4), {"0.weight", "3.weight"}

    def moved(groups: Callable, exclude: bool = False) -> dict[str, torch.Tensor]:
        own = copy.deepcopy(network)
        config = OptimizerConfig(name, 0.1, 0.9, 0.5, exclude_bias_norm=exclude)
        optimizer = build_optimizer(config, groups(own))
        for _ in range(3):
            optimizer.zero_grad()
            own(images).square().mean().backward()
            optimizer.step()
        return {name: value.detach() for name, value in own.named_parameters()}

    def one_group(own: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(own.parameters())}]

    with_all, spared = moved(one_group), moved(one_group, exclude=True)
    by_hand = moved(lambda own: [
        {"params": [p], "weight_decay": 0.5 if n in decayed else 0.0} for n, p in own.named_parameters()
    ])  # fmt: skip
    for entry in spared:
        torch.testing.assert_close(spared[entry], by_hand[entry], rtol=0, atol=0)
    assert not torch.equal(spared["0.bias"], with_all["0.bias"])


def test_each_groups_rate_is_kept_when_its_vectors_are_spared():
    layer, rest = nn.Linear(2, 3), nn.Linear(3, 4, bias=False)
    given = [{"params": list(layer.parameters()), "lr": 0.5}, {"params": list(rest.parameters()), "lr": 0.1}]
    assert no_decay_for_bias_and_norm(given) == [
        {"params": [layer.weight], "lr": 0.5}, {"params": [layer.bias], "lr": 0.5, "weight_decay": 0.0},
        {"params": [rest.weight], "lr": 0.1},
    ]  # fmt: skip


def test_a_pretraining_that_spares_vectors_resumes_as_itself_alone(image_folder, tmp_path, in_process, capsys):
    words = [image_folder, *TINY, "--wd", 0.1, "--steps", 2, "--save-dir"]
    for folder, more in (("spared", ["--exclude-bias-norm"]), ("all", [])):
        assert in_process(*words, tmp_path / folder, *more) == 0
    one, other = (load(tmp_path / folder) for folder in ("spared", "all"))
    assert [group["weight_decay"] for group in one["optimizer"]["param_groups"]] == [0.1, 0.0]
    assert [group["weight_decay"] for group in other["optimizer"]["param_groups"]] == [0.1]
    assert ".state_dict.module.encoder_q.bn1.weight" in differences(one, other)
    parts = [*words, tmp_path / "parts", "--exclude-bias-norm", "--resume", "auto"]
    for _ in range(2):
        assert in_process(*parts, "--max-minutes", 0) == 75
    assert differences(one, load(tmp_path / "parts")) == []
    for folder, more in (("spared", []), ("all", ["--exclude-bias-norm"])):
        capsys.readouterr()
        assert in_process(*words, tmp_path / folder, *more, "--resume", "auto") == 2
        error = capsys.readouterr().err
        assert "is of a run with --exclude-bias-norm o" in error
        assert error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        ("pretrain", "--min-lr 1e-4", "--min-lr is where --cos or --plateau ends"),
        ("pretrain", "--cos --min-lr 0.03", "--min-lr 0.03 must be below the learning rate 0.03"),
        ("pretrain", "--cos --min-lr -1", "--min-lr must be at least 0"),
        ("pretrain", "--cos --plateau 3", "--plateau and --cos are two schedules"),
        ("pretrain", "--schedule 3 4 --plateau 3", "--plateau and --schedule are two schedules"),
        ("pretrain", "--plateau -1", "--plateau must be at least 0"),
        ("pretrain", "--opt adamw --opt-betas 0.9 1", "--opt-betas is a share from 0 to below 1, not 1"),
        ("pretrain", "--lr-decay-rate 0", "--lr-decay-rate is above 0"),
        ("pretrain", "--plateau 3 --lr-decay-rate 0.5", "--plateau drops rates 10x; leave it out"),
        ("lincls", "--min-lr 1", "--min-lr is where --cos ends; give it, or leave it out."),
        ("lincls", "--cos --lr 30 3 --min-lr 4", "--min-lr 4 must be below the learning rate 3"),
        ("lincls", "--clip-grad 0", "--clip-grad must be a number above 0"),
        ("pretrain", "--warm --steps 9", "needs more --epochs than that, and no --steps"),
        ("lincls", "--warm --warm-epochs 100", "--warm lasts --warm-epochs epochs and needs more --epochs than that."),
        ("lincls", "--warm-epochs 0", "--warm-epochs must be at least 1"),
        ("semisup", "--warm --warm-epochs 30", "--warm lasts --warm-epochs epochs and needs more --epochs"),
        ("semisup", "--warmup-epochs 30", "--warmup-epochs must end before --epochs do; give more --epochs"),
        ("semisup", "--warm --warmup-epochs 3", "--warm and --warmup-epochs are two warm-ups"),
        ("semisup", "--schedule 3 --plateau 3", "--plateau and --schedule are two schedules"),
        ("semisup", "--plateau 3 --lr-decay-rate 0.2", "--plateau drops rates 10x; leave it out"),
        ("semisup", "--cosine --plateau 3", "--plateau and --cos are two schedules"),
        ("semisup", "--schedule 3 --min-lr 1e-3", "--min-lr is where --cos or --plateau ends"),
        ("semisup", "--lr_decay_rate 2", "--lr-decay-rate is above 0 and at most 1"),
        ("semisup", "--syncBN --weights freeze", "--weights freeze has none"),
        ("semisup", "--min-lr 0.5", "--min-lr 0.5 must be below the learning rate 0.5"),
    ],
)
def test_mistakes_are_one_sentence(main, words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        PARSE[main](["DIR", *words.split()])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in error
    assert error.count("\n") == 1
