"""What small crops as queries (--local-crops) cost: a training step and its images, with and without them, in one run.

    python -m benchmarks.speed.local_crops [--rounds 15] [--local-crops 6] [flags of main_pretrain.py]

Model and step are those of main_pretrain.py on noise that lies on the device, as in training_step.py; images are made
by one process as for the loader, from decoded noise of --source pixels a side. In every round each row is called once,
in a new order; ratios are taken within rounds, and their median is printed with its quartiles. "views alone, again" is
the base against itself, which shows what the machine does to a ratio. Without flags: MoCo v2 with ResNet-18, SwAV's
2 x 224 + 6 x 96, batch 8, K 4,096.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.timing import rounds
from moco import cli, data, distributed
from moco.cli.pretrain import pretrain_config
from moco.config import InBatchConfig, LocalCropConfig, PretrainConfig
from moco.train.bench import make_trainer, noise
from moco.train.runlog import RunLog
from moco.train.setup import Views, view_settings

SETTING = ["-a", "resnet18", "--dataset", "folder", "--size", "224", "-b", "8", "--moco-k", "4096", "--moco-t", "0.2",
           "--aug-plus", "--mlp", "--no-mask-same-image", "--seed", "0"]  # fmt: skip
IMAGES = 1 << 20  # of the data set that is not there
ALONE = "views alone"
Times = dict[str, list[float]]


def report(found: Times) -> str:
    """A line a row, with ratios to the views alone in the same round."""
    lines = ["| row | median ms | x views alone, median | quartiles |", "| --- | ---: | ---: | ---: |"]
    for name, taken in found.items():
        cells = [name, f"{statistics.median(taken):.4g}", "", ""]
        if name != ALONE:
            ratios = [one / other for one, other in zip(taken, found[ALONE], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            cells[2:] = [f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def step_times(configs: dict[str, PretrainConfig], view: Views, batch: int, count: int) -> Times:
    """Milliseconds of the steps."""
    device = distributed.device()
    with tempfile.TemporaryDirectory() as folder, RunLog(folder, tensorboard=False) as log:
        calls: dict[str, Callable[[], Any]] = {}
        for name, config in configs.items():
            trainer = make_trainer(config, view, log, folder, IMAGES, batch)
            source = noise(batch, view, 0, device, IMAGES, local=config.views.local)
            calls[name] = functools.partial(trainer.step, source)
        return rounds(calls, count, device.type)


def item_times(configs: dict[str, PretrainConfig], view: Views, images: data.Source, count: int) -> Times:
    """Milliseconds of an image's views in one process."""
    made = {name: config.views.local for name, config in configs.items()}
    views = {name: data.TwoViews(images, view.preset, view.size, 0, local=local) for name, local in made.items()}
    return rounds({name: functools.partial(each.__getitem__, (0, 0)) for name, each in views.items()}, count, "cpu")


def worker(args: Namespace) -> int:
    """Measure and print, in the one process that a benchmark is."""
    if args.threads:
        torch.set_num_threads(args.threads)
    pixels = np.random.default_rng(0).integers(0, 256, (1, args.source, args.source, 3), dtype=np.uint8)
    images = data.ArraySource("noise", pixels)
    view, batch = view_settings(args.configs[ALONE].views, images), args.batch_size
    local = list(args.configs.values())[-1].views.local.beside(view.size)
    about = f"{args.method}, {args.arch} at {view.size} px, {local.count} small crops of {local.size} px, batch {batch}"
    print(f"{about}, K {args.moco_k}, {distributed.processes()}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, {args.rounds} rounds")  # fmt: skip
    print(f"\na step:\n\n{report(step_times(args.configs, view, batch, args.rounds))}")
    print(f"\nthe views of an image:\n\n{report(item_times(args.configs, view, images, 10 * args.rounds))}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each row, at least 2 (default: 15)")
    parser.add_argument("--local-crops", type=int, default=6, help="small crops an image (default: 6)")
    parser.add_argument("--source", type=int, default=400, help="side of the image that is cropped (default: 400)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    args, argv = parser.parse_known_args(argv)
    if args.rounds < 2 or args.local_crops < 1:
        parser.error("--rounds: quartiles need at least 2; --local-crops: at least 1")
    run = cli.parse_pretrain([*SETTING, *argv, "--local-crops", str(args.local_crops)])
    crops = pretrain_config(run)
    alone = replace(crops, views=replace(crops.views, local=LocalCropConfig()))
    if isinstance(crops.model, InBatchConfig):
        alone = replace(alone, model=replace(crops.model, local=0))
    args.configs = {ALONE: alone, f"{ALONE}, again": alone, f"with {args.local_crops} small crops": crops}
    return distributed.launch(worker, Namespace(**{**vars(run), **vars(args)}))


if __name__ == "__main__":
    sys.exit(main())
