"""SimCLR, SupCon, HCL and DCL as runs: the step, two processes against one, SupContrast's command lines, learning."""

import functools
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, differences, load, records
from PIL import Image
from sklearn.linear_model import RidgeClassifier
from support.networks import IN_BATCH, LABELS, MEAN, OWN, STD, batch, batch_contrast, step_inputs
from support.workers import noting
from torch import nn

from moco import cli, distributed, run_folder
from moco import describe as describe_door
from moco.cli.pretrain import DEMO_CONFIG
from moco.data import open_sources, size_warning
from moco.data.sources.base import ArraySource
from moco.eval.features import EvalData, FeatureExtractor
from moco.methods import losses
from moco.methods.registry import METHODS
from moco.models.batchnorm import sync_batchnorm
from moco.models.encoder import build_encoder
from moco.models.inputs import normalise
from moco.train.plan import TrainPlan
from moco.weights.read import load_backbone

# ------------------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("method", IN_BATCH)
def test_the_step_is_the_loss_of_both_views_through_one_forward(method):
    im_q, im_k, ids = batch()
    net = batch_contrast(method)
    z = net.encoder_q(normalise(torch.cat([im_q, im_k]), MEAN, STD))  # (2N, C): BatchNorm saw all of it
    groups = LABELS if method == "supcon" else ids
    pairs = losses.compare(torch.stack([z[:6], z[6:]], dim=1), groups)
    out = batch_contrast(method)([im_q, im_k], ids, 0, 0)
    torch.testing.assert_close(out.loss, METHODS[method].hooks.loss(net.config)(pairs, 0.2).mean())
    torch.testing.assert_close(out.q, F.normalize(z[:6].detach(), dim=1))
    torch.testing.assert_close(out.paired, F.normalize(z[6:].detach(), dim=1))
    assert len(out.keys) == 0


def test_statistics_are_what_they_say():
    im_q, im_k, ids = batch()
    out = batch_contrast()([im_q, im_k], ids)
    z = torch.stack([out.q, out.paired], dim=1)
    pairs = losses.compare(z, LABELS)
    ranks, hardest = [], []
    for a in range(12):
        nearest = max(pairs.cosine[a][pairs.positive[a]])
        negatives = pairs.cosine[a][pairs.negative[a]]
        ranks.append(int((negatives > nearest).sum()))
        hardest.append(float(negatives.max()))
    assert float(out.statistics["top1"]) == pytest.approx(sum(r < 1 for r in ranks) / 12)
    assert float(out.statistics["top5"]) == pytest.approx(sum(r < 5 for r in ranks) / 12)
    assert float(out.statistics["hardest"]) == pytest.approx(sum(hardest) / 12, rel=1e-5)
    assert float(out.statistics["no_positive"]) == 0


def test_a_snapshot_puts_batchnorm_back():
    net = batch_contrast()
    before = {n: v.clone() for n, v in net.state_dict().items()}
    restore = net.snapshot(0)
    net(*step_inputs())
    assert differences(net.state_dict(), before)
    restore(torch.tensor(True))
    assert not differences(dict(net.state_dict()), before)


def test_checkpoints_hold_the_encoder_under_mocos_name_and_nothing_else():
    assert all(name.startswith("encoder_q.") for name in batch_contrast().state_dict())


# ------------------------------------------------------------------------------------------- BatchNorm, processes


def test_sync_batchnorm_in_one_process_is_batchnorm():
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3))
    synced = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3))
    synced.load_state_dict(plain.state_dict())
    synced = sync_batchnorm(synced)
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(x), synced(x))
    assert not differences(dict(plain.state_dict()), dict(synced.state_dict()))


