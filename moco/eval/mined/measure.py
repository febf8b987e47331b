"""What the queue of a checkpoint is to a sample of queries: numbers, without pictures.

A false negative is a queue row of the query's class: the loss pushes the query away from it.

Legend: N queries, C feature width, K queue rows, H hardest rows a query (n_hard), S synthetic negatives a query,
n queries of a part, R ranges of ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moco import seeding
from moco.errors import UserError
from moco.eval.mined.queue_run import QueueRun
from moco.kernels import Draws, hardest_rows
from moco.kernels.reference import lacks_a_parent, synthesize
from moco.methods.negatives import GROUPS, KINDS, Recipe, Synthetic, draw, in_columns

PART = 64  # queries at a time: of a queue of 65,536 rows their similarities are 17 MB
BINS = 100  # of a histogram of similarities
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Mined:
    """A sample of queries with their keys, and the queue that they are compared with.

    ids: (N,) int64, the images. q, k: (N, C) unit rows. classes: (images,) int64 of the data set, None without labels.
    recipe, hard: of the synthetic negatives, H also without any. masked: queue rows of a query's own image are left
    out. seed, call: of the draws.
    """

    run: QueueRun
    ids: Tensor
    q: Tensor
    k: Tensor
    classes: Tensor | None
    recipe: Recipe
    hard: int
    masked: bool
    seed: int
    call: int

    def draws(self) -> Draws | None:
        """Those that a batch of these queries gets from the loss: a function of (seed, call)."""
        key = seeding.key("draws", self.seed, self.call, 0)
        return draw(self.recipe, len(self.q), self.hard, self.q.shape[1], key, self.q.device)

    def row_classes(self) -> Tensor:
        """(K,) int64, -1 for a row without an image or without labels."""
        ids, classes = self.run.ids, self.classes
        if classes is None:
            return torch.full_like(ids, -1)
        known = (ids >= 0) & (ids < len(classes))
        return torch.where(known, classes[torch.where(known, ids, 0)], -1)

    def parts(self) -> Iterator[Part]:
        """All queries, a part at a time."""
        draws, rows, queue = self.draws(), self.row_classes(), self.run.queue.to(self.q.device)
        for start in range(0, len(self.q), PART):
            here = slice(start, start + PART)
            q, ids = self.q[here], self.ids[here]
            out = (ids.unsqueeze(1) == self.run.ids) & self.masked
            of_class = torch.zeros_like(out)
            if self.classes is not None:
                of_class = self.classes[ids].unsqueeze(1) == rows
            if self.run.supervised:
                out = of_class
            out, of_class = out.to(q.device), of_class.to(q.device)
            s, positive = torch.einsum("nc,ck->nk", q, queue.T), torch.linalg.vecdot(q, self.k[here])
            some = None if draws is None else draws.rows(start, start + len(q))
            yield Part(self, start, q, positive, s, out, of_class, some)


@dataclass(frozen=True)
class Part:
    """Some of the queries. positive: (n,) similarity with the own key. s: (n, K) similarities with the queue.
    out: (n, K) rows that are no negatives. of_class: (n, K) rows of the query's class."""

    mined: Mined
    start: int
    q: Tensor
    positive: Tensor
    s: Tensor
    out: Tensor
    of_class: Tensor
    draws: Draws | None

    @cached_property
    def negatives(self) -> Tensor:
        """(n, K) similarities, -inf for a row that is left out."""
        return self.s.masked_fill(self.out, -torch.inf)

    @cached_property
    def synthetic(self) -> dict[str, Synthetics]:
        """By kind, in the recipe's order; computed by the loss's definition (:mod:`moco.kernels.reference`)."""
        d = self.draws
        if d is None:
            return {}
        rows, values = hardest_rows(self.negatives, self.mined.hard)
        h = synthesize(self.q, self.mined.run.queue.to(self.q.device), rows, d)
        cosine = torch.einsum("nc,nsc->ns", self.q, h).masked_fill(lacks_a_parent(values, d), -torch.inf)
        a, b = rows.gather(1, d.slots_a), rows.gather(1, d.slots_b)
        found, at, of_group = {}, 0, dict.fromkeys(GROUPS, 0)
        for row in in_columns(self.mined.recipe):
            group, columns = KINDS[row.kind].group, slice(at, at + row.count)
            inner = slice(of_group[group], of_group[group] + row.count)
            other = b[:, inner] if group == "pair" else None
            found[row.kind] = Synthetics(cosine[:, columns], a[:, columns], other, _weights(d, group, inner))
            at, of_group[group] = columns.stop, inner.stop
        return {row.kind: found[row.kind] for row in self.mined.recipe}

    @cached_property
    def softmax_sum(self) -> Tensor:
        """(n,) logarithm of the denominator of the loss: the key, the queue and all synthetic negatives."""
        T = self.mined.run.T
        rows = self.s if self.mined.run.supervised else self.negatives  # with labels positives stand in it too
        logits = [self.positive.unsqueeze(1), rows, *(made.cosine for made in self.synthetic.values())]
        return (torch.cat(logits, 1).double() / T).logsumexp(1)


