"""Backbones by name, from torchvision and timm, with the stem, channels and projection head that a run needs.

Parameter names are the library's own, so checkpoints keep upstream's layout (``encoder_q.conv1.weight``,
``encoder_q.fc.0.weight``) and a backbone loads back into its library.

Legend: N images, C feature width, F backbone feature width, S splits of a batch.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moco import distributed, seeding
from moco.errors import UserError
from moco.kernels import norm

SMALL = 64  # images up to this size get the 3x3 stem by default: a 7x7 stride-4 stem leaves 32 px with 8 px
_TUPLE_OUTPUT = {"inception_v3", "googlenet"}  # they return auxiliary outputs while training


def build_encoder(
    arch: str, dim: int, *, mlp: bool = False, stem: str = "auto", size: int = 224, in_chans: int = 3,
    drop_path: float = 0.0,
) -> nn.Module:  # fmt: skip
    """A network whose output is (N, dim). It remembers its stem, size and channels as ``built``.

    Args:
        arch: a torchvision name (looked up first) or a timm name; ``timm/NAME`` skips torchvision.
        dim: output width (128 for the contrastive head, the number of classes for a probe).
        mlp: put Linear ReLU before the last layer (MoCo v2's head).
        stem: "imagenet" (7x7 and max-pool), "cifar" (3x3, no pooling) or "auto" (cifar up to 64 px).
        size: side of the square input in pixels.
        in_chans: 1 or 3.
        drop_path: rate of stochastic depth of the last block; those below it have less, in proportion (timm alone).

    Raises:
        UserError: unknown name, or an architecture that cannot take the stem, size or head.
    """
    cifar = size <= SMALL if stem == "auto" else stem == "cifar"
    if arch in torchvision_names():
        if drop_path:
            raise UserError(f"--drop-path is for timm's networks: write timm/{arch} if timm has it, or leave it out.")
        encoder, head = _from_torchvision(arch, dim, in_chans, size)
    else:
        encoder, head = _from_timm(arch, dim, in_chans, size, drop_path)
    changed = _use_small_stem(encoder, in_chans) if cifar else False
    if stem == "cifar" and not changed:
        raise UserError(f"--stem cifar is for ResNet-like networks with conv1 and maxpool; {arch} has none.")
    encoder.head_name = head  # type: ignore[assignment]
    shape = {"stem": "cifar" if changed else "imagenet", "size": size, "channels": in_chans}
    encoder.built = shape  # type: ignore[assignment]
    if mlp:
        _replace(encoder, head, _mlp_head(encoder.get_submodule(head)))
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
        _replace(encoder, name, _conv_like(conv, in_channels=in_chans))
    return encoder, heads[-1]


def _from_timm(arch: str, dim: int, in_chans: int, size: int, drop_path: float = 0.0) -> tuple[nn.Module, str]:
    import timm  # a second of import time that torchvision's networks do not need

    name = arch.removeprefix("timm/")
    if not timm.is_model(name):
        known = [*torchvision_names(), *timm.list_models()]
        close = ", ".join(difflib.get_close_matches(name, known, 3)) or "resnet50, resnet18, vit_small_patch16_224"
        raise UserError(f"-a {arch}: no torchvision or timm network has this name; close ones: {close}.")
    config = timm.get_pretrained_cfg(name)
    fixed = bool(config and config.fixed_input_size)
    options: dict[str, float] = {"img_size": size} if fixed else {}
    options |= {"drop_path_rate": drop_path} if drop_path else {}
    create = functools.partial(timm.create_model, name, pretrained=False, in_chans=in_chans, **options)
    try:
        encoder = create(num_classes=dim)
        head = getattr(encoder, "pretrained_cfg", {}).get("classifier")
        module = encoder.get_submodule(head) if isinstance(head, str) else None
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            return encoder, str(head)
        return Headed(create(num_classes=0), dim, in_chans, size), "fc"
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"{arch} cannot be built for {size} px images with {in_chans} channels: {error}") from error


class Headed(nn.Module):
    """A backbone whose own classifier is not one linear layer (two heads, a fused norm), with a plain ``fc``."""

    def __init__(self, backbone: nn.Module, dim: int, in_chans: int, size: int):
        super().__init__()
        self.backbone = backbone.eval()
        with torch.no_grad():
            width = backbone(torch.zeros(2, in_chans, size, size)).shape[1]
        self.backbone.train()
        self.fc = nn.Linear(width, dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.backbone(images))


def _conv_like(conv: nn.Conv2d, **changes) -> nn.Conv2d:
    settings = {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "bias": conv.bias is not None,
    }
    made = nn.Conv2d(**{**settings, **changes})
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


def _mlp_head(last: nn.Module) -> nn.Sequential:
    """MoCo v2's head: Linear(F, F) ReLU Linear(F, C); 1x1 convolutions where the network's classifier is one."""
    if isinstance(last, nn.Conv2d):
        hidden: nn.Module = nn.Conv2d(last.in_channels, last.in_channels, 1)
    else:
        assert isinstance(last, nn.Linear)
        hidden = nn.Linear(last.in_features, last.in_features)
    return nn.Sequential(hidden, nn.ReLU(), last)


def _replace(root: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    root.get_submodule(parent)._modules[leaf] = new  # also right for names that are numbers (Sequential)


# -------------------------------------------------------------------------------------------------- features


def features(encoder: nn.Module, images: Tensor) -> Tensor:
    """What enters the head: (N, F) encoder features of (N, channels, height, width) images."""
    return around_head(encoder, images)[0]


def around_head(encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the head, (N, F), and what leaves it, (N, C), in one pass of (N, channels, height, width) images."""
    caught: list[Tensor] = []
    head = encoder.get_submodule(head_of(encoder))
    handle = head.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    try:
        output = encoder(images)
    finally:
        handle.remove()
    return caught[0].flatten(1), output


def head_of(encoder: nn.Module) -> str:
    """The name of the head's module inside the encoder: ``fc`` for ResNets."""
    return str(encoder.head_name)


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

    convs = [(name, m) for name, m in encoder.named_modules() if isinstance(m, nn.Conv2d)]
    handles = [m.register_forward_pre_hook(functools.partial(look, name)) for name, m in convs]
    training = encoder.training
    try:
        encoder.eval()(torch.zeros(2, channels, size, size))
    finally:
        encoder.train(training)
        for handle in handles:
            handle.remove()
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


# ------------------------------------------------------------------------------------------------ BatchNorm


def has_batchnorm(encoder: nn.Module) -> bool:
    """Whether statistics over the batch can leak which images belong together."""
    return any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())


