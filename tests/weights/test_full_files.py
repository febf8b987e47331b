"""Whole files of DINO, iBOT, DINOv2, MAE, SwAV, BYOL, VICReg and BEiT-3 give the encoder that those projects evaluate.

The networks are timm's and torchvision's own, whose modules compute what the projects' own do; names and nesting are
the projects'. Sizes are cut to two blocks or to ResNet-18 where the layout does not depend on them.
"""

import argparse
import math
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm
import torch
from support.layouts import prefixed, resnet, without_head
from torch import nn

from moco.errors import UserError
from moco.models.encoder import build_encoder, features
from moco.weights.layouts import Submodule, open_file
from moco.weights.read import load_backbone, open_backbone
from moco.weights.translate import translate

TINY = "vit_tiny_patch16_224"


def vit(arch: str = TINY, size: int = 32, **options) -> nn.Module:
    """timm's own, with random scales and without a head."""
    network = timm.create_model(arch, img_size=size, num_classes=0, **options).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0, 0.05)
    return network


def noise(network: nn.Module) -> dict[str, torch.Tensor]:
    """Entries of the same names and shapes with other numbers."""
    return {name: torch.randn_like(v) if v.is_floating_point() else v for name, v in network.state_dict().items()}


def cnn() -> nn.Module:
    network = resnet()
    network.fc = nn.Identity()
    return network.eval()


def dino(wrapped: bool = False) -> tuple[dict, nn.Module]:
    """main_dino.py's: a teacher with BatchNorm is wrapped in DistributedDataParallel, a ViT is not."""
    network = cnn() if wrapped else vit()
    head = {"head.mlp.0.weight": torch.zeros(8, 8), "head.last_layer.weight_g": torch.ones(8, 1)}
    student = prefixed("module.", {**prefixed("backbone.", noise(network)), **head})
    teacher = prefixed("module." if wrapped else "", {**prefixed("backbone.", network.state_dict()), **head})
    more = {"args": argparse.Namespace(arch="vit_tiny"), "dino_loss": {"center": torch.zeros(1, 8)}}
    return {"student": student, "teacher": teacher, "optimizer": {}, "epoch": 3, **more}, network


def ibot(scaled: bool) -> tuple[dict, nn.Module]:
    """main_ibot.py's: the student alone has a token for what is masked, and either may have layer scale."""
    network = vit(init_values=0.1 if scaled else None)
    named = {
        n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for n, v in network.state_dict().items()
    }
    student = {**{name: torch.randn_like(v) for name, v in named.items()}, "masked_embed": torch.zeros(1, 192)}
    head = {"head.mlp.0.weight": torch.zeros(8, 8), "head.mlp2.0.weight": torch.zeros(8, 8)}
    return {
        "student": {**prefixed("module.backbone.", student), **head},
        "teacher": {**prefixed("backbone.", named), **head},
    }, network


def ibots_student() -> tuple[dict, nn.Module]:
    """What extract_backbone_weights.py makes of a student."""
    network = vit()
    return {**network.state_dict(), "masked_embed": torch.zeros(1, 192)}, network


def dinov2(registers: int, chunks: int = 0) -> tuple[dict, nn.Module]:
    """The published backbone, and with chunks the teacher_checkpoint.pth that its training writes."""
    arch = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    network = vit(arch, 56)
    state = {**network.state_dict(), "mask_token": torch.zeros(1, 384)}
    if registers:  # there the class token has a position of its own
        state["register_tokens"], place = state.pop("reg_token"), torch.randn(1, 1, 384)
        state["cls_token"] = state["cls_token"] - place
        state["pos_embed"] = torch.cat((place, state["pos_embed"]), 1)
    if not chunks:
        return state, network
    chunked = {
        n: n if not n.startswith("blocks.") else f"blocks.{int(n.split('.')[1]) * chunks // 12}.{n[7:]}" for n in state
    }
    state = {
        **prefixed("backbone.", {chunked[n]: v for n, v in state.items()}),
        "dino_head.last_layer.weight": torch.ones(4, 4),
    }
    return {"teacher": state}, network


def dinov2s_model() -> tuple[dict, nn.Module]:
    """All of a training's networks in one dictionary, by prefixes."""
    state, network = dinov2(0)
    student = {name: torch.randn_like(value) for name, value in state.items()}
    return {
        "model": {**prefixed("student.backbone.", student), **prefixed("teacher.backbone.", state)},
        "iteration": 9,
    }, network


def mae() -> tuple[dict, nn.Module]:
    network = vit()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8),
               "decoder_embed.weight": torch.zeros(8, 192), "decoder_blocks.0.norm1.weight": torch.zeros(8),
               "decoder_norm.weight": torch.zeros(8), "decoder_pred.weight": torch.zeros(8, 8)}  # fmt: skip
    return {"model": {**network.state_dict(), **decoder}, "optimizer": {}, "epoch": 799, "scaler": {}}, network


