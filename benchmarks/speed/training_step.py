"""A whole training step with synthetic hard negatives against the same step with plain MoCo, in one run.

    python -m benchmarks.speed.training_step [--rounds 25] [--methods moco synco mochi] [flags of main_pretrain.py]

Model and step are those of main_pretrain.py: encoders, momentum update, loss, backward, optimizer, queue. Images are
noise that already lies on the device, so that no loader is measured. In every round each method makes one step, in a
new order; ratios are taken within rounds, and their median is printed with its quartiles. "moco" among the methods is
plain MoCo against itself, which shows what the machine does to a ratio. Without flags: ResNet-18 with the 3x3 stem at
32 px, batch 128, K 16,384, C 128, the methods' own counts. --head-impl and --head-precision choose the loss.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator

import torch

from benchmarks.timing import rounds
from moco import cli, data, distributed
from moco.cli.pretrain import pretrain_config
from moco.train import pretraining
from moco.train.bench import make_trainer, noise
from moco.train.runlog import RunLog

SETTING = ["-a", "resnet18", "--dataset", "cifar10", "--size", "32", "-b", "128", "--moco-k", "16384",
           "--moco-t", "0.2", "--mlp", "--hard-start-epoch", "0", "--no-mask-same-image", "--seed", "0"]  # fmt: skip
BASE, METHODS = "moco", ("moco", "synco", "mochi")
GOAL = 1.05
IMAGES = 1 << 20  # of the data set that is not there


def measure(trainers: dict[str, pretraining.Trainer], source: Iterator[dict], steps: int) -> dict[str, list[float]]:
    """Milliseconds of each trainer's steps."""
    calls = {name: functools.partial(trainer.step, source) for name, trainer in trainers.items()}
    return rounds(calls, steps, distributed.device().type)


def report(found: dict[str, list[float]]) -> str:
    """The table: a line a method, ratios to the plain step of the same round."""
    lines = [
        "| step | median ms | x plain MoCo, median | quartiles | x, fastest step of each | goal for the median |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, taken in found.items():
        cells = [name, f"{statistics.median(taken):.0f}", "", "", "", ""]
        if name != "plain":
            ratios = [one / other for one, other in zip(taken, found["plain"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            verdict = "" if name == BASE else f"<= {GOAL}: {'met' if middle <= GOAL else 'missed'}"
            fastest = min(taken) / min(found["plain"])
            cells[2:] = [f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{fastest:.3f}", verdict]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def worker(args: Namespace) -> int:
    """Measure and print, in the one process that a benchmark is."""
    if args.threads:
        torch.set_num_threads(args.threads)
    plain = args.runs["plain"]
    mean, std = data.channel_statistics(plain.dataset, 3, None, None)
    view = Namespace(size=plain.size, channels=3, mean=mean, std=std)
    with tempfile.TemporaryDirectory() as folder, RunLog(folder, tensorboard=False) as log:
        trainers = {
            name: make_trainer(pretrain_config(run), view, log, folder, IMAGES, run.batch_size)
            for name, run in args.runs.items()
        }
        source = noise(plain.batch_size, view, plain.seed, distributed.device(), IMAGES)
        found = measure(trainers, source, args.rounds)
    amp = trainers["plain"].plan.amp or "off"
    about = f"{plain.arch} at {plain.size} px, batch {plain.batch_size}, K {plain.moco_k}, {distributed.processes()}"
    print(f"{about}, {torch.get_num_threads()} threads, amp {amp}, torch {torch.__version__}, {args.rounds} rounds")
    print(f"\n{report(found)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=25, help="timed steps of each method, at least 2 (default: 25)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    args, argv = parser.parse_known_args(argv)
    if args.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    names = {"plain": BASE, **{method: method for method in args.methods}}
    args.runs = {name: cli.parse_pretrain([*SETTING, *argv, "--method", names[name]]) for name in names}
    return distributed.launch(worker, Namespace(**{**vars(args.runs["plain"]), **vars(args)}))


if __name__ == "__main__":
    sys.exit(main())
