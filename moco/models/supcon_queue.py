"""SupCon with a queue: MoCo whose queue holds labels beside its keys.

Legend: N queries on this process, C feature width, K queue rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moco import distributed
from moco.kernels import LossOutput, labelled_loss
from moco.models.key_queue import next_rows
from moco.models.moco import MoCo

UNLABELLED = -1  # of a queue row that no image has filled: nobody's positive


class LabelledMoCo(MoCo):
    """Every queue row of the query's class is a positive, and no parent of a synthetic negative.

    Args:
        labels: (n,) int64 class of every image of the data set, on the encoders' device.
        base_temperature: multiply the loss by T / base_temperature; None leaves it.
        settings: as :class:`moco.models.moco.MoCo`'s.
    """

    def __init__(
        self,
        encoder_q: nn.Module,
        encoder_k: nn.Module,
        *,
        labels: Tensor,
        base_temperature: float | None = None,
        **settings: Any,
    ):
        super().__init__(encoder_q, encoder_k, **settings)
        self.labels = labels
        self.scale = 1.0 if base_temperature is None else self.T / base_temperature
        self.queue_labels: Tensor
        self.register_buffer("queue_labels", torch.full((self.K,), UNLABELLED))

    def contrast(self, q: Tensor, k: Tensor, ids: Tensor, epoch: int, draw: int, step: int = 0) -> LossOutput:
        """SupCon of q against its key, the queue and the extra negatives."""
        with self.timer("head"):
            draws = self.extra(q.shape[0], epoch, draw, step) if self.extra else None
            head = labelled_loss(
                q, k, self.queue, self.labels[ids], self.queue_labels, temperature=self.T, n_hard=self.n_hard,
                draws=draws,
            )  # fmt: skip
        return head._replace(loss=head.loss * self.scale)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor) -> None:
        """Put the keys and labels of all processes into the queue."""
        rows = next_rows(self.queue, self.queue_ptr, len(keys) * distributed.world_size())
        super().enqueue(keys, ids)
        self.queue_labels.index_copy_(0, rows, self.labels[self.queue_ids[rows]])

    def shared(self) -> tuple[Tensor, ...]:
        """Keys, ids, labels and pointer."""
        return (*super().shared(), self.queue_labels)
