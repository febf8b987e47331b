"""Bytes and operations of the four stages of the fused head, counted, against the floor of each stage.

    python benchmarks/kernel_bytes.py

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query, which are
Sq + Sp + Ss + Sn as in moco/kernels/spec.py.

The floor of a stage reads each of its inputs from memory once and writes each of its outputs once; rows of the queue
that are gathered count at most the whole queue. What is moved is what the programs of moco/kernels/programs.py ask
for, caches not considered. Everything is float32, slots of the draws are int64.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

FLOAT, SLOT = 4, 8  # bytes
SELECT_PASSES = 5  # four digits of the H-th largest, then the set itself
SYNCO = (256 + 256 + 64, 256, 64, 64)  # Sq, Sp, Ss, Sn of SynCo's default counts
NOTHING = (0, 0, 0, 0)


class Stage(NamedTuple):
    name: str
    floor: int  # bytes
    moved: int  # bytes
    flops: int  # of a matrix product, 2 a multiply-add; 0 for the other stages, which memory bounds


def stages(n: int, k: int, c: int, hard: int, counts: tuple[int, int, int, int]) -> list[Stage]:
    """The stages of a step, forward and backward; without synthetic negatives no hardest set is looked for.

    Args: n, k, c, hard: N, K, C, H. counts: (Sq, Sp, Ss, Sn).
    """
    matrix, queue, batch = (FLOAT * size for size in (n * k, k * c, n * c))
    of_query, of_pair, of_sign, of_noise = counts
    draws = sum(counts)
    slots = SLOT * n * (draws + of_pair)
    weights = FLOAT * n * (2 * of_query + 2 * of_pair + of_sign + of_noise * (1 + c))  # noise carries its e
    hardest = 2 * FLOAT * n * hard if draws else 0  # rows and values
    row = n * c * FLOAT
    first_walk, second_walk = row * (2 * of_pair + of_sign + of_noise), row * (draws + of_pair)
    small = 3 * batch + 5 * FLOAT * n  # q, k, the vector a query; its loss, rank, largest similarity, mass
    product = 2 * n * k * c
    gathered = min(first_walk, queue)
    found = [
        Stage("similarities", queue + batch + matrix, queue + batch + matrix, product),
        Stage("hardest set", matrix + hardest, SELECT_PASSES * matrix + hardest, 0),
        Stage(
            "head",
            2 * matrix + hardest + slots + weights + gathered + small,
            3 * matrix + 2 * (hardest + slots + weights) + first_walk + second_walk + small,
            0,
        ),
        Stage("gradient", matrix + queue + 2 * batch, matrix + queue + 2 * batch, product),
    ]
    return [stage for stage in found if draws or stage.name != "hardest set"]


def least(n: int, k: int, c: int) -> Stage:
    """What no implementation does without: the queue, q and k read once, the gradient written once, two products.

    Args: N, K, C.
    """
    size = FLOAT * (k * c + 3 * n * c)
    return Stage("least", size, size, 4 * n * k * c)


def floor_bytes(shape: list[Stage]) -> int:
    """The floors of all stages together."""
    return sum(stage.floor for stage in shape)


def floor_seconds(shape: list[Stage], bandwidth: float, rate: float) -> float:
    """The least time that the stages take one after another.

    Args: bandwidth: bytes a second. rate: operations a second of a matrix product.
    """
    return sum(max(stage.floor / bandwidth, stage.flops / rate) for stage in shape)


def table(width: int = 128, hard: int = 1024, counts: tuple[int, int, int, int] = SYNCO) -> str:
    """The table of moco/kernels/README.md."""
    names = [stage.name for stage in stages(1, 1, 1, 1, counts)]
    lines = [
        "| N | K | " + " | ".join(names) + " | all | moved / floor | least |",
        "| ---: | ---: |" + " ---: |" * (len(names) + 3),
    ]
    for n in (32, 256, 1024):
        for k in (4096, 65536, 262144):
            shape = stages(n, k, width, hard, counts)
            moved, floor = sum(stage.moved for stage in shape), floor_bytes(shape)
            cells = [f"{n:,}", f"{k:,}", *map(_cell, shape), f"{_mb(moved)} ({_mb(floor)})", f"{moved / floor:.1f}"]
            lines.append("| " + " | ".join([*cells, _mb(least(n, k, width).floor)]) + " |")
    return "\n".join(lines)


def _cell(stage: Stage) -> str:
    work = f", {stage.flops / 1e9:.2g} Gflop" if stage.flops else ""
    floor = f" ({_mb(stage.floor)})" if stage.floor != stage.moved else ""
    return _mb(stage.moved) + floor + work


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.1f}"


if __name__ == "__main__":
    print(table())
    sys.exit(0)
