"""MoCo v3 against algorithm 1 of arXiv 2104.02057, its networks, and its runs: two processes, resumed, read again."""

import copy
import json
import math
import re
import sys
import types

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, differences, load
from PIL import Image
from support.networks import MEAN, STD, Tiny
from support.workers import noting
from torch import nn

from moco import cli
from moco.cli.methods import model_config
from moco.config import MoCoV3Config, ScheduleConfig
from moco.data.augment.by_numpy import finish
from moco.data.augment.by_pil import apply, draw
from moco.data.augment.by_torch import finish as finish_batch
from moco.data.augment.by_torch import pack_params
from moco.data.augment.from_file import get_preset
from moco.errors import UserError
from moco.methods import losses, moco_v3
from moco.methods.registry import METHODS, Method
from moco.models.encoder import build_encoder
from moco.models.moco_v3 import MoCoV3, mlp, positions
from moco.train.plan import make_plan
from moco.weights import describe
from moco.weights.read import load_backbone

OWN = [word for word in TINY if word not in ("--moco-k", "20")] + ["--method", "moco_v3", "--moco-mlp-dim", "24"]


def tiny() -> Tiny:
    network = Tiny()
    network.head_name = "fc"  # type: ignore[assignment]
    return network


def vit(arch="test_vit", size=32, dim=8):
    return build_encoder(arch, dim, size=size)


def model(network=tiny, **changes) -> MoCoV3:
    torch.manual_seed(0)
    config = MoCoV3Config(C=8, hidden=12, mean=MEAN, std=STD, **{"T": 0.3, **changes})
    return MoCoV3(network(), network(), config, batch=6)


