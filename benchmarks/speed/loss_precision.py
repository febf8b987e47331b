"""What rounding the operands of the loss's two matrix products costs, against float64, emulated on a CPU.

    python -m benchmarks.speed.loss_precision

Legend: N queries, C feature width, K queue rows, H hardest rows a query, T temperature.

Unit features, each query with a key near it: "random", where nothing but the key is near, and "clustered", where the
queue, the queries and the keys lie around 100 centres, as features of images with classes do. Operands are rounded to
the nearest number of the precision, products are summed in float32, and everything between the two products is
float32, as in moco/kernels. tf32x3 is the sum of three products of parts in tf32: high high + high low + low high.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

C, K, HARD = 128, 65536, 1024
DIGITS = {"tf32": 10, "bf16": 7}  # explicit binary ones; float32 has 23
PRECISIONS = ("fp32", "tf32x3", "tf32", "bf16")


def rounded(x: Tensor, digits: int) -> Tensor:
    """Float32 numbers to the nearest with so many explicit binary digits, ties to even."""
    bits, drop = x.contiguous().view(torch.int32), 23 - digits
    bits = bits + (1 << (drop - 1)) - 1 + ((bits >> drop) & 1)
    return (bits & -(1 << drop)).view(torch.float32)


def product(a: Tensor, b: Tensor, precision: str, out: Tensor | None = None) -> Tensor:
    """a @ b as a GPU has it, operands in ``precision``, sums in float32; of float64 operands as they are."""
    if a.dtype == torch.float64 or precision == "fp32":
        return torch.mm(a, b, out=out)
    if precision == "tf32x3":
        highs = [rounded(x, DIGITS["tf32"]) for x in (a, b)]
        lows = [rounded(x - high, DIGITS["tf32"]) for x, high in zip((a, b), highs, strict=True)]
        return torch.add(highs[0] @ highs[1], highs[0] @ lows[1] + lows[0] @ highs[1], out=out)
    return torch.mm(*(rounded(x, DIGITS[precision]) for x in (a, b)), out=out)


def features(kind: str, n: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """q (N, C), k (N, C) and queue (K, C), unit rows in float32."""

    def unit(count: int) -> Tensor:
        return F.normalize(torch.randn(count, C, generator=generator), dim=1)

    centres = unit(100)

    def around(count: int) -> Tensor:
        mixed = centres[torch.randint(100, (count,), generator=generator)] + 0.6 * unit(count)
        return F.normalize(mixed, dim=1) if kind == "clustered" else unit(count)

    q, queue = around(n), around(rows)
    return q, F.normalize(q + 0.5 * unit(n), dim=1), queue


def step(q: Tensor, k: Tensor, queue: Tensor, temperature: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities (N, K), the loss of each query (N,) and its gradient (N, C), of InfoNCE with the queue alone."""
    similarities = product(q, queue.T, precision)
    positive = torch.linalg.vecdot(q, k).unsqueeze(1)
    logits = torch.cat([positive, similarities], dim=1) / temperature
    p = logits.softmax(1)
    gradient = (product(p[:, 1:].contiguous(), queue, precision) + (p[:, :1] - 1) * k) / temperature
    return similarities, logits.logsumexp(1) - logits[:, 0], gradient


def moved(found: Tensor, gold: Tensor, hard: int) -> float:
    """Share of the ``hard`` largest of each row of ``gold`` that are not among those of ``found``."""
    ours, right = (torch.zeros_like(s, dtype=torch.bool) for s in (found, gold))
    for chosen, s in ((ours, found), (right, gold)):
        chosen.scatter_(1, s.topk(hard, dim=1).indices, True)
    return float((right & ~ours).sum() / right.sum())


def row(kind: str, temperature: float, precision: str, n: int, rows: int, hard: int) -> list[str]:
    """A row of the table: the worst and the root mean square of each error, over the queries."""
    tensors = features(kind, n, rows, torch.Generator().manual_seed(0))
    gold = step(*(t.double() for t in tensors), temperature, precision)
    found = step(*tensors, temperature, precision)
    errors = [
        (found[0] - gold[0]).abs(),
        (found[1] - gold[1]).abs() / gold[1],
        (found[2] - gold[2]).norm(dim=1) / gold[2].norm(dim=1),
    ]
    cells = [f"{float(e.max()):.1e} / {float(e.square().mean().sqrt()):.1e}".replace("e-0", "e-") for e in errors]
    return [kind, f"{temperature:g}", precision, *cells, f"{100 * moved(found[0], gold[0], hard):.3g} %"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=32, metavar="N")
    parser.add_argument("--rows", type=int, default=K, metavar="K")
    parser.add_argument("--hard", type=int, default=HARD, metavar="H")
    args = parser.parse_args(argv)
    print("| rows | T | operands | similarities max / rms | loss max / rms | gradient max / rms | hardest rows moved |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind in ("random", "clustered"):
        for temperature in (0.2, 0.07):
            for precision in PRECISIONS:
                cells = row(kind, temperature, precision, args.queries, args.rows, args.hard)
                print("| " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