@pytest.mark.dist
@pytest.mark.parametrize(
    "words",
    [["--method", "supcon", "--syncBN"], ["--method", "hcl", "--syncBN", "--contrast-mode", "one"],
     ["--method", "simclr", "--syncBN", "--views", 3], ["--method", "supcon", "--moco-k", 20]],
    ids=["supcon", "hcl, one anchor", "simclr, three views", "supcon with a queue"],
)  # fmt: skip
def test_two_processes_compute_what_one_does(words, image_folder, tmp_path, start):
    """In loss, gradient and updated weights: the gather has a backward and BatchNorm one batch."""
    parts = ["--bn-splits", 2] if "--moco-k" in words else []
    words = [*OWN, "--size", 32, "--epochs", 1, *words, image_folder]
    runs = {1: parts, 2: ["--nproc", 2]}
    programs = {n: start(*words, *more, "--save-dir", tmp_path / str(n), main=noting) for n, more in runs.items()}
    for program in programs.values():
        assert program.end() == 0, program.text
    logs = [records(tmp_path / f"{n}") for n in (1, 2)]
    for name in ("loss", "top1", "hardest", "grad_norm"):
        assert logs[1][0][name] == pytest.approx(logs[0][0][name], rel=1e-4), name
    (one, *_), (two, *_), (other, *_) = (
        torch.load(tmp_path / name, weights_only=True) for name in ("1/rank0.pt", "2/rank0.pt", "2/rank1.pt")
    )
    for name, value in one.items():
        if not name.endswith(("running_mean", "running_var")) or "--syncBN" in words:
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            assert torch.equal(two[name], other[name]), name


def adding(folder: str, args) -> int:
    """A worker that differentiates both exchanges with a gradient."""
    rank = distributed.rank()
    x = torch.arange(4.0).view(2, 2).add(10 * rank).requires_grad_()
    weights = torch.arange(8.0).view(4, 2) + 100 * rank
    (distributed.all_gather_with_grad(x) * weights).sum().backward()
    y = torch.full((3,), float(rank + 1), requires_grad=True)
    total = distributed.all_reduce_sum_with_grad(y)
    (total * torch.arange(3.0) * (rank + 1)).sum().backward()
    torch.save({"x": x.grad, "y": y.grad, "total": total.detach()}, f"{folder}/rank{rank}.pt")
    return 0


@pytest.mark.dist
def test_the_exchanges_with_a_gradient(tmp_path, start):
    program = start("--nproc", 2, "--save-dir", tmp_path, main=functools.partial(adding, str(tmp_path)))
    assert program.end() == 0, program.text
    both = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    summed = 2 * torch.arange(8.0).view(4, 2) + 100
    assert torch.equal(torch.cat([found["x"] for found in both]), summed)
    for found in both:
        assert torch.equal(found["total"], torch.full((3,), 3.0))
        assert torch.equal(found["y"], 3 * torch.arange(3.0))


# -------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "SimCLR", "--base-temperature", 0.1], "against 15 others, loss in fp32, multiplied by T / 0.1"),
        (["--method", "hcl", "--beta", 0.5], "against 15 others, loss in fp32; BatchNorm over both views"),
        (["--method", "dcl", "--accum", 2], "against 15 others"),
        (["--method", "SupCon", "--syncBN"], "of all processes"),
        (["--method", "supcon", "--moco-k", 20, "--n-hard", 8, "--n1", 4, "--hard-start-epoch", 0], "loss by labels"),
    ],
    ids=lambda words: words[1] if isinstance(words, list) else "",
)
def test_a_run(words, said, image_folder, tmp_path, in_process, capsys):
    assert in_process(*OWN, *words, "--steps", 1, "--save-dir", tmp_path, image_folder) == 0
    text = capsys.readouterr().out
    assert said in text
    assert text.count("images/s") == 1
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(record["loss"]) and record["loss_ratio"] > 0
    assert record.get("no_positive", 0) == 0


@pytest.mark.parametrize("queue", [True, False])
def test_a_resumed_run_is_the_same_run(queue, image_folder, tmp_path, in_process, capsys):
    """Also with mixed negatives and labels in the queue; and its checkpoint is a sane one of ours."""
    words = [*OWN, "--method", "supcon", image_folder]
    if queue:
        words += ["--moco-k", 20, "--mochi", 8, 4, 4, "--hard-start-epoch", 0]
    for folder, epochs in (("whole", [2]), ("parts", [1, 2])):
        for n in epochs:
            more = ["--epochs", n, "--save-dir", tmp_path / folder, "--resume", "auto"]
            assert in_process(*words, *more) == 0
    whole, parts = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert ("module.queue_labels" in whole["state_dict"]) == queue
    assert differences(whole, parts) == []
    file = run_folder.newest(str(tmp_path / "whole"))
    assert describe_door.main([file]) == 0
    assert f"{file}: pretraining checkpoint of this project" in capsys.readouterr().out