# --------------------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize(("network", "size"), [(tiny, 6), (vit, 32)], ids=["ResNet's heads", "ViT"])
def test_loss_and_gradients_are_algorithm_1(network, size):
    """Written as loops over the pairs of a batch, in float64, from the networks' outputs."""
    net = model(network).double()
    with torch.no_grad():  # keys unlike queries
        for p in net.encoder_k.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x1, x2 = torch.randn(2, 6, 3, size, size, dtype=torch.float64)
    other = copy.deepcopy(net)
    q1, q2 = (other.predictor(other.encoder_q(x)) for x in (x1, x2))
    k1, k2 = (other.encoder_k(x).detach() for x in (x1, x2))

    def ctr(q, k):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(6):
            sims = torch.stack([q[i] @ k[j] / (q[i].norm() * k[j].norm()) / 0.3 for j in range(6)])
            total = total - torch.log(sims[i].exp() / sims.exp().sum())
        return 2 * 0.3 * total / 6

    want = ctr(q1, k2) + ctr(q2, k1)
    want.backward()
    out = net([x1, x2], torch.arange(6))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-13)
    for (name, p), theirs in zip(net.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (theirs.grad is None), name
        if p.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(p.grad, theirs.grad, rtol=1e-9, atol=1e-13, msg=name)
    assert len(out.keys) == 0
    torch.testing.assert_close(out.paired, torch.nn.functional.normalize(k2, dim=1))


def test_chance_is_the_loss_of_features_that_all_look_alike():
    net = model()
    same = torch.ones(6, 8)
    pairs = moco_v3.against_keys(same, same)
    one = net.loss(pairs, net.T).mean()
    assert 2 * float(one) == pytest.approx(net.chance) == pytest.approx(4 * 0.3 * math.log(6))


def test_an_own_key_is_the_only_positive():
    q = torch.eye(4)[1:3]
    pairs = moco_v3.against_keys(q, torch.eye(4), first=1)
    assert pairs.positive.tolist() == [[False, True, False, False], [False, False, True, False]]
    assert torch.equal(pairs.negative, ~pairs.positive) and torch.equal(pairs.cosine, q)


def test_the_momentum_rises_along_half_a_cosine():
    assert moco_v3.momentum(0.99, 0, 100) == 0.99
    assert moco_v3.momentum(0.99, 50, 100) == pytest.approx(0.995)
    assert moco_v3.momentum(0.99, 25, 100) == pytest.approx(1 - 0.01 * (1 + math.sqrt(0.5)) / 2)
    assert moco_v3.momentum(0.996, 100, 100) == 1.0
    net = model(m=0.9)
    net.begin_step(1, 2)
    with torch.no_grad():
        for p in net.encoder_q.parameters():
            p.fill_(1.0)
        for p in net.encoder_k.parameters():
            p.zero_()
    net.update_key_encoder()
    assert all(torch.allclose(p, torch.tensor(0.05)) for p in net.encoder_k.parameters())
    still = model(m=0.9, m_cosine=False)
    still.begin_step(1, 2)
    assert still.m == 0.9


# ------------------------------------------------------------------------------------------------------- networks


def shapes(net: nn.Module) -> list[str]:
    """Each layer's type and widths."""
    found = []
    for m in net.modules():
        if isinstance(m, nn.Linear):
            found.append(f"Linear {m.in_features}-{m.out_features}")
        elif isinstance(m, nn.BatchNorm2d):
            found.append(f"BatchNorm {m.num_features} {'affine' if m.affine else 'bare'}")
        elif isinstance(m, nn.ReLU):
            found.append("ReLU")
    return found


def test_mlps_are_the_published_ones():
    net, large = model(), model(vit)
    head = ["Linear 5-12", "BatchNorm 12 affine", "ReLU", "Linear 12-8", "BatchNorm 8 bare"]
    assert shapes(net.encoder_q.fc) == shapes(net.encoder_k.fc) == head
    assert shapes(net.predictor) == ["Linear 8-12", *head[1:3], "Linear 12-8"]
    assert shapes(large.encoder_q.head) == [
        "Linear 64-12", *head[1:3], "Linear 12-12", *head[1:3], "Linear 12-8", "BatchNorm 8 bare"
    ]  # fmt: skip
    assert shapes(large.predictor) == ["Linear 8-12", *head[1:3], "Linear 12-8", "BatchNorm 8 bare"]
    assert all(m.bias is None for m in mlp([2, 3, 4]).modules() if isinstance(m, nn.Linear))
    state = net.encoder_q.state_dict()
    assert not differences(dict(state), dict(net.encoder_k.state_dict()))


def test_a_resnets_blocks_begin_as_the_identity():
    net = model(lambda: build_encoder("resnet18", 8, size=32))
    assert not net.encoder_q.get_submodule("layer1.0.bn2").weight.any()
    assert net.encoder_q.get_submodule("layer1.0.bn1").weight.all()


def test_a_vit_begins_as_published():
    net = model(lambda: vit("vit_small_patch16_224"))
    encoder = net.encoder_q
    table = encoder.pos_embed
    assert not table.requires_grad and not encoder.patch_embed.proj.weight.requires_grad
    assert not encoder.patch_embed.proj.bias.requires_grad and not encoder.patch_embed.proj.bias.any()
    assert not table[0, 0].any() and encoder.cls_token.abs().max() < 1e-5
    for place, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        for i in (0, 5, 95):
            rate = 10000 ** (-i / 96)
            want = [math.sin(row * rate), math.cos(row * rate), math.sin(column * rate), math.cos(column * rate)]
            assert table[0, 1 + place, i::96].tolist() == pytest.approx(want, abs=1e-6)
    bounds = {"patch_embed.proj": 3 * 256 + 384, "blocks.3.attn.qkv": 384 + 384, "blocks.3.mlp.fc1": 384 + 1536}
    for name, fans in bounds.items():
        largest = encoder.get_submodule(name).weight.abs().max().item()
        assert 0.99 * math.sqrt(6 / fans) < largest <= math.sqrt(6 / fans), name
    assert encoder.blocks[0].attn.num_heads == 12 and encoder.changes == {"num_heads": 12}
    trained = model(vit, freeze_patches=False).encoder_q
    assert trained.patch_embed.proj.weight.requires_grad and not trained.pos_embed.requires_grad
    assert positions(2, 3, 8).shape == (6, 8)


@pytest.mark.parametrize("arch", ["vit_b_16", "swin_tiny_patch4_window7_224"])
def test_other_transformers_are_a_sentence(arch):
    with pytest.raises(UserError, match="takes timm's ViTs with a class token"):
        model(lambda: build_encoder(arch, 8, size=224))


# ----------------------------------------------------------------------------------------------------------- runs


@pytest.mark.dist
def test_two_processes_compute_what_one_does(image_folder, tmp_path, start):
    """In loss, gradient and weights after three steps, both encoders' and the predictor's."""
    words = [*OWN, "--size", 32, "--epochs", 1, "--lr", 0.05, image_folder]
    programs = {n: start(*words, "--nproc", n, "--save-dir", tmp_path / str(n), main=noting) for n in (1, 2)}
    for program in programs.values():
        assert program.end() == 0, program.text
    logs = [[json.loads(x) for x in (tmp_path / f"{n}/log.jsonl").read_text().splitlines()] for n in (1, 2)]
    for name in ("loss", "top1", "hardest", "grad_norm"):
        assert logs[1][0][name] == pytest.approx(logs[0][0][name], rel=1e-4), name
    one, two, other = (torch.load(tmp_path / name)[0] for name in ("1/rank0.pt", "2/rank0.pt", "2/rank1.pt"))
    assert any(name.startswith("predictor.") for name in one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(two[name], other[name]), name


def test_a_run_in_pieces_is_one_run(image_folder, tmp_path, in_process):
    """Bit by bit, though the momentum is another at each step."""
    words = [image_folder, *OWN, "--epochs", 2, "--rise-epochs", 1, "--cos", "--opt", "lars", "--exclude-bias-norm"]
    assert in_process(*words, "--save-dir", tmp_path / "one") == 0
    for _ in range(6):
        more = ["--max-minutes", 0, "--save-dir", tmp_path / "many", "--resume", "auto"]
        assert in_process(*words, *more) == 75
    whole = load(tmp_path / "one")
    assert differences(whole, load(tmp_path / "many")) == []
    lr = [json.loads(x).get("lr") for x in (tmp_path / "one/log.jsonl").read_text().splitlines()]
    cosine = [0.03 * (1 + math.cos(math.pi * t / 3)) / 2 for t in range(3)]
    assert [x for x in lr if x is not None] == pytest.approx([0, 0.01, 0.02, *cosine])


def test_a_vits_checkpoint_is_described_and_read_with_its_heads(image_folder, tmp_path, in_process):
    words = [*OWN, "-a", "vit_tiny_patch16_224", "--size", "32", "--steps", "2", "--opt", "adamw", "--lr", "0.001"]
    assert in_process(*words, image_folder, "--knn-every", "1", "--save-dir", tmp_path) == 0
    path = str(next(tmp_path.glob("*.pth.tar")))
    assert not any(line.startswith("warning") for line in describe.describe_file(path)), describe.describe_file(path)
    state = load(tmp_path)
    assert state["run"]["changes"] == {"num_heads": 12}
    encoder = build_encoder("vit_tiny_patch16_224", 3, size=32)
    assert "12 attention heads" in load_backbone(encoder, path)[1]
    assert encoder.blocks[0].attn.num_heads == 12
    kept = state["state_dict"]
    assert torch.equal(encoder.pos_embed, kept["module.encoder_q.pos_embed"])
    assert torch.equal(
        kept["module.encoder_q.patch_embed.proj.weight"], kept["module.encoder_k.patch_embed.proj.weight"]
    )
    assert any("knn" in json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())


def test_the_loss_falls_on_digits(tmp_path, in_process):
    words = [*OWN, "--dataset", "mnist5k", "--size", "28", "-b", "64", "--steps", "30", "--lr", "0.1"]
    assert in_process(*words, "--save-dir", tmp_path) == 0
    found = [json.loads(x)["loss"] for x in (tmp_path / "log.jsonl").read_text().splitlines() if '"loss"' in x]
    assert np.mean(found[-5:]) < np.mean(found[:5]) - 0.3


# ---------------------------------------------------------------------------------------------- flags and a new row


def test_defaults_are_the_papers_and_flags_and_files_override_them(tmp_path):
    args = cli.parse_pretrain(["--method", "mocov3", "DIR"])
    assert (args.method, args.family, args.aug) == ("moco_v3", "momentum", "v3")
    assert model_config(args) == MoCoV3Config(channels_last=True)
    args = cli.parse_pretrain(["--method", "moco_v3", "--moco-t", "0.07", "--moco-dim", "128", "DIR"])
    assert (args.moco_t, args.moco_dim, args.moco_m) == (0.07, 128, 0.99)
    (tmp_path / "own.yml").write_text("method: moco_v3\nmoco-m: 0.999\n")
    args = cli.parse_pretrain(["--config", str(tmp_path / "own.yml"), "DIR"])
    assert (args.moco_m, args.moco_t) == (0.999, 1.0)


@pytest.mark.parametrize("words", ["--moco-k 512", "--symmetric", "--bn-splits 2", "--n1 5", "--warmup-epochs 40"])
def test_what_it_has_no_use_for_is_a_sentence(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse_pretrain(["--method", "moco_v3", *words.split(), "DIR"])
    assert stop.value.code == 2 and "moco_v3" in capsys.readouterr().err


def test_a_new_loss_is_a_file_and_a_row(image_folder, tmp_path, in_process, monkeypatch):
    """Two steps through main_pretrain.py's worker, and its name is one of --method's."""
    seen = []

    def loss(config):
        seen.append(config.method)
        return lambda pairs, T: losses.dcl(pairs, T) ** 2

    monkeypatch.setitem(sys.modules, "moco.methods.squared", types.SimpleNamespace(loss=loss))
    monkeypatch.setitem(METHODS, "squared", Method("batch", "moco.methods.squared"))
    words = [word for word in OWN if word not in ("--method", "moco_v3", "--moco-mlp-dim", "24")]
    assert in_process(*words, "--method", "squared", "--steps", "2", image_folder, "--save-dir", tmp_path) == 0
    assert seen == ["squared"] and load(tmp_path)["run"]["step"] == 2
    assert re.search(r"--method \{[^}]*squared", cli.pretrain_parser().format_help())


def test_the_rate_rises_and_falls_as_published():
    """lr e / W while it rises over W epochs, then half a cosine over the rest, at e epochs done with their fraction."""
    plan = make_plan(20, None, ScheduleConfig(100, lr=9.6, cosine=True, rise=10))
    for step in (0, 7, 199, 200, 1000, 1999):
        e = step / 20
        want = 9.6 * e / 10 if e < 10 else 9.6 * (1 + math.cos(math.pi * (e - 10) / 90)) / 2
        rise = min(1.0, step / plan.rise)
        assert plan.lr_at(step // 20, step) * rise == pytest.approx(want, rel=1e-12)
    with pytest.raises(UserError, match="--rise-epochs must end"):
        make_plan(20, None, ScheduleConfig(10, rise=10))


# ---------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize(("name", "crop"), [("v3", 0.2), ("v3-wide", 0.08)])
def test_the_first_view_is_blurred_and_the_second_sometimes_solarized(name, crop):
    preset, rng = get_preset(name), np.random.default_rng(0)
    first, second = ([draw(preset.of_view(view), 60, 40, rng) for _ in range(2000)] for view in (0, 1))
    assert all(p.blur is not None and not p.solarize for p in first)
    shares = [np.mean([p.blur is not None for p in second]), np.mean([p.solarize for p in second])]
    assert shares == pytest.approx([0.1, 0.2], abs=0.03)
    assert preset.crop_scale == preset.of_view(1).crop_scale == (crop, 1.0)
    assert (preset.saturation, preset.hue, preset.jitter_p, preset.grey_p) == (0.2, 0.1, 0.8, 0.2)


def test_solarizing_is_pils_on_every_path():
    pixels = np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    params = draw(get_preset("v3"), 20, 20, np.random.default_rng(2))._replace(
        order=("crop", "solarize"), box=(0, 0, 20, 20), solarize=True
    )
    want = torch.from_numpy(np.where(pixels < 128, pixels, 255 - pixels).transpose(2, 0, 1).copy())
    assert torch.equal(apply(Image.fromarray(pixels), params, 20), want)
    plain = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    assert torch.equal(finish(plain, params, ("solarize",)), want)
    rows = torch.stack([pack_params(None, False, None, False, solarize) for solarize in (True, False)])
    assert torch.equal(finish_batch(torch.stack([plain, plain]), rows, ("solarize",)), torch.stack([want, plain]))


def test_timms_vit_small_has_other_heads():
    assert timm.create_model("vit_small_patch16_224", num_classes=0).blocks[0].attn.num_heads == 6
