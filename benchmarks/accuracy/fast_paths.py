"""Whether what makes a run faster costs accuracy: k-NN on CIFAR-10 with and without each fast path, over seeds.

    python -m benchmarks.accuracy.fast_paths [--data cifar10.tar | --download] [--images 5000] [--seeds 0 1 2]

A small ResNet by the recipe of configs/moco_cifar10.yml with SynCo's negatives; every row has the same images, budget
and seeds, and changes one thing (that the fused loss equals its definition is for the tests). The rows "128 px" read
the same photographs from JPEG files enlarged to 128 px, which a decoder can then open at a half or a quarter of their
size, as it can large photographs. k-NN: k=200, T=.1, encoder features, bank = the images trained on, queries = held-out
images. Finished runs are kept in --out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from benchmarks.accuracy.cifar10_methods import METHODS, flags, prepare, spread, train

PLAIN = ["--amp", "off", "--aug-device", "cpu", "--decode", "exact", "--head-precision", "fp32"]
BASE, BASE_128 = "fp32, all plain", "128 px, all plain"
ROWS = {
    BASE: [],
    "bf16 encoders": ["--amp", "bf16"],
    "bf16 operands of the loss": ["--head-precision", "bf16"],
    "views finished on the device": ["--aug-device", "gpu"],
    "all of these": ["--amp", "bf16", "--head-precision", "bf16", "--aug-device", "gpu"],
    BASE_128: [],
    "128 px, --decode fast": ["--decode", "fast"],
}


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print the table."""
    parser = flags(__doc__, "fast_paths", epochs=10)
    parser.add_argument("-a", "--arch", default="test_resnet")
    parser.add_argument("--stem", default="imagenet")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--parallel", type=int, default=1, help="runs side by side, each with its share of the cores")
    args = parser.parse_args(argv)
    images = prepare(args)
    large = [*images[:-3], *enlarged(images[-3:])]
    network = ["-a", args.arch, "--stem", args.stem, *METHODS["synco"], *PLAIN]
    trials = [(row, seed) for seed in args.seeds for row in args.rows]

    def score(trial: tuple[str, int]) -> float:
        row, seed = trial
        argv = [*(large if row.startswith("128") else images), *network, *ROWS[row]]
        return train(args, argv, f"{row.replace(', ', '_').replace(' ', '_')}_{args.arch}_{args.stem}", seed)

    with ThreadPoolExecutor(args.parallel) as pool:
        scores = dict(zip(trials, pool.map(score, trials), strict=True))
    print_table(args, scores)
    return 0


def enlarged(images: list[str]) -> list[str]:
    """The list to train on with every file enlarged to 128 px, JPEG of quality 95; what is tested stays."""
    small, *test = images
    target = Path(small).with_name(f"large_{Path(small).name}")
    if not target.exists():
        rows = []
        for number, line in enumerate(Path(small).read_text(encoding="utf-8").splitlines()):
            path, label = line.split("\t")
            file = target.parent / "large" / f"{number:05d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).convert("RGB").resize((128, 128), Image.Resampling.BICUBIC).save(file, quality=95)
            rows.append(f"{file}\t{label}")
        target.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return [str(target), *test]


def print_table(args: argparse.Namespace, scores: dict[tuple[str, int], float]) -> None:
    """Mean and standard deviation a row, and the differences to its plain row with the same seed."""
    print(f"\n{args.arch}, {args.images} images x {args.epochs} epochs, {args.queries} queries, seeds {args.seeds}\n")
    print("| path | k-NN top-1, mean | std | each seed | minus plain, same seed: mean | std |")
    print("| --- | ---: | ---: | --- | ---: | ---: |")
    for row in args.rows:
        mine = [scores[row, seed] for seed in args.seeds]
        line = f"| {row} | {statistics.mean(mine):.2f} | {spread(mine):.2f} | {' '.join(f'{x:.1f}' for x in mine)} |"
        base = BASE_128 if row.startswith("128") else BASE
        if row != base and base in args.rows:
            gains = [scores[row, seed] - scores[base, seed] for seed in args.seeds]
            line += f" {statistics.mean(gains):+.2f} | {spread(gains):.2f} |"
        else:
            line += " | |"
        print(line)


if __name__ == "__main__":
    sys.exit(main())
