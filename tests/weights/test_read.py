"""Files in the layouts of this field's projects, built here key by key, load; what does not fit is named."""

import argparse
import functools
import importlib
import json
import math
import re
import sys
import types
import urllib.error
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from support.layouts import (
    C,
    OwnResNet,
    barlow_twins,
    by_position,
    lightly,
    moco_v3,
    moco_v3_vit,
    prefixed,
    resnet,
    small,
    solo_learn,
    without_head,
)
from torch import nn

from moco import cli as flags
from moco import distributed, files
from moco.errors import UserError
from moco.models.encoder import backbone_keys, build_encoder, features
from moco.weights.changes import apply_changes, has_fixed_positions, restore_changes
from moco.weights.layouts import RESNETS, File, Submodule, arch_of, open_file
from moco.weights.read import load_backbone, open_backbone

K = 12


def contrastive_file(queue_shape: tuple[int, int], head: str, arch: str = "resnet18") -> tuple[dict, nn.Module]:
    """A checkpoint exactly as main_moco.py (or SynCo's) writes it, and its query encoder."""

    def make() -> nn.Module:
        return resnet(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, C)) if head == "mlp" else None, arch)

    q, k = make(), make()
    entries = OrderedDict()
    for name, network in (("encoder_q", q), ("encoder_k", k)):
        entries.update({f"module.{name}.{key}": value for key, value in network.state_dict().items()})
    entries["module.queue"] = torch.randn(queue_shape)
    entries["module.queue_ptr"] = torch.zeros(1, dtype=torch.long)
    optimizer = torch.optim.SGD(q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    return {"epoch": 200, "arch": arch, "state_dict": entries, "optimizer": optimizer.state_dict()}, q


def assert_same_backbone(encoder: nn.Module, source: nn.Module) -> None:
    theirs = source.state_dict()
    for name in backbone_keys(encoder):
        assert torch.equal(encoder.state_dict()[name], theirs[name]), name


@pytest.fixture
def encoder() -> nn.Module:
    return build_encoder("resnet18", 10, stem="imagenet")


@pytest.mark.parametrize(
    ("queue", "head"),
    [((C, K), "linear"), ((C, K), "mlp"), ((K, C), "mlp")],
    ids=["MoCo v1", "MoCo v2", "SynCo"],
)
def test_contrastive_checkpoints_give_their_query_encoder(tmp_path, encoder, queue, head):
    state, q = contrastive_file(queue, head)
    path = str(tmp_path / "theirs.pth.tar")
    torch.save(state, path)
    before = {name: value.clone() for name, value in encoder.fc.state_dict().items()}
    _, words = load_backbone(encoder, path, "resnet18")
    assert_same_backbone(encoder, q)
    assert all(torch.equal(value, before[name]) for name, value in encoder.fc.state_dict().items())
    assert "read 120 tensors from encoder_q" in words
    assert "epoch 200" in words
    assert f"its head ({2 if head == 'linear' else 4} tensors)" in words


def variants(network: nn.Module) -> dict[str, dict]:
    plain = dict(network.state_dict())
    wrapped = {"module." + name: value for name, value in plain.items()}
    return {
        "torchvision's": plain,
        "a classifier's": {"epoch": 3, "arch": "resnet18", "state_dict": wrapped, "best_acc1": 1.0, "optimizer": {}},
        "model": {"model": plain},
        "compiled": {"state_dict": {"_orig_mod." + name: value for name, value in plain.items()}},
        "half precision": {"state_dict": {n: v.half() if v.is_floating_point() else v for n, v in plain.items()}},
        "without counters": {n: v for n, v in plain.items() if not n.endswith("num_batches_tracked")},
        "without a head": {n: v for n, v in plain.items() if not n.startswith("fc.")},
    }


@pytest.mark.parametrize("layout", list(variants(nn.Linear(1, 1))))
def test_other_layouts(tmp_path, encoder, layout):
    network = resnet(nn.Linear(512, 1000))
    if layout == "half precision":
        network = network.half().float()
    path = str(tmp_path / "weights.pth")
    torch.save(variants(network)[layout], path)
    load_backbone(encoder, path)
    assert_same_backbone(encoder, network)


def test_timm_and_small_stems_read_their_own_files(tmp_path):
    for arch, options in (("vit_tiny_patch16_224", {"size": 32}), ("resnet18", {"size": 32, "in_chans": 1})):
        trained = build_encoder(arch, C, mlp=True, **options)
        entries = {"module.encoder_q." + name: value for name, value in trained.state_dict().items()}
        path = str(tmp_path / "ours.pth.tar")
        torch.save({"epoch": 1, "arch": arch, "state_dict": entries, "optimizer": {}}, path)
        fresh = build_encoder(arch, 10, **options)
        load_backbone(fresh, path, arch)
        assert_same_backbone(fresh, trained)


def refusal(encoder: nn.Module, path: object, arch: str = "resnet18") -> str:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_backbone(encoder, str(path), arch)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items()), "loaded in part"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_architecture_is_named(tmp_path, encoder):
    path = tmp_path / "theirs.pth.tar"
    state, _ = contrastive_file((C, K), "linear", "resnet34")
    torch.save(state, path)
    # resnet34 holds every entry of resnet18, with equal shapes: only its further blocks tell them apart
    sentence = refusal(encoder, path)
    assert "has unknown layer1.2.conv1.weight" in sentence
    assert "trained with -a resnet34" in sentence
    torch.save(dict(resnet().state_dict()), path)
    assert "lacks layer1.0.conv3.weight" in refusal(build_encoder("resnet50", 10), path, "resnet50")


