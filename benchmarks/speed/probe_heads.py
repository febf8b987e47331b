"""Many learning rates of a linear probe in one run against as many runs of one rate, and against one such run.

    python -m benchmarks.speed.probe_heads [-a resnet18 --size 32 -b 128 --heads 4 --classes 10 --steps 5]

One step on the same images: the frozen forward and, for every head, the layer's forward, backward and SGD. "As many
single probes" is that many steps of a probe with one head. The three take turns; each one's fastest counts. A
classifier that is not, bit for bit, what its own run trained ends this with exit code 1.

Legend: N images of a step.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor

from moco.config import OptimizerConfig
from moco.eval import linear
from moco.eval.classifier import Classifier
from moco.models.encoder import build_encoder


def prepare(args: argparse.Namespace, rates: list[float]) -> tuple[Classifier, list[linear.LinearClassifier]]:
    """A probe of a random encoder and a head for each rate."""
    torch.manual_seed(0)
    encoder = build_encoder(args.arch, args.classes, size=args.size)
    model = Classifier(encoder, [0.5] * 3, [0.25] * 3, seed=0, freeze=True).to(args.device)
    return model, linear.make_classifiers(model, rates, OptimizerConfig())


def step(model: Classifier, heads: list[linear.LinearClassifier], images: Tensor, labels: Tensor) -> None:
    """One step of every head on the same features; images (N, 3, size, size) uint8, labels (N,)."""
    x = model.features(images)
    for head in heads:
        head.step(x, labels)


def seconds(run, device: str) -> float:
    """Of one call, with the device's work done."""
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-a", "--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("-b", "--batch-size", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (args.batch_size, 3, args.size, args.size), dtype=torch.uint8, generator=g)
    labels = torch.randint(args.classes, (args.batch_size,), generator=g).to(args.device)
    rates = [30.0 / 2**i for i in range(args.heads)]
    many, alone = prepare(args, rates), [prepare(args, [rate]) for rate in rates]
    variants = {
        "one probe": lambda: step(*alone[0], images, labels),
        f"{args.heads} rates in one run": lambda: step(*many, images, labels),
        f"{args.heads} single probes": lambda: [step(*single, images, labels) for single in alone],
    }
    for run in variants.values():
        run()  # first calls allocate and choose kernels
    rounds = [[seconds(run, args.device) for run in variants.values()] for _ in range(args.steps)]
    times = {name: min(taken) for name, taken in zip(variants, zip(*rounds, strict=True), strict=True)}
    first = times["one probe"]
    print(f"{args.arch} at {args.size} px, batch {args.batch_size}, {args.classes} classes, {args.device}, "
          f"{torch.get_num_threads()} threads\n")  # fmt: skip
    print("| | ms a step | to one probe |\n| --- | ---: | ---: |")
    for name, taken in times.items():
        print(f"| {name} | {1000 * taken:.1f} | {taken / first:.2f} |")
    pairs = zip(many[1][1:], (heads[0] for _, heads in alone[1:]), strict=True)  # the first one took more steps
    differ = [head.name for head, single in pairs if not torch.equal(head.layer.weight, single.layer.weight)]
    print(f"\nclassifiers that differ from their own run: {', '.join(differ) or 'none'}")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