MISTAKES = [
    (["--method", "supcon", "FLAT"], "--method supcon needs labels and"),
    (["--method", "supcon", "--num-classes", "5", "DIR"], "--num-classes 5: "),
    (["--method", "simclr", "--moco-k", "64", "DIR"], "has no queue; leave --moco-k out"),
    (["--method", "supcon", "--mochi", "4", "2", "2", "DIR"], "give --method supcon a --moco-k"),
    (["--method", "simclr", "--n1", "4", "DIR"], "--method simclr does not use --n1"),
    (["--method", "simclr", "--symmetric", "DIR"], "--method simclr does not use --symmetric"),
    (["--method", "simclr", "--warmup-epochs", "5", "DIR"], "synthetic negatives; a warm-up is --rise-epochs"),
    (["--method", "supcon", "--moco-k", "64", "--syncBN", "DIR"], "--syncBN is for the methods without a queue"),
    (["--method", "supcon", "--moco-k", "64", "--head-impl", "cpu", "DIR"], "does not use --head-impl"),
    (["--method", "supcon", "--moco-k", "64", "--contrast-mode", "one", "DIR"], "--contrast-mode one"),
    (["--method", "hcl", "--tau-plus", "1", "DIR"], "--tau-plus is a share"),
    (["--method", "hcl", "--beta", "-1", "DIR"], "--beta must be at least 0"),
    (["--method", "simclr", "--base-temperature", "0", "DIR"], "--base-temperature must be a number above 0"),
    (["--method", "simclr", "--warm", "--epochs", "5", "DIR"], "--warm lasts --warm-epochs epochs"),
    (["--method", "barlow", "DIR"], "--method"),
    (["--mean", "(0.1, x)", "DIR"], "--mean (0.1, x): write numbers"),
    (["--mean", "(__import__('os').abort(),)", "DIR"], "write numbers"),
    (["--lr-decay-epochs", "7;8", "DIR"], "--lr-decay-epochs"),
    (["--data-folder", "DIR", "DIR"], "the same thing"),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES, ids=[" ".join(words[:3]) for words, _ in MISTAKES])
def test_mistakes_are_one_sentence_and_exit_code_2(words, sentence, image_folder, tmp_path, in_process, capsys):
    flat = image_folder / "train" / "red"
    known = {"DIR": image_folder, "FLAT": flat}
    try:
        code = in_process(*OWN, *(known.get(w, w) for w in words), "--save-dir", tmp_path)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert re.fullmatch(r"error: [^\n]*\n", error)


# --------------------------------------------------------------------------------- SupContrast's command lines


def test_supcontrasts_lines_mean_the_same():
    words = ["--batch_size", "1024", "--learning_rate", "0.5", "--temp", "0.1", "--cosine", "--method", "SupCon"]
    words += ["--dataset", "path", "--data_folder", "pictures", "--test_folder", "others", "--num_classes", "7"]
    words += ["--mean", "(0.4914, 0.4822, 0.4465)", "--std=(0.2675,0.2565, 0.2761)", "--size", "64", "--syncBN"]
    words += ["--model", "resnet18", "--lr_decay_epochs", "70,80", "--num_workers", "3", "--trial", "5", "--warm"]
    args = cli.parse_pretrain([*words, "--weight_decay", "1e-3", "--print_freq", "7", "--save_freq", "4"])
    assert (args.batch_size, args.lr, args.moco_t, args.cos, args.method) == (1024, 0.5, 0.1, True, "supcon")
    assert (args.dataset, args.data, args.val_data, args.num_classes) == ("folder", "pictures", "others", 7)
    assert (args.mean, args.std) == ([0.4914, 0.4822, 0.4465], [0.2675, 0.2565, 0.2761])
    assert (args.size, args.sync_bn, args.arch, args.schedule, args.workers) == (64, True, "resnet18", [70, 80], 3)
    assert (args.save_dir, args.warm, args.weight_decay) == ("./trial_5", True, 1e-3)
    assert (args.print_freq, args.save_every, args.family) == (7, 4, "batch")
    assert (args.mlp, args.aug, args.base_temperature) == (True, "supcon", 0.07)


@pytest.mark.parametrize(
    ("words", "negatives", "queue", "method"),
    [
        ("DIR", "moco", True, "moco"),
        ("DIR --n1 4", "synco", True, "synco"),
        ("DIR --method supcon", "moco", False, "supcon"),
        ("DIR --method supcon --moco-k 8192", "moco", True, "supcon"),
        ("DIR --method supcon --moco_k 8192 --n1 4", "synco", True, "supcon"),
        ("DIR --method supcon --moco-k 8192 --mochi 8 4 4", "mochi", True, "supcon"),
        (f"--config {DEMO_CONFIG} --method SupCon", "moco", False, "supcon"),  # a file with a queue and n1..n6
    ],
)
def test_the_family_follows_from_the_flags(words, negatives, queue, method):
    args = cli.parse_pretrain(words.split())
    assert (args.negatives, args.family == "queue", args.method) == (negatives, queue, method)


