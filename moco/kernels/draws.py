"""Draws of synthetic negatives on a GPU, all of a batch in one Triton launch, by a counter-based generator.

Legend: N queries, C feature width, H hardest rows a query, S synthetic negatives a query (Sq, Sp, Ss, Sn of spec.py).

Every number is a word of Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011) at a counter of its own: which negative
of its kind, which query, which kind, and what for. So what a negative gets depends neither on the other kinds, nor on
how many negatives or queries there are, nor on the device. ``by_torch`` is the definition, and what is used where
triton cannot compile; ``by_triton`` gives the same slots and, to rounding, the same weights and noise.

Importing this file does not import triton; the first call does.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from moco.kernels import by_triton as fused
from moco.kernels.spec import Draws

WORD = (1 << 32) - 1
ROUND_A, ROUND_B, KEY_A, KEY_B = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85  # of Philox-4x32
BLOCK_S = 128  # negatives a program; 3 us on an H200 at N = 32, 14 at N = 256
APPROXIMATION = 1e-4  # of weights and noise, whose logarithm and cosine a GPU approximates


class Row(NamedTuple):
    """One kind of synthetic negative of a recipe: c ~ U(low, high), and its weights a c + b."""

    group: int  # of the columns of ``Draws``: query, pair, sign, noise
    stream: int  # of its randomness, below 2^31
    count: int
    low: float
    high: float
    weights: tuple[tuple[float, float], ...]  # (a, b): two of query and pair, one of the others


def draw(rows: tuple[Row, ...], n: int, hard: int, dim: int, key: int, device: torch.device) -> Draws:
    """The draws of n queries, slots in [0, hard), noise of width dim, a function of all but the device.

    Columns of a group stand in the order of the rows. key: 63 bits.
    """
    compute = by_triton if agrees(device) else by_torch
    return compute(rows, n, hard, dim, key, device)


@functools.cache
def agrees(device: torch.device) -> bool:
    """Whether ``by_triton`` runs on a device and gives the defined draws; warns if not. Asked once a process."""

    def compare() -> str:
        halves = ((-1.0, 1.0), (1.0, 0.5))
        rows = tuple(Row(group, 7 + group, 40, 0.2, 0.7, halves[: 1 + (group < 2)]) for group in range(4))
        found = by_triton(rows, 3, 1000, 21, (1 << 62) + 12345, device).to("cpu").tensors()
        right = by_torch(rows, 3, 1000, 21, (1 << 62) + 12345, torch.device("cpu")).tensors()
        same = all(torch.allclose(x, y, rtol=0, atol=APPROXIMATION) for x, y in zip(found, right, strict=True))
        return "" if same else "its numbers are not the defined ones"

    if why := fused.fault(compare):
        warnings.warn(
            f"synthetic negatives are drawn on {device} by torch's operators, not by triton: {why}; the draws are the "
            "same, slower",
            RuntimeWarning,
            stacklevel=2,
        )
    return not why


def group_sizes(rows: tuple[Row, ...]) -> tuple[int, int, int, int]:
    """(Sq, Sp, Ss, Sn)."""
    n_query, n_pair, n_sign, n_noise = (sum(row.count for row in rows if row.group == group) for group in range(4))
    return n_query, n_pair, n_sign, n_noise


@functools.lru_cache(64)
def table(rows: tuple[Row, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """What is drawn into each column of ``slots_a``, in its order: (5, S) int32 and (6, S) float32.

    int32: the stream, the number of the negative in its row, how many numbers a query the weights of groups before it
    take, how many negatives its group has, and which of them it is. float32: low, high - low, a and b of the first
    weight, a and b of the second, 0 for none.
    """
    sizes = group_sizes(rows)
    bases = (0, 2 * sizes[0], 2 * (sizes[0] + sizes[1]), 2 * (sizes[0] + sizes[1]) + sizes[2])
    whole, real = [], []
    for group in range(4):
        place = 0
        for row in (row for row in rows if row.group == group):
            (a, b), (a2, b2) = (*row.weights, (0.0, 0.0))[:2]
            for inside in range(row.count):
                whole.append((row.stream, inside, bases[group], sizes[group], place + inside))
                real.append((row.low, row.high - row.low, a, b, a2, b2))
            place += row.count
    return (
        torch.tensor(whole, dtype=torch.int32).T.contiguous().to(device),
        torch.tensor(real, dtype=torch.float32).T.contiguous().to(device),
    )


# ------------------------------------------------------------------------------------------------- the definition


def philox(key: int, *counter: Tensor) -> list[Tensor]:
    """Four words for each counter of four words: int64 tensors below 2^32, broadcast; key: 64 bits."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key & WORD, key >> 32
    for _ in range(10):
        a, b = ROUND_A * c0, ROUND_B * c2  # 64 bits, of which int64 has the highest as its sign
        c0, c1, c2, c3 = (b >> 32) & WORD ^ c1 ^ k0, b & WORD, (a >> 32) & WORD ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + KEY_A) & WORD, (k1 + KEY_B) & WORD
    return [c0, c1, c2, c3]


