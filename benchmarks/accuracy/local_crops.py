"""Whether small crops as queries (--local-crops) teach an encoder of digits more, and more than longer training does.

    python -m benchmarks.accuracy.local_crops [--methods moco synco] [--seeds 0 1 2] [--parallel 2]

The built-in 4,000 digits by the demo's recipe: MoCo and SynCo, each with two views, with four small crops beside them,
and with two views for as many more epochs as take the crops' time (--longer; benchmarks/speed/local_crops.py has the
ratio). Same images and seeds; k-NN as in cifar10_methods.py. Finished runs are kept in --out and not run again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor

from benchmarks.accuracy.cifar10_methods import DIGITS, METHODS, ROOT, spread, train

# The views keep 50 % to 100 % of a digit (--aug digits). As in SwAV the small crops go on where the views end.
CROPS = ["--local-crops", "4", "--local-crop-scale", "0.2", "0.5"]
BASES = ("moco", "synco")


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=28, help="side of the views in pixels (default: the demo's 28)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--longer", type=int, default=18, help="epochs in the time of --epochs with crops (default: 18)"
    )
    parser.add_argument("--methods", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--parallel", type=int, default=1, help="runs side by side, each with its share of the cores")
    args = parser.parse_args(argv)
    args.out, args.images = ROOT / "runs" / f"local_crops_{args.size}", 4000
    longer = argparse.Namespace(**{**vars(args), "epochs": args.longer})
    recipe = [*DIGITS, "--size", str(args.size)]
    rows = {base: (args, METHODS[base]) for base in args.methods}
    rows |= {f"{base}_crops": (args, [*METHODS[base], *CROPS]) for base in args.methods}
    rows |= {f"{base}_longer": (longer, METHODS[base]) for base in args.methods}
    trials = [(row, seed) for seed in args.seeds for row in rows]
    with ThreadPoolExecutor(args.parallel) as pool:
        found = list(pool.map(lambda t: train(rows[t[0]][0], [*recipe, *rows[t[0]][1]], *t), trials))
    print_table(args, dict(zip(trials, found, strict=True)), list(rows))
    return 0


def print_table(args: argparse.Namespace, scores: dict[tuple[str, int], float], rows: list[str]) -> None:
    """Mean and deviation a row, and its differences to the same method with two views and the same seed."""
    budget = f"{args.epochs} epochs ({args.longer} longer), seeds {args.seeds}"
    print(f"\n4000 digits of {args.size} px x {budget}, {' '.join(CROPS)}\n")
    print("| run | k-NN top-1, mean | std | each seed | minus two views, same seed: mean | std |")
    print("| --- | ---: | ---: | --- | ---: | ---: |")
    for row in rows:
        mine, base = [scores[row, seed] for seed in args.seeds], row.partition("_")[0]
        gains = [one - scores[base, seed] for one, seed in zip(mine, args.seeds, strict=True)]
        cells = [row, f"{statistics.mean(mine):.2f}", f"{spread(mine):.2f}", " ".join(f"{x:.1f}" for x in mine)]
        cells += ["", ""] if row == base else [f"{statistics.mean(gains):+.2f}", f"{spread(gains):.2f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