def swav(nested: bool, prototypes: str = "prototypes.weight") -> tuple[dict, nn.Module]:
    network = cnn()
    head = {"projection_head.0.weight": torch.zeros(8, 512), "projection_head.1.running_mean": torch.zeros(8)}
    state = prefixed("module.", {**network.state_dict(), **head, prototypes: torch.zeros(3, 8)})
    return {"epoch": 5, "state_dict": state, "arch": "resnet18"} if nested else state, network


def byol() -> tuple[dict, nn.Module]:
    """byol-pytorch's learner: ``net`` is the online network's own, once more."""
    network = cnn()
    online = {**prefixed("net.", network.state_dict()), "projector.0.weight": torch.zeros(8, 512)}
    target = prefixed("target_encoder.net.", noise(network))
    state = {**prefixed("net.", network.state_dict()), **prefixed("online_encoder.", online), **target}
    return {**state, "online_predictor.0.weight": torch.zeros(8, 8)}, network


def byols_dictionaries() -> tuple[dict, nn.Module]:
    """PyTorch-BYOL's: a dictionary a network, and the encoder's modules by position."""
    network = cnn()
    positions = {"conv1": "0", "bn1": "1", **{f"layer{i}": str(i + 3) for i in range(1, 5)}}
    moved = {f"encoder.{positions[n.split('.')[0]]}.{n.partition('.')[2]}": v for n, v in network.state_dict().items()}
    target = {name: value + 1 for name, value in moved.items()}
    return {
        "target_network_state_dict": target,
        "online_network_state_dict": moved,
        "optimizer_state_dict": {},
    }, network


def vicreg() -> tuple[dict, nn.Module]:
    network = cnn()
    projector = {"module.projector.0.weight": torch.zeros(8, 512), "module.projector.1.running_mean": torch.zeros(8)}
    return {"epoch": 9, "model": {**prefixed("module.backbone.", network.state_dict()), **projector}}, network


def plainly(wrapper: str, prefix: str) -> tuple[dict, nn.Module]:
    network = cnn()
    return {wrapper: prefixed(prefix, network.state_dict()), "epoch": 1, "config": {"lr": 0.1}}, network


def beside_an_average(name: str) -> tuple[dict, nn.Module]:
    network = cnn()
    return {"model": network.state_dict(), name: prefixed("module.", noise(network))}, network


def several_networks() -> tuple[dict, nn.Module]:
    network = cnn()
    other = {"0.weight": torch.zeros(8, 512), "1.weight": torch.zeros(8)}
    return {
        "projector": other,
        "backbone": without_head(network),
        "classifier": {"weight": torch.zeros(3, 512)},
    }, network