def test_another_stem_or_number_of_channels_is_named(tmp_path):
    path = tmp_path / "theirs.pth.tar"
    torch.save(contrastive_file((C, K), "linear")[0], path)
    sentence = refusal(build_encoder("resnet18", 10, stem="cifar"), path)
    assert "conv1.weight is (64, 3, 7, 7) there and (64, 3, 3, 3) here" in sentence
    assert "--stem" in sentence
    assert "(64, 1, 7, 7) here" in refusal(build_encoder("resnet18", 10, stem="imagenet", in_chans=1), path)


def test_a_file_without_the_query_encoder_or_without_tensors_is_refused(tmp_path, encoder):
    path = tmp_path / "odd.pth.tar"
    state, _ = contrastive_file((C, K), "linear")
    only_k = {name: value for name, value in state["state_dict"].items() if "encoder_q" not in name}
    torch.save({"state_dict": only_k}, path)
    assert "lacks conv1.weight" in refusal(encoder, path)
    torch.save({"epoch": 3, "state_dict": {}}, path)
    assert "holds no weights" in refusal(encoder, path)
    torch.save([1, 2], path)
    assert "not a checkpoint" in refusal(encoder, path)


def test_missing_truncated_and_malicious_files_are_refused(tmp_path, encoder):
    assert "no checkpoint at" in refusal(encoder, tmp_path / "nowhere.pth.tar")
    path = tmp_path / "cut.pth.tar"
    torch.save(dict(resnet().state_dict()), path)
    path.write_bytes(path.read_bytes()[:100_000])
    assert "truncated, damaged" in refusal(encoder, path)
    torch.save({"state_dict": {"x": print}}, path)
    assert "more than weights" in refusal(encoder, path)


def test_published_weights_by_name(monkeypatch, encoder):
    network, asked = resnet(nn.Linear(512, 1000)), []

    def fetched(url, **options):
        asked.append((url, options["weights_only"], options["check_hash"]))
        return OrderedDict(network.state_dict())

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetched)
    _, words = load_backbone(encoder, "torchvision:IMAGENET1K_V1", "resnet18")
    assert_same_backbone(encoder, network)
    assert "torchvision:IMAGENET1K_V1" in words
    assert asked == [(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url, True, True)]
    assert "it has IMAGENET1K_V1" in refusal(encoder, "torchvision:V9")
    assert "no weights for -a vit_tiny" in refusal(encoder, "torchvision:IMAGENET1K_V1", "vit_tiny_patch16_224")


