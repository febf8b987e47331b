"""What the networks take: uint8 images become normalised floats."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moco.errors import UserError
from moco.kernels import images as on_gpu


def normalise(
    images: torch.Tensor,
    mean: Sequence[float] | torch.Tensor,
    std: Sequence[float] | torch.Tensor,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format | None = None,
) -> torch.Tensor:
    """(N, C, h, w) uint8 to floats, (images / 255 - mean) / std with C numbers each, on the device of ``images``.

    The arithmetic of torchvision's ToTensor and Normalize, operation by operation, in float32 and then rounded to
    ``dtype``; on a GPU in one launch. layout: of the result's memory, by default that of ``images``.
    """
    centre = torch.as_tensor(mean, dtype=torch.float32, device=images.device)  # (C,)
    spread = torch.as_tensor(std, dtype=torch.float32, device=images.device)  # (C,)
    if centre.numel() != images.shape[-3] or spread.numel() != images.shape[-3]:
        raise UserError(f"the images have {images.shape[-3]} channels: give --mean and --std as many numbers")
    last = layout == torch.channels_last
    if (last or images.is_contiguous()) and on_gpu.suits(images, dtype, last):
        return on_gpu.to_floats(images, centre.flatten(), spread.flatten(), dtype, last)
    made = on_gpu.by_torch(images, centre, spread).to(dtype)
    return made if layout is None else made.contiguous(memory_format=layout)
