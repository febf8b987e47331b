"""A resumed run says what it has otherwise than its file and uses it, or refuses by name what cannot change."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import SYNCO, TINY, hard_images, load, write_images
from support.finetuning import state_of, tune
from support.probing import probe_once
from support.probing import state_of as probe_state
from torch import nn

from moco import cli
from moco.cli import flag_classes
from moco.cli.flag_classes import LINCLS, PRETRAIN, SEMISUP
from moco.config import OptimizerConfig, typed
from moco.errors import UserError
from moco.train.optimizers import build_optimizer

ABOUT = ("flags", "data", "torch")


# ---------------------------------------------------------------------------------------------------- the classes


@pytest.mark.parametrize(
    ("parser", "classes", "more"),
    [
        (cli.pretrain_parser(), PRETRAIN, {"synthetic negatives"}),
        (cli.lincls_parser(), LINCLS, set()),
        (cli.semisup_parser(), SEMISUP, {"training images", "validation images"}),
    ],
)
def test_every_flag_is_in_one_class(parser, classes, more):
    """A new flag belongs into moco/cli/flag_classes.py: may it change when a run is resumed, and is that said?"""
    three = [*classes.fixed, *classes.free, *classes.silent]
    assert len(three) == len(set(three))
    assert set(three) - more == set(flag_classes.dests(parser))
    assert more <= classes.fixed


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0001, "0.0001"), (30.0, "30"), (True, "on"), (False, "off"), (None, "none"), ([], "none"), ("", "none"),
     (0, "0"), ([0.9, 0.95], "0.9 0.95"), ("bf16", "bf16")],
)  # fmt: skip
def test_settings_are_shown_as_they_are_typed(value, text):
    assert typed(value) == text


# ----------------------------------------------------------------------------------------------- the optimizer


def test_a_loaded_optimizer_has_its_own_runs_decay_and_momentum():
    """And each group its own: vectors that are spared stay so. A step is then the one of the formula."""

    def made(wd: float, momentum: float):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        config = OptimizerConfig("sgd", 0.1, momentum, wd, exclude_bias_norm=True)
        return layer, build_optimizer(config, [{"params": list(layer.parameters())}])

    one, before = made(0.5, 0.9)
    one.weight.grad, one.bias.grad = torch.ones(2, 3), torch.ones(2)
    before.step()
    two, after = made(0.01, 0.3)
    two.load_state_dict(one.state_dict())
    after.load_state_dict(before.state_dict())
    assert [(g["weight_decay"], g["momentum"]) for g in after.param_groups] == [(0.01, 0.3), (0.0, 0.3)]
    start, buffer = two.weight.detach().clone(), before.state_dict()["state"][0]["momentum_buffer"].clone()
    two.weight.grad, two.bias.grad = torch.ones(2, 3), torch.ones(2)
    after.step()
    torch.testing.assert_close(two.weight.detach(), start - 0.1 * (0.3 * buffer + 1 + 0.01 * start))


def test_a_loaded_optimizer_has_its_own_runs_betas_and_the_files_counts():
    weight = nn.Parameter(torch.ones(2))
    betas = ([0.5, 0.6], [0.8, 0.9])
    before, after = (
        build_optimizer(OptimizerConfig("lookahead_adamw", 0.1, 0.9, 0.1, None, pair), [weight]) for pair in betas
    )
    for _ in range(4):
        weight.grad = torch.ones(2)
        before.step()
    after.load_state_dict(before.state_dict())
    assert tuple(after.param_groups[0]["betas"]) == (0.8, 0.9)  # torch 2.6 keeps a list
    assert after.param_groups[0]["lookahead_step"] == before.param_groups[0]["lookahead_step"] == 4


@pytest.mark.parametrize(("written", "given"), [("nesterov", "sgd"), ("adamw", "sgd"), ("adamw", "adam")])
def test_the_state_of_another_kind_is_refused_without_flags_too(written, given):
    if given == "adam" and "decoupled_weight_decay" not in torch.optim.AdamW([torch.ones(1)]).defaults:
        written = "nesterov"  # before torch 2.7 the groups of the two look alike
    optimizers = [
        build_optimizer(OptimizerConfig(name, 0.1, 0.9, 0.1), [nn.Parameter(torch.ones(2))])
        for name in (written, given)
    ]
    with pytest.raises(ValueError, match="another --opt"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


# -------------------------------------------------------------------------------------------------- pretraining


@pytest.fixture
def resumed(image_folder, tmp_path, in_process, capsys):
    """``resumed(*flags, stop=, images=, change=)``: a run of two epochs or of one step, its file changed, is gone on
    with; returns the lines, or the sentence of a refusal."""

    def begin(*words, first=(), stop=False, images=image_folder, change=None, epochs=2) -> list[str]:
        own = [*TINY, "--save-dir", tmp_path / "run"]
        more = ["--max-minutes", 0] if stop else []
        assert in_process(*own, *first, "--epochs", epochs, *more, image_folder) == (75 if stop else 0)
        before = load(tmp_path / "run")
        if change:
            change(before)
            torch.save(before, tmp_path / "run" / (tmp_path / "run" / "latest").read_text().strip())
        capsys.readouterr()
        code = in_process(*own, *first, "--epochs", 4, "--resume", "auto", *words, images)
        told = capsys.readouterr()
        assert code == (2 if told.err else 0)
        if code:
            assert told.err.count("\n") == 1
            assert load(tmp_path / "run")["run"]["step"] == before["run"]["step"]
        return (told.err or told.out).splitlines()

    return begin


def test_a_checkpoint_says_settings_data_and_torch(image_folder, tmp_path, in_process):
    words = [*TINY, *SYNCO, "--steps", 1, "--type-starts", "mixup=2", "noise=7steps", "--save-dir", tmp_path]
    assert in_process(*words, image_folder) == 0
    run = load(tmp_path)["run"]
    wanted = {"--method": "synco", "--arch": "test_resnet", "--size": 16, "--stem": "imagenet", "--channels": 3,
              "--amp": "off", "--aug": "v1", "--moco-k": 20, "--wd": 1e-4, "--opt-betas": None,
              "--schedule": [120, 160], "--type-starts": ["mixup=2", "noise=7steps"], "--mlp": False, "--mochi": None,
              "--mean": [0.485, 0.456, 0.406], "synthetic negatives": "synco", "--batch-size": 8,
              "--steps": 1}  # fmt: skip
    assert {name: run["flags"][name] for name in wanted} == wanted
    assert set(run["flags"]) == PRETRAIN.fixed | PRETRAIN.free
    assert run["data"] | {"fingerprint": ""} == {"name": str(image_folder / "train"), "images": 24, "fingerprint": ""}
    assert run["torch"]["version"] == torch.__version__
    assert torch.backends.cpu.get_cpu_capability() in run["torch"]["processor"]


def test_what_may_change_is_used_and_said_in_one_line(resumed, tmp_path):
    words = ["--wd", 0.01, "--momentum", 0.5, "--moco-t", 0.1, "--lr", 0.002, "--aug-plus", "--cos", "-p", 2]
    told = resumed(*words)
    lines = [line for line in told if "(was " in line]
    assert lines == [
        "resumed with --aug v2 (was v1), --moco-t 0.1 (was 0.07), --epochs 4 (was 2), --lr 0.002 (was 0.03), "
        "--cos on (was off), --momentum 0.5 (was 0.9), --wd 0.01 (was 0.0001)"
    ]
    state = load(tmp_path / "run")
    group = state["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["momentum"]) == (0.01, 0.5)
    assert group["lr"] == pytest.approx(0.002 * 0.5 * (1 + np.cos(np.pi * 3 / 4)))
    assert state["run"]["flags"]["--moco-t"] == 0.1


def test_the_changed_decay_and_momentum_are_those_of_the_steps(image_folder, tmp_path, in_process):
    """The run whose file is written as if it had always had them: the same bits."""
    words = [*TINY, "--save-dir", tmp_path / "run", image_folder]
    assert in_process(*words, "--epochs", 1) == 0
    state = load(tmp_path / "run")
    for name in ABOUT:
        del state["run"][name]
    state["optimizer"]["param_groups"][0] |= {"weight_decay": 0.1, "momentum": 0.2}
    torch.save(state, tmp_path / "edited.pth.tar")
    more = ["--epochs", 2, "--wd", 0.1, "--momentum", 0.2]
    assert in_process(*words, *more, "--resume", "auto") == 0
    edited = [*words[:-3], "--save-dir", tmp_path / "edited", image_folder, *more]
    assert in_process(*edited, "--resume", tmp_path / "edited.pth.tar") == 0
    one, two = (load(tmp_path / name)["state_dict"] for name in ("run", "edited"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("stop", [False, True], ids=["at an epoch's end", "inside an epoch"])
def test_a_run_that_has_nothing_otherwise_says_nothing(resumed, stop):
    told = resumed("--keep", 2, "-j", 1, "--knn-t", 0.2, first=["--seed", 3], stop=stop, epochs=4)
    assert not [line for line in told for word in ("resumed", "(was", "written by", "not used") if word in line]


REFUSED = [
    (["--method", "synco", *SYNCO], "--method moco and this one has synco, synthetic negatives moco and synco"),
    (["--moco-k", 22], "--moco-k 20 and this one has 22"),
    (["--moco-dim", 8], "--moco-dim 16 and this one has 8"),
    (["--mlp"], "--mlp off and this one has on"),
    (["--channels", 1, "--mean", 0.5, "--std", 0.5], "--channels 3 and this one has 1"),
    (["-a", "test_vit"], "--arch test_resnet and this one has test_vit"),
    (["--opt", "adamw"], "--opt sgd and this one has adamw"),
    (["--exclude-bias-norm"], "--exclude-bias-norm off and this one has on"),
]


@pytest.mark.parametrize(("words", "named"), REFUSED, ids=[words[0] for words, _ in REFUSED])
def test_what_cannot_change_is_refused_by_name(words, named, resumed):
    (told,) = resumed(*words)
    assert f"checkpoint_0001.pth.tar is of a run with {named}: give the same to continue it" in told


def test_another_stem_is_refused_by_name(resumed):
    words = ["-a", "resnet18", "--stem", "cifar"]
    (told,) = resumed("--stem", "imagenet", first=words)
    assert "is of a run with --stem cifar and this one has imagenet: give the same" in told


def test_an_adamw_file_does_not_go_on_as_adam(resumed):
    (told,) = resumed("--opt", "adam", first=["--opt", "adamw", "--lr", 1e-3])
    assert "is of a run with --opt adamw and this one has adam: give the same" in told


@pytest.fixture
def others(tmp_path):
    """As many images of the same names in the same classes."""
    return write_images(
        tmp_path / "others", {"train": 12, "val": 4}, ["blue", "red"],
        lambda rng, label: rng.integers(0, 255, (20, 20, 3)), seed=5,
    )  # fmt: skip


def test_other_images_inside_an_epoch_are_refused(resumed, others, image_folder):
    (told,) = resumed(stop=True, images=others)
    shown = f"24 of {image_folder}/train (here 24 of {others}/train; names, labels or sizes differ)"
    assert f"was written inside epoch 0 on other images, {shown}: give the same, or" in told


def test_other_images_at_an_epochs_end_are_said_and_no_row_of_the_queue_is_of_them(resumed, others, monkeypatch):
    from moco.train.pretraining import Trainer

    ids, run_epoch = [], Trainer.run_epoch
    monkeypatch.setattr(
        Trainer, "run_epoch", lambda self, *words: ids.append(self.model.queue_ids.clone()) or run_epoch(self, *words)
    )
    told = resumed(images=others, change=lambda state: state["run"]["bad_images"]["seen"].append(7))
    (line,) = [line for line in told if line.startswith("resumed on other images, 24 of")]
    assert line.endswith("/train); the queue's rows count as of no image and no class")
    assert bool((ids[1] >= 0).all())  # of the first run's second epoch: 24 keys, 20 rows
    assert bool((ids[2] == -1).all())


def test_no_label_of_other_images_stays_in_a_queue_with_labels(resumed, others, monkeypatch):
    from moco.train.pretraining import Trainer

    labels, run_epoch = [], Trainer.run_epoch
    monkeypatch.setattr(
        Trainer, "run_epoch",
        lambda self, *words: labels.append(self.model.queue_labels.clone()) or run_epoch(self, *words),
    )  # fmt: skip
    resumed(images=others, first=["--method", "supcon"])
    assert bool((labels[1] >= 0).all())
    assert bool((labels[2] == -1).all())


def test_without_a_queue_other_images_are_said_alone(image_folder, others, tmp_path, in_process, capsys):
    words = ["-a", "test_resnet", "--size", 16, "-b", 8, "-j", 0, "--amp", "off", "--knn-every", 0, "--seed", 3,
             "--method", "simclr", "--save-dir", tmp_path / "run"]  # fmt: skip
    assert in_process(*words, "--epochs", 1, image_folder) == 0
    assert in_process(*words, "--epochs", 2, "--resume", "auto", others) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed on other images")]
    assert line.endswith(f"(was 24 of {image_folder}/train)")


def test_a_moved_folder_is_the_same_data(resumed, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "moved")
    told = resumed(images=tmp_path / "moved", stop=True)
    assert not [line for line in told if "other images" in line]


def test_another_torch_or_processor_is_said(resumed):
    def older(state):
        state["run"]["torch"] = {"version": "2.5.1", "processor": "a Cray-1", "threads": 8}

    told = resumed(change=older)
    (line,) = [line for line in told if line.startswith("written by")]
    now = f"this is torch {torch.__version__} on "
    assert line.startswith(f"written by torch 2.5.1 on a Cray-1, 8 threads; {now}")
    assert line.endswith(", 1 thread: the rest is equal to rounding, not bit for bit")


@pytest.mark.parametrize("older", [False, True], ids=["now", "before-it-was-kept"])
def test_another_number_of_processes_is_said(resumed, older):
    def by_two(state):
        state["run"] |= {"processes": 2, "batches": {**state["run"]["batches"], "processes": 2}}
        if older:
            del state["run"]["processes"]

    told = resumed(change=by_two)
    (line,) = [line for line in told if line.startswith("written by")]
    assert line == "written by 2 processes; this run has 1: not bit for bit the uninterrupted run"


def test_a_file_that_says_nothing_goes_on_and_that_is_said(resumed, tmp_path):
    def before(state):
        for name in ABOUT:
            del state["run"][name]

    told = resumed("--wd", 0.01, "--moco-t", 0.1, change=before)
    said = [line for line in told if "does not say what its run's settings were" in line or "resumed with" in line]
    assert said[0] == "resumed with --wd 0.01 (was 0.0001)"  # the optimizer's groups know it
    assert said[1].endswith("settings were: those of this command are used")
    assert len(said) == 2
    assert set(ABOUT) <= load(tmp_path / "run")["run"].keys()


def test_a_seed_that_is_not_used_is_said(resumed):
    assert "--seed 77 is not used: the file's run has 3" in resumed("--seed", 77)


@pytest.mark.dist
def test_two_processes_say_it_once(image_folder, tmp_path, start):
    words = [*TINY, "--nproc", 2, "--save-dir", tmp_path, image_folder]
    assert start(*words, "--steps", 1).end() == 0
    refused = start(*words, "--steps", 2, "--resume", "auto", "--moco-k", 22)
    assert refused.end() == 2
    assert refused.text.count("--moco-k 20 and this one has 22") == 1
    goes_on = start(*words, "--steps", 2, "--resume", "auto", "--wd", 0.5)
    assert goes_on.end() == 0
    assert goes_on.text.count("resumed with --wd 0.5 (was 0.0001), --steps 2 (was 1)") == 1


# ------------------------------------------------------------------------------------------------ probe, fine-tuning


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """(images, the folder of a probe of one epoch)."""
    images, out = (tmp_path_factory.mktemp(name) for name in ("images", "probe"))
    hard_images(images, 8, 5)
    probe_once(images, out, "--epochs", 1)
    return images, out


def copy_of(done, tmp_path):
    shutil.copytree(done, tmp_path / "run")
    return tmp_path / "run"


def test_a_probe_uses_and_says_what_may_change(probed, tmp_path, capsys):
    images, done = probed
    run = copy_of(done, tmp_path)
    probe_once(images, run, "--epochs", 2, "--resume", "auto", "--wd", 0.1, "--momentum", 0.4, "--lr", 0.7,
               "--label-smoothing", 0.2)  # fmt: skip
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed with")]
    assert said == [
        "resumed with --epochs 2 (was 1), --lr 0.7 (was 0.3), --momentum 0.4 (was 0.9), --wd 0.1 (was 0), "
        "--label-smoothing 0.2 (was 0)"
    ]
    group = probe_state(run)["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["momentum"], group["lr"]) == (0.1, 0.4, 0.7)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--size", 32], "--size 16 and this one has 32"),
        (["--features", "cached"], "--features views and this one has cached"),
        (["--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5], "--mean 0.485 0.456 0.406 and this one has 0.5 0.5 0.5"),
        (["--opt", "adamw"], "--opt sgd and this one has adamw"),
        (["--val-share", 0.2], "--val-share 0 and this one has 0.2"),
    ],
)
def test_a_probe_refuses_what_decides_its_result(words, named, probed):
    images, done = probed
    before = os.stat(done / "checkpoint.pth.tar").st_mtime_ns
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        probe_once(images, done, "--epochs", 2, "--resume", "auto", *words)
    assert os.stat(done / "checkpoint.pth.tar").st_mtime_ns == before


def test_a_probe_and_a_tuning_refuse_other_images(probed, tmp_path):
    images, done = probed
    other = hard_images(tmp_path / "other", 8, 5)
    for path in other.glob("train/*/0.png"):
        path.write_bytes(path.read_bytes() + b"\0")  # one more byte is another file
    with pytest.raises(UserError, match=r"on other images, 24 of .*give the same, or begin another --save-dir"):
        probe_once(other, done, "--epochs", 2, "--resume", "auto")
    tune(images, tmp_path / "tuned", "--epochs", 1)
    with pytest.raises(UserError, match=r"on other images, 24 of .*give the same, or begin another --save-dir"):
        tune(other, tmp_path / "tuned", "--epochs", 1, "--resume", "auto")


def test_evaluating_a_classifier_compares_no_training(probed, tmp_path, capsys):
    images, done = probed
    run = copy_of(done, tmp_path)
    capsys.readouterr()
    probe_once(images, run, "-e", "--resume", "auto", "--lr", 9, "--wd", 1, "--features", "cached")
    said = capsys.readouterr().out
    assert "resumed with" not in said
    assert " images held out, 3 classes" in said and "training and" not in said
    assert json.loads((run / "evaluate.json").read_text())["lr"] == 0.3  # which trained it


def test_a_finished_probes_result_keeps_the_rate_that_trained_it(probed, tmp_path, capsys):
    images, done = probed
    run = copy_of(done, tmp_path)
    found = probe_once(images, run, "--epochs", 1, "--resume", "auto", "--lr", 9, "--wd", 1)
    said = capsys.readouterr().out
    assert found["lr"] == 0.3
    assert "\nthe run is finished: nothing is trained" in said
    assert "resumed with" not in said


def test_a_tuning_refuses_another_recipe_and_says_another_arithmetic(folder, tmp_path, capsys):
    tune(folder, tmp_path, "--epochs", 1, "--train-percent", 50)
    more = ["--epochs", 1, "--train-percent", 50, "--resume", "auto"]
    for words, named in (
        (["--mean", 0.5, 0.5, 0.5], "--mean 0.485 0.456 0.406 and this one has 0.5 0.5 0.5"),
        (["--clip-grad", 2], "--clip-grad none and this one has 2"),
        (["--wd", 0.1, "--momentum", 0.3], "--momentum 0.9 and this one has 0.3, --wd 1e-06 and 0.1"),
    ):
        with pytest.raises(UserError, match=named.replace(".", r"\.")):
            tune(folder, tmp_path, *more, *words)
    capsys.readouterr()
    tune(folder, tmp_path, *more, "--no-channels-last", "--warm-from", 0.5)  # of what is off nothing is said
    assert "resumed with --channels-last off (was on)" in capsys.readouterr().out.splitlines()


def test_a_tuning_of_before_is_compared_by_its_settings(folder, tmp_path, capsys):
    tune(folder, tmp_path, "--epochs", 1, "--train-percent", 50)
    state = state_of(tmp_path)
    for name in ABOUT[1:]:
        del state["run"][name]
    flags = state["run"].pop("flags")
    state["run"]["settings"] = {name: flags[name] for name in ("--wd", "--lr-backbone", "training images")}
    torch.save(state, tmp_path / "old.pth.tar")
    words = ["--epochs", 1, "--train-percent", 50, "--resume", tmp_path / "old.pth.tar"]
    with pytest.raises(UserError, match="is of a run with --wd 1e-06 and this one has 0.1"):
        tune(folder, tmp_path / "on", *words, "--wd", 0.1)
    capsys.readouterr()
    tune(folder, tmp_path / "on", *words)
    assert "does not say" not in capsys.readouterr().out


def test_a_file_of_another_version_may_say_more_or_less_of_its_loss(monkeypatch):
    from moco.train import resume

    head = {"impl": "triton", "precision": "tf32x3", "device": "cuda", "asked": ["auto", "auto"]}
    assert resume.loss_choice_of({"run": {"head": {**head, "blocks": 64}}}) == resume.Earlier(**head)
    assert resume.loss_choice_of({"run": {"head": {"impl": "triton"}}}) is None
    old, words = (
        {"state_dict": {"module.queue": torch.zeros(2, 2)}},
        "written before the loss on a GPU was the fused step",
    )
    assert resume._other_head(old, {}) == ""
    monkeypatch.setattr(resume.distributed, "device", lambda: torch.device("cuda"))
    assert resume._other_head(old, {}).startswith(words)
    assert resume._other_head(old, {"head": head}) == resume._other_head({"state_dict": {}}, {}) == ""