@pytest.mark.parametrize("path", ["torchvision:IMAGENET1K_V1", "file"])
def test_published_weights_are_fetched_by_one_of_each_node_first(monkeypatch, tmp_path, encoder, path):
    network, waits, first = resnet(nn.Linear(512, 1000)), [], distributed.first_on_node
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: dict(network.state_dict()))
    monkeypatch.setattr(distributed, "first_on_node", lambda make, wait: [waits.append(wait), first(make, wait)][1])
    torch.save(network.state_dict(), tmp_path / "file")
    given = path if path != "file" else str(tmp_path / path)
    weights, words = load_backbone(encoder, given, "resnet18")
    assert_same_backbone(encoder, network)
    assert waits == [path != "file"] and given in words
    assert set(weights) == set(network.state_dict()) - {"fc.weight", "fc.bias"}


def test_a_failed_download_is_one_sentence(monkeypatch, encoder):
    def fails(url, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fails)
    sentence = refusal(encoder, "torchvision:IMAGENET1K_V1")
    assert "no route to host" in sentence
    assert "download it and give its path" in sentence


# ------------------------------------------------------------------------------------ other projects' layouts
# The files below are made as each project makes its own, key by key; the networks that must be reproduced are built
# as that project builds them.


def by_hand(x: torch.Tensor, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """The features of SupContrast's ResNet-18 (its networks/resnet_big.py): 3x3 stem, no pooling, ``shortcut``."""

    def conv(x, name, norm, stride=1):
        weight = t[f"{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var, gamma, beta = (t[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, gamma, beta)

    x = F.relu(conv(x, "conv1", "bn1"))
    for block in sorted({name.rpartition(".conv")[0] for name in t if re.match(r"layer\d\.\d+\.conv1", name)}):
        stride = 2 if block.endswith(".0") and block[5] != "1" else 1
        y = F.relu(conv(x, f"{block}.conv1", f"{block}.bn1", stride))
        y = conv(y, f"{block}.conv2", f"{block}.bn2")
        short = f"{block}.shortcut"
        x = F.relu(y + (conv(x, f"{short}.0", f"{short}.1", stride) if f"{short}.0.weight" in t else x))
    return x.mean((2, 3))


def supcontrast(wrapper: str = "") -> tuple[dict, Callable]:
    shortcuts = {name.replace("downsample", "shortcut"): value for name, value in without_head(small()).items()}
    head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128)).state_dict()
    model = {**prefixed(f"encoder.{wrapper}", shortcuts), **prefixed("head.", head)}
    flags = argparse.Namespace(model="resnet18", dataset="cifar10", lr_decay_epochs=[700, 800])
    return {"opt": flags, "model": model, "optimizer": {}, "epoch": 1000}, lambda x: by_hand(x, shortcuts)


def own_by_name() -> nn.Module:
    network = OwnResNet()
    network.linear = nn.Identity()
    return network