def normal(words: list[Tensor]) -> list[Tensor]:
    """Four numbers of N(0, 1) from four words, by Box and Muller."""
    found = []
    for one, other in (words[:2], words[2:]):
        radius = (-2 * ((one.float() + 1) * 2.0**-32).log()).sqrt()
        angle = (other >> 8).float() * (2 * math.pi * 2.0**-24) - math.pi / 4
        found += [radius * angle.cos(), radius * angle.sin()]
    return found


def by_torch(rows: tuple[Row, ...], n: int, hard: int, dim: int, key: int, device: torch.device) -> Draws:
    """``draw`` by torch's operators."""
    n_query, n_pair, n_sign, n_noise = group_sizes(rows)
    whole, real = table(rows, device)
    (stream, inside, *_), (low, span, a, b, a2, b2) = whole.long(), real  # each (S,)
    query = torch.arange(n, device=device).unsqueeze(1)
    words = philox(key, inside, query, stream, query.new_zeros(()))  # each (N, S)
    slots_a, slots_b = ((word * hard) >> 32 for word in words[:2])
    c = low + span * ((words[2] >> 8).float() * 2.0**-24)
    first, second = (w.split([n_query, n_pair, n_sign, n_noise], dim=1) for w in (a * c + b, a2 * c + b2))
    quarter = torch.arange(-(-dim // 4), device=device)
    of_noise = slice(len(stream) - n_noise, None)
    counter = quarter, query.unsqueeze(2), stream[of_noise].unsqueeze(1), 1 + inside[of_noise].unsqueeze(1)
    noise = torch.cat(normal(philox(key, *counter)), dim=2)[:, :, :dim]  # (N, Sn, C)
    pairs = slots_b[:, n_query : n_query + n_pair]
    return Draws(
        slots_a, pairs.contiguous(), first[0], second[0], first[1], second[1], first[2], first[3], noise.contiguous()
    )


# ------------------------------------------------------------------------------------------------- one launch


def by_triton(rows: tuple[Row, ...], n: int, hard: int, dim: int, key: int, device: torch.device) -> Draws:
    """``draw`` in one launch, in which all weights are one tensor."""
    n_query, n_pair, n_sign, n_noise = group_sizes(rows)
    total, quarter = n_query + n_pair + n_sign + n_noise, -(-dim // 4)
    sizes = (n_query, n_query, n_pair, n_pair, n_sign, n_noise)
    weights = torch.empty(n * sum(sizes), device=device)
    x, y, pair_y, pair_z, v, w = (
        part.view(n, size) for part, size in zip(weights.split([n * s for s in sizes]), sizes, strict=True)
    )
    slots_a, slots_b = (torch.empty(n, size, dtype=torch.int64, device=device) for size in (total, n_pair))
    noise = torch.empty(n, n_noise, dim, device=device)
    blocks, code = -(-total // BLOCK_S), fused.programs("draws_triton")
    with torch.cuda.device_of(weights):
        fused.run_program(
            code.draw, (n, blocks + n_noise), *table(rows, device), slots_a, slots_b, weights, noise, key, n,
            total, n_query, n_pair, n_noise, hard, dim, blocks, quarter, BLOCK_S=BLOCK_S,
            BLOCK_C=max(16, fused.power_of_two(quarter)), num_warps=1,
        )  # fmt: skip
    return Draws(slots_a, slots_b, x, y, pair_y, pair_z, v, w, noise)
