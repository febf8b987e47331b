"""Networks and batches with which a step takes milliseconds: MoCo's, and that of the methods without a queue."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from conftest import TINY
from torch import nn

from moco.config import InBatchConfig, MoCoConfig
from moco.methods.registry import METHODS
from moco.models.in_batch import BatchContrast
from moco.models.moco import MoCo

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class Tiny(nn.Module):
    """A network with BatchNorm and few weights: (N, 3, 6, 6) -> (N, 4)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


CONFIG = MoCoConfig(C=4, K=20, m=0.9, T=0.2, mean=MEAN, std=STD, shuffle=False)


def moco(extra=None, seed=1, **changes) -> MoCo:
    torch.manual_seed(0)
    return MoCo(Tiny(), Tiny(), replace(CONFIG, **changes), seed=seed, extra=extra)


def batch(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randint(0, 256, (n, 3, 6, 6), generator=generator, dtype=torch.uint8) for _ in range(2))
    return q, k, torch.arange(100 * seed, 100 * seed + n)


def step_inputs():
    """What a model takes: views and ids."""
    im_q, im_k, ids = batch()
    return [im_q, im_k], ids


IN_BATCH = tuple(name for name, row in METHODS.items() if row.family == "batch")
OWN = [word for word in TINY if word not in ("--moco-k", "20")]  # naming a queue would ask for one
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def batch_contrast(method="supcon", **more) -> BatchContrast:
    torch.manual_seed(0)
    config = InBatchConfig(T=0.2, base_temperature=0.07, mean=MEAN, std=STD, **more)
    labels = LABELS if method == "supcon" else None
    return BatchContrast(Tiny(), METHODS[method].hooks.loss(config), config, chance=1.0, labels=labels)
