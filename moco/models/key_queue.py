"""The queue of keys: K rows of width C, unit length from birth, oldest rows replaced first.

Functions over plain tensors; the tensors are buffers of the model, so checkpoints hold them.
"""

from __future__ import annotations

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
