"""Backbones by name, from torchvision and timm, with the stem, channels and projection head that a run needs.

Parameter names are the library's own, so checkpoints keep upstream's layout (``encoder_q.conv1.weight``,
``encoder_q.fc.0.weight``) and a backbone loads back into its library.

Legend: N images, C feature width, F backbone feature width.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moco import distributed, seeding
from moco.errors import UserError, one_line

SMALL = 64  # images up to this size get the 3x3 stem by default: a 7x7 stride-4 stem leaves 32 px with 8 px
_TUPLE_OUTPUT = {"inception_v3", "googlenet"}  # they return auxiliary outputs while training


def build_encoder(
    arch: str, dim: int, *, mlp: bool = False, stem: str = "auto", size: int = 224, in_chans: int = 3,
    drop_path: float = 0.0, any_size: bool = False,
) -> nn.Module:  # fmt: skip
    """A network whose output is (N, dim). It remembers its stem, size and channels as ``built``.

    Args:
        arch: a torchvision name (looked up first) or a timm name; ``timm/NAME`` skips torchvision.
        dim: output width (128 for the contrastive head, the number of classes for a probe).
        mlp: put Linear ReLU before the last layer (MoCo v2's head).
        stem: "imagenet" (7x7 and max-pool), "cifar" (3x3, no pooling) or "auto" (cifar up to 64 px).
        size: side of the square input in pixels.
        in_chans: of the images; other than 3, the first convolution is a new one.
        drop_path: rate of stochastic depth of the last block; those below it have less, in proportion (timm alone).
        any_size: let timm's ViTs take images of other sizes too, their positions interpolated; see ``check_reads``.

    Raises:
        UserError: unknown name, or an architecture that cannot take the stem, size or head.
    """
    cifar = size <= SMALL if stem == "auto" else stem == "cifar"
    if arch in torchvision_names():
        if drop_path:
            raise UserError(f"--drop-path is for timm's networks: write timm/{arch} if timm has it, or leave it out.")
        encoder, head = _from_torchvision(arch, dim, in_chans, size)
    else:
        options = {"drop_path_rate": drop_path} if drop_path else {}
        encoder, head = _from_timm(arch, dim, in_chans, size, options, any_size)
    changed = _use_small_stem(encoder, in_chans) if cifar else False
    if stem == "cifar" and not changed:
        raise UserError(f"--stem cifar is for ResNet-like networks with conv1 and maxpool; {arch} has none.")
    encoder.head_name = head  # type: ignore[assignment]
    built = {"stem": "cifar" if changed else "imagenet", "size": size, "channels": in_chans}
    encoder.built = built  # type: ignore[assignment]
    if mlp:
        encoder.set_submodule(head, mlp_head(encoder.get_submodule(head)))
    return encoder


@functools.cache
def torchvision_names() -> frozenset[str]:
    """Classification networks of torchvision."""
    return frozenset(torchvision.models.list_models(module=torchvision.models)) - _TUPLE_OUTPUT


def _from_torchvision(arch: str, dim: int, in_chans: int, size: int) -> tuple[nn.Module, str]:
    options = {"image_size": size} if arch.startswith("vit_") else {}
    try:
        encoder = torchvision.models.get_model(arch, weights=None, num_classes=dim, **options)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{arch} cannot be built for {size} px images: {error}") from error
    heads = [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear) and m.out_features == dim]
    if not heads:
        raise UserError(f"{arch} has no linear classifier to replace by a projection head; choose another -a.")
    if in_chans != 3:
        name, conv = next((n, m) for n, m in encoder.named_modules() if isinstance(m, nn.Conv2d))
        encoder.set_submodule(name, _conv_like(conv, in_channels=in_chans))
    return encoder, heads[-1]


def _from_timm(
    arch: str, dim: int, in_chans: int, size: int, options: dict[str, float], any_size: bool
) -> tuple[nn.Module, str]:
    import timm  # a second of import time that torchvision's networks do not need

    name = arch.removeprefix("timm/")
    if not timm.is_model(name):
        raise UserError(_unknown_name(arch, timm.list_models()))
    config = timm.get_pretrained_cfg(name)
    fixed = bool(config and config.fixed_input_size)
    options |= {"img_size": size} if fixed else {}
    create = functools.partial(timm.create_model, name, pretrained=False, in_chans=in_chans, **options)
    try:
        if fixed and any_size and _has_option(create, "dynamic_img_size"):
            create = functools.partial(create, dynamic_img_size=True)
        encoder = create(num_classes=dim)
        head = getattr(encoder, "pretrained_cfg", {}).get("classifier")
        module = encoder.get_submodule(head) if isinstance(head, str) else None
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            return encoder, str(head)
        backbone = create(num_classes=0)
        return Headed(backbone, _width(backbone, in_chans, size), dim), "fc"
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"{arch} cannot be built for {size} px images with {in_chans} channels: {error}") from error


def _has_option(create: Callable[..., nn.Module], name: str) -> bool:
    """Whether one of timm's networks takes this option, which its constructor alone knows."""
    try:
        with torch.device("meta"):
            create(**{name: True})
    except TypeError:
        return False
    return True


def check_reads(encoder: nn.Module, arch: str, channels: int, size: int) -> None:
    """UserError where a network does not take images of another ``size`` than its own. Computes nothing."""
    try:
        copy.deepcopy(encoder).to("meta").train()(torch.empty(2, channels, size, size, device="meta"))
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"-a {arch} does not read small crops of {size} px ({one_line(error)}): choose another --local-crop-size, "
            "a ResNet or one of timm's ViTs, or leave --local-crops out."
        ) from error