def split_batchnorm(encoder: nn.Module, splits: int) -> nn.Module:
    """Let every BatchNorm2d see each of ``splits`` parts of the batch by itself, as several GPUs would.

    With one process there is no other process to shuffle with; the split is what MoCo's own one-GPU code uses.
    The state dict does not change. Works on plain and on timm's BatchNorm layers.
    """
    if splits > 1:
        for name, module in list(encoder.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                _replace(encoder, name, _as_split(module, splits))
    return encoder


def _as_split(norm: nn.BatchNorm2d, splits: int) -> nn.BatchNorm2d:
    return _take_over(SplitBatchNorm2d(norm.num_features, splits, norm.eps, norm.momentum), norm)


def _take_over(made: nn.BatchNorm2d, norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    # The class changes and the tensors stay: a copy would have to know each library's constructor.
    after = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    made.eps, made.momentum = norm.eps, norm.momentum
    made.weight, made.bias = norm.weight, norm.bias
    made.running_mean, made.running_var = norm.running_mean, norm.running_var
    made.num_batches_tracked = norm.num_batches_tracked
    made.after = nn.Sequential(*after)  # timm keeps the activation in the norm layer
    return made


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over each of S equal parts of the batch; running statistics are the mean over the parts.

    A batch that S does not divide is normalised in its largest number of equal parts (its greatest divisor up to S).
    On a GPU all parts at once (:mod:`moco.kernels.norm`), elsewhere a part after another.
    """

    def __init__(self, num_features: int, splits: int, eps: float, momentum: float | None):
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.splits = splits
        self.after: nn.Module = nn.Sequential()

    def forward(self, input: Tensor) -> Tensor:
        parts = largest_divisor(input.shape[0], self.splits)
        if not self.training or parts == 1:
            return self.after(super().forward(input))
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        if not torch.compiler.is_compiling() and norm.suits(input, self.weight, parts):
            running = (self.running_mean, self.running_var, self.num_batches_tracked)
            made = norm.split_batch_norm(input, self.weight, self.bias, running, parts, self.momentum, self.eps)
            return self.after(made)
        # A compiler fuses one formula over all parts; S calls one after another cost it minutes.
        compute = self._in_one_formula if torch.compiler.is_compiling() else self._part_by_part
        normed, means, variances = compute(input, parts)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(means.mean(0), self.momentum)
            self.running_var.lerp_(variances.mean(0), self.momentum)
        return self.after(normed)

    def _part_by_part(self, input: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised batch, and the mean and the unbiased variance of each part, (S, C)."""
        assert self.running_mean is not None
        means, variances = self.running_mean.new_zeros(2, parts, self.num_features)
        # momentum 1 writes each part's own statistics into its row
        normed = [
            F.batch_norm(part, means[i], variances[i], self.weight, self.bias, True, 1.0, self.eps)
            for i, part in enumerate(input.chunk(parts))
        ]
        return torch.cat(normed), means, variances

    def _in_one_formula(self, input: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same as `_part_by_part`, in no less than fp32."""
        split = input.to(torch.promote_types(input.dtype, torch.float32)).unflatten(0, (parts, -1))  # (S, N/S, C, H, W)
        alike = [1, *range(3, split.dim())]  # what a mean of a part and channel is over
        variance, mean = torch.var_mean(split, alike, correction=0, keepdim=True)
        shape = (-1,) + (1,) * (split.dim() - 3)
        scale = self.weight.view(shape) * (variance + self.eps).rsqrt()
        normed = ((split - mean) * scale + self.bias.view(shape)).to(input.dtype).flatten(0, 1)
        count = split[0, :, 0].numel()
        return normed, mean.reshape(parts, -1), variance.reshape(parts, -1) * (count / max(count - 1, 1))


def compile_encoders(encoders: list[nn.Module], mode: str) -> None:
    """Have torch compile them when they are first called; ``mode`` is torch.compile's.

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
        encoder.compile(mode=mode)


def sync_batchnorm(encoder: nn.Module) -> nn.Module:
    """Let every BatchNorm2d normalise by the statistics of the batch of all processes; the state dict does not change.

    On GPUs the library's layer, which has kernels for it; torch has none for CPUs, so there ours.
    """
    if torch.cuda.is_available():
        from timm.layers.norm_act import convert_sync_batchnorm  # also knows timm's own BatchNorm layers

        return convert_sync_batchnorm(encoder)
    for name, module in list(encoder.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            _replace(encoder, name, _take_over(SyncBatchNorm2d(module.num_features), module))
    return encoder


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the equal parts of a batch that the processes hold, with the gradient of one process."""

    after: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        world = distributed.world_size()
        if not self.training or world == 1:
            return self.after(super().forward(input))
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        x = input.float()
        mean = distributed.all_reduce_sum_with_grad(x.mean((0, 2, 3))) / world  # (C,)
        centred = x - mean.view(-1, 1, 1)
        variance = distributed.all_reduce_sum_with_grad(centred.square().mean((0, 2, 3))) / world  # (C,)
        count = world * x.numel() // self.num_features
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        out = centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return self.after(out.to(input.dtype))


def largest_divisor(n: int, limit: int) -> int:
    """The greatest divisor of n that is at most ``limit`` and leaves parts of at least two."""
    return max([1, *(d for d in range(2, min(limit, n // 2) + 1) if n % d == 0)])


def choose_splits(wanted: int | None, batch: int, processes: int) -> int:
    """Parts of this process's batch for BatchNorm: 8 (MoCo's own one-GPU code) or the most that the batch allows.

    Raises:
        UserError: ``wanted`` does not divide the batch into parts of at least two images.
    """
    if wanted is None:
        return 1 if processes > 1 else largest_divisor(batch, 8)
    if wanted > 1 and (batch % wanted or batch // wanted < 2):
        raise UserError(f"--bn-splits {wanted} does not divide a batch of {batch} into equal parts of two or more.")
    return wanted


def describe_batchnorm(encoder: nn.Module, processes: int, splits: int, shuffled: bool) -> str:
    """How a run keeps BatchNorm from leaking which images belong together, for its log."""
    if not has_batchnorm(encoder):
        return "no BatchNorm in the encoder, nothing to shuffle"
    parts = f"SplitBatchNorm in {splits} parts" if splits > 1 else "BatchNorm over each process's whole batch"
    across = "across processes" if processes > 1 else "between the parts"
    if shuffled:
        return f"{parts}, keys shuffled {across} (ShuffleBN)"
    return f"{parts}, keys NOT shuffled: BatchNorm can leak which images belong together"