LAYOUTS = {
    "SupContrast": supcontrast,
    "SupContrast, several GPUs": functools.partial(supcontrast, "module."),
    "MoCo v3": moco_v3,
    "MoCo v3, ViT-S": moco_v3_vit,
    "Barlow Twins": functools.partial(barlow_twins, True),
    "Barlow Twins, backbone": functools.partial(barlow_twins, False),
    "lightly": functools.partial(lightly, lambda: by_position(resnet())),
    "lightly, small images": functools.partial(lightly, lambda: by_position(small())),
    "lightly, its own ResNet": functools.partial(lightly, lambda: by_position(OwnResNet())),
    "lightly, its own ResNet, 7x7": functools.partial(lightly, lambda: by_position(OwnResNet(7))),
    "lightly, its own ResNet by name": functools.partial(lightly, own_by_name),
    "solo-learn": functools.partial(solo_learn, "backbone"),
    "solo-learn, older": functools.partial(solo_learn, "encoder"),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_features_of_other_projects_files(tmp_path, layout):
    torch.manual_seed(1)
    state, theirs = LAYOUTS[layout]()
    path = str(tmp_path / "theirs.ckpt")
    torch.save(state, path)
    found = open_backbone(path)
    assert found.arch == ("vit_small_patch16_224" if "ViT" in layout else "resnet18")
    images = torch.randn(2, 3, 32, 32)
    if isinstance(theirs, nn.Module):
        theirs = drop_head(theirs).eval()
    with torch.no_grad():
        torch.testing.assert_close(features(found.encoder, images), theirs(images).flatten(1), rtol=1e-5, atol=1e-5)
    # the mains build their encoder from flags and get the same
    encoder = build_encoder(found.arch, 10, stem=found.stem, size=32).eval()
    assert "read " in load_backbone(encoder, path, found.arch)[1]
    assert torch.equal(features(encoder, images), features(found.encoder, images))


def drop_head(network: nn.Module) -> nn.Module:
    if hasattr(network, "fc"):
        network.fc = nn.Identity()
    return network


def test_what_tensors_cannot_tell_is_said(tmp_path):
    bare = LAYOUTS["lightly, its own ResNet"], "neither ReLU nor max-pool after bn1"
    for make, words in ((LAYOUTS["solo-learn"], "pads by 2"), (moco_v3_vit, "12 attention heads"), bare):
        torch.save(make()[0], tmp_path / "theirs.ckpt")
        assert words in open_backbone(str(tmp_path / "theirs.ckpt")).summary


@pytest.mark.parametrize("stem", [3, 7])
def test_timms_resnet_reads_lightlys_own_as_it_is(tmp_path, stem):
    state, theirs = lightly(lambda: by_position(OwnResNet(stem)))
    torch.save(state, tmp_path / "theirs.ckpt")
    encoder = build_encoder("timm/resnet18", 10, stem="cifar" if stem == 3 else "imagenet", size=32).eval()
    load_backbone(encoder, str(tmp_path / "theirs.ckpt"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = theirs.eval()(images).flatten(1)  # type: ignore[attr-defined]
        torch.testing.assert_close(features(encoder, images), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["solo-learn", "lightly, its own ResNet"])
@pytest.mark.parametrize("program", ["lincls", "semisup"])
def test_what_tensors_cannot_tell_stays_with_a_probes_and_a_fine_tunings_file(program, layout, tmp_path, image_folder):
    """Evaluated later without --pretrained, and read as an encoder, the network is the one that was trained."""
    torch.save(LAYOUTS[layout]()[0], tmp_path / "theirs.ckpt")
    parse = getattr(flags, f"parse_{program}")
    worker = importlib.import_module(f"main_{program}").worker
    words = [str(image_folder), "-a", "resnet18", "--size", "16", "-b", "8", "-j", "0", "--epochs", "1"]
    words += ["--save-dir", str(tmp_path)]
    words += ["--weights", "freeze"] if program == "semisup" else ["--lr", "0.1", "0.01"]
    assert distributed.launch(worker, parse([*words, "--pretrained", str(tmp_path / "theirs.ckpt")])) == 0
    trained = json.loads((tmp_path / "result.json").read_text())
    assert distributed.launch(worker, parse([*words, "--evaluate", "--resume", "auto"])) == 0
    name = "result.json" if program == "lincls" else "evaluate.json"
    loss = "per_lr" if program == "lincls" else "loss"
    assert json.loads((tmp_path / name).read_text())[loss] == trained[loss]
    images = torch.randn(2, 3, 32, 32)
    written = tmp_path / ("checkpoint.pth.tar" if program == "lincls" else "checkpoint_semisup.pth.tar")
    with torch.no_grad():
        ours, theirs = (features(open_backbone(str(p)).encoder, images) for p in (written, tmp_path / "theirs.ckpt"))
    torch.testing.assert_close(ours, theirs)


LEADS_EITHER = ("0.1", "1"), ("1", "0.1")


@pytest.mark.parametrize(
    ("program", "where", "rates"),
    [
        ("lincls", "encoder", ("0.1", "0.01")),
        ("semisup", "encoder", ()),
        *(("lincls", where, rates) for where in ("another head", "a diverged head") for rates in LEADS_EITHER),
    ],
)
def test_checkpoints_of_no_use_are_not_gone_on_from(program, where, rates, tmp_path, image_folder, capsys):
    parse = getattr(flags, f"parse_{program}")
    worker = importlib.import_module(f"main_{program}").worker
    words = [str(image_folder), "-a", "test_resnet", "--size", "16", "-b", "8", "-j", "0", "--save-dir", str(tmp_path)]
    words += ["--lr", *rates] if rates else []
    assert distributed.launch(worker, parse([*words, "--epochs", "1"])) == 0
    written = tmp_path / ("checkpoint.pth.tar" if program == "lincls" else "checkpoint_semisup.pth.tar")
    state = torch.load(written, weights_only=True)
    if where == "encoder":
        next(v for n, v in state["state_dict"].items() if "layer1" in n).fill_(math.nan)
    else:  # not the classifier that leads, whose weight is the network's own: which it is, is for the processor to say
        head = state["heads"][state["run"]["lr"] == state["heads"][0]["lr"]]
        head["layer"]["weight"][0] = math.nan
        head["diverged"] = where == "a diverged head"
    torch.save(state, written)
    for mode in (["--evaluate"], ["--epochs", "1"]):
        capsys.readouterr()
        code = distributed.launch(worker, parse([*words, *mode, "--resume", "auto"]))
        said = "holds NaN or infinity; take another checkpoint" in capsys.readouterr().err
        assert (code, said) == ((0, False) if where == "a diverged head" else (2, True))


# ---------------------------------------------------------------------- fixed positions, and the heads they tell


def sines(number: int, width: int) -> list[float]:
    """Sines and cosines of a number at ``width // 2`` rates."""
    angles = [number / 10_000 ** (i / (width // 2)) for i in range(width // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def fixed(width: int, rows_first: bool, side: int = 3) -> torch.Tensor:
    """Positions of MoCo v3 (rows first) or MAE (columns first), (1, 1 + side * side, width), class token 0."""
    places = [(r, c) if rows_first else (c, r) for r in range(side) for c in range(side)]
    return torch.tensor([[[0.0] * width, *(sines(a, width // 2) + sines(b, width // 2) for a, b in places)]])


def vit(word: str, heads: int, positions: torch.Tensor) -> nn.Module:
    import timm

    network = timm.create_model(f"vit_{word}_patch16_224", num_heads=heads, img_size=48, num_classes=0).eval()
    with torch.no_grad():
        network.pos_embed.copy_(positions)
    return network


def nested(nest: str, prefix: str, **more: torch.Tensor) -> Callable[[dict], dict]:
    return lambda tensors: {nest: {**prefixed(prefix, tensors), **more}}


PROBES = {"head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}
ROWS, COLUMNS, LEARNED = fixed(192, True), fixed(192, False), torch.randn(1, 10, 192)
NO_CLASS = torch.cat([torch.zeros(1, 1, 192), LEARNED[:, 1:]], 1)
SOLO = nested("state_dict", "backbone.", **{"classifier.weight": torch.zeros(10, 192)})
HEADS = {  # word of the ViT, its heads, its positions, the file, whether a guess is told
    "MoCo v3's probe": ("tiny", 12, ROWS, nested("state_dict", "module.", **PROBES), False),
    "MoCo v3 for DeiT": ("tiny", 12, ROWS, nested("model", ""), False),
    "MoCo v3 for DeiT, ViT-S": ("small", 12, fixed(384, True), nested("model", ""), False),
    "MoCo v3, 16 bits": ("tiny", 12, ROWS, lambda tensors: {"model": {n: v.half() for n, v in tensors.items()}}, False),
    "lightly": ("tiny", 12, ROWS, nested("state_dict", "backbone."), False),
    "solo-learn, MoCo v3": ("tiny", 12, ROWS, SOLO, False),
    "solo-learn, MAE": ("tiny", 12, COLUMNS, SOLO, False),
    "solo-learn, DINO": ("tiny", 3, LEARNED, SOLO, False),
    "MAE": ("tiny", 3, COLUMNS, nested("model", ""), True),
    "MAE, backbone": ("tiny", 3, COLUMNS, nested("state_dict", "backbone."), True),
    "no class row": ("tiny", 3, NO_CLASS, nested("model", ""), True),
    "zeros": ("tiny", 3, torch.zeros(1, 10, 192), nested("model", ""), True),
    "timm": ("tiny", 3, LEARNED, nested("model", ""), False),
}


@pytest.mark.parametrize("layout", list(HEADS))
def test_heads_are_those_that_the_positions_tell(tmp_path, layout):
    word, heads, positions, make, guessed = HEADS[layout]
    torch.manual_seed(2)
    network = vit(word, heads, positions)
    if "16 bits" in layout:
        network = network.half().float()
    torch.save(make(network.state_dict()), tmp_path / "theirs.pth")
    found = open_backbone(str(tmp_path / "theirs.pth"))
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(features(found.encoder, images), network(images), rtol=1e-5, atol=1e-5)
    assert found.summary.count("attention heads") == int(guessed or heads == 12)
    assert ("a guess: its fixed positions" in found.summary) == guessed


ODD_CARDS = [
    "[]", "null", "{", "[" * 100_000, '{"arch": []}',
    '{"arch": {}}', '{"size": -32}', '{"size": 1e400}', '{"size": true}',
    '{"channels": [3]}', '{"channels": 1, "mean": [0.5, 0.5, 0.5]}', '{"mean": "0.5"}', '{"mean": [NaN, 0, 0]}',
    '{"std": [0, 1, 1]}', '{"stem": 7}', '{"changes": -1}', '{"changes": {"num_heads": -1}}', '{"epoch": "x"}',
]  # fmt: skip


@pytest.mark.parametrize("card", ODD_CARDS)
def test_a_card_that_is_none_is_one_sentence(card, tmp_path):
    theirs = str(tmp_path / "odd.safetensors")
    save_file({"conv1.weight": torch.ones(2)}, theirs, {"card": card})
    with pytest.raises(UserError, match="the card in .* is damaged"):
        open_backbone(theirs)
    files.write({"conv1.weight": torch.ones(2)}, str(tmp_path / "c.pth"))
    (tmp_path / "c.json").write_text(re.sub(r"^{", '{"kind": "moco backbone", ', card))
    if card.startswith("{"):
        with pytest.raises(UserError, match="c.json is damaged"):
            open_file(str(tmp_path / "c.pth"))
    else:  # it may be another program's
        assert open_file(str(tmp_path / "c.pth")).settings == {}
    files.write({"arch": "x", "state_dict": {"a": torch.ones(2)}, "run": {}}, str(tmp_path / "ours.pth"))
    (tmp_path / "log_settings.json").write_text(card)
    with pytest.raises(UserError, match="log_settings.json is damaged"):
        open_file(str(tmp_path / "ours.pth"))


def test_heads_of_tensors_alone_and_of_positions_on_another_grid(tmp_path):
    grid = F.interpolate(ROWS[:, 1:].unflatten(1, (3, 3)).permute(0, 3, 1, 2), 5, mode="bicubic")
    resized = torch.cat([ROWS[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    network = vit("tiny", 12, ROWS)
    network.pos_embed = nn.Parameter(resized)
    save_file(network.state_dict(), tmp_path / "theirs.safetensors")  # no card
    found = open_backbone(str(tmp_path / "theirs.safetensors"))
    assert (found.size, found.changes) == (80, {"num_heads": 12})


@pytest.mark.parametrize("word", ["base", "large"])
def test_where_timm_has_moco_v3s_heads_nothing_is_changed(word):
    width = {"base": 768, "large": 1024}[word]
    part = Submodule("base_encoder", {"pos_embed": fixed(width, True)})
    assert not has_fixed_positions(part)


def test_a_probe_of_the_old_reading_keeps_it_and_is_not_mixed_with_the_new(tmp_path):
    """Checkpoints of ours without the entry were trained on timm's heads."""
    network = vit("tiny", 3, ROWS)
    state = {"state_dict": prefixed("module.", network.state_dict()), "run": {"seed": 1}}
    torch.save(state, tmp_path / "probe.pth.tar")
    assert open_backbone(str(tmp_path / "probe.pth.tar")).changes == {}
    encoder = build_encoder("vit_tiny_patch16_224", 10, size=48)
    torch.save({"model": network.state_dict()}, tmp_path / "theirs.pth")
    load_backbone(encoder, str(tmp_path / "theirs.pth"))
    with pytest.raises(UserError, match="with no change, --pretrained gives one with 12 attention heads .*leave"):
        restore_changes(encoder, state, "probe.pth.tar")
    fresh = build_encoder("vit_tiny_patch16_224", 10, size=48)
    restore_changes(fresh, {**state, "run": {}}, "upstreams.pth.tar")  # their probe's file says nothing
    assert fresh.changes == {"num_heads": 12}


def test_a_change_of_a_newer_version_is_refused(encoder):
    with pytest.raises(UserError, match="has the change wings, which this version does not know"):
        apply_changes(encoder, {"wings": 2})


# --------------------------------------------------------------------------------------- weights of no use

ODD = {
    "NaN or infinity": lambda w: w.index_fill(0, torch.tensor([3]), math.nan),
    "-inf": lambda w: w.index_fill(0, torch.tensor([3]), -math.inf),
    "too large": lambda w: w.double() * 1e300,  # for float32
    "int8 numbers": lambda w: (w * 100).to(torch.int8),
    "int64 numbers": lambda w: (w * 100).long(),
    "bool numbers": lambda w: w > 0,
    "complex64 numbers": lambda w: w.to(torch.complex64),
    "quint8 numbers": lambda w: torch.quantize_per_tensor(w, 0.1, 10, torch.quint8),
    "sparse numbers": lambda w: w.to_sparse(),
    "float8_e5m2 numbers": lambda w: w.to(torch.float8_e5m2),  # the scales that it needs are elsewhere
    "a negative variance": lambda w: w - 2,
}


@pytest.mark.filterwarnings("ignore:.*quantiz.*:")
@pytest.mark.parametrize("words", list(ODD))
def test_weights_that_nothing_can_be_computed_with_are_refused(tmp_path, encoder, words):
    state, _ = contrastive_file((C, K), "linear")
    names = ["layer1.0.conv1.weight", "layer2.0.conv1.weight"] if "variance" not in words else ["bn1.running_var"]
    for name in names:
        entries, name = state["state_dict"], f"module.encoder_q.{name}"
        entries[name] = ODD[words](entries[name])
    path = tmp_path / "theirs.pth.tar"
    torch.save(state, path)
    sentence = refusal(encoder, path)
    holds = words if "numbers" in words or "variance" in words else "NaN or infinity"
    more = " (2 such tensors)" if len(names) > 1 else ""
    assert f"theirs.pth.tar cannot be used: {names[0]} holds {holds}{more}; take another checkpoint" in sentence
    with pytest.raises(UserError, match=f"{names[0]} holds {holds}"):
        open_backbone(str(path))


def test_what_is_not_read_need_not_be_sound(tmp_path, encoder):
    state, q = contrastive_file((C, K), "linear")
    for name in ("module.encoder_k.conv1.weight", "module.encoder_q.fc.weight", "module.queue"):
        state["state_dict"][name].fill_(math.nan)
    torch.save(state, tmp_path / "theirs.pth.tar")
    load_backbone(encoder, str(tmp_path / "theirs.pth.tar"))
    assert_same_backbone(encoder, q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read(tmp_path, encoder, dtype):
    network = resnet().to(dtype)
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    load_backbone(encoder, str(tmp_path / "theirs.pth"))
    assert_same_backbone(encoder, network.float())


def test_lightnings_dictionary_of_settings_needs_no_lightning(tmp_path, monkeypatch):
    package, module = types.ModuleType("lightning_fabric"), types.ModuleType("lightning_fabric.utilities.data")
    made = type("AttributeDict", (dict,), {"__module__": module.__name__})
    module.AttributeDict = made
    state, _ = LAYOUTS["lightly"]()
    with monkeypatch.context() as patch:
        for known in (package, types.ModuleType("lightning_fabric.utilities"), module):
            patch.setitem(sys.modules, known.__name__, known)
        torch.save({**state, "hyper_parameters": made(batch_size_per_device=4)}, tmp_path / "theirs.ckpt")
    assert open_file(str(tmp_path / "theirs.ckpt")).state["hyper_parameters"] == {"batch_size_per_device": 4}


@pytest.mark.parametrize("arch", RESNETS.values())
def test_every_resnet_is_known_by_its_tensors(arch):
    with torch.device("meta"):
        tensors = torchvision.models.get_model(arch).state_dict()
    assert arch_of(File("weights.pth", {}, dict(tensors), {})) == arch


def test_a_resnet_without_its_first_convolutions_is_of_no_known_architecture():
    tensors = {name: value for name, value in resnet().state_dict().items() if "layer1.0.conv" not in name}
    assert arch_of(File("weights.pth", {}, tensors, {})) == ""


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_base_patch32_224", "vit_b_16", "vit_l_32", "vit_h_14"])
def test_every_vit_is_known_by_its_tensors(arch):
    with torch.device("meta"):
        tensors = build_encoder(arch, 10).state_dict()
    assert arch_of(File("weights.pth", {}, dict(tensors), {})) == arch


def test_an_architecture_that_is_neither_named_nor_known_is_asked_for(tmp_path):
    path = str(tmp_path / "weights.pth")
    trained = build_encoder("test_convnext", 10)
    torch.save(trained.state_dict(), path)
    with pytest.raises(UserError, match="give it by -a"):
        open_backbone(path)
    assert_same_backbone(open_backbone(path, "test_convnext").encoder, trained)


@pytest.mark.parametrize("layout", ["SupContrast", "MoCo v3", "lightly", "solo-learn"])
def test_keys_that_differ_are_named_in_every_layout(tmp_path, layout):
    state, _ = LAYOUTS[layout]()
    nest = state["model" if "model" in state else "state_dict"]
    lost = next(n for n in nest if n.endswith(("layer4.1.conv2.weight", "7.1.conv2.weight")) and "momentum" not in n)
    nest[lost.replace("conv2", "conv9")] = nest.pop(lost)
    torch.save(state, tmp_path / "theirs.ckpt")
    with pytest.raises(UserError) as caught:
        open_backbone(str(tmp_path / "theirs.ckpt"))
    assert "lacks layer4.1.conv2.weight and has unknown layer4.1.conv9.weight" in str(caught.value)