def test_a_batch_above_256_warms_up_by_itself():
    assert cli.parse_pretrain(["DIR", "--method", "simclr", "-b", "512"]).warm
    assert not cli.parse_pretrain(["DIR", "--method", "simclr", "-b", "256"]).warm
    assert not cli.parse_pretrain(["DIR", "--method", "simclr", "-b", "512", "--no-warm"]).warm
    assert not cli.parse_pretrain(["DIR", "-b", "512"]).warm


def test_warm_up_is_supcontrasts():
    """Linear over the steps of 10 epochs from .01 to the rate that the cosine has then."""
    plan = TrainPlan(100, None, 0.5, True, warm_epochs=10, steps_per_epoch=20, total_steps=2000)
    target = 0.5 * (1 + math.cos(math.pi * 10 / 100)) / 2
    for step in (0, 1, 57, 199):
        assert plan.lr_at(step // 20, step) == pytest.approx(0.01 + step / 200 * (target - 0.01))
    assert plan.lr_at(10, 200) == pytest.approx(target)
    assert plan.lr_at(60, 1200) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.6)) / 2)


@pytest.mark.parametrize(("size", "warned"), [(32, True), (64, True), (65, False), (224, False)])
def test_views_far_below_the_images_are_warned_of(size, warned):
    source = ArraySource("large", np.zeros((3, 256, 300, 3), np.uint8))
    assert ("the images' short side is 256 px" in size_warning(source, size)) == warned


def test_the_warning_reaches_the_log(tmp_path, in_process, capsys):
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (100, 80), (i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    words = [*OWN, "--method", "supcon", "--steps", 1, "--save-dir", tmp_path / "run", tmp_path / "images"]
    assert in_process(*words) == 0
    assert "warning: the images' short side is 80 px and --size 16 keeps 20 % of it" in capsys.readouterr().out


def test_the_recipes_are_the_published_ones():
    for name, temperature in (("supcon", 0.1), ("simclr", 0.5)):
        for data in ("cifar10", "cifar100"):
            args = cli.parse_pretrain(["--config", str(ROOT / "configs" / f"{name}_{data}.yml")])
            assert (args.method, args.dataset, args.moco_t, args.batch_size) == (name, data, temperature, 1024)
            assert (args.lr, args.epochs, args.warm, args.cos, args.family) == (0.5, 1000, True, True, "batch")
    assert cli.parse_pretrain(["--config", str(ROOT / "configs" / "supcon_queue_in1k.yml"), "DIR"]).family == "queue"


# ---------------------------------------------------------------------------------------------------- learning


def linear_accuracy(path: str) -> float:
    """Top-1 on the 1,000 held-out digits of a linear classifier on frozen features of the 4,000 others."""
    encoder = build_encoder("test_resnet", 10, size=20, in_chans=1)
    load_backbone(encoder, path)
    sources = open_sources("mnist5k")
    assert sources.train is not None and sources.val is not None
    extractor = FeatureExtractor(EvalData(20, 500), torch.device("cpu"), [0.1307], [0.3081])
    train, val = (extractor.whole(encoder, source) for source in (sources.train, sources.val))
    fitted = RidgeClassifier().fit(train.x.numpy(), train.labels.numpy())
    return 100 * fitted.score(val.x.numpy(), val.labels.numpy())


def test_labels_teach_more_than_views_do(tmp_path, in_process):
    """The same 80 steps on the built-in digits: SupCon and a linear classifier beat SimCLR and one."""
    scores = {}
    for method in ("simclr", "supcon"):
        words = ["--dataset", "mnist5k", "-a", "test_resnet", "--aug", "digits", "-b", 128, "--size", 20]
        words += ["--steps", 80, "--temp", 0.2, "--lr", 0.1, "--cos", "--seed", 0, "-j", 0, "--knn-every", 0]
        assert in_process(*words, "--method", method, "--save-dir", tmp_path / method) == 0
        scores[method] = linear_accuracy(run_folder.newest(str(tmp_path / method)))
    assert scores["supcon"] > scores["simclr"] + 1, scores
