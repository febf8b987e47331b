"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers, arXiv 2104.02057.

The same: views of one image. A query of one view is compared with the keys of the other view of all images.
"""

import math
from functools import partial

import torch
from torch import Tensor

from moco.config import MoCoV3Config
from moco.methods import losses


def loss(config: MoCoV3Config) -> losses.Loss:
    """2 T times InfoNCE over the keys of the batch (algorithm 1)."""
    return partial(losses.supcon, base_temperature=0.5)  # which multiplies by T / .5


def against_keys(q: Tensor, keys: Tensor, first: int = 0) -> losses.Pairs:
    """Queries (N, C) against keys (G, C) of all processes, of which the ``first``-th is that of the first query."""
    with torch.autocast(q.device.type, enabled=False):
        cosine = losses.unit(q) @ losses.unit(keys).T  # (N, G)
    own = torch.arange(len(keys), device=q.device) == first + torch.arange(len(q), device=q.device)[:, None]
    return losses.Pairs(cosine, own, ~own)


def momentum(m: float, step: int, total: int) -> float:
    """The key encoder's share of itself at optimizer step ``step`` of ``total``: from m to 1 along half a cosine."""
    return 1.0 - (1.0 - m) * (1.0 + math.cos(math.pi * step / total)) / 2
