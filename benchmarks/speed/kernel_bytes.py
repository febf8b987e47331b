"""Bytes and operations of a step of the contrastive head, counted: the floor of its four stages, and its launches.

    python -m benchmarks.speed.kernel_bytes

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query, which are
Sq + Sp + Ss + Sn as in moco/kernels/spec.py.

The floor of a stage reads each of its inputs from memory once and writes each of its outputs once; rows of the queue
that are gathered count at most the whole queue. Launches are counted by what the programs of
moco/kernels/triton_kernels.py ask for, caches not considered. Everything is float32, slots of the draws are int64.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from moco.kernels.by_triton import GridPlan

FLOAT, SLOT = 4, 8  # bytes
CANDIDATES = 1.15  # a row of the set: expected in random order, with 4 H buckets
SYNCO = (256 + 256 + 64, 256, 64, 64)  # Sq, Sp, Ss, Sn of SynCo's default counts
NOTHING = (0, 0, 0, 0)


class Stage(NamedTuple):
    name: str
    floor: int  # bytes
    flops: int  # of a matrix product, 2 a multiply-add; 0 for the other stages, which memory bounds


def stages(n: int, k: int, c: int, hard: int, counts: tuple[int, int, int, int]) -> list[Stage]:
    """The stages of a step, forward and backward; without synthetic negatives no hardest set is looked for.

    Args: n, k, c, hard: N, K, C, H. counts: (Sq, Sp, Ss, Sn).
    """
    matrix, queue, batch = (FLOAT * size for size in (n * k, k * c, n * c))
    of_pair, of_sign, of_noise = counts[1:]
    draws = sum(counts)
    hardest = 2 * FLOAT * n * hard if draws else 0  # rows and values
    gathered = min(n * c * FLOAT * (2 * of_pair + of_sign + of_noise), queue)
    small = 3 * batch + 5 * FLOAT * n  # q, k, the vector a query; its loss, rank, largest similarity, mass
    product = 2 * n * k * c
    found = [
        Stage("similarities", queue + batch + matrix, product),
        Stage("hardest set", matrix + hardest, 0),
        Stage("head", 2 * matrix + hardest + drawn(n, c, counts) + gathered + small, 0),
        Stage("gradient", matrix + queue + 2 * batch, product),
    ]
    return [stage for stage in found if draws or stage.name != "hardest set"]


def drawn(n: int, c: int, counts: tuple[int, int, int, int]) -> int:
    """Bytes of the draws: slots, weights, and the noise with its e."""
    of_query, of_pair, of_sign, of_noise = counts
    slots = SLOT * n * (sum(counts) + of_pair)
    return slots + FLOAT * n * (2 * of_query + 2 * of_pair + of_sign + of_noise * (1 + c))


def launches(plan: GridPlan, counts: tuple[int, int, int, int]) -> dict[str, int]:
    """Bytes that each launch of a step asks for, with operands in float32; counts: Sq, Sp, Ss, Sn."""
    n, k, c, hard = plan.n, plan.total, plan.width, plan.hard
    matrix, queue, batch = (FLOAT * size for size in (n * k, k * c, n * c))
    of_tiles, maxima = 3 * FLOAT * n * plan.tiles, FLOAT * n * plan.maxima
    tall = -(-n // plan.block_n)  # programs that read the same row of the queue
    listed = int(CANDIDATES * n * hard) * 2 * FLOAT  # row and similarity
    hardest, vectors = 2 * FLOAT * n * hard, FLOAT * n * plan.blocks * (c + 2)
    wide = -(-c // plan.pull_c)  # programs that read the same similarity
    partial = FLOAT * plan.splits * n * c
    return {
        "score": tall * queue + 2 * plan.tiles * batch + matrix + maxima + of_tiles,
        "compact": plan.chunks * maxima + matrix + listed,
        "exact": plan.listing * listed + hardest,
        "draws": drawn(n, c, counts) + 8 * n * (plan.draws + counts[1]) + n * (plan.draws + counts[1]) * c * FLOAT
        + plan.blocks * batch + vectors,
        "combine": plan.parts * (of_tiles + 2 * batch) + vectors + batch,
        "pull": wide * matrix + tall * queue + partial,
        "finish": partial + 2 * batch,
    }  # fmt: skip


def least(n: int, k: int, c: int) -> Stage:
    """What no implementation does without: the queue, q and k read once, the gradient written once, two products.

    Args: N, K, C.
    """
    size = FLOAT * (k * c + 3 * n * c)
    return Stage("least", size, 4 * n * k * c)


def floor_bytes(shape: list[Stage]) -> int:
    """The floors of all stages together."""
    return sum(stage.floor for stage in shape)


def floor_seconds(shape: list[Stage], bandwidth: float, rate: float) -> float:
    """The least time that the stages take one after another.

    Args: bandwidth: bytes a second. rate: operations a second of a matrix product.
    """
    return sum(max(stage.floor / bandwidth, stage.flops / rate) for stage in shape)


def table(width: int = 128, hard: int = 1024, counts: tuple[int, int, int, int] = SYNCO) -> str:
    """The table of moco/kernels/README.md, in megabytes."""
    names = list(launches(GridPlan(1, 4096, width, hard, sum(counts)), counts))
    lines = [
        "| N | K | Gflop | " + " | ".join(names) + " | all | floor of the stages | least |",
        "| ---: | ---: | ---: |" + " ---: |" * (len(names) + 3),
    ]
    for n in (32, 256, 1024):
        for k in (4096, 65536, 262144):
            moved = list(launches(GridPlan(n, k, width, hard, sum(counts)), counts).values())
            floor, need = floor_bytes(stages(n, k, width, hard, counts)), least(n, k, width)
            sizes = (_mb(size) for size in (*moved, sum(moved), floor, need.floor))
            lines.append(f"| {n:,} | {k:,} | {need.flops / 1e9:.2g} | " + " | ".join(sizes) + " |")
    return "\n".join(lines)


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.1f}"


def main() -> int:
    """Print the table; the exit code."""
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
