"""Queries, keys, queues and draws, the fused loss on them and its float64 reference.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.config import SynCoConfig
from moco.kernels import PRECISIONS, Draws, by_triton, contrastive_loss, reference
from moco.kernels.spec import LossOutput, hardest_rows
from moco.methods import synco
from moco.methods.negatives import Recipe, draw, synthetic

FULL = synco.recipe(SynCoConfig(256, 256, 256, 64, 64, 64))
ODD = synco.recipe(SynCoConfig(37, 41, 29, 17, 13, 11))
TINY = synco.recipe(SynCoConfig(3, 2, 2, 1, 2, 1))
KINDS = ("mixup", "interpolation", "extrapolation", "extrapolation-paper", "noise", "perturbation", "adversarial")


@dataclass(frozen=True)
class Case:
    """One problem: N, K, C, H, the recipe (None: no synthetic negatives), T, masks, and what it is computed in."""

    name: str
    n: int = 256
    total: int = 65536
    dim: int = 128
    hard: int = 1024
    recipe: Recipe | None = FULL
    temperature: float = 0.2
    masked: bool = False
    precision: str = "fp32"
    dtype: torch.dtype = torch.float32  # of the queue

    def tiny(self) -> Case:
        """The same on a CPU: small, and in fp32, which the interpreter has."""
        recipe = self.recipe if not self.recipe or len(self.recipe) > 1 else (replace(self.recipe[0], count=3),)
        few = TINY if recipe and len(recipe) > 1 else recipe
        small = {"n": min(self.n, 2), "total": min(self.total, 70), "dim": min(self.dim, 20), "hard": min(self.hard, 9)}
        return replace(self, **small, recipe=few, precision="bf16" if self.precision == "bf16" else "fp32")


CASES = (
    Case("as published"),
    Case("N 32"),
    Case("N 32, K 262144", n=32, total=262144),
    *(Case(name, precision=name) for name in PRECISIONS if name not in ("auto", "fp32")),
    Case("masked", masked=True),
    Case("no synthetic negatives", recipe=None),
    Case("T 0.07", temperature=0.07),
    Case("T 0.02", temperature=0.02),
    Case("N 1024, K 262144", n=1024, total=262144),
    Case("N 64, K 16384", n=64, total=16384),
    Case("K 4096", total=4096),
    Case("odd everything", 13, 10007, 100, 77, ODD),
    Case("odd, masked, bf16", 13, 10007, 100, 77, ODD, masked=True, precision="bf16"),
    Case("C 33", 16, 4099, 33, 256, ODD),
    Case("H = K", 16, 512, 64, 512),
    Case("S > H", 16, 4096, hard=32),
    Case("one row", 3, 1, 16, 1, synco.recipe(SynCoConfig(1, 1, 1, 1, 1, 1))),
    Case("ones everywhere", 1, 50, 3, 1, synco.recipe(SynCoConfig(0, 1, 1, 1, 0, 1)), 1.0),
    Case("C 512", 32, 8192, 512, 256),
    Case("C 2048", 8, 2048, 2048, 64, ODD),
    Case("queue in fp16", 32, 8192, hard=256, dtype=torch.float16),
    Case("tf32, masked, T 0.07", 32, masked=True, precision="tf32", temperature=0.07),
    *(Case(kind, 64, 16384, hard=512, recipe=(synthetic(kind, 64),)) for kind in KINDS),
)
DRY = ("as published", "masked", "no synthetic negatives", "odd, masked, bf16", "H = K", "S > H", "one row",
       "queue in fp16", "mixup", "noise")  # fmt: skip


class Problem(NamedTuple):
    """All on one device; rows unit, keys near their queries."""

    q: Tensor  # (N, C)
    k: Tensor  # (N, C)
    queue: Tensor  # (K, C)
    draws: Draws | None
    hard: int
    masks: dict[str, Tensor]

    def double(self) -> Problem:
        draws = None if self.draws is None else self.draws.to(dtype=torch.float64)
        return self._replace(q=self.q.double(), k=self.k.double(), queue=self.queue.double(), draws=draws)

    def rows(self, start: int, stop: int) -> Problem:
        draws = None if self.draws is None else self.draws.rows(start, stop)
        return self._replace(q=self.q[start:stop], k=self.k[start:stop], draws=draws)


def make(case: Case, device: str, seed: int = 0) -> Problem:
    generator = torch.Generator(device=device).manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, case.dim, generator=generator, device=device), dim=1)

    q = unit(case.n)
    k = F.normalize(q + 0.1 * torch.randn(q.shape, generator=generator, device=device), dim=1)
    hard, masks = min(case.hard, case.total), {}
    draws = draw(case.recipe, case.n, hard, case.dim, seed, device) if case.recipe else None
    if case.masked:
        ids = torch.arange(case.total, device=device)
        masks = {"ids": ids[: case.n].clone(), "queue_ids": ids % (3 * case.n)}
    return Problem(q, k, unit(case.total).to(case.dtype), draws, hard if draws else 0, masks)


def both_passes(
    p: Problem, impl: str = "triton", precision: str = "auto", temperature: float = 0.2
) -> tuple[LossOutput, Tensor]:
    """The head, its loss detached, and dloss/dq (N, C)."""
    q = p.q.detach().requires_grad_()
    head = contrastive_loss(
        q,
        p.k,
        p.queue,
        temperature=temperature,
        n_hard=p.hard,
        draws=p.draws,
        impl=impl,
        precision=precision,
        **p.masks,
    )
    (gradient,) = torch.autograd.grad(head.loss, q)
    return head._replace(loss=head.loss.detach()), gradient


def same_bits(one: tuple[LossOutput, Tensor], other: tuple[LossOutput, Tensor]) -> bool:
    pairs = zip((*one[0], one[1]), (*other[0], other[1]), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@contextlib.contextmanager
def parents_of(p: Problem, precision: str) -> Iterator[None]:
    """The float64 reference takes the hardest rows of the very similarities that the fused step sees: with other
    rounding a row at the edge of the set is another one, and draws point elsewhere."""
    ids, queue_ids = p.masks.get("ids"), p.masks.get("queue_ids")
    step = by_triton._Step(p.q.float(), p.k.float(), p.queue, 0.2, p.hard, p.draws, precision, True, ids is not None)
    similarities = step.score(step.queue, ids, queue_ids)[0][:, : len(p.queue)].clone()  # (N, K)
    before = reference.hardest_rows

    def same(exact: Tensor, hard: int) -> tuple[Tensor, Tensor]:
        rows = hardest_rows(similarities, hard)[0]
        return rows, exact.gather(1, rows)

    reference.hardest_rows = same
    try:
        yield
    finally:
        reference.hardest_rows = before