class Synthetics(NamedTuple):
    """Negatives of one kind of some queries."""

    cosine: Tensor  # (n, S) similarity with the query, -inf where a parent is a row that is left out
    a: Tensor  # (n, S) the queue row that it is made from
    b: Tensor | None  # (n, S) the other one, of mixup alone
    weights: tuple[Tensor, Tensor]  # (n, S) each: of the parts in PARTS, before the sum is scaled to unit length


PARTS = {"query": ("query", "a"), "pair": ("a", "b"), "sign": ("a", "sign"), "noise": ("a", "noise")}  # by group


def _weights(d: Draws, group: str, at: slice) -> tuple[Tensor, Tensor]:
    if group == "query":
        return d.query_x[:, at], d.query_y[:, at]
    if group == "pair":
        return d.pair_y[:, at], d.pair_z[:, at]
    step = (d.sign_v if group == "sign" else d.noise_w)[:, at]
    return torch.ones_like(step), step


# ------------------------------------------------------------------------------------------- over all queries


def measure(mined: Mined) -> dict[str, Any]:
    """All numbers of a checkpoint as plain values; a share is of 1, and None where there is nothing to count.

    Raises:
        UserError: no query has a negative in the queue.
    """
    sizes, ranges = sizes_of(mined), ranges_of(len(mined.run.queue))
    found = _together(_of_queue(part, sizes, ranges) | _of_kinds(part) for part in mined.parts())
    if not found["top_any"].any():
        raise UserError(f"no query has a negative in the queue of {mined.run.path}; give more images.")
    top = [
        {"hard": hard, "false": _share(found["top_same"][:, i], found["top_known"][:, i]),
         "similarity": _mean(found["top_mean"][:, i]), "mass": _mean(found["top_mass"][:, i])}
        for i, hard in enumerate(sizes)
    ]  # fmt: skip
    return {
        "queries": len(mined.q),
        "hard": mined.hard,
        "base_rate": _share(found["same"], found["known"]),
        "positive": _spread(found["positive"]),
        "top1": _mean((found["rank"] < 1).double()),
        "own_rows": _mean(found["own"]),
        "mass": {name: _mean(found[f"mass_{name}"]) for name in ("positive", "same", "other")},
        "by_rank": _by_rank(found, ranges),
        "by_hard": top,
        "kinds": {kind: of for row in mined.recipe if (kind := row.kind) and (of := _of_kind(mined, row, found))},
    }


def sizes_of(mined: Mined) -> list[int]:
    """Sizes of the hardest set to compare: powers of two from 16 to K, K itself and H."""
    K = len(mined.run.queue)
    return sorted({*(1 << i for i in range(4, K.bit_length()) if 1 << i <= K), K, mined.hard})


def ranges_of(K: int) -> list[int]:
    """(R + 1) first ranks, counted from 0, of ranges that grow with the rank, and K."""
    steps = {1, *(n << i for i in range(40) for n in (2, 3))}
    return [0, *sorted(step for step in steps if step < K), K]


