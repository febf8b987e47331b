"""The synthetic negatives themselves, for looking at. The losses never build them, see :mod:`moco.kernels.closed_form`.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, n negatives of a kind a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moco import distributed, seeding
from moco.config import MoCHiConfig, SynCoConfig
from moco.errors import UserError
from moco.kernels import Draws, hardest_rows, reference
from moco.library.arguments import check
from moco.methods.losses import unit
from moco.methods.negatives import Recipe, draw, in_columns
from moco.methods.registry import METHODS

_OF = {"mochi": MoCHiConfig, "synco": SynCoConfig}


@torch.no_grad()
def hard_negatives(
    q: Tensor,
    queue: Tensor,
    recipe: str | MoCHiConfig | SynCoConfig = "synco",
    n_hard: int = 1024,
    *,
    seed: int = 0,
    call: int = 0,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """The synthetic negatives (N, n, C) of queries by kind, unit rows; a formula for each is in
    :mod:`moco.methods.synco`.

    They are those of the loss with this seed in its ``call``-th call, counted from 0, by its definition
    (:mod:`moco.kernels.reference`); ``int(criterion.calls)`` is the number of the next one.

    Args:
        q: (N, C) features of the queries, of any length.
        queue: (K, C) unit rows, such as ``criterion.queue``.
        recipe: "synco" or "mochi" with its default counts, or a config with others.
        n_hard: H, the queue rows most similar to a query, which negatives are made from.
        ids, queue_ids: as in a call of the loss and its buffer: rows of the query's own image are no parents. A
            negative that lacks a parent is NaN, and is no negative in the loss.

    Raises:
        UserError: an unknown recipe, or shapes and counts that do not fit.
    """
    config = _OF[recipe]() if isinstance(recipe, str) and recipe in _OF else recipe
    name = next((name for name, kind in _OF.items() if isinstance(config, kind)), "")
    if not name:
        raise UserError(f"recipe must be {' or '.join(_OF)}, or a config of one, not {recipe!r}.")
    check(n_hard=n_hard, seed=seed, **vars(config))
    if q.dim() != 2 or queue.dim() != 2 or q.shape[1] != queue.shape[1] or n_hard > len(queue):
        sizes = f"q {tuple(q.shape)} and a queue {tuple(queue.shape)}"
        raise UserError(f"{sizes} do not fit n_hard {n_hard}: give (N, C), (K, C) and n_hard of at most K.")
    rows: Recipe = tuple(row for row in METHODS[name].hooks.recipe(config) if row.count)
    q = unit(q)
    key = seeding.key("draws", seed, call, distributed.rank())
    draws = draw(rows, len(q), n_hard, q.shape[1], key, q.device)
    if draws is None:
        return {}
    made = _made(q, queue.to(q.dtype), n_hard, draws.to(q.device, q.dtype), ids, queue_ids)
    ordered = in_columns(rows)
    found = dict(zip((row.kind for row in ordered), made.split([row.count for row in ordered], dim=1), strict=True))
    return {row.kind: found[row.kind] for row in rows}


def _made(q: Tensor, queue: Tensor, n_hard: int, draws: Draws, ids: Tensor | None, queue_ids: Tensor | None) -> Tensor:
    """(N, S, C), NaN where a parent is missing."""
    similarity = torch.einsum("nc,ck->nk", q, queue.T)  # (N, K)
    if ids is not None and queue_ids is not None:
        similarity = similarity.masked_fill(ids.unsqueeze(1) == queue_ids, -torch.inf)
    rows, values = hardest_rows(similarity, n_hard)
    made = reference.synthesize(q, queue, rows, draws)
    return made.masked_fill(reference.lacks_a_parent(values, draws).unsqueeze(2), torch.nan)
