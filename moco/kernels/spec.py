"""What every implementation of the contrastive head takes, returns and means by "the H hardest rows".

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query, of which
Sq mix the query with one row, Sp mix two rows, Ss step along sgn(q), Sn carry noise: S = Sq + Sp + Ss + Sn.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """The random choices and weights of S synthetic negatives a query, in groups by what a formula reads.

    Every synthetic negative is h = u / |u| with u = x q + y n_a + z n_b + w e + v sgn(q), where n_a and n_b are rows
    of the query's hardest set. A slot is a position in that set as ``hardest_rows`` orders it. The columns of
    ``slots_a`` stand in the order [query | pair | sign | noise]:

    ======  ====================================== ===========================
    group   kinds                                  u
    ======  ====================================== ===========================
    query   interpolation, extrapolation,          x q + y n_a
            perturbation
    pair    mixup                                  y n_a + z n_b
    sign    adversarial                            n_a + v sgn(q)
    noise   noise                                  n_a + w e
    ======  ====================================== ===========================
    """

    slots_a: Tensor  # (N, S) int64 in [0, H)
    slots_b: Tensor  # (N, Sp) int64 in [0, H)
    query_x: Tensor  # (N, Sq)
    query_y: Tensor  # (N, Sq)
    pair_y: Tensor  # (N, Sp)
    pair_z: Tensor  # (N, Sp)
    sign_v: Tensor  # (N, Ss)
    noise_w: Tensor  # (N, Sn)
    noise: Tensor  # (N, Sn, C), the e of the formula

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """(Sq, Sp, Ss, Sn)."""
        return self.query_x.shape[1], self.slots_b.shape[1], self.sign_v.shape[1], self.noise.shape[1]

    def tensors(self) -> list[Tensor]:
        """The fields in their order; ``Draws(*tensors)`` undoes it."""
        return [getattr(self, f.name) for f in fields(self)]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Draws:
        """The same draws elsewhere; ``dtype`` is that of the weights and the noise, slots stay int64."""
        return Draws(*(t.to(device=device, dtype=dtype if t.is_floating_point() else None) for t in self.tensors()))

    def rows(self, start: int, stop: int) -> Draws:
        """The draws of queries [start, stop)."""
        return Draws(*(t[start:stop] for t in self.tensors()))


class LossOutput(NamedTuple):
    """What one call returns; only ``loss`` carries a gradient."""

    loss: Tensor  # () mean over queries of -log softmax of the positive
    rank: Tensor  # (N,) int64: how many queue rows beat the positive, 0 is top-1; comparable between all methods
    hardest: Tensor  # () mean over queries of the largest queue similarity, queries without any negative left out
    synthetic_mass: Tensor  # () mean over queries of the softmax mass on synthetic negatives

    def statistics(self) -> dict[str, Tensor]:
        """() each, for a log: top1 and top5 are the shares of queries with so near a key."""
        top1, top5 = ((self.rank < n).mean(dtype=torch.float32) for n in (1, 5))
        return {"top1": top1, "top5": top5, "hardest": self.hardest, "synthetic_mass": self.synthetic_mass}


def hardest_rows(similarities: Tensor, hard: int) -> tuple[Tensor, Tensor]:
    """The definition of the hardest set and of its order, which is what slots refer to.

    The ``hard`` largest similarities of each query; among equal ones the lower row; listed by ascending row, rows
    left out (similarity -inf) last. The order says nothing about hardness: drawing needs a set.

    Args: similarities (N, K), -inf where a row is left out; hard, at most K.
    Returns: rows (N, H) int64 and their similarities (N, H).
    """
    values, rows = similarities.sort(dim=1, descending=True, stable=True)
    values, rows = values[:, :hard], rows[:, :hard]
    left_out_last = rows + torch.where(values == -torch.inf, similarities.shape[1], 0)
    order = left_out_last.argsort(dim=1, stable=True)
    return rows.gather(1, order), values.gather(1, order)


def mean_hardest(largest: Tensor) -> Tensor:
    """Mean of the largest similarity a query (N,), over the queries that have a negative at all; 0 for none."""
    some = largest != -torch.inf
    return torch.where(some, largest, 0).sum() / some.sum().clamp(min=1)
