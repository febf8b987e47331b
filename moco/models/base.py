"""What every model is for the training loop, and what those with a key encoder share.

Legend: N images of this process, C feature width, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moco import distributed, seeding
from moco.config import ModelConfig
from moco.kernels import Earlier
from moco.models.buffers import Counts, Rounded, Small
from moco.models.ema import fused_groups, lerp_unless
from moco.models.encoder import input_dtype, recompute_blocks
from moco.models.inputs import normalise


class StepOutput(NamedTuple):
    """What a step returns. ``loss`` () has the gradient; the other tensors are for the log and the queue."""

    loss: Tensor  # () what is optimised
    statistics: dict[str, Tensor]  # () each, by their names in the log
    q: Tensor  # (N, C) unit rows, of a classifier its logits; detached
    paired: Tensor  # (N, C) the positives of q
    keys: Tensor  # unit rows (.., C) to be enqueued, none without a queue


def by_crop(encode: Callable[[Tensor], Tensor], local: Tensor | None) -> Sequence[Tensor]:
    """Of each of L small crops what ``encode`` makes of it, (N, C), in one pass of all; nothing of None.

    Images stay together, so that a part of BatchNorm has all crops of its images, as a process of several has.

    Args:
        local: (N, L, channels, l, l).
    """
    if local is None:
        return ()
    return encode(local.flatten(0, 1)).unflatten(0, local.shape[:2]).transpose(0, 1).contiguous().unbind()


class Contrast(nn.Module):
    """An encoder and hooks for the training loop that do nothing; a model overrides what it needs, and ``forward``:
    (views, ids, epoch, draw, step, local) -> StepOutput, changing nothing but BatchNorm's running statistics.

    ``local``, (N, L, channels, l, l) or None, are small crops of the images: queries beside those of the views, and no
    keys. They are encoded last, in one pass of their size, so that nothing about the views is another.

    Args:
        encoder: a network with outputs (N, C).
        config: temperature, and how images reach the encoder.
    """

    STATS: tuple[str, ...]  # what the loop averages: the loss and statistics
    chance: float  # the loss of features that all look alike
    chance_formula = "chance"  # the same for the log
    LARGE: tuple[str, ...] = ()  # buffers of which a step changes some rows
    K = 0  # rows of the queue
    extra: Callable | None = None  # the hook for synthetic negatives
    head: Earlier | None = None  # for checkpoints, where an implementation of the loss was chosen for a run
    symmetric = False  # whether a step enqueues the keys of both views

    def __init__(self, encoder: nn.Module, config: ModelConfig):
        super().__init__()
        if config.recompute:
            recompute_blocks(encoder)
        self.encoder_q = encoder
        self.T = config.T
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.timer: Callable[[str], AbstractContextManager] = nullcontext  # told which part of a step begins
        self._few: Small | None = None
        self._count_q = Counts(encoder)
        self.mean = nn.Buffer(torch.tensor(config.mean), persistent=False)
        self.std = nn.Buffer(torch.tensor(config.std), persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        """Normalised floats from uint8 images, in the encoder's memory layout and of its first layer's type."""
        if images.dtype == torch.uint8:
            dtype = input_dtype(self.encoder_q, images.device.type)
            images = normalise(images, self.mean, self.std, dtype, self.layout)
        return images.contiguous(memory_format=self.layout)

    def begin_step(self, step: int, total: int) -> None:
        """Told before optimizer step ``step``, counted from 0, of ``total``: what follows a schedule moves here."""

    def update_key_encoder(self, due: Tensor | None = None) -> None:
        """Told once a step, before its first batch; ``due``: see :class:`Momentum`."""

    def slow_reason(self, device: torch.device) -> str:
        """Of something that takes longer than it need on ``device``, for the log; else empty."""
        return ""

    def enqueue(self, keys: Tensor, ids: Tensor) -> None:
        """Told after each batch, with the keys of its output and its images."""

    def measure(self, q: Tensor, ids: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        """Numbers for a log line beside the averages of ``STATS``; the host waits for them.

        Args:
            q: (N, C) queries of the newest batch. ids: (N,) their images. labels: (n,) int64 of all images, if any.
        """
        return {}

    def shared(self) -> tuple[Tensor, ...]:
        """What must be equal on all processes besides the parameters."""
        return ()

    def snapshot(self, keys: int) -> Callable[[Tensor], None]:
        """Remember all that a step changes besides the weights; returns ``restore(bad)``.

        ``restore`` puts it back where ``bad``, () bool, is true and else changes nothing. Which it is, the host never
        asks: both are the same few launches.

        Args:
            keys: how many keys all processes may enqueue meanwhile.
        """
        if self._few is None:  # all buffers whose copy is cheaper than to ask which rows of it a step changes
            self._few = Small(self, leave=(*self.LARGE, "mean", "std"))
        return self._few.snapshot()


class Momentum(Contrast):
    """A model with a key encoder, a moving average of the query encoder.

    Args:
        encoder_q, encoder_k: two networks of the same shape with outputs (N, C); k starts as a copy of q.
        config: as :class:`Contrast`'s. m: the share of itself that the key encoder keeps at a step.
    """

    def __init__(self, encoder_q: nn.Module, encoder_k: nn.Module, config: ModelConfig, m: float):
        encoder_k.load_state_dict(encoder_q.state_dict())
        super().__init__(encoder_q, config)
        self.m = m
        self.encoder_k = encoder_k.requires_grad_(False)
        self._count_k, self._round_k = Counts(encoder_k), Rounded(encoder_k)

    def forward_q(self, images: Tensor) -> Tensor:
        """(N, C) with a gradient."""
        with self.timer("q forward"), self._count_q.at_once(images.device):
            return self.encoder_q(self.prepare(images))

    @torch.no_grad()
    def forward_k(self, images: Tensor) -> Tensor:
        """(N, C) of the key encoder."""
        with self.timer("k forward"), self._count_k.at_once(images.device), self._round_k.at_once(images.device):
            return self.encoder_k(self.prepare(images))

    @torch.no_grad()
    def in_shuffled_order(self, encode: Callable[[Tensor], Tensor], images: Tensor, seed: int, draw: int) -> Tensor:
        """``encode`` (N, C) of images whose order among all processes is drawn anew, and the rows put back (ShuffleBN).

        Args:
            draw: number of this batch since the start of training; with ``seed`` it keys the order.
        """
        with self.timer("shuffle"):
            rows = images.shape[0] * distributed.world_size()
            permutation = torch.randperm(rows, generator=seeding.torch_generator("shuffle", seed, draw))
            shuffled = distributed.exchange_rows(images, permutation)
        made = encode(shuffled)
        with self.timer("shuffle"):
            return distributed.exchange_rows(made, torch.argsort(permutation))

    @torch.no_grad()
    def update_key_encoder(self, due: Tensor | None = None) -> None:
        """k <- m k + (1 - m) q over the parameters; BatchNorm's buffers are the key encoder's own.

        Args:
            due: () bool, nothing moves where it is false. On a GPU it is not read by the host.
        """
        k, q = self._pairs()
        if due is not None and due.device.type != "cpu":
            self._follow_where(due, k, q)
        elif due is None or bool(due):  # few launches for all tensors instead of two a tensor
            torch._foreach_lerp_(k, q, 1.0 - self.m)  # pyright: ignore[reportPrivateImportUsage, reportCallIssue]

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.encoder_k.parameters()), list(self.encoder_q.parameters())

    def _follow_where(self, due: Tensor, k: list[Tensor], q: list[Tensor]) -> None:
        """k <- m k + (1 - m) q where ``due`` in one pass over the parameters, decided by the device."""
        called_off = torch.logical_not(due, out=torch.empty_like(due, dtype=torch.float32))
        lerp_unless(called_off, k, q, 1.0 - self.m)

    def slow_reason(self, device: torch.device) -> str:
        """Of a key encoder that takes three passes on a GPU in place of one, for the log; else empty."""
        odd = fused_groups(*self._pairs(), device)[1][0] if device.type != "cpu" else []
        summary = "parameters of the key encoder follow in three passes: their types, devices or layouts differ"
        return f"{len(odd)} {summary}" if odd else ""
