"""What keeps BatchNorm's statistics over the batch from telling which images belong together, and their synchronising.

Legend: N images, C channels, H, W height and width, S parts of a batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed
from moco.errors import UserError
from moco.kernels import norm


def has_batchnorm(encoder: nn.Module) -> bool:
    """Whether statistics over the batch can leak which images belong together."""
    return any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())


def trains_on(encoder: nn.Module, images: int, channels: int, size: int) -> bool:
    """Whether the encoder can be trained on so few images: no layer of BatchNorm has a single value a channel, which
    has no variance. Computes nothing: the encoder itself is left alone."""
    try:
        copy.deepcopy(encoder).to("meta").train()(torch.empty(images, channels, size, size, device="meta"))
    except ValueError:  # of BatchNorm, which looks at the shape before all
        return False
    return True


def split_batchnorm(encoder: nn.Module, splits: int) -> nn.Module:
    """Let every BatchNorm2d see each of ``splits`` parts of the batch by itself, as several GPUs would.

    With one process there is no other process to shuffle with; the split is what MoCo's own one-GPU code uses.
    The state dict does not change. Works on plain and on timm's BatchNorm layers.
    """
    if splits > 1:
        for name, module in list(encoder.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                encoder.set_submodule(name, SplitBatchNorm2d(module, splits))
    return encoder


class _Replacement(nn.BatchNorm2d):
    """A layer with the tensors of the one it replaces: a copy would have to know each library's constructor."""

    running_mean: Any
    running_var: Any
    num_batches_tracked: Any
    momentum: Any

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.affine, self.weight, self.bias = norm.affine, norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        after = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
        self.after = nn.Sequential(*after)  # timm keeps the activation in the norm layer

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Count a batch with these statistics, (C,) each, the variance unbiased."""
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


class SplitBatchNorm2d(_Replacement):
    """BatchNorm over each of S equal parts of the batch; running statistics are the mean over the parts.

    A batch that S does not divide is normalised in its largest number of equal parts (its greatest divisor up to S).
    On a GPU all parts at once (:mod:`moco.kernels.norm`), elsewhere a part after another.
    """

    def __init__(self, norm: nn.BatchNorm2d, splits: int) -> None:
        super().__init__(norm)
        self.splits = splits

    def forward(self, input: Tensor) -> Tensor:
        parts = largest_divisor(input.shape[0], self.splits)
        if not self.training or parts == 1:
            return self.after(super().forward(input))
        if not torch.compiler.is_compiling() and norm.suits(input, self.weight, parts):
            running = (self.running_mean, self.running_var, self.num_batches_tracked)
            made = norm.split_batch_norm(input, self.weight, self.bias, running, parts, self.momentum, self.eps)
            return self.after(made)
        # A compiler fuses one formula over all parts; S calls one after another cost it minutes.
        compute = self._in_one_formula if torch.compiler.is_compiling() else self._part_by_part
        normed, means, variances = compute(input, parts)
        self._follow(means.mean(0), variances.mean(0))
        return self.after(normed)

    def _part_by_part(self, input: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised batch, and the mean and the unbiased variance of each part, (S, C)."""
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


def sync_batchnorm(encoder: nn.Module) -> nn.Module:
    """Let every BatchNorm normalise by the statistics of the batch of all processes; the state dict does not change.

    On GPUs the library's layer, which has kernels for it; torch has none for CPUs, so there ours.
    """
    if torch.cuda.is_available():
        from timm.layers.norm_act import convert_sync_batchnorm  # also knows timm's own BatchNorm layers

        return convert_sync_batchnorm(encoder)
    for name, module in list(encoder.named_modules()):
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            encoder.set_submodule(name, SyncBatchNorm(module))
    return encoder


class SyncBatchNorm(_Replacement):
    """BatchNorm over the equal parts of a batch that the processes hold, with the gradient of one process."""

    def forward(self, input: Tensor) -> Tensor:
        world = distributed.world_size()
        if not self.training or world == 1:
            return self.after(super().forward(input))
        x = input.to(torch.promote_types(input.dtype, torch.float32))  # (N, C, ..)
        others, column = (0, *range(2, x.ndim)), (-1,) + (1,) * (x.ndim - 2)
        mean = distributed.all_reduce_sum_with_grad(x.mean(others)) / world  # (C,)
        centred = x - mean.view(column)
        variance = distributed.all_reduce_sum_with_grad(centred.square().mean(others)) / world  # (C,)
        count = world * x.numel() // self.num_features
        self._follow(mean, variance * (count / max(count - 1, 1)))
        scale = torch.rsqrt(variance + self.eps)
        out = centred * (scale * self.weight if self.affine else scale).view(column)
        return self.after((out + self.bias.view(column) if self.affine else out).to(input.dtype))

    def _check_input_dim(self, input: Tensor) -> None:
        """(N, C) as well as (N, C, h, w)."""


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
        raise UserError(
            f"--bn-splits {wanted} does not divide a batch of {batch} into equal parts of two or more; choose another."
        )
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
