"""MoCo: a query encoder, a key encoder that follows it, a queue of keys, and one hook for extra negatives.

Momentum Contrast, arXiv 1911.05722, algorithm 1; v2 arXiv 2003.04297. The order of a step is the paper's: the key
encoder moves first, then keys are computed, then the loss, and the keys enter the queue last.

Legend: N queries on this process, C feature width, K queue rows, h x w pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed, seeding
from moco.config import MoCoConfig
from moco.kernels import Draws, LossOutput, contrastive_loss
from moco.models.base import Momentum, StepOutput, by_crop
from moco.models.key_queue import EMPTY, enqueue_, new_queue, next_rows, read_queue

# (queries on this process, epoch, draw number, step) -> the draws of the synthetic negatives, None for none
ExtraNegatives = Callable[[int, int, int, int], "Draws | None"]
# Added to a batch's number, which stays below, where other queries than those of the first view get draws of their own.
SECOND_VIEW, NEXT_CROP = 1 << 40, 1 << 41


class MoCo(Momentum):
    """Momentum contrast with a queue.

    Args:
        encoder_q, encoder_k: two networks of the same shape with outputs (N, C); k starts as a copy of q.
        config: the paper's symbols and the choices that go with them. Images are normalised after they were exchanged.
        seed: of the queue's first rows and of the shuffles.
        extra: the hook for synthetic negatives; :func:`moco.models.build.with_queue` makes it of ``config.negatives``.
    """

    STATS = ("loss", "top1", "top5", "hardest", "synthetic_mass")
    LARGE = ("queue", "queue_ids", "shadow")
    scale = 1.0  # by which the loss is multiplied
    READ = 64  # queries a log line compares with the queue: of 65,536 rows they make 16 MiB of logits

    def __init__(
        self,
        encoder_q: nn.Module,
        encoder_k: nn.Module,
        config: MoCoConfig,
        *,
        seed: int,
        extra: ExtraNegatives | None = None,
    ):
        super().__init__(encoder_q, encoder_k, config, config.m)
        self.config, self.seed, self.extra = config, seed, extra
        self.K, self.symmetric = config.K, config.symmetric
        self.queue = nn.Buffer(new_queue(config.K, config.C, seeding.torch_generator("init", seed, 1)))
        self.queue_ids = nn.Buffer(torch.full((config.K,), EMPTY))
        self.queue_ptr = nn.Buffer(torch.zeros(1, dtype=torch.long))
        # The queue as the fused loss multiplies it in bf16, so that no step rounds all of it again.
        rounded = (config.loss_impl, config.loss_precision) == ("triton", "bf16")
        self.shadow: Tensor | None
        self.register_buffer("shadow", self.queue.bfloat16() if rounded else None, persistent=False)
        self.register_load_state_dict_post_hook(_round_queue)

    @property
    def chance(self) -> float:
        """The loss of queries that all look like every key."""
        return math.log(1 + self.K) * self._terms

    @property
    def chance_formula(self) -> str:
        return "ln(1+K)" if self._terms == 1 else f"{self._terms:.4g} ln(1+K)"

    @property
    def _terms(self) -> float:
        return self.scale * (2 if self.symmetric else 1)

    def forward(
        self, views: Sequence[Tensor], ids: Tensor, epoch: int, draw: int, step: int = 0, local: Tensor | None = None
    ) -> StepOutput:
        """The loss of one batch; changes nothing but BatchNorm's running statistics.

        With small crops the mean over a query of a view and those of the crops, all against the view's key and the same
        queue; ``symmetric``: the crops ask both keys. The statistics are those of the views.

        Args:
            views: two of (N, channels, h, w), uint8 or already normalised floats: of the queries and of the keys.
            ids: (N,) int64, which image each row is.
            epoch, step: decide which synthetic negatives are active.
            draw: number of this batch since the start of training; keys its randomness.
            local: (N, L, channels, l, l) small crops, None for none.
        """
        im_q, im_k = views
        q = self.encode_queries(im_q)  # (N, C)
        k = self.encode_keys(im_k, draw)  # (N, C)
        head = self.contrast(q, k, ids, epoch, draw, step)
        if not self.symmetric:
            small = by_crop(self.encode_queries, local)
            loss = self.with_local(head.loss, small, k, ids, epoch, draw, step)
            return _output(head, loss, q, k, k)
        q2 = self.encode_queries(im_k)
        k2 = self.encode_keys(im_q, draw)
        second = draw + SECOND_VIEW
        other = self.contrast(q2, k2, ids, epoch, second, step)
        small = by_crop(self.encode_queries, local)
        loss = self.with_local(head.loss, small, k, ids, epoch, draw, step)
        loss = loss + self.with_local(other.loss, small, k2, ids, epoch, second, step)
        return _output(head, loss, q, torch.cat([k, k2]), k)

    def with_local(
        self, loss: Tensor, small: Sequence[Tensor], k: Tensor, ids: Tensor, epoch: int, draw: int, step: int
    ) -> Tensor:
        """() the mean of a view's loss and those of the crops' queries (N, C) against the same keys."""
        if not small:
            return loss
        # A crop at a time: of its size the loss was chosen, and (N, K) products of all crops may be too large.
        places = enumerate(small, 1)
        losses = [self.contrast(q, k, ids, epoch, draw + n * NEXT_CROP, step).loss for n, q in places]
        return torch.stack([loss, *losses]).mean()

    def encode_queries(self, images: Tensor) -> Tensor:
        """Unit features (N, C) with a gradient."""
        z = self.forward_q(images)
        with self.timer("q forward"):
            return F.normalize(z.float(), dim=1)

    @torch.no_grad()
    def encode_keys(self, images: Tensor, draw: int) -> Tensor:
        """Unit features (N, C) of the key encoder, computed in a shuffled order and put back."""
        if not self.config.shuffle:
            return self._unit_keys(images)
        return self.in_shuffled_order(self._unit_keys, images, self.seed, draw)

    def _unit_keys(self, images: Tensor) -> Tensor:
        z = self.forward_k(images)
        with self.timer("k forward"):
            return F.normalize(z.float(), dim=1)

    def contrast(self, q: Tensor, k: Tensor, ids: Tensor, epoch: int, draw: int, step: int = 0) -> LossOutput:
        """The loss of q against its key, the queue and the extra negatives."""
        with self.timer("head"):
            return self.compute_loss(q, k, ids, self.extra(q.shape[0], epoch, draw, step) if self.extra else None)

    def compute_loss(self, q: Tensor, k: Tensor, ids: Tensor, draws: Draws | None) -> LossOutput:
        """InfoNCE."""
        mask = {"ids": ids, "queue_ids": self.queue_ids} if self.config.mask_same_image else {}
        n_hard = self.config.n_hard if draws is not None else 0
        return contrastive_loss(
            q, k, self.queue, temperature=self.T, n_hard=n_hard, draws=draws,
            impl=self.config.loss_impl, precision=self.config.loss_precision, shadow=self.shadow, **mask,
        )  # fmt: skip

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor) -> None:
        """Put the keys of all processes into the queue, in the same order everywhere."""
        ids = distributed.all_gather(ids)
        for direction in keys.split(len(keys) // (2 if self.symmetric else 1)):
            gathered = distributed.all_gather(direction)
            enqueue_(self.queue, self.queue_ids, self.queue_ptr, gathered, ids, self.shadow)

    @property
    def hard(self) -> int:
        """How many of a query's hardest rows ``false_negatives`` is of: those that its synthetic negatives are made
        from; without any one in 64, as in SynCo's published 1,024 of 65,536."""
        return self.config.n_hard if self.extra else -(-self.K // 64)

    def measure(self, q: Tensor, ids: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        few, rows = slice(0, self.READ), (self.queue, self.queue_ids, self.queue_ptr)
        found = read_queue(q[few], ids[few], *rows, self.T, labels, self.hard)
        values = {} if found is None else found._asdict()
        return {name: x for name, x in values.items() if x is not None and not math.isnan(x)}

    def shared(self) -> tuple[Tensor, ...]:
        return self.queue, self.queue_ids, self.queue_ptr

    def snapshot(self, keys: int) -> Callable[[Tensor], None]:
        """With the rows of the queue that ``keys`` keys will replace."""
        rows = next_rows(self.queue, self.queue_ptr, keys)
        queues = [(x, x[rows]) for name, x in self.named_buffers() if name in self.LARGE]
        restore_small = super().snapshot(keys)

        @torch.no_grad()
        def restore(bad: Tensor) -> None:
            for tensor, old in queues:
                tensor.index_copy_(0, rows, torch.where(bad, old, tensor[rows]))
            restore_small(bad)

        return restore


def _round_queue(model: nn.Module, _: object) -> None:
    """After a state was loaded, of which the queue in bf16 is no part."""
    assert isinstance(model, MoCo)
    if model.shadow is not None:
        model.shadow.copy_(model.queue)


def _output(head: LossOutput, loss: Tensor, q: Tensor, keys: Tensor, paired: Tensor) -> StepOutput:
    return StepOutput(loss, head.statistics(), q.detach(), paired, keys)
