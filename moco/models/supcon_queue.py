"""SupCon with a queue: MoCo whose queue holds labels beside its keys.

Legend: N queries on this process, C feature width, K queue rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moco import distributed
from moco.config import MoCoConfig
from moco.kernels import Draws, LossOutput, labelled_loss
from moco.models.key_queue import next_rows
from moco.models.moco import ExtraNegatives, MoCo

UNLABELLED = -1  # of a queue row that no image has filled: nobody's positive


class LabelledMoCo(MoCo):
    """Every queue row of the query's class is a positive, and no parent of a synthetic negative.

    Args:
        labels: (n,) int64 class of every image of the data set, on the encoders' device.
        others: as :class:`moco.models.moco.MoCo`'s.
    """

    def __init__(
        self,
        encoder_q: nn.Module,
        encoder_k: nn.Module,
        config: MoCoConfig,
        *,
        labels: Tensor,
        seed: int,
        extra: ExtraNegatives | None = None,
    ):
        super().__init__(encoder_q, encoder_k, config, seed=seed, extra=extra)
        self.labels = labels
        self.scale = 1.0 if config.base_temperature is None else self.T / config.base_temperature
        self.queue_labels = nn.Buffer(torch.full((self.K,), UNLABELLED))

    def compute_loss(self, q: Tensor, k: Tensor, ids: Tensor, draws: Draws | None) -> LossOutput:
        """SupCon."""
        rows, n_hard = (self.queue, self.labels[ids], self.queue_labels), self.config.n_hard
        head = labelled_loss(q, k, *rows, temperature=self.T, n_hard=n_hard, draws=draws)
        return head._replace(loss=head.loss * self.scale)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor) -> None:
        """Put the keys and labels of all processes into the queue."""
        rows = next_rows(self.queue, self.queue_ptr, len(keys) * distributed.world_size())
        super().enqueue(keys, ids)
        self.queue_labels.index_copy_(0, rows, self.labels[self.queue_ids[rows]])

    def measure(self, q: Tensor, ids: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        """Without ``false_negatives``: rows of a query's class are its positives."""
        return super().measure(q, ids)

    def shared(self) -> tuple[Tensor, ...]:
        return (*super().shared(), self.queue_labels)