def _together(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of all parts, in float64."""
    kept = [{name: value.double().cpu() for name, value in part.items()} for part in parts]
    return {name: torch.cat([part[name] for part in kept]) for name in kept[0]}


def _of_queue(part: Part, sizes: list[int], ranges: list[int]) -> dict[str, Tensor]:
    """What :func:`measure` needs of the queue, (n,) or (n, sizes or ranges) each."""
    mined, negatives, whole = part.mined, part.negatives, part.softmax_sum.unsqueeze(1)
    known = (mined.row_classes() >= 0).to(part.q.device) & ~part.out
    same, T = part.of_class & ~part.out, mined.run.T
    values, order = negatives.sort(dim=1, descending=True, stable=True)
    same_here, known_here = (_sums(flags.gather(1, order)) for flags in (same, known))  # (n, 1 + K)
    mass = _sums((values.double() / T - whole).exp())
    some = _sums(values.isfinite())
    similarity = _sums(values.masked_fill(values == -torch.inf, 0.0).double())
    weight = (part.s.double() / T - whole).exp()
    positives = part.of_class if mined.run.supervised else same
    ends, first = torch.tensor(sizes, device=order.device), torch.tensor(ranges, device=order.device)
    found = {
        "positive": part.positive,
        "rank": (negatives > part.positive.unsqueeze(1)).sum(1),
        "own": (mined.ids[part.start : part.start + len(part.q)].unsqueeze(1) == mined.run.ids).sum(1),
        "same": same.sum(1),
        "known": known.sum(1),
        "mass_positive": (part.positive.double() / T - whole.squeeze(1)).exp(),
        "mass_same": weight.where(positives, 0.0).sum(1),
        "mass_other": mass[:, -1] - weight.where(same, 0.0).sum(1),
        "at_rank": values[:, first[:-1]],
        "range_same": same_here[:, first].diff(dim=1),
        "range_known": known_here[:, first].diff(dim=1),
        "top_same": same_here[:, ends],
        "top_known": known_here[:, ends],
        "top_mean": similarity[:, ends] / some[:, ends].clamp(min=1),
        "top_any": some[:, -1],
        "top_mass": mass[:, ends] / mass[:, -1:].clamp(min=1e-300),
    }
    return found


def _sums(values: Tensor) -> Tensor:
    """(n, 1 + K): sums of the first so many of (n, K)."""
    return F.pad(values.cumsum(1), (1, 0))


def _of_kinds(part: Part) -> dict[str, Tensor]:
    """What :func:`measure` needs of the synthetic negatives, by "kind name", (n,) or (n, S) each."""
    whole, negatives, found = part.softmax_sum.unsqueeze(1), part.negatives, {}
    hardest = negatives.amax(1, keepdim=True)
    for kind, made in part.synthetic.items():
        rows = [made.a] if made.b is None else [made.a, made.b]
        parents = [part.s.gather(1, row) for row in rows]
        # of the class of the query, as a parent of several must be to make a false negative
        false = torch.stack([part.of_class.gather(1, row) for row in rows]).all(0)
        there = made.cosine.isfinite()
        nothing = torch.full_like(made.cosine, torch.nan)
        found |= {
            f"{kind} cosine": made.cosine.where(there, nothing),
            f"{kind} parents": torch.cat([parent.where(there, nothing) for parent in parents], 1),
            f"{kind} mass": (made.cosine.double() / part.mined.run.T - whole).exp().sum(1),
            f"{kind} above hardest": (made.cosine > hardest).where(there, nothing),
            f"{kind} above parents": (made.cosine > torch.stack(parents).amax(0)).where(there, nothing),
            f"{kind} false": false.where(there, nothing),
        }
    return found


def _of_kind(mined: Mined, row: Synthetic, found: dict[str, Tensor]) -> dict[str, Any]:
    cosine, parents = found[f"{row.kind} cosine"], found[f"{row.kind} parents"]
    if not cosine.isfinite().any():  # of no query are there enough rows
        return {}
    return {
        "count": row.count,
        "coefficient": [row.low, row.high],
        "in_use": mined.run.in_use(row),
        "similarity": _spread(cosine),
        "parents": _spread(parents),
        "histogram": _histogram(cosine),
        "parents_histogram": _histogram(parents),
        "mass": _mean(found[f"{row.kind} mass"]),
        "above_hardest": _mean(found[f"{row.kind} above hardest"]),
        "above_parents": _mean(found[f"{row.kind} above parents"]),
        "false": None if mined.classes is None else _mean(found[f"{row.kind} false"]),
    }


def _by_rank(found: dict[str, Tensor], ranges: list[int]) -> list[dict[str, Any]]:
    """A row for each range of ranks, which are counted from 1: its ends, the share of false negatives with the standard
    error over the queries, and the similarity at its first rank."""
    rows = []
    for i, (first, end) in enumerate(itertools.pairwise(ranges)):
        same, known, at = (found[name][:, i] for name in ("range_same", "range_known", "at_rank"))
        share = _share(same, known)
        row: dict[str, Any] = {"first": first + 1, "last": end, "false": share, "error": None}
        if share is not None and len(same) > 1:  # of a ratio of two means (Cochran, Sampling Techniques, eq. 2.39)
            row["error"] = float((same - share * known).std() / known.mean() / math.sqrt(len(same)))
        rows.append(row | {"similarity": _spread(at)})
    return rows


def _share(some: Tensor, of: Tensor) -> float | None:
    return float(some.sum() / of.sum()) if of.sum() else None


def _mean(values: Tensor) -> float | None:
    there = values[values.isfinite()]
    return float(there.mean()) if len(there) else None


def _spread(values: Tensor) -> dict[str, Any]:
    """Mean and QUANTILES of what is finite."""
    there = values[values.isfinite()].numpy()
    if not len(there):
        return {"mean": None, "quantiles": None}
    return {"mean": float(there.mean()), "quantiles": np.quantile(there, QUANTILES).tolist()}


def _histogram(values: Tensor) -> list[int]:
    """Counts in BINS equal parts of [-1, 1]."""
    there = values[values.isfinite()].clamp(-1, 1).numpy()
    return np.histogram(there, BINS, (-1.0, 1.0))[0].tolist()


# --------------------------------------------------------------------------------------------- a few queries

EXAMPLES = ("hardest", "median", "easiest")  # of a query's synthetic negatives of a kind


def look(mined: Mined, queries: int, top: int) -> list[dict[str, Any]]:
    """The first ``queries`` of the sample: what each is compared with, the ``top`` hardest rows that have an image one
    by one, and EXAMPLES of each kind of synthetic negatives. Weights are shares of the softmax."""
    found = []
    for part in mined.parts():
        here = min(queries - part.start, len(part.q))
        if here < 1:
            break
        found += [_query(part, i, top) for i in range(here)]
    return found


def _query(part: Part, i: int, top: int) -> dict[str, Any]:
    mined, values = part.mined, part.negatives[i].sort(descending=True, stable=True)
    rows = values.indices.tolist()
    hardest = [_row(part, i, row) | {"rank": rank + 1} for rank, row in enumerate(rows) if mined.run.ids[row] >= 0]
    hard, rank = rows[: mined.hard], int((part.negatives[i] > part.positive[i]).sum())
    out = part.out[i]
    known, same = ((flags & ~out.to(flags.device))[hard] for flags in (mined.row_classes() >= 0, part.of_class[i]))
    return {
        "id": int(mined.ids[part.start + i]),
        "positive": {"similarity": float(part.positive[i]), "weight": _weight(part, i, part.positive[i]), "rank": rank},
        "hardest": hardest[:top],
        "false_hard": int(same.sum()),
        "known_hard": int(known.sum()),
        "no_image_hard": int((mined.run.ids[hard] < 0).sum()),
        "left_out": int(out.sum()),
        "synthetic": [
            _example(part, i, kind, made, name, at)
            for kind, made in part.synthetic.items()
            for name, at in _chosen(made.cosine[i])
        ],
    }  # fmt: skip


def _row(part: Part, i: int, row: int) -> dict[str, Any]:
    similarity, same = part.s[i, row], bool(part.of_class[i, row]) and not bool(part.out[i, row])
    weight = _weight(part, i, similarity)
    return {"row": row, "id": int(part.mined.run.ids[row]), "similarity": float(similarity), "weight": weight,
            "same_class": same}  # fmt: skip


def _weight(part: Part, i: int, similarity: Tensor) -> float:
    return float((similarity.double() / part.mined.run.T - part.softmax_sum[i]).exp())


def _chosen(cosine: Tensor) -> list[tuple[str, int]]:
    """EXAMPLES as places in (S,), those of them that are different."""
    order = cosine.argsort(descending=True, stable=True)
    order = order[cosine[order].isfinite()].tolist()
    if not order:
        return []
    places = zip(EXAMPLES, (order[0], order[len(order) // 2], order[-1]), strict=True)
    return list({at: (name, at) for name, at in reversed([*places])}.values())[::-1]


def _example(part: Part, i: int, kind: str, made: Synthetics, name: str, at: int) -> dict[str, Any]:
    rows = {"a": int(made.a[i, at]), "b": None if made.b is None else int(made.b[i, at])}
    parts = []
    for of, weight in zip(PARTS[KINDS[kind].group], made.weights, strict=True):
        what: dict[str, Any] = {"of": of, "weight": float(weight[i, at])}
        row = rows.get(of)
        parts.append(what if row is None else what | {**_row(part, i, row), "of": "row", "weight": what["weight"]})
    similarity = made.cosine[i, at]
    return {"kind": kind, "which": name, "column": at, "parts": parts, "similarity": float(similarity),
            "softmax": _weight(part, i, similarity)}  # fmt: skip
