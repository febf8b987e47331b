"""The benchmarks against others' code make real steps on both sides; ratios are those of one round or one seed."""

import importlib
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

TINY = ["-a", "test_resnet", "--size", "32", "-b", "4", "--moco-k", "1100", "--moco-dim", "16", "--amp", "off",
        "--stem", "imagenet", "--threads", "1"]  # fmt: skip

# What the released code looks like to the benchmark: CUDA and a group of processes are asked for inside the model.
BUILDER = """
import torch
import torch.nn as nn
class SynCo(nn.Module):
    def __init__(self, base_encoder, dim, K, m, T, mlp, n_hard, n1, n2, n3, n4, n5, n6, warmup_epochs):
        super().__init__()
        self.encoder_q, self.seen, self.counts = base_encoder(num_classes=dim), [], (n_hard, n1, n2, n3, n4, n5, n6)
    def forward(self, im_q, im_k, epoch):
        assert torch.distributed.get_world_size() == 1 and torch.distributed.get_rank() == 0
        order = torch.randperm(len(im_k)).cuda()
        torch.distributed.broadcast(order, src=0)
        gathered = [torch.ones_like(im_k)]
        torch.distributed.all_gather(gathered, im_k, async_op=False)
        assert torch.equal(gathered[0], im_k) and not torch.equal(im_q, im_k)
        self.seen.append(im_q.shape)
        return self.encoder_q(im_q), torch.zeros(len(im_q), dtype=torch.long).cuda()
"""
LOADER = """
class TwoCropsTransform:
    def __init__(self, transform): self.transform = transform
    def __call__(self, image): return [self.transform(image), self.transform(image)]
class GaussianBlur:
    def __init__(self, sigma): self.sigma = sigma
    def __call__(self, image): return image
"""
MAIN = """
models = []
def train(train_loader, model, criterion, optimizer, epoch, args):
    for (im_q, im_k), _ in train_loader:
        before = [p.detach().clone() for p in model.parameters()]
        criterion(*model(im_q=im_q, im_k=im_k, epoch=epoch)).backward()
        optimizer.step()
        assert not all((a == b).all() for a, b in zip(before, model.parameters()))
        models.append(model)
        print("a line that nobody wants")
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of the released code, in small."""
    (tmp_path / "code" / "synco").mkdir(parents=True)
    for name, text in (("synco/__init__", ""), ("synco/builder", BUILDER), ("synco/loader", LOADER),
                       ("main_synco", MAIN)):  # fmt: skip
        (tmp_path / "code" / f"{name}.py").write_text(text)
    for name in ("synco", "synco.builder", "synco.loader", "main_synco"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.cuda)
    return tmp_path / "code"


class NTXentLoss(nn.Module):
    """lightly's, as far as a step can tell: InfoNCE against rows that are replaced by the keys."""

    def __init__(self, temperature, memory_bank_size):
        super().__init__()
        self.T, self.bank = temperature, torch.randn(*memory_bank_size)

    def forward(self, q, k):
        q, k, n = (nn.functional.normalize(x, dim=1) for x in (q, k, self.bank))
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ n.T], 1) / self.T
        self.bank[: len(k)] = k.detach()
        return nn.functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


@torch.no_grad()
def update_momentum(model, model_ema, m):
    for p, average in zip(model.parameters(), model_ema.parameters(), strict=True):
        average.lerp_(p, 1 - m)


