"""What labels, a queue and synthetic negatives add on a small CIFAR-10 budget: linear probe, mean and spread.

    python -m benchmarks.accuracy.supervised_methods [--data cifar10.tar | --download] [--images N] [--seeds 0 1 2]
    python -m benchmarks.accuracy.supervised_methods --arch test_resnet --stem imagenet --images 5000 --epochs 12

A small ResNet (--arch, --stem; ResNet-18 with the 3x3 stem) at batch 128, SGD .06, cosine, T .1, the same views,
images and epochs for SimCLR, SupCon, SupCon with a queue of 4,096 and that with SynCo's negatives (from epoch 1). Then
a linear classifier on cached features of the same images, tested on held-out ones. Cross-entropy trains the same
network for the same epochs by main_semisup.py on all labels, with its own recipe and views. Finished runs are kept in
--out and not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.accuracy.cifar10_methods import METHODS as QUEUE_METHODS
from benchmarks.accuracy.cifar10_methods import ROOT, flags, prepare, spread

QUEUE = ["--method", "supcon", "--moco-k", "4096", "--moco-m", "0.99"]
METHODS = {
    "cross-entropy": [],
    "simclr": ["--method", "simclr"],
    "supcon": ["--method", "supcon"],
    "supcon, queue": QUEUE,
    "supcon, queue, synco": [*QUEUE, *QUEUE_METHODS["synco"], "--hard-start-epoch", "1"],
}
STATISTICS = ["--mean", ".4914", ".4822", ".4465", "--std", ".2023", ".1994", ".2010"]
SIZE = ["--size", "32", *STATISTICS]
PRETRAIN = ["--lr", "0.06", "--cos", "--wd", "5e-4", "--temp", "0.1", "--keep", "1", "--knn-every", "0"]
PROBE = ["--features", "cached", "--lr", "3", "--epochs", "40", "--schedule", "25", "35"]


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print the table."""
    parser = flags(__doc__, "supervised_methods", epochs=6)
    parser.add_argument("-a", "--arch", default="resnet18")
    parser.add_argument("--stem", default="cifar")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args(argv)
    images = prepare(args)[-3:]  # the list to train on, --val-data and the list to test on
    scores = {(m, seed): accuracy(args, images, m, seed) for seed in args.seeds for m in args.methods}
    budget = f"{args.images} images x {args.epochs} epochs"
    print(f"\n{args.arch}, {budget}, {args.queries} held-out images, seeds {args.seeds}\n")
    print("| method | linear top-1, mean | std | each seed |\n| --- | ---: | ---: | --- |")
    for method in args.methods:
        mine = [scores[method, seed] for seed in args.seeds]
        each = " ".join(f"{x:.1f}" for x in mine)
        print(f"| {method} | {statistics.mean(mine):.2f} | {spread(mine):.2f} | {each} |")
    return 0


def accuracy(args: argparse.Namespace, images: list[str], method: str, seed: int) -> float:
    """Top-1 in percent of one method and seed, from its record if it has been run."""
    folder = args.out / f"{method.replace(', ', '_')}_{args.arch}_{args.images}x{args.epochs}_seed{seed}"
    result = folder / "result.json"
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        common = ["-a", args.arch, "--stem", args.stem, *SIZE, *images]
        common += ["--seed", str(seed), "-j", "1", "--save-dir", str(folder)]
        budget = ["--epochs", str(args.epochs), "-b", str(args.batch_size), "--overwrite"]
        if method == "cross-entropy":
            run(folder, "main_semisup.py", "--lr-backbone", "0.06", "--lr-classifier", "0.06",
                "--wd", "5e-4", *budget, *common)  # fmt: skip
        else:
            run(folder, "main_pretrain.py", *PRETRAIN, *METHODS[method], *budget, *common)
            weights = sorted(folder.glob("checkpoint_*.pth.tar"))[-1]
            run(folder, "main_lincls.py", *PROBE, "--pretrained", str(weights), "--overwrite", *common)
    found = json.loads(result.read_text(encoding="utf-8"))["acc1"]
    print(f"{method} seed {seed}: {found:.2f} %", flush=True)
    return found


def run(folder: Path, program: str, *argv: str) -> None:
    """One command to its end, its output appended to log.txt."""
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        command = [sys.executable, str(ROOT / program), *argv]
        code = subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT, env=os.environ).returncode
    if code:
        sys.exit(f"error: {program} ended with exit code {code}, see {log.name}")


if __name__ == "__main__":
    sys.exit(main())