def _unknown_name(arch: str, timms: list[str]) -> str:
    """A sentence on a name that no network has, with the names that are close, other cases and signs aside."""

    def plain(name: str) -> str:
        return re.sub("[^a-z0-9]", "", name.lower())

    prefix = "timm/" if arch.startswith("timm/") else ""
    known = {
        plain(name): name for name in [*timms, *(() if prefix else sorted(torchvision_names()))]
    }  # many are in both
    found = difflib.get_close_matches(plain(arch.removeprefix("timm/")), list(known), 3)
    close = ", ".join(prefix + known[name] for name in found) or "resnet50, resnet18, vit_small_patch16_224"
    if arch in _TUPLE_OUTPUT:
        what = "torchvision's network of this name has more than one output in training, which no method here takes"
    else:
        what = "no torchvision or timm network has this name" if not prefix else "no timm network has this name"
    return f"-a {arch}: {what}; close ones: {close}."


@torch.no_grad()
def _width(backbone: nn.Module, in_chans: int, size: int) -> int:
    """F of a backbone that returns features."""
    width = backbone.eval()(torch.zeros(2, in_chans, size, size)).shape[1]
    backbone.train()
    return width


class Headed(nn.Module):
    """A backbone that returns features (N, F), with a plain ``fc``: its own classifier is not one linear layer (two
    heads, a fused norm), or it has none."""

    def __init__(self, backbone: nn.Module, width: int, dim: int):
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(width, dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.backbone(images).flatten(1))


