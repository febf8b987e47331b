"""The methods without a queue: one encoder, and a loss that compares all views of the batch of all processes.

The same step as :class:`moco.models.moco.MoCo` for the training loop: one ``forward``, nothing to enqueue, no key
encoder.

Legend: N images of this process, V views an image, L small crops an image, C feature width, h x w pixels, A anchors,
M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.config import InBatchConfig
from moco.methods.losses import Loss, compare, rank_statistics
from moco.models.base import Contrast, StepOutput


class BatchContrast(Contrast):
    """Contrast of the views of a batch.

    Args:
        encoder: a network with outputs (N, C). Its name in checkpoints is that of MoCo's query encoder, so that every
            probe and export reads it.
        loss: (pairs, temperature) -> (A,), see :mod:`moco.methods.losses`.
        config: temperature, which views are anchors, how images reach the encoder.
        chance: the loss, before any training, of an anchor whose candidates all look alike.
        labels: (n,) int64 class of every image of the data set, on the encoder's device; None: views of one image are
            the same and nothing else is.
    """

    STATS = ("loss", "top1", "top5", "hardest", "no_positive")

    def __init__(
        self, encoder: nn.Module, loss: Loss, config: InBatchConfig, *, chance: float, labels: Tensor | None = None
    ):
        super().__init__(encoder, config)
        self.config, self.loss, self.chance, self.labels = config, loss, chance, labels

    def forward(
        self, views: Sequence[Tensor], ids: Tensor, epoch: int = 0, draw: int = 0, step: int = 0,
        local: Tensor | None = None,
    ) -> StepOutput:  # fmt: skip
        """The loss of one batch: its mean over the processes is that of one process with all images.

        Small crops are anchors against the views of all images and no candidates. The statistics are those of views.

        Args:
            views: V of (N, channels, h, w), uint8 or already normalised floats.
            ids: (N,) int64, which image each row is.
            epoch, draw, step: not used; the step of the methods with a queue needs them.
            local: (N, L, channels, l, l) small crops, None for none.
        """
        z = self._encode(views)  # (N, V, C)
        small = None if local is None else self._encode(local.unbind(1))  # (N, L, C)
        with self.timer("head"):
            groups = ids if self.labels is None else self.labels[ids]
            pairs = compare(z, groups, contrast_mode=self.config.contrast_mode, local=small)
            loss = self.loss(pairs, self.T).mean()
            found = rank_statistics(pairs.first(len(pairs.cosine) - (0 if small is None else small[:, :, 0].numel())))
        unit = F.normalize(z.detach(), dim=2)
        return StepOutput(loss, found, unit[:, 0], unit[:, 1], unit[:0, 0])

    def _encode(self, views: Sequence[Tensor]) -> Tensor:
        """(N, V, C) of V views (N, channels, h, w) in one forward: BatchNorm sees all of them."""
        with self.timer("q forward"):
            rows = torch.cat([self.prepare(view) for view in views])
            with self._count_q.at_once(rows.device):
                z = self.encoder_q(rows)
            return z.float().unflatten(0, (len(views), -1)).transpose(0, 1)
