"""What MoCo, MoCHi and SynCo learn on a small CIFAR-10 budget: k-NN accuracy, mean and spread over seeds.

    python -m benchmarks.accuracy.cifar10_methods [--data cifar10.tar | --download] [--images 5000] [--seeds 0 1 2]
    python -m benchmarks.accuracy.cifar10_methods --digits      the same on the built-in digits, the demo's recipe

ResNet-18 by MoCo's CIFAR-10 recipe (configs/moco_cifar10.yml) at batch 128, every method with the same images, budget
and seeds; the three differ only in their synthetic negatives, which are active from epoch 1. k-NN: k=200, T=.1, encoder
features, bank = the images trained on, queries = held-out images. Finished runs are kept in --out and not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TAR = ROOT.parent / "shared" / "data" / "cifar10.tar"
# 256 of 4,096 rows are mixed; the counts keep the ratio to mixed rows of the ImageNet recipes.
METHODS = {
    "moco": ["--method", "moco"],
    "mochi": ["--method", "mochi", "--mochi", "256", "128", "64"],
    "synco": ["--n-hard", "256", "--n1", "64", "--n2", "64", "--n3", "64", "--n4", "16", "--n5", "16", "--n6", "16"],
}
DIGITS = ["--config", str(ROOT / "configs" / "demo.yml")]
RECIPE = ["--config", str(ROOT / "configs" / "moco_cifar10.yml"), "--dataset", "folder"]
RECIPE += ["--hard-start-epoch", "1", "--mean", ".4914", ".4822", ".4465", "--std", ".2023", ".1994", ".2010"]


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print the table."""
    parser = flags(__doc__, "cifar10_methods", epochs=6)
    parser.add_argument("--digits", action="store_true", help="the built-in 4,000 digits with configs/demo.yml instead")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--parallel", type=int, default=1, help="runs side by side, each with its share of the cores")
    args = parser.parse_args(argv)
    if args.digits:
        args.images, args.queries, args.epochs = 4000, 1000, 15
        args.out = args.out.with_name("digits_methods")
    images = DIGITS if args.digits else prepare(args)
    trials = [(method, seed) for seed in args.seeds for method in args.methods]
    with ThreadPoolExecutor(args.parallel) as pool:
        scores = list(pool.map(lambda trial: train(args, [*METHODS[trial[0]], *images], *trial), trials))
    print_table(args, dict(zip(trials, scores, strict=True)))
    return 0


