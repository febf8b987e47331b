"""MoCo: a query encoder, a key encoder that follows it, a queue of keys, and one hook for extra negatives.

Momentum Contrast, arXiv 1911.05722, algorithm 1; v2 arXiv 2003.04297. The order of a step is the paper's: the key
encoder moves first, then keys are computed, then the loss, and the keys enter the queue last.

Legend: N queries on this process, C feature width, K queue rows, h x w pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed, seeding
from moco.config import MoCoConfig
from moco.kernels import Earlier, LossOutput, contrastive_loss
from moco.kernels.spec import Draws
from moco.models.base import StepOutput
from moco.models.buffers import Counts, Rounded, Small
from moco.models.ema import fused_groups, lerp_unless
from moco.models.encoder import input_dtype, recompute_blocks
from moco.models.inputs import normalise
from moco.models.key_queue import EMPTY, enqueue_, new_queue, next_rows

LARGE = ("queue", "queue_ids", "shadow")  # buffers of which a step changes some rows
# (queries on this process, epoch, draw number, step) -> the draws of the synthetic negatives, None for none
ExtraNegatives = Callable[[int, int, int, int], "Draws | None"]


class MoCo(nn.Module):
    """Momentum contrast with a queue.

    Args:
        encoder_q, encoder_k: two networks of the same shape with outputs (N, C); k starts as a copy of q.
        config: the paper's symbols and the choices that go with them. Images are normalised after they were exchanged.
        seed: of the queue's first rows and of the shuffles.
        extra: the hook for synthetic negatives; :func:`moco.models.build.with_queue` makes it of ``config.negatives``.
    """

    STATS = ("loss", "top1", "top5", "hardest", "synthetic_mass")
    scale = 1.0  # by which the loss is multiplied

    def __init__(
        self,
        encoder_q: nn.Module,
        encoder_k: nn.Module,
        config: MoCoConfig,
        *,
        seed: int,
        extra: ExtraNegatives | None = None,
    ):
        super().__init__()
        self.encoder_q, self.encoder_k = encoder_q, encoder_k
        self.config, self.seed, self.extra = config, seed, extra
        self.K, self.m, self.T, self.symmetric = config.K, config.m, config.T, config.symmetric
        self.head: Earlier | None = None  # for checkpoints, where the two were chosen for a run
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.timer: Callable[[str], AbstractContextManager] = nullcontext  # told which part of a step begins
        self._few: Small | None = None
        self._count_q, self._count_k = Counts(encoder_q), Counts(encoder_k)
        self._round_k = Rounded(encoder_k)
        encoder_k.load_state_dict(encoder_q.state_dict())
        encoder_k.requires_grad_(False)
        if config.recompute:
            recompute_blocks(encoder_q)
        self.mean: Tensor
        self.std: Tensor
        self.queue: Tensor
        self.queue_ids: Tensor
        self.queue_ptr: Tensor
        self.register_buffer("queue", new_queue(config.K, config.C, seeding.torch_generator("init", seed, 1)))
        self.register_buffer("queue_ids", torch.full((config.K,), EMPTY))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        # The queue as the fused loss multiplies it in bf16, so that no step rounds all of it again.
        rounded = (config.loss_impl, config.loss_precision) == ("triton", "bf16")
        self.shadow: Tensor | None
        self.register_buffer("shadow", self.queue.bfloat16() if rounded else None, persistent=False)
        self.register_load_state_dict_post_hook(_round_queue)
        self.register_buffer("mean", torch.tensor(config.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.std), persistent=False)

    @property
    def chance(self) -> float:
        """The loss of queries that all look like every key."""
        return math.log(1 + self.K) * self._terms

    @property
    def chance_formula(self) -> str:
        """The same for the log."""
        return "ln(1+K)" if self._terms == 1 else f"{self._terms:.4g} ln(1+K)"

    @property
    def _terms(self) -> float:
        return self.scale * (2 if self.symmetric else 1)

    def forward(self, views: Sequence[Tensor], ids: Tensor, epoch: int, draw: int, step: int = 0) -> StepOutput:
        """The loss of one batch; changes nothing but BatchNorm's running statistics.

        Args:
            views: two of (N, channels, h, w), uint8 or already normalised floats: of the queries and of the keys.
            ids: (N,) int64, which image each row is.
            epoch, step: decide which synthetic negatives are active.
            draw: number of this batch since the start of training; keys its randomness.
        """
        im_q, im_k = views
        q = self.encode_queries(im_q)  # (N, C)
        k = self.encode_keys(im_k, draw)  # (N, C)
        head = self.contrast(q, k, ids, epoch, draw, step)
        if not self.symmetric:
            return _output(head, head.loss, q, k, k)
        q2 = self.encode_queries(im_k)
        k2 = self.encode_keys(im_q, draw)
        other = self.contrast(q2, k2, ids, epoch, draw + (1 << 40), step)  # its own draws
        return _output(head, head.loss + other.loss, q, torch.cat([k, k2]), k)

    def encode_queries(self, images: Tensor) -> Tensor:
        """Unit features (N, C) with a gradient."""
        with self.timer("q forward"), self._count_q.at_once(images.device):
            return F.normalize(self.encoder_q(self.prepare(images)).float(), dim=1)

    @torch.no_grad()
    def encode_keys(self, images: Tensor, draw: int) -> Tensor:
        """Unit features (N, C) of the key encoder, computed in a shuffled order and put back."""
        if not self.config.shuffle:
            return self._keys(images)
        with self.timer("shuffle"):
            rows = images.shape[0] * distributed.world_size()
            permutation = torch.randperm(rows, generator=seeding.torch_generator("shuffle", self.seed, draw))
            shuffled = distributed.exchange_rows(images, permutation)
        k = self._keys(shuffled)
        with self.timer("shuffle"):
            return distributed.exchange_rows(k, torch.argsort(permutation))

    def _keys(self, images: Tensor) -> Tensor:
        with self.timer("k forward"), self._count_k.at_once(images.device), self._round_k.at_once(images.device):
            return F.normalize(self.encoder_k(self.prepare(images)).float(), dim=1)

    def prepare(self, images: Tensor) -> Tensor:
        """Normalised floats from uint8 images, in the encoder's memory layout and of its first layer's type."""
        if images.dtype == torch.uint8:
            dtype = input_dtype(self.encoder_q, images.device.type)
            images = normalise(images, self.mean, self.std, dtype, self.layout)
        return images.contiguous(memory_format=self.layout)

    def contrast(self, q: Tensor, k: Tensor, ids: Tensor, epoch: int, draw: int, step: int = 0) -> LossOutput:
        """InfoNCE of q against its key, the queue and the extra negatives."""
        with self.timer("head"):
            draws = self.extra(q.shape[0], epoch, draw, step) if self.extra else None
            mask = {"ids": ids, "queue_ids": self.queue_ids} if self.config.mask_same_image else {}
            n_hard = self.config.n_hard if draws is not None else 0
            return contrastive_loss(
                q, k, self.queue, temperature=self.T, n_hard=n_hard, draws=draws,
                impl=self.config.loss_impl, precision=self.config.loss_precision, shadow=self.shadow, **mask,
            )  # fmt: skip

    @torch.no_grad()
    def update_key_encoder(self, due: Tensor | None = None) -> None:
        """k <- m k + (1 - m) q over the parameters; BatchNorm's buffers are the key encoder's own.

        Args:
            due: () bool, nothing moves where it is false. On a GPU it is not read by the host.
        """
        k, q = self._pairs()
        # few launches for all tensors instead of two a tensor
        if due is None or due.device.type == "cpu":
            if due is None or bool(due):
                torch._foreach_lerp_(k, q, 1.0 - self.m)  # pyright: ignore[reportPrivateImportUsage, reportCallIssue]
            return
        self._follow_where(due, k, q)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.encoder_k.parameters()), list(self.encoder_q.parameters())

    @torch.no_grad()
    def _follow_where(self, due: Tensor, k: list[Tensor], q: list[Tensor]) -> None:
        """k <- m k + (1 - m) q where ``due`` in one pass over the parameters, decided by the device."""
        called_off = torch.logical_not(due, out=torch.empty_like(due, dtype=torch.float32))
        lerp_unless(called_off, k, q, 1.0 - self.m)

    def slow_reason(self, device: torch.device) -> str:
        """Of a key encoder that takes three passes on a GPU in place of one, for the log; else empty."""
        odd = fused_groups(*self._pairs(), device)[1][0] if device.type != "cpu" else []
        summary = "parameters of the key encoder follow in three passes: their types, devices or layouts differ"
        return f"{len(odd)} {summary}" if odd else ""

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor) -> None:
        """Put the keys of all processes into the queue, in the same order everywhere."""
        ids = distributed.all_gather(ids)
        for direction in keys.split(len(keys) // (2 if self.symmetric else 1)):
            gathered = distributed.all_gather(direction)
            enqueue_(self.queue, self.queue_ids, self.queue_ptr, gathered, ids, self.shadow)

    def shared(self) -> tuple[Tensor, ...]:
        """What must be equal on all processes besides the parameters."""
        return self.queue, self.queue_ids, self.queue_ptr

    def snapshot(self, keys: int) -> Callable[[Tensor], None]:
        """Remember all that a step changes besides the weights; returns ``restore(bad)``.

        ``restore`` puts it back where ``bad``, () bool, is true and else changes nothing. Which it is, the host never
        asks: both are the same few launches.

        Args:
            keys: how many keys all processes may enqueue meanwhile.
        """
        rows = next_rows(self.queue, self.queue_ptr, keys)
        large = [x for name, x in self.named_buffers() if name in LARGE]
        queues = [(x, x[rows]) for x in large]
        restore_small = self._small().snapshot()

        @torch.no_grad()
        def restore(bad: Tensor) -> None:
            for tensor, old in queues:
                tensor.index_copy_(0, rows, torch.where(bad, old, tensor[rows]))
            restore_small(bad)

        return restore

    def _small(self) -> Small:
        """All buffers whose copy is cheaper than to ask which rows of it a step changes; found at the first step."""
        if self._few is None:
            self._few = Small(self, leave=(*LARGE, "mean", "std"))
        return self._few


def _round_queue(model: nn.Module, _: object) -> None:
    """After a state was loaded, of which the queue in bf16 is no part."""
    assert isinstance(model, MoCo)
    if model.shadow is not None:
        model.shadow.copy_(model.queue)


def _output(head: LossOutput, loss: Tensor, q: Tensor, keys: Tensor, paired: Tensor) -> StepOutput:
    top1, top5 = ((head.rank < n).mean(dtype=torch.float32) for n in (1, 5))  # share of queries with so near a key
    statistics = {"top1": top1, "top5": top5, "hardest": head.hardest, "synthetic_mass": head.synthetic_mass}
    return StepOutput(loss, statistics, q.detach(), paired, keys)
