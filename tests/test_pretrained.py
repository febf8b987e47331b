"""Files in the layouts of this field's projects, built here key by key, load; what does not fit is named."""

import argparse
import functools
import importlib
import json
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
from torch import nn

import moco.options as flags
from moco import distributed
from moco.encoder import backbone_keys, build_encoder, features
from moco.errors import UserError
from moco.pretrained import RESNETS, File, arch_of, load_backbone, open_backbone, open_file

K, C = 12, 128


def resnet(head: nn.Module | None = None, arch: str = "resnet18") -> nn.Module:
    """torchvision's own network, as upstream builds it, with random running statistics."""
    network = torchvision.models.get_model(arch, weights=None, num_classes=C)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    if head is not None:
        network.fc = head
    return network


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
    words = load_backbone(encoder, path, "resnet18")
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
    words = load_backbone(encoder, "torchvision:IMAGENET1K_V1", "resnet18")
    assert_same_backbone(encoder, network)
    assert "torchvision:IMAGENET1K_V1" in words
    assert asked == [(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url, True, True)]
    assert "it has IMAGENET1K_V1" in refusal(encoder, "torchvision:V9")
    assert "no weights for -a vit_tiny" in refusal(encoder, "torchvision:IMAGENET1K_V1", "vit_tiny_patch16_224")


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


def prefixed(prefix: str, tensors: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def small(padding: int = 1) -> nn.Module:
    network = resnet()
    network.conv1 = nn.Conv2d(3, 64, 3, padding=padding, bias=False)
    network.maxpool = nn.Identity()
    return network


def without_head(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}


def positions(network: nn.Module) -> nn.Sequential:
    """What lightly's users write: a network's children without its classifier."""
    return nn.Sequential(*list(network.children())[:-1])


def supcontrast(wrapper: str = "") -> tuple[dict, Callable]:
    shortcuts = {name.replace("downsample", "shortcut"): value for name, value in without_head(small()).items()}
    head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128)).state_dict()
    model = {**prefixed(f"encoder.{wrapper}", shortcuts), **prefixed("head.", head)}
    flags = argparse.Namespace(model="resnet18", dataset="cifar10", lr_decay_epochs=[700, 800])
    return {"opt": flags, "model": model, "optimizer": {}, "epoch": 1000}, lambda x: by_hand(x, shortcuts)


def moco_v3() -> tuple[dict, Callable]:
    network = resnet(nn.Identity())
    head = nn.Sequential(nn.Linear(512, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16, bias=False))
    entries = {**network.state_dict(), **prefixed("fc.", head.state_dict())}
    other = prefixed("module.momentum_encoder.", resnet().state_dict())
    entries = {**prefixed("module.base_encoder.", entries), **other, "module.predictor.0.weight": torch.zeros(8, 8)}
    return {"epoch": 300, "arch": "resnet18", "state_dict": entries}, network


def moco_v3_vit() -> tuple[dict, Callable]:
    import timm

    network = timm.create_model("vit_small_patch16_224", num_heads=12, img_size=32, depth=12, num_classes=0)
    with torch.no_grad():
        network.pos_embed[0, 0] = 0  # its positions are sines and cosines, the class token has none
    head = {"head.0.weight": torch.zeros(8, 384), "head.1.running_mean": torch.zeros(8)}
    entries = prefixed("module.base_encoder.", {**network.state_dict(), **head})
    return {"epoch": 300, "arch": "vit_small", "state_dict": entries}, network


def barlow_twins(whole: bool) -> tuple[dict, Callable]:
    network = resnet(nn.Identity())
    if not whole:
        return dict(network.state_dict()), network
    extra = {"module.projector.0.weight": torch.zeros(8, 512), "module.bn.running_mean": torch.zeros(8)}
    return {"epoch": 1000, "model": {**prefixed("module.backbone.", network.state_dict()), **extra}}, network


def lightly(own: bool) -> tuple[dict, Callable]:
    if own:  # its ResNet for small images has no module for ReLU and pooling
        network = small()
        names = {"conv1": "0", "bn1": "1", "layer1": "2", "layer2": "3", "layer3": "4", "layer4": "5"}
        shortcuts = {name.replace("downsample", "shortcut"): value for name, value in without_head(network).items()}
        entries = {names[n.split(".")[0]] + n[n.index(".") :]: value for n, value in shortcuts.items()}
    else:
        network = resnet(nn.Identity())
        entries = positions(network).state_dict()
    momentum = prefixed("backbone_momentum.", {name: value + 1 for name, value in entries.items()})
    state = {**prefixed("backbone.", entries), **momentum, "projection_head.layers.0.weight": torch.zeros(8, 512)}
    return {"epoch": 9, "pytorch-lightning_version": "2.4.0", "state_dict": state}, network


def solo_learn(prefix: str) -> tuple[dict, Callable]:
    network = small(padding=2)
    head = {"classifier.weight": torch.zeros(10, 512), "classifier.bias": torch.zeros(10)}
    head |= {"queue": torch.zeros(2, 8, 16), "projector.0.weight": torch.zeros(8, 512)}
    state = {**prefixed(f"{prefix}.", without_head(network)), **head}
    state |= prefixed(f"momentum_{prefix}.", {name: value + 1 for name, value in without_head(network).items()})
    return {"epoch": 999, "pytorch-lightning_version": "1.6.4", "state_dict": state}, network


LAYOUTS = {
    "SupContrast": supcontrast,
    "SupContrast, several GPUs": functools.partial(supcontrast, "module."),
    "MoCo v3": moco_v3,
    "MoCo v3, ViT-S": moco_v3_vit,
    "Barlow Twins": functools.partial(barlow_twins, True),
    "Barlow Twins, backbone": functools.partial(barlow_twins, False),
    "lightly": functools.partial(lightly, False),
    "lightly, its own ResNet": functools.partial(lightly, True),
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
    assert "read " in load_backbone(encoder, path, found.arch)
    assert torch.equal(features(encoder, images), features(found.encoder, images))


def drop_head(network: nn.Module) -> nn.Module:
    if hasattr(network, "fc"):
        network.fc = nn.Identity()
    return network


def test_what_tensors_cannot_tell_is_said(tmp_path):
    for make, words in ((LAYOUTS["solo-learn"], "pads by 2"), (moco_v3_vit, "12 attention heads")):
        torch.save(make()[0], tmp_path / "theirs.ckpt")
        assert words in open_backbone(str(tmp_path / "theirs.ckpt")).words


@pytest.mark.parametrize("program", ["lincls", "semisup"])
def test_what_tensors_cannot_tell_stays_with_a_probes_and_a_fine_tunings_file(program, tmp_path, image_folder):
    """Evaluated later without --pretrained, and read as an encoder, the network is the one that was trained."""
    torch.save(LAYOUTS["solo-learn"]()[0], tmp_path / "theirs.ckpt")
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


def test_lightnings_dictionary_of_settings_needs_no_lightning(tmp_path, monkeypatch):
    package, module = types.ModuleType("lightning_fabric"), types.ModuleType("lightning_fabric.utilities.data")
    made = type("AttributeDict", (dict,), {"__module__": module.__name__})
    module.AttributeDict = made
    state, _ = lightly(False)
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
