"""The hardest set of each query, exactly and faster than a library's top-k.

Legend: n queries of a block, K queue rows, H hardest rows a query, W buckets, M candidates of all queries.

Slots count rows by their number, so neither a sort nor a top-k of K is needed. H of the maxima of W disjoint buckets
give a floor that H elements reach and few others (6 % more at K = 65,536 and H = 1,024), one comparison of the whole
matrix finds those in the order of their rows, and the H-th largest of them is the threshold. The selections are
numpy's partition, which vectorises where torch's top-k does not. On another device they are top-k's.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moco.kernels.spec import hardest_rows

BUCKET = 8  # elements a bucket
DIRECT = 32  # up to so many rows a wanted one, selecting among all rows is faster than among maxima and candidates
SPARE = 8  # a query with more than SPARE * H candidates (rows without number alike) goes to the definition


def on_host(x: Tensor) -> bool:
    """Whether the CPU computes: then it may read a value to save work, and adds in one order. On a GPU the host would
    wait for all that the device has to do, and what many programs add to one number, they add in any order."""
    return x.device.type == "cpu"


def by_maxima(total: int, hard: int, device: torch.device) -> bool:
    """Whether ``hardest`` of ``hard`` among ``total`` rows wants the maxima of buckets."""
    return device.type == "cpu" and total >= DIRECT * hard


def bucket_maxima(scores: Tensor) -> Tensor:
    """(n, V / BUCKET) maxima of disjoint buckets of scores (n, V); the columns of a last, short bucket are left out."""
    width = scores.shape[1] // BUCKET
    return scores[:, : width * BUCKET].unflatten(1, (BUCKET, width)).amax(1)


def hardest(
    scores: Tensor, hard: int, maxima: Tensor | None = None, absent: float = -torch.inf
) -> tuple[Tensor, Tensor]:
    """``spec.hardest_rows`` of scores (n, K): rows (n, H) int64, ascending, and their scores (n, H).

    Scores are similarities or any increasing function of them. On a CPU a query with fewer than H rows that are not
    left out, or with NaN, is given to the definition itself; elsewhere nothing waits for the device.

    Args:
        maxima: (n, W) of disjoint buckets where the caller has them, see ``by_maxima``.
        absent: the score of a row that is left out, the least there is.
    """
    if not on_host(scores):
        return _on_device(scores, hard, absent)
    rows, values, sure = _on_host(scores, hard, _floor(scores, hard, maxima), absent)
    if not bool(sure.all()):
        doubtful = scores[~sure]
        rows[~sure], found = hardest_rows(doubtful.masked_fill(doubtful == absent, -torch.inf), hard)
        values[~sure] = found.masked_fill(found == -torch.inf, absent)
    return rows, values


def _on_device(scores: Tensor, hard: int, absent: float) -> tuple[Tensor, Tensor]:
    """``hardest`` by two top-k: of the scores, and of the lowest rows among those equal to the H-th."""
    total, device = scores.shape[1], scores.device
    values, rows = scores.topk(hard, dim=1)  # descending, NaN first; which of equal rows is anybody's guess
    least = values[:, -1:]
    tied, ties = (torch.where(least.isnan(), x.isnan(), x == least) for x in (scores, values))  # (n, K), (n, H)
    upward = torch.arange(total, 0, -1, dtype=torch.int32, device=device)
    lowest = total - torch.where(tied, upward, 0).topk(hard, dim=1).values.long()  # (n, H) rows, ascending
    which = torch.arange(hard, device=device) - (~ties).sum(1, keepdim=True)  # (n, H) of a tie, from 0
    rows = torch.where(ties, lowest.gather(1, which.clamp_(min=0)), rows)
    places, _ = torch.where(scores.gather(1, rows) == absent, rows + total, rows).sort(dim=1)  # those left out last
    rows = places % total
    return rows, scores.gather(1, rows)


def _on_host(scores: Tensor, hard: int, floor: np.ndarray, absent: float) -> tuple[Tensor, Tensor, Tensor]:
    """By numpy, from a floor (n, 1): rows and values (n, H), and whether they are surely the defined ones (n,)."""
    s = scores.numpy()
    n, total = s.shape
    first = total * np.arange(n)[:, None]  # (n, 1) flat place of a query's first row
    places, counts = _reaching(s, floor)  # (M,), (n,)
    sure = (counts >= hard) & (counts <= SPARE * hard) & (floor[:, 0] > absent)
    if not sure.all():
        places, counts = _reaching(s, np.where(sure[:, None], floor, np.inf))
    values = s.reshape(-1).take(places)  # (M,)
    if (counts == hard).all():
        rows, similar = places.reshape(n, hard) - first, values.reshape(n, hard)
        return torch.from_numpy(rows), torch.from_numpy(similar), torch.from_numpy(sure)

    width = max(int(counts.max()), hard)
    lines = np.full((n, width), -np.inf, s.dtype)  # a query's candidates stand at the front of its line
    lines[np.arange(width) < counts[:, None]] = values
    least = _largest(lines, hard)[:, 0]  # (n,) the H-th largest
    keep = values >= least.repeat(counts)
    starts = np.append(0, counts.cumsum())
    for i in np.flatnonzero(sure & (np.diff(np.append(0, keep.cumsum())[starts]) > hard)):
        of_query = slice(starts[i], starts[i + 1])
        equal = np.flatnonzero(values[of_query] == least[i])
        keep[of_query][equal[hard - np.count_nonzero(keep[of_query]) :]] = False  # the last ones: the higher rows

    kept = np.flatnonzero(keep)
    rows, similar = places.take(kept).reshape(-1, hard), values.take(kept).reshape(-1, hard)
    rows -= first[sure]
    if len(rows) < n:
        some_rows, some_similar = rows, similar
        rows, similar = np.zeros((n, hard), np.int64), np.zeros((n, hard), s.dtype)
        rows[sure], similar[sure] = some_rows, some_similar
    return torch.from_numpy(rows), torch.from_numpy(similar), torch.from_numpy(sure)


def _floor(scores: Tensor, hard: int, maxima: Tensor | None) -> np.ndarray:
    """(n, 1) a number that at least H elements of each query reach, and the H-th largest does: of all, or of maxima."""
    if not by_maxima(scores.shape[1], hard, scores.device):
        return _largest(scores.numpy(), hard)
    if maxima is None or maxima.shape[1] < hard:
        maxima = bucket_maxima(scores)
    return _largest(maxima.numpy(), hard)


def _reaching(s: np.ndarray, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat places (M,), ascending, of the elements of s (n, K) that are no less than floor (n, 1), and how many a row.

    Few are: words of eight comparisons are looked through before the comparisons themselves.
    """
    n, total = s.shape
    reach = np.zeros(-(-s.size // 8) * 8, bool)
    np.greater_equal(s, floor, out=reach[: s.size].reshape(n, total))
    words = np.flatnonzero(reach.view(np.uint64) != 0)
    found = np.flatnonzero(reach.reshape(-1, 8).take(words, axis=0))
    places = (words << 3).take(found >> 3) + (found & 7)
    return places, np.diff(places.searchsorted(np.arange(n + 1) * total))


def _largest(values: np.ndarray, hard: int) -> np.ndarray:
    """(n, 1) the H-th largest of each row."""
    place = values.shape[1] - hard
    return np.partition(values, place, axis=1)[:, place : place + 1]
