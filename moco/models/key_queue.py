"""The queue of keys: K rows of width C, unit length from birth, oldest rows replaced first.

Functions over plain tensors; the tensors are buffers of the model, so checkpoints hold them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY = -1  # id of a row that no image has filled yet


def new_queue(K: int, C: int, generator: torch.Generator) -> Tensor:
    """(K, C) random unit rows. (The released SynCo normalises the other axis, so its first rows are not unit.)"""
    return F.normalize(torch.randn(K, C, generator=generator), dim=1)


@torch.no_grad()
def enqueue_(
    queue: Tensor, queue_ids: Tensor, pointer: Tensor, keys: Tensor, ids: Tensor, shadow: Tensor | None = None
) -> None:
    """Replace the oldest rows by ``keys``, wrapping around; any number of keys, no host synchronisation.

    Args:
        queue: (K, C) changed in place. queue_ids: (K,) int64 changed in place.
        pointer: (1,) int64, the oldest row; moved in place.
        keys: (n, C), ids: (n,); with n > K only the last K stay.
        shadow: (K, C) the queue in another dtype, changed in place alike.
    """
    K, n = queue.shape[0], keys.shape[0]
    rows = next_rows(queue, pointer + max(0, n - K), n)
    kept = keys[-K:].to(queue.dtype)
    for rounded in (queue,) if shadow is None else (queue, shadow):
        rounded.index_copy_(0, rows, kept.to(rounded.dtype))
    queue_ids.index_copy_(0, rows, ids[-K:])
    pointer.add_(n).remainder_(K)


def next_rows(queue: Tensor, pointer: Tensor, n: int) -> Tensor:
    """Indices (min(n, K),) of the rows that the next ``n`` keys will replace."""
    K = queue.shape[0]
    return (pointer + torch.arange(min(n, K), device=queue.device)) % K


@torch.no_grad()
def old_mass(q: Tensor, ids: Tensor, queue: Tensor, queue_ids: Tensor, pointer: Tensor, T: float) -> float | None:
    """The share of a queue's softmax mass that is on its older half, mean over queries: 0.5 where keys of all ages are
    alike, near 0 where old keys are told from new ones by their age. None while rows are left that no image has filled,
    or where all rows are of a query's own image.

    For a log line, not for a step: the host waits, and all products of q and the queue are kept.

    Args:
        q: (N, C) unit queries. ids: (N,) their images, whose own rows do not count.
        queue, queue_ids, pointer: (K, C), (K,), (1,), see :func:`enqueue_`.
        T: temperature.
    """
    K = queue.shape[0]
    by_age = next_rows(queue, pointer, K)  # (K,) the oldest first
    logits = (q @ queue[by_age].T).masked_fill(queue_ids[by_age] == ids[:, None], -torch.inf) / T  # (N, K)
    old, new = (logits[:, rows].logsumexp(1) for rows in (slice(0, K // 2), slice(K - K // 2, K)))  # (N,) each
    share = float(torch.sigmoid(old - new).mean())
    return None if bool((queue_ids == EMPTY).any()) or math.isnan(share) else share
