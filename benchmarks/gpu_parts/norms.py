"""BatchNorm in parts beside plain BatchNorm, in bf16 and channels_last, and uint8 images made normalised floats.

Legend: N images, C channels, h x w pixels, S parts of a batch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from moco.models.batchnorm import split_batchnorm

from . import clock
from .findings import Findings
from .training import a_trainer

SPLITS = 8
SHAPES = ((64, 112), (256, 56), (512, 28), (2048, 7))  # (C, h = w) of a ResNet-50


def run(found: Findings) -> None:
    for n in (16,) if found.dry else (32, 256):
        for channels, side in ((6, 5),) if found.dry else SHAPES:
            with found.guarded(f"BatchNorm in parts, N {n}, C {channels}"):
                in_parts(found, n, channels, side)
    with found.guarded("images to floats"), a_trainer(["--method", "moco", "-b", "8"], found.dry) as (trainer, source):
        images_to_floats(found, trainer.model, next(source)["q"])


def in_parts(found: Findings, n: int, channels: int, side: int) -> None:
    """Outputs and gradients against float64, part by part, and microseconds beside a plain layer."""
    generator = torch.Generator(device=found.device).manual_seed(0)
    x = torch.randn(n, channels, side, side, generator=generator, device=found.device)
    given = torch.randn(x.shape, generator=generator, device=found.device)
    x, given = (t.to(torch.bfloat16).contiguous(memory_format=torch.channels_last) for t in (x, given))
    plain = nn.BatchNorm2d(channels).to(found.device)
    split = split_batchnorm(nn.Sequential(nn.BatchNorm2d(channels)), SPLITS).to(found.device)
    out, gradient = both_passes(split, x, given)
    exact = nn.BatchNorm2d(channels, dtype=torch.float64, device=found.device)
    parts = [
        both_passes(exact, *pair) for pair in zip(x.double().chunk(SPLITS), given.double().chunk(SPLITS), strict=True)
    ]
    apart = []
    for got, each in zip((out, gradient), zip(*parts, strict=True), strict=True):
        gold = torch.cat(each)
        apart.append(float((got - gold).norm() / gold.norm()))
    name = f"N {n}, C {channels}, {side} px"
    good = max(apart) <= 2**-7  # two roundings to bf16
    found.note(f"BatchNorm in parts, {name}", f"output {apart[0]:.1e}, gradient {apart[1]:.1e} off float64", good=good)
    taken = {
        layer: clock.microseconds(functools.partial(both_passes, module, x, given), found.device)
        for layer, module in (("plain", plain), ("parts", split))
    }
    told = f"us in {SPLITS} parts, {taken['parts'] / taken['plain']:.2f} x plain BatchNorm, both passes"
    found.note(f"BatchNorm, {name}", taken["parts"], told)


def both_passes(layer: nn.Module, x: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = layer(x)
    (gradient,) = torch.autograd.grad(out, x, given)
    return out.detach(), gradient


def images_to_floats(found: Findings, model: nn.Module, images: Tensor) -> None:
    """uint8 (N, 3, h, w) to what the encoder takes, under the autocast of a run."""
    mean, std = (
        torch.as_tensor(x, dtype=torch.float64, device=images.device).view(-1, 1, 1) for x in (model.mean, model.std)
    )
    for n in (8,) if found.dry else (32, 256):
        batch = images.repeat(n // len(images), 1, 1, 1)

        def call(batch: Tensor = batch) -> Tensor:
            with torch.autocast(found.device, torch.bfloat16):
                return model.prepare(batch)

        exact = (batch.double() / 255 - mean) / std
        apart = float((call() - exact).abs().max() / exact.abs().max())
        taken = clock.microseconds(call, found.device)
        made = call()
        rate = (batch.numel() + made.numel() * made.element_size()) / taken / 1e3
        found.note(
            f"images to floats, N {n}", taken, f"us to {made.dtype}, {rate:.0f} GB/s, {apart:.1e} off", apart <= 2**-8
        )
