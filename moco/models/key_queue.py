"""The queue of keys: K rows of width C, unit length from birth, oldest rows replaced first.

Functions over plain tensors; the tensors are buffers of the model, so checkpoints hold them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.kernels.topk import hardest

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


class QueueReading(NamedTuple):
    """What :func:`read_queue` finds of a queue that is full of keys."""

    old_mass: float  # share of the queue's softmax mass on its older half, mean over queries; NaN: no rows count
    false_negatives: float | None  # share of the hardest rows that are of the query's class; None without labels


@torch.no_grad()
def read_queue(
    q: Tensor, ids: Tensor, queue: Tensor, queue_ids: Tensor, pointer: Tensor, T: float,
    labels: Tensor | None = None, hard: int = 0,
) -> QueueReading | None:  # fmt: skip
    """How a few queries see the queue, in one pass over it. None while rows are left that no image has filled.

    ``old_mass`` is 0.5 where keys of all ages are alike, and near 0 where old keys are told from new ones by their age.
    For a log line, not for a step: the host waits once, and all products of q and the queue are kept.

    Args:
        q: (N, C) unit queries. ids: (N,) their images, whose own rows do not count.
        queue, queue_ids, pointer: (K, C), (K,), (1,), see :func:`enqueue_`.
        T: temperature.
        labels: (n,) int64, the class of every image. hard: how many rows, K at most, are a query's hardest.
    """
    K = queue.shape[0]
    by_age = next_rows(queue, pointer, K)  # (K,) the oldest first
    numbers = queue_ids[by_age]
    own = numbers == ids[:, None]  # (N, K)
    logits = (q @ queue[by_age].T).masked_fill(own, -torch.inf) / T  # (N, K)
    old, new = (logits[:, half].logsumexp(1) for half in (slice(0, K // 2), slice(K - K // 2, K)))  # (N,) each
    found = [(queue_ids == EMPTY).any().float(), torch.sigmoid(old - new).mean()]
    if labels is not None:
        rows, _ = hardest(logits, min(hard, K))  # (N, H)
        counts = ~own.gather(1, rows)
        alike = (labels[numbers[rows]] == labels[ids][:, None]) & counts
        found.append(alike.sum() / counts.sum())
    empty, share, *false = torch.stack(found).tolist()
    return None if empty else QueueReading(share, false[0] if false else None)
