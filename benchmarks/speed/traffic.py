"""Bytes that one process sends in a training step, by exchange, as a function of how many there are.

    python -m benchmarks.speed.traffic [--processes 2 4 8 64 1024]

Legend: W processes, N images of each, v bytes of a view (uint8), C feature width, K queue rows, P trained parameters, O
numbers that the online probe sums.

An all-reduce of n bytes sends 2 n (W - 1) / W from each process and an all-gather of n bytes a process (W - 1) n, in
the ring that gloo uses and NCCL from a few nodes on (Patarasuk and Yuan 2009). An all-to-all of n bytes sends what is
for others: n (W - 1) / W. tests/distributed/test_traffic.py counts what really leaves a process.
"""

from __future__ import annotations

import argparse

import torch

from moco.models.encoder import build_encoder, feature_width


def per_step(W: int, N: int, v: int, C: int, P: int, O: int) -> dict[str, float]:  # noqa: E741
    """Of this code. Random shuffles: the mean over permutations for the rows that move."""
    others = (W - 1) / W
    return {
        "shuffle of images": others * N * v,
        "shuffle of keys": others * N * 4 * C,
        "gather of keys": (W - 1) * N * 4 * C,
        "gather of ids": (W - 1) * N * 8,
        "gradients": 2 * others * 4 * P,
        "online probe": 2 * others * 4 * O,
        "flags": 2 * others * 16,
    }


def upstreams(W: int, N: int, v: int, C: int, P: int, K: int) -> dict[str, float]:
    """Of MoCo's published code, which gathers fp32 images everywhere and sends buffers with every forward pass."""
    others = (W - 1) / W
    return {
        "shuffle of images": (W - 1) * N * 4 * v,
        "shuffle of keys": (W - 1) * N * 4 * C,
        "gather of keys": (W - 1) * N * 4 * C,
        "gradients": 2 * others * 4 * P,
        "queue, with the buffers": others * 4 * C * K if W > 1 else 0.0,  # a broadcast, the mean over the processes
    }


def numbers_of_probe(classes: int, width: int) -> int:
    """O: gradients of a linear layer, sums of features and of their squares, and two counts."""
    return classes * width + classes + 2 * width + 2


def traffic_table(worlds: tuple[int, ...], N: int, v: int, C: int, P: int, K: int, O: int) -> str:  # noqa: E741
    """MB a process and step, this code's rows and both sums."""
    ours = [per_step(W, N, v, C, P, O) for W in worlds]
    theirs = [upstreams(W, N, v, C, P, K) for W in worlds]
    lines = ["| MB sent a process and step | " + " | ".join(f"{W:,}" for W in worlds) + " |",
             "| --- |" + " ---: |" * len(worlds)]  # fmt: skip
    rows = [(name, [one[name] for one in ours]) for name in ours[0]]
    rows += [("all", [sum(x.values()) for x in ours]), ("as published", [sum(x.values()) for x in theirs])]
    lines += ["| " + name + " | " + " | ".join(map(_megabytes, values)) + " |" for name, values in rows]
    return "\n".join(lines)


def _megabytes(n: float) -> str:
    return f"{n / 1e6:,.0f}" if n >= 1e9 else f"{n / 1e6:.2g}" if n < 1e6 else f"{n / 1e6:.1f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="MB that a process sends in a training step of MoCo v2")
    parser.add_argument("-a", "--arch", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32, help="images of one process")
    parser.add_argument("--moco-k", type=int, default=65536)
    parser.add_argument("--classes", type=int, default=1000, help="of the online probe; 0: without it")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8, 64, 1024])
    args = parser.parse_args(argv)
    with torch.device("meta"):
        encoder = build_encoder(args.arch, 128, mlp=True, size=args.size)
    view, P = 3 * args.size**2, sum(p.numel() for p in encoder.parameters())
    probe = numbers_of_probe(args.classes, feature_width(encoder)) if args.classes else 0
    print(traffic_table(tuple(args.processes), N=args.batch_size, v=view, C=128, P=P, K=args.moco_k, O=probe))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
