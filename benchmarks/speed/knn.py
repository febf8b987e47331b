"""k-NN of frozen features: time and memory of ours, in parts, against one matrix of all similarities.

    python -m benchmarks.speed.knn [--bank 200000 --queries 1000 --dim 512 --k 200]

Each variant runs in a fresh process on the same random features. Memory is the rise of the resident set's high-water
mark over the inputs (Linux only). Both must predict the same classes, or this ends with exit code 1.

Legend: n bank images, m queries, F feature width, k neighbours, T temperature.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.eval.features import Features
from moco.eval.knn import knn_predict

CLASSES, T = 1000, 0.1


def ours(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """(m,) classes, the similarities of a part of the bank at a time."""
    features = Features(bank, labels, torch.arange(len(bank)), torch.ones(len(bank), dtype=torch.bool))
    return knn_predict(features, queries, k=[k], temperature=T, num_classes=CLASSES)[0]


def naive(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """(m,) classes, by one matrix (m, n)."""
    s, place = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(k, dim=1)
    return torch.zeros(len(queries), CLASSES).scatter_add_(1, labels[place], (s / T).exp()).argmax(1)


VARIANTS = {"one matrix": naive, "ours, in parts": ours}


def peak() -> float:
    """The most memory that this process has had, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, n: int, m: int, width: int, k: int) -> dict:
    """Seconds, MB over the inputs, and a checksum of the classes."""
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(n, width, generator=g), torch.randn(m, width, generator=g)
    labels = torch.randint(CLASSES, (n,), generator=g)
    VARIANTS[name](bank[:k], labels[:k], queries[:1], k)  # first calls allocate and choose kernels
    before, start = peak(), time.perf_counter()
    found = VARIANTS[name](bank, labels, queries, k)
    return {"seconds": time.perf_counter() - start, "mb": peak() - before, "classes": found.tolist()}


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--only", choices=VARIANTS, help="this one, here, as JSON")
    args = parser.parse_args(argv)
    sizes = (args.bank, args.queries, args.dim, args.k)
    if args.only:
        print(json.dumps(measure(args.only, *sizes)))
        return 0
    print(f"n={args.bank} m={args.queries} F={args.dim} k={args.k}, {torch.get_num_threads()} threads\n")
    print("| variant | seconds | queries/s | memory over the inputs, MB |\n| --- | --- | --- | --- |")
    seen = []
    argv = [w for flag, x in zip(("bank", "queries", "dim", "k"), sizes, strict=True) for w in (f"--{flag}", str(x))]
    for name in VARIANTS:
        command = [sys.executable, __file__, "--only", name, *argv]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {name} | {found['seconds']:.2f} | {args.queries / found['seconds']:.0f} | {found['mb']:.0f} |")
        seen.append(found["classes"])
    differ = sum(a != b for a, b in zip(*seen, strict=True))
    print(f"\n{differ} of {args.queries} predictions differ")
    return int(differ > args.queries / 1000)  # similarities that differ in their last bit may change places


if __name__ == "__main__":
    sys.exit(main())