GUESSES = {  # what is read and what is left, where a file has several encoders
    "DINO": ("teacher", "student"),
    "DINO, ResNet": ("teacher", "student"),
    "iBOT": ("teacher", "student"),
    "iBOT, layer scale": ("teacher", "student"),
    "DINOv2, both": ("teacher.backbone", "student.backbone"),
    "BYOL, byol-pytorch": ("online_encoder.net", "target_encoder.net"),
    "BYOL, a dictionary each": ("online_network_state_dict", "target_network_state_dict"),
    "timm with an average": ("model", "model_ema"),
}
LAYOUTS: dict[str, tuple[Callable, str, str]] = {  # each with its architecture and where the encoder was
    "DINO": (dino, TINY, "teacher.backbone"),
    "DINO, ResNet": (lambda: dino(True), "resnet18", "teacher.backbone"),
    "iBOT": (lambda: ibot(False), TINY, "teacher.backbone"),
    "iBOT, layer scale": (lambda: ibot(True), TINY, "teacher.backbone"),
    "iBOT, student alone": (ibots_student, TINY, ""),
    "DINOv2": (lambda: dinov2(0), "vit_small_patch14_dinov2", ""),
    "DINOv2, registers": (lambda: dinov2(4), "vit_small_patch14_reg4_dinov2", ""),
    "DINOv2, teacher": (lambda: dinov2(0, 4), "vit_small_patch14_dinov2", "teacher.backbone"),
    "DINOv2, both": (dinov2s_model, "vit_small_patch14_dinov2", "teacher.backbone"),
    "MAE": (mae, TINY, ""),
    "SwAV": (lambda: swav(True), "resnet18", ""),
    "SwAV, published": (lambda: swav(False), "resnet18", ""),
    "DeepCluster v2": (lambda: swav(True, "prototypes.prototypes0.weight"), "resnet18", ""),
    "BYOL, byol-pytorch": (byol, "resnet18", "online_encoder.net"),
    "BYOL, a dictionary each": (byols_dictionaries, "resnet18", "online_network_state_dict.encoder"),
    "VICReg": (vicreg, "resnet18", "backbone"),
    "model_state_dict": (lambda: plainly("model_state_dict", ""), "resnet18", "model_state_dict"),
    "net, compiled": (lambda: plainly("net", "_orig_mod.module."), "resnet18", "net"),
    "Lightning": (lambda: plainly("state_dict", "model.backbone."), "resnet18", "model.backbone"),
    "VISSL": (lambda: plainly("trunk", "_feature_blocks."), "resnet18", "trunk._feature_blocks"),
    "timm with an average": (lambda: beside_an_average("model_ema"), "resnet18", ""),
    "several networks": (several_networks, "resnet18", "backbone"),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_full_file_gives_the_features_of_the_projects_own_encoder(tmp_path, layout):
    torch.manual_seed(1)
    make, arch, place = LAYOUTS[layout]
    state, theirs = make()
    path = str(tmp_path / "theirs.pth")
    torch.save(state, path)
    found = open_backbone(path)
    assert found.arch == arch
    assert f"from {place} of {path}" in found.summary if place else f"from {path}" in found.summary
    read, left = GUESSES.get(layout, ("", ""))
    assert (f"; a guess: {read} is read, and {left} in the file is not" in found.summary) == bool(read)
    side = 56 if layout.startswith("DINOv2") else 32
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(features(found.encoder, images), theirs(images), rtol=1e-5, atol=1e-5)


def wide(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: v.repeat_interleave(2, 0) if v.ndim else v for name, v in network.state_dict().items()}


REFUSED: dict[str, tuple[Callable[[], dict], str, str]] = {  # what is held, and the step
    "a linear evaluation's classifier": (
        lambda: {"state_dict": {"module.linear.weight": torch.zeros(3, 8), "module.linear.bias": torch.zeros(3)}},
        "linear", "the file that the encoder lies in"),
    "DINOv2's linear head": (
        lambda: {"weight": torch.zeros(3, 8), "bias": torch.zeros(3)},
        "weight, bias", "the file that the encoder lies in"),
    "SwAV's queue": (lambda: {"queue": torch.zeros(2, 3, 4)}, "queue", "the file that the encoder lies in"),
    "SwAV's RN50w2": (lambda: prefixed("module.", wide(cnn())), "2-2-2-2 blocks that begins with 128 channels",
                      "give a file of the usual width"),
    "DINOv3": (lambda: {"storage_tokens": torch.zeros(1, 4, 4), "patch_embed.proj.weight": torch.zeros(4, 3, 16, 16)},
               "DINOv3's ViT", "that timm publishes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(REFUSED))
def test_a_file_without_an_encoder_that_can_be_built_is_refused_by_what_it_holds(tmp_path, kind):
    make, held, step = REFUSED[kind]
    torch.save(make(), tmp_path / "theirs.pth")
    encoder = build_encoder("resnet18", 3, stem="imagenet")
    with pytest.raises(UserError) as caught:
        load_backbone(encoder, str(tmp_path / "theirs.pth"), "resnet18")
    assert held in str(caught.value) and step in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        open_backbone(str(tmp_path / "theirs.pth"))
    assert held in str(caught.value) and step in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_torch_did_not_write_is_told_from_a_damaged_file(tmp_path, protocol):
    (tmp_path / "byol.pkl").write_bytes(pickle.dumps({"online_params": {"w": [0.5]}}, protocol))
    with pytest.raises(
        UserError, match="a pickle that torch.save did not write, such as those of projects in JAX; save its"
    ):
        open_file(str(tmp_path / "byol.pkl"))


def cubic(values: torch.Tensor, place: float) -> torch.Tensor:
    """Convolution with the cubic kernel of R. Keys (1981) at a = -.75, which torch takes; the edges are repeated."""
    first = math.floor(place) - 1
    total = torch.zeros_like(values[0])
    for i in range(first, first + 4):
        x, a = abs(place - i), -0.75
        weight = (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)
        total += weight * values[min(max(i, 0), len(values) - 1)]
    return total


def test_dinov2s_positions_at_another_size_are_those_of_its_own_evaluation():
    """Its interpolate_pos_encoding as a loop: the centres of the new patches are 8 / (4 + .1) of the old ones apart."""
    torch.manual_seed(0)
    positions = torch.randn(1, 1 + 64, 2)
    own = {"pos_embed": torch.zeros(1, 1 + 16, 2), "blocks.0.ls1.gamma": torch.zeros(2)}
    entries = {"pos_embed": positions, "mask_token": torch.zeros(1, 2), "blocks.0.ls1.gamma": torch.zeros(2)}
    encoder = SimpleNamespace(state_dict=lambda: own)
    part, words = translate(encoder, Submodule("", entries))  # type: ignore[arg-type]
    found = part.entries["pos_embed"]
    assert "8x8 patches are interpolated to 4x4" in words and found.shape == (1, 17, 2)
    assert torch.equal(found[0, 0], positions[0, 0])
    grid, step = positions[0, 1:].reshape(8, 8, 2), 8 / 4.1
    for row in range(4):
        for column in range(4):
            of_rows = torch.stack([cubic(line, (column + 0.5) * step - 0.5) for line in grid])
            wanted = cubic(of_rows, (row + 0.5) * step - 0.5)
            torch.testing.assert_close(found[0, 1 + 4 * row + column], wanted, rtol=1e-4, atol=1e-4)
