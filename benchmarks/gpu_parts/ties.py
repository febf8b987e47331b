"""The hardest set among ties, at edges and with rows left out, through the loss: which rows got gradients.

A query is one axis and a row of the queue holds its similarities to all queries on those axes, exact in any precision;
what is left of it is its own direction, which neither query nor key has. A negative that was made of another row than
the definition's then shows in the gradient there, where only p of the rows and of the negatives made of them stands.

Legend: N queries, C feature width, K queue rows, H hardest rows a query.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from moco.config import SynCoConfig
from moco.methods import synco
from moco.methods.negatives import draw

from .findings import Findings
from .problems import Problem, both_passes

DIM = 128
SIZES = ((1, 1, 1), (3, 100, 100), (4, 303, 20))  # N, K, H
LARGE = ((5, 64, 4), (32, 65536, 1024), (7, 100003, 999), (8, 262144, 1024), (32, 4096, 4096), (1, 2500, 2048))
DRY_LEVELS, LEVELS = (3, 1000), (1, 3, 50, 1000)  # similarities of a query, in all


def run(found: Findings) -> None:
    sizes, steps = (SIZES, DRY_LEVELS) if found.dry else ((*SIZES, *LARGE), LEVELS)
    for (n, total, hard), levels in itertools.product(sizes, steps):
        what = f"hardest {hard} of {total}, N {n}, {levels} levels"
        for masked in (False, True):
            with found.guarded(what):
                p = tied(n, total, hard, levels, found.device, masked)
                (head, gradient), (gold, exact) = both_passes(p, precision="fp32"), both_passes(p.double(), "reference")
                own = float((gradient - exact)[:, n:].norm() / exact[:, n:].norm().clamp(min=1e-12))
                ranks = torch.equal(head.rank, gold.rank)
                good = own <= 2e-5 and ranks
                told = (
                    f"apart in the rows' own directions{', rows left out' * masked}{'' if ranks else ', other ranks'}"
                )
                found.note(what, own, told, good)


def tied(n: int, total: int, hard: int, levels: int, device: str, masked: bool) -> Problem:
    """N of at most 32 queries whose similarities are multiples of 2^-10 up to 0.1."""
    generator = torch.Generator().manual_seed(total + levels)
    steps = torch.randint(levels, (total, n), generator=generator) * (100 // levels or 1) % 103 - 51  # -51 .. 51
    similarities = steps / 1024  # (K, N)
    own = F.normalize(torch.randn(total, DIM - n, generator=generator), dim=1)
    own *= (1 - similarities.square().sum(1, keepdim=True)).sqrt()
    queue = torch.cat([similarities, own], dim=1).to(device)
    q = torch.eye(n, DIM, device=device)
    draws = draw(synco.recipe(SynCoConfig(16, 16, 16, 8, 8, 8)), n, hard, DIM, total, device)
    masks = {}
    if masked:
        ids = torch.arange(total, device=device) % 3  # of three queries, a third of the rows each
        masks = {"ids": torch.arange(n, device=device), "queue_ids": ids}
    return Problem(q, q.clone(), queue, draws, hard, masks)
