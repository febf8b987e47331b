"""From bytes to what an encoder takes: (x / 255 - mean) / std of a whole batch in one Triton launch.

Legend: N images, C channels, h x w pixels.

Reads a byte and writes one number a value, in float32 or already rounded to half precision, in contiguous or
channels_last memory. The numbers are torch's on a CPU, bit for bit, by triton's interpreter and on an H200.
Importing this file does not import triton; the first call does.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from moco.kernels import by_triton

# 1 / 255 in two pieces: a byte times the first, of 16 bits, is exact, so that the sum of both products is x / 255
# rounded once, whether or not a compiler fuses them, for each of 256 bytes.
HIGH = round(2**23 / 255) / 2**23
LOW = 1 / 255 - HIGH
BLOCK = 1024  # values a program, 8 a thread; not yet timed on a GPU


def constants(channels: int, pixels: int, last: bool) -> dict[str, int]:
    """What the program of images of this shape is compiled for."""
    align = math.gcd(pixels * channels if last else pixels, 16)
    return {"LAST": last, "ALIGN": align, "CHANNELS": channels, "BLOCK": BLOCK, "enable_fp_fusion": False}


@torch.no_grad()
def to_floats(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype, last: bool) -> Tensor:
    """(N, C, h, w) in ``dtype``, normalised; last: in channels_last memory, else contiguous.

    Args:
        images: (N, C, h, w) uint8.
        mean, std: (C,) float32 on the device of the images. The host waits for nothing.
    """
    images, mean, std = images.contiguous(), mean.contiguous(), std.contiguous()
    n, channels, height, width = images.shape
    memory = torch.channels_last if last else torch.contiguous_format
    made = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=memory)
    pixels = height * width
    size = n * -(-pixels * channels // BLOCK) if last else n * channels * -(-pixels // BLOCK)
    known, code = constants(channels, pixels, last), by_triton.programs("images_triton")
    with torch.cuda.device_of(images):
        by_triton.run_program(code.to_floats, (size,), images, made, mean, std, pixels, **known)
    return made


def suits(images: Tensor, dtype: torch.dtype, last: bool) -> bool:
    """Whether the program can make these images here: a GPU, its first answer right, bytes of few channels."""
    known = images.dim() == 4 and images.dtype == torch.uint8 and dtype in by_triton.DTYPES
    if not by_triton.on_gpu(images) or not known or not 0 < images.shape[1] <= 4:
        return False
    return agrees(images.device, tuple(images.shape[1:]), dtype, last)


@functools.cache
def agrees(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, last: bool) -> bool:
    """Whether the program runs on a device and gives the CPU's numbers for noise of shape (C, h, w); warns if not."""
    noise = torch.randint(256, (2, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = torch.tensor([[0.485, 0.456, 0.406, 0.5], [0.229, 0.224, 0.225, 0.25]])[:, : shape[0]]

    def compare() -> str:
        found = to_floats(noise.to(device), mean.to(device), std.to(device), dtype, last)
        wanted = by_torch(noise, mean, std).to(device, dtype)
        return "" if bool((found == wanted).all()) else "its numbers are not the CPU's"

    return by_triton.agrees(compare, f"images are normalised on {device} by torch's operators")


def by_torch(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The definition, in float32: the arithmetic of torchvision's ToTensor and Normalize, operation by operation."""
    most = torch.full((), 255.0, device=images.device)  # a tensor: by a number a GPU multiplies by its reciprocal
    return images.to(torch.float32).div_(most).sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