def _conv_like(conv: nn.Conv2d, **changes) -> nn.Conv2d:
    same = {name: getattr(conv, name) for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding")}
    made = nn.Conv2d(**{**same, "bias": conv.bias is not None, **changes})
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNets are
    return made


def _use_small_stem(encoder: nn.Module, in_chans: int) -> bool:
    """3x3 stride-1 first convolution and no max-pool; False when there is no such stem."""
    conv, pool = getattr(encoder, "conv1", None), getattr(encoder, "maxpool", None)
    if not isinstance(conv, nn.Conv2d) or pool is None:
        return False
    encoder.conv1 = _conv_like(conv, in_channels=in_chans, kernel_size=3, stride=1, padding=1)
    encoder.maxpool = nn.Identity()
    return True


def mlp_head(last: nn.Module) -> nn.Sequential:
    """MoCo v2's head: Linear(F, F) ReLU Linear(F, C); 1x1 convolutions where the network's classifier is one."""
    assert isinstance(last, (nn.Linear, nn.Conv2d))
    width = last.weight.shape[1]
    hidden = nn.Conv2d(width, width, 1) if isinstance(last, nn.Conv2d) else nn.Linear(width, width)
    return nn.Sequential(hidden, nn.ReLU(), last)


def use_heads(encoder: nn.Module, heads: int) -> None:
    """Attention of a timm ViT in so many heads; no tensor tells how many there are. UserError: its width is not so
    many equal parts."""
    for module in encoder.modules():
        if hasattr(module, "num_heads") and hasattr(module, "qkv"):
            if heads < 1 or module.qkv.in_features % heads:  # type: ignore[operator, union-attr]
                raise UserError(f"{heads} attention heads do not divide a width of {module.qkv.in_features}.")  # type: ignore[union-attr]
            module.num_heads = heads  # type: ignore[assignment]
            module.head_dim = module.qkv.in_features // heads  # type: ignore[assignment, union-attr]
            module.scale = module.head_dim**-0.5  # type: ignore[assignment, operator]


# -------------------------------------------------------------------------------------------------- features


def features(encoder: nn.Module, images: Tensor) -> Tensor:
    """What enters the head: (N, F) encoder features of (N, channels, height, width) images."""
    return around_head(encoder, images)[0]


def around_head(encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the head, (N, F), and what leaves it, (N, C), in one pass of (N, channels, height, width) images."""
    caught: list[Tensor] = []
    head = encoder.get_submodule(head_of(encoder))
    with head.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0])):
        output = encoder(images)
    return caught[0].flatten(1), output


def head_of(encoder: nn.Module) -> str:
    """The name of the head's module inside the encoder: ``fc`` for ResNets."""
    return str(encoder.head_name)


def feature_width(encoder: nn.Module) -> int:
    """F: what the head's first layer takes."""
    layers = encoder.get_submodule(head_of(encoder)).modules()
    return next(m.weight.shape[1] for m in layers if isinstance(m, (nn.Linear, nn.Conv2d)))


def input_dtype(encoder: nn.Module, device_type: str) -> torch.dtype:
    """In what images may come: on a GPU autocast's type, if the first layer with weights rounds them to it anyway.

    Convolutions and linear layers do. Elsewhere float32.
    """
    layers = (m for m in encoder.modules() if not any(True for _ in m.children()))
    first = next((m for m in layers if any(True for _ in m.parameters(recurse=False))), None)
    rounds = device_type == "cuda" and torch.is_autocast_enabled("cuda") and isinstance(first, (nn.Conv2d, nn.Linear))
    return torch.get_autocast_dtype("cuda") if rounds else torch.float32


def new_classifier(encoder: nn.Module, seed: int) -> nn.Linear | nn.Conv2d:
    """The encoder's head, made a classifier that begins as published: weight normal with deviation .01, bias 0.

    Raises:
        UserError: the head is not one linear layer with a bias.
    """
    layer = encoder.get_submodule(head_of(encoder))
    if not isinstance(layer, (nn.Linear, nn.Conv2d)) or layer.bias is None:
        raise UserError("this -a has no classifier that is one linear layer with a bias; choose another.")
    first = torch.empty(layer.weight.shape).normal_(0.0, 0.01, generator=seeding.torch_generator("init", seed, 2))
    layer.weight.data.copy_(first)
    layer.bias.data.zero_()
    return layer


def backbone_keys(encoder: nn.Module) -> set[str]:
    """Names of the entries of the state dict that are not the head's."""
    prefix = head_of(encoder) + "."
    return {name for name in encoder.state_dict() if not name.startswith(prefix)}


@torch.no_grad()
def strided_point(encoder: nn.Module, channels: int, size: int) -> str:
    """The name of a strided convolution wider than 1x1 whose input is a single pixel, or an empty string.

    On CPUs, torch 2.14's oneDNN returns uninitialised weight gradients for it in bf16 and fp16.
    """
    found: list[str] = []

    def look(name: str, conv: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[-2:] == (1, 1) and max(conv.stride) > 1 and max(conv.kernel_size) > 1:
            found.append(name)

    with contextlib.ExitStack() as afterwards:
        afterwards.callback(encoder.train, encoder.training)
        for name, module in encoder.named_modules():
            if isinstance(module, nn.Conv2d):
                afterwards.enter_context(module.register_forward_pre_hook(functools.partial(look, name)))
        encoder.eval()(torch.zeros(2, channels, size, size))
    return found[0] if found else ""


# ---------------------------------------------------------------------------------------------- recomputation


def recompute_blocks(encoder: nn.Module) -> None:
    """Keep only what enters each block for the backward pass and compute the rest again there: less memory, more time.

    Blocks are what the network repeats: the members of its outermost ``nn.Sequential``s that are all of one class.
    Gradients, statistics and random numbers stay what they were.

    Raises:
        UserError: the network has no such blocks.
    """
    stages = [m for m in encoder.modules() if isinstance(m, nn.Sequential)]
    inside = {id(x) for stage in stages for x in stage.modules() if x is not stage}
    repeated = [m for m in stages if id(m) not in inside and len({type(block) for block in m}) == 1]
    blocks = [block for stage in repeated for block in stage if any(True for _ in block.parameters())]
    if not blocks:
        raise UserError("--recompute needs a network of repeated blocks, such as a ResNet or a ViT; leave it out.")
    for block in blocks:
        block.forward = functools.partial(_recomputed, block, block.forward)  # type: ignore[method-assign]


def _recomputed(block: nn.Module, forward: Callable, *inputs: Tensor) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(
        forward, *inputs, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _same_statistics(block))
    )


@contextlib.contextmanager
def _same_statistics(block: nn.Module) -> Iterator[None]:
    """What runs in here leaves BatchNorm's running statistics as they were: the second time must not count."""
    buffers = list(block.buffers())
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


# ------------------------------------------------------------------------------------------------ compiling


def compile_encoders(encoders: list[nn.Module], mode: str, several: bool = False) -> None:
    """Have torch compile them when they are first called; ``mode`` is torch.compile's.

    several: images of several sizes come, for each of which they are compiled: one graph for all sizes, which torch
    would try at the second one, fails in torch 2.14.

    Raises:
        UserError: this machine cannot compile at all (no C++ compiler, no Triton).
    """
    try:  # the least there is to generate, before minutes of data and networks go into a step that fails
        torch.compile(torch.neg)(torch.zeros(8, device=distributed.device()))
    except (RuntimeError, ImportError, OSError) as error:
        said = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
        reason = said[0] if said else type(error).__name__
        raise UserError(f"--compile: torch.compile does not work on this machine ({reason}); leave it out.") from error
    for encoder in encoders:
        encoder.compile(mode=mode, **({"dynamic": False} if several else {}))