def flags(text: str | None, name: str, epochs: int) -> argparse.ArgumentParser:
    """What every comparison on a part of CIFAR-10 is told; results are kept in runs/``name``."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=TAR, help="tar or folder of train/CLASS/*.jpg, test/CLASS/*.jpg")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 through torchvision instead")
    parser.add_argument("--images", type=int, default=5000, help="number of training images, equal per class")
    parser.add_argument("--queries", type=int, default=2000, help="number of held-out images, equal per class")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / name)
    return parser


def prepare(args: argparse.Namespace) -> list[str]:
    """The flags that name the images: lists (path, TAB, class) of the subset, extracted or written under --out."""
    out: list[Path] = []
    for split, count in (("train", args.images), ("test", args.queries)):
        target = args.out / f"{split}_{count}.txt"
        if not target.exists():
            args.out.mkdir(parents=True, exist_ok=True)
            rows = [f"{path}\t{label}" for path, label in subset(args, split, count)]
            target.write_text("\n".join(rows) + "\n", encoding="utf-8")
        out.append(target)
    return [*RECIPE, "-b", str(args.batch_size), str(out[0]), "--val-data", str(out[1])]


def subset(args: argparse.Namespace, split: str, count: int) -> list[tuple[Path, str]]:
    """The first count / 10 images of each class."""
    images = args.out / "images"
    if args.download:
        return downloaded(images, split, count)
    if args.data.is_dir():
        names = sorted(str(p.relative_to(args.data)) for p in (args.data / split).glob("*/*.jpg"))
        return [(args.data / name, Path(name).parts[1]) for name in first_of_each(names, count)]
    if not args.data.is_file():
        sys.exit(f"error: no CIFAR-10 at {args.data}; give --data or --download")
    with tarfile.open(args.data) as tar:
        files = {m.name.removeprefix("./"): m for m in tar.getmembers() if m.isfile()}
        names = first_of_each(sorted(n for n in files if n.startswith(split + "/")), count)
        for name in names:
            target = images / name
            target.parent.mkdir(parents=True, exist_ok=True)
            stream = tar.extractfile(files[name])
            assert stream is not None
            target.write_bytes(stream.read())
    return [(images / name, Path(name).parts[1]) for name in names]


def first_of_each(names: list[str], count: int) -> list[str]:
    """``count`` names, the first of each class (the second part of the path)."""
    by_class: dict[str, list[str]] = {}
    for name in names:
        by_class.setdefault(Path(name).parts[1], []).append(name)
    return [name for group in by_class.values() for name in group[: count // len(by_class)]]


def downloaded(images: Path, split: str, count: int) -> list[tuple[Path, str]]:
    """The same from torchvision's files, written as PNG."""
    from torchvision.datasets import CIFAR10

    source = CIFAR10(str(images), train=split == "train", download=True)
    names = [f"{split}/{source.classes[label]}/{i:05d}.png" for i, label in enumerate(source.targets)]
    rows = []
    for name in first_of_each(sorted(names), count):
        target = images / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source[int(target.stem)][0].save(target)
        rows.append((target, target.parent.name))
    return rows


def train(args: argparse.Namespace, flags: list[str], method: str, seed: int) -> float:
    """One run by ``flags``, or its recorded result by the name ``method``; the k-NN accuracy at its end in percent."""
    folder = args.out / f"{method}_{args.images}x{args.epochs}_seed{seed}"
    result = folder / "result.json"
    if not result.exists():
        threads = max(1, len(os.sched_getaffinity(0)) // args.parallel)
        command = [sys.executable, str(ROOT / "main_pretrain.py"), *flags]
        command += ["--epochs", str(args.epochs), "--seed", str(seed), "-j", "1", "--save-dir", str(folder)]
        command += ["--overwrite", "--keep", "1", "--knn-every", str(args.epochs)]
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"{method} seed {seed} ...", flush=True)
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with open(folder.with_suffix(".txt"), "w", encoding="utf-8") as log:
            code = subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT, env=env).returncode
        if code:
            sys.exit(f"error: {method} seed {seed} ended with exit code {code}, see {log.name}")
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        accuracy = [record["knn"] for record in records if "knn" in record][-1]
        result.write_text(json.dumps({"knn": accuracy}), encoding="utf-8")
        print(f"{method} seed {seed}: k-NN {accuracy:.2f} %", flush=True)
    return json.loads(result.read_text(encoding="utf-8"))["knn"]


def print_table(args: argparse.Namespace, scores: dict[tuple[str, int], float]) -> None:
    """Mean and standard deviation a method, and the differences to MoCo with the same seed."""
    print(f"\n{args.images} images x {args.epochs} epochs, {args.queries} queries, seeds {args.seeds}\n")
    print("| method | k-NN top-1, mean | std | each seed | minus MoCo, same seed: mean | std |")
    print("| --- | ---: | ---: | --- | ---: | ---: |")
    for method in args.methods:
        mine = [scores[method, seed] for seed in args.seeds]
        row = f"| {method} | {statistics.mean(mine):.2f} | {spread(mine):.2f} | {' '.join(f'{x:.1f}' for x in mine)} |"
        if "moco" in args.methods and method != "moco":
            gains = [scores[method, seed] - scores["moco", seed] for seed in args.seeds]
            row += f" {statistics.mean(gains):+.2f} | {spread(gains):.2f} |"
        else:
            row += " | |"
        print(row)


def spread(values: list[float]) -> float:
    """Sample standard deviation; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    sys.exit(main())
