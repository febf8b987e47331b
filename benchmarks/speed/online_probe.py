"""What the online probe costs a training step: the demo's steps with it and without it, in turn in one run.

    python -m benchmarks.speed.online_probe [--rounds 60] [--classes 10] [--threads N] [--cpu-time]
        [flags of main_pretrain.py]

Model and step are those of main_pretrain.py, by default with the demo's recipe and all of its synthetic negatives.
Images and labels are noise that already lies on the device, so that no loader is measured. In every round each makes
one step, in a new order; ratios are taken within rounds, and their median is printed with its quartiles. "without"
stands twice, against itself, which shows what the machine does to a ratio. ``--cpu-time`` counts the process's seconds
on the CPU in place of those of the clock, for a machine that others use at the same time.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from unittest import mock

import torch

from benchmarks import timing
from moco import cli, data, distributed
from moco.cli.pretrain import pretrain_config
from moco.train.bench import make_trainer, noise
from moco.train.online_probe import OnlineProbe
from moco.train.pretraining import Trainer
from moco.train.runlog import RunLog
from moco.train.setup import Views

SETTING = ["--config", "configs/demo.yml", "--seed", "0"]
GOAL = 1.03
IMAGES = 1 << 20  # of the data set that is not there


def with_probe(trainer: Trainer, classes: int) -> Trainer:
    """The same with a probe of random labels."""
    labels = torch.randint(classes, (IMAGES,), generator=torch.Generator().manual_seed(0))
    trainer.probe = OnlineProbe(trainer.model.encoder_q, labels, [str(number) for number in range(classes)], classes)
    return trainer


def report(found: dict[str, list[float]]) -> str:
    """A line for each kind of step, its ratio that to the step without of the same round."""
    lines = ["| step | median ms | x without, median | quartiles | goal for the median |", "|" + " --- |" * 5]
    for name, taken in found.items():
        ratios = [one / other for one, other in zip(taken, found["without"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        verdict = f"< {GOAL}: {'met' if middle < GOAL else 'missed'}" if name == "with" else ""
        cells = [name, f"{statistics.median(taken):.1f}", f"{middle:.4f}", f"{low:.4f} to {high:.4f}", verdict]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=60, help="timed steps of each, at least 2 (default: 60)")
    parser.add_argument("--classes", type=int, default=10, help="default: 10")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    parser.add_argument("--cpu-time", action="store_true", help="count the process's time on the CPU")
    own, rest = parser.parse_known_args(argv)
    if own.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    if own.threads:
        torch.set_num_threads(own.threads)
    args = cli.parse_pretrain([*SETTING, *rest])
    row = data.dataset_of(args.dataset)
    size, channels = args.size or 224, args.channels or row.channels
    mean, std = data.channel_statistics(args.dataset, channels, None, None)
    view = Views(size, channels, list(mean), list(std), row.preset, data.get_preset(row.preset))
    names = ("without", "without, again", "with")
    with tempfile.TemporaryDirectory() as folder, RunLog(folder, tensorboard=False) as log:
        make = functools.partial(make_trainer, pretrain_config(args), view, log, folder, IMAGES, args.batch_size)
        trainers = {name: with_probe(make(), own.classes) if name == "with" else make() for name in names}
        batches = noise(args.batch_size, view, 0, distributed.device(), IMAGES)
        calls = {name: functools.partial(trainer.step, batches) for name, trainer in trainers.items()}
        with mock.patch.object(timing.time, "perf_counter", time.process_time if own.cpu_time else time.perf_counter):
            found = timing.rounds(calls, own.rounds, distributed.device().type)
    amp = trainers["with"].plan.amp or "off"
    about = f"{args.arch} at {size} px, batch {args.batch_size}, {own.classes} classes, {distributed.processes()}"
    print(f"{about}, {torch.get_num_threads()} threads, amp {amp}, torch {torch.__version__}, {own.rounds} rounds")
    print(f"\n{report(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