@pytest.fixture
def blocks(monkeypatch):
    """The parts of lightly that are used."""

    def views(input_size):
        return lambda image: [torch.rand(3, input_size, input_size) for _ in range(2)]

    def head(features, hidden, width):
        return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, width))

    members = {
        "loss": {"NTXentLoss": NTXentLoss},
        "transforms": {"MoCoV2Transform": views},
        "models.modules": {"MoCoProjectionHead": head},
        "models.utils": {"deactivate_requires_grad": lambda x: x.requires_grad_(False),
                         "update_momentum": update_momentum},
    }  # fmt: skip
    for name, content in members.items():
        module = types.ModuleType(f"lightly.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"lightly.{name}", module)
    for name in ("lightly", "lightly.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def whole(script):
    return script("speed.whole_step")


@pytest.fixture(scope="module")
def until(whole):
    return importlib.import_module("benchmarks.accuracy.time_to_accuracy")


def small(images):
    return [*TINY, "--data", str(images), "--images", "12"]


def test_every_row_makes_steps_with_what_it_is_called(whole, images, checkout, blocks, monkeypatch, capsys):
    trainers = []
    ours = whole.ours

    def spy(trainer, source, view, setting, own_loader):
        trainers.append((trainer, own_loader))
        return ours(trainer, source, view, setting, own_loader)

    monkeypatch.setattr(whole, "ours", spy)
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiled.append(self))
    monkeypatch.setattr(torch, "compile", lambda call: call)
    words = ["--rounds", "2", "--workers", "0", "--synco", str(checkout), "--lightly"]
    assert whole.main([*small(images), *words]) == 0
    out = capsys.readouterr().out
    assert "nobody wants" not in out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")][2:]
    assert tuple(names := [row[0] for row in rows]) == whole.ROWS
    assert all(float(cell) > 0 for row in rows for cell in (row[1], row[2], row[5], row[6]))
    assert [bool(row[4]) for row in rows] == [name in list(whole.LADDER) for name in names]
    assert out.count(", goal ") == len(whole.GOALS)
    peer = sys.modules["main_synco"].models[0]
    assert peer.seen == 4 * [(4, 3, 32, 32)]
    assert peer.counts == (1024, 256, 256, 256, 64, 64, 64)
    found = [
        (own, t.plan.amp, t.model.layout, t.model.config.loss_impl, t.model.extra is not None) for t, own in trainers
    ]
    last, wide = torch.channels_last, torch.contiguous_format
    bf16 = torch.bfloat16
    assert found == [
        (False, None, wide, "reference", True),
        (False, bf16, wide, "reference", True),
        (False, bf16, last, "reference", True),
        (False, bf16, last, "cpu", True),
        (True, bf16, last, "cpu", True),
        (True, bf16, last, "cpu", True),  # compiled
        (True, None, last, "cpu", True),  # --amp off of TINY; auto, on a CPU
        (True, None, last, "cpu", True),
        (True, bf16, last, "cpu", False),
        (True, bf16, last, "cpu", False),
    ]
    assert all(t.progress.step == 4 for t, _ in trainers)  # two rounds before the two that count
    assert [t.model.config.mask_same_image for t, _ in trainers] == 6 * [False] + 2 * [True] + 2 * [False]
    assert len(compiled) == 2 * len([name for name in names if name.endswith("--compile")])
    assert [t.model.encoder_q in compiled for t, _ in trainers] == 5 * [False] + [True] + 2 * [False, True]


def test_ratios_of_a_step_are_taken_within_rounds(whole):
    # the machine slowed down tenfold in the last two rounds
    found = {whole.RELEASED: [400, 400, 4000, 4000], whole.BEST: [100, 130, 1000, 1300],
             whole.BOUND: [92, 117, 920, 1170]}  # fmt: skip
    lines = whole.report(found, 128).splitlines()
    assert lines[3].startswith(f"| {whole.BEST} | 565 | 226.5 |")
    assert lines[3].endswith("| 3.54 | 3.54 | 0.91 |")
    assert f"{whole.BEST} / {whole.RELEASED}: 3.54 (3.08 to 4.00), goal 3.0: met" in lines
    assert f"{whole.BEST} / {whole.BOUND}: 0.91 (0.90 to 0.92), goal 0.9: met" in lines
    assert not any(whole.LIGHTLY in line for line in lines)
    slower = {**found, whole.BOUND: [80, 80, 800, 800]}
    assert f"{whole.BEST} / {whole.BOUND}: 0.71 (0.62 to 0.80), goal 0.9: missed" in whole.report(slower, 128)


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_lightly_is_put_together_as_moco(whole, images, blocks):
    from benchmarks.peers import Lightly, Setting, open_cifar

    source = open_cifar(images, images, 12, 4).pretrain
    assert len(source) == 12
    assert source.labels is not None and source.labels.tolist() == 6 * [0] + 6 * [1]
    torch.manual_seed(0)
    made = Lightly(Setting("test_resnet", "imagenet", 16, 4, 16, 24, 0.5, 0.2, 0.1, 0.9, 0.0, 0), source, None, True)
    q, k = (flat(x) for x in (made.q, made.k))
    assert torch.equal(q, k)
    first = made.step(next(iter(made.batches)))
    moved = flat(made.q)
    assert torch.isfinite(first) and not torch.equal(moved, q)
    assert torch.equal(flat(made.k), k)  # it follows at the next step
    made.step(next(iter(made.batches)))
    torch.testing.assert_close(flat(made.k), (k + moved) / 2)


def test_two_contestants_train_in_turn_and_are_kept(until, images, blocks, tmp_path, capsys):
    words = [*small(images), "--queries", "4", "--epochs", "2", "--seeds", "1", "--out", str(tmp_path)]
    assert until.main(words) == 0
    out = capsys.readouterr().out
    records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    turns = [(record["run"], record["epoch"], record["images"]) for record in records]
    assert turns == [("lightly", 1, 12), ("ours", 1, 12), ("ours", 2, 24), ("lightly", 2, 24)]
    assert all(0 <= record["knn"] <= 100 and record["cpu_s"] > 0 for record in records)
    assert "seconds to the target, lightly / ours: " in out
    assert until.main(words) == 0
    again = capsys.readouterr().out
    assert "{" not in again
    assert again.strip() in out
    assert until.main([*words, "--threads", "2"]) == 2
    assert "holds a run with other flags; choose another --out" in capsys.readouterr().err


def test_results_of_fast_paths_are_kept_by_network(whole, monkeypatch, tmp_path, capsys):
    fast_paths, kept = importlib.import_module("benchmarks.accuracy.fast_paths"), []
    monkeypatch.setattr(fast_paths, "prepare", lambda args: ["list", "--val-data", "test"])
    monkeypatch.setattr(fast_paths, "enlarged", lambda images: images)
    monkeypatch.setattr(fast_paths, "train", lambda args, words, name, seed: kept.append(name) or 50.0)
    for words in ([], ["-a", "resnet18"], ["--stem", "cifar"]):
        assert fast_paths.main(["--rows", "bf16 encoders", "--seeds", "0", *words]) == 0
    assert kept == ["bf16_encoders_test_resnet_imagenet", "bf16_encoders_resnet18_imagenet",
                    "bf16_encoders_test_resnet_cifar"]  # fmt: skip


def test_time_to_accuracy_counts_to_the_first_epoch_that_has_it(until):
    def records(name, seed, seconds, accuracies):
        return [{"run": name, "seed": seed, "epoch": i + 1, "images": 100 * (i + 1), "knn": accuracy,
                 "cpu_s": seconds * (i + 1)} for i, accuracy in enumerate(accuracies)]  # fmt: skip

    found = [*records("lightly", 0, 10.0, [30, 34, 36, 35.5]), *records("ours", 0, 4.0, [30, 35, 34, 36]),
             *records("lightly", 1, 10.0, [30, 31, 32, 33]), *records("ours", 1, 5.0, [30, 31, 35, 36])]  # fmt: skip
    lines = until.report(found, 35.0).splitlines()
    assert lines[2:6] == ["| lightly | 0 | 10 | 35.50 | 35.00 | 3 | 30 |",
                          "| lightly | 1 | 10 | 33.00 | 35.00 | never |  |",
                          "| ours | 0 | 25 | 36.00 | 35.00 | 2 | 8 |",
                          "| ours | 1 | 20 | 36.00 | 35.00 | 3 | 15 |"]  # fmt: skip
    assert "ours / lightly, images/s: 2.25 (mean over 2 seeds)" in lines
    assert "final k-NN, ours minus lightly, by seed: +0.50, +3.00" in lines
    assert lines[-1] == "seconds to the target, lightly / ours: 3.75 (over 1 seeds where both did)"
    lines = until.report(found, None).splitlines()
    assert lines[2:6] == ["| lightly | 0 | 10 | 35.50 | 36.00 | 3 | 30 |",
                          "| lightly | 1 | 10 | 33.00 | 33.00 | 4 | 40 |",
                          "| ours | 0 | 25 | 36.00 | 36.00 | 4 | 16 |",
                          "| ours | 1 | 20 | 36.00 | 33.00 | 3 | 15 |"]  # fmt: skip
    assert lines[-1] == "seconds to the target, lightly / ours: 2.26 (over 2 seeds where both did)"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["--synco", "nowhere"], "give a checkout of github.com/giakoumoglou/synco"),
     (["--lightly"], "pip install lightly"), (["--data", "nowhere"], "no CIFAR-10 at nowhere: give --data"),
     (["--rows", "fast"], "invalid choice: 'fast'"), (["--rounds", "1"], "quartiles need at least 2")],
)  # fmt: skip
def test_what_is_missing_is_one_sentence(whole, images, words, sentence, monkeypatch, capsys):
    for name in ("lightly", "lightly.loss", "synco", "synco.builder"):
        monkeypatch.setitem(sys.modules, name, None)
    try:
        code = whole.main([*small(images), "--workers", "0", *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert sentence in capsys.readouterr().err
