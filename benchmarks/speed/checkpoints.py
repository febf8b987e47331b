"""What saving inside epochs costs a pretraining: blocks of steps without a save, with one that training waits for, and
with one that a thread writes beside it.

    python -m benchmarks.speed.checkpoints [--every 20] [--rounds 5] [--out FOLDER] [flags of main_pretrain.py]

Without flags: MoCo's ResNet-50 with its 65,536 keys, a file of 305 MiB, on noise of 64 px in batches of 8, two threads.
A block is ``--every`` steps and the save after half of them, and ends when the file is safe. In every round each kind
makes one block, in a new order; ratios to "none" are taken within rounds, and their median is printed, with the seconds
that a save adds. ``--out`` is on the disk that is asked about.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time

from moco import cli, data
from moco.cli.pretrain import pretrain_config
from moco.train.bench import make_trainer, noise
from moco.train.pretraining import Trainer
from moco.train.runlog import RunLog
from moco.train.saving import Saver
from moco.train.setup import Views

SETTING = ["-a", "resnet50", "--size", "64", "-b", "8", "--moco-k", "65536", "--seed", "0", "--dataset", "folder"]
KINDS = {"none": None, "waited for": False, "beside": True}  # whether by a thread


def main(argv: list[str] | None = None) -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    own, rest = parser.parse_known_args(argv)
    args = cli.parse_pretrain([*SETTING, *rest, "/nowhere"])
    config, size = pretrain_config(args), args.size or 224
    view = Views(size, 3, [0.5] * 3, [0.25] * 3, "v1", data.get_preset("v1"))
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(dir=own.out) as folder, RunLog(folder, tensorboard=False) as log:
        trainer = make_trainer(config, view, log, folder, 1 << 20, args.batch_size)
        trainer.arch, log.line = args.arch, lambda text: None
        batches = noise(args.batch_size, view, 0, trainer.device)
        for number in range(-1, own.rounds):  # the first one warms up
            for kind in [*KINDS][number % 3 :] + [*KINDS][: number % 3]:
                seconds = block(trainer, batches, own.every, KINDS[kind], folder)
                if number >= 0:
                    found[kind].append(seconds)
        size = max(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
    print(f"{size / 2**20:.0f} MiB, every {own.every} steps, median of {own.rounds} rounds")
    for kind, values in found.items():
        pairs = list(zip(values, found["none"], strict=True))
        ratio, more = statistics.median(a / b for a, b in pairs), statistics.median(a - b for a, b in pairs)
        spread = f"{min(a / b for a, b in pairs):.3f} .. {max(a / b for a, b in pairs):.3f}"
        step = 1e3 * statistics.median(values) / own.every
        print(f"{kind:12} {step:8.1f} ms a step, {ratio:.3f} of none ({spread}), {more:+.2f} s a save")
    return 0


def block(trainer: Trainer, batches, steps: int, beside: bool | None, folder: str) -> float:
    """Seconds of so many steps with a save in their middle; None: with none."""
    with Saver(folder, lambda _: None, beside=bool(beside)) as trainer.saver:
        begin = time.perf_counter()
        for step in range(steps):
            trainer.step(batches)
            if step == steps // 2 and beside is not None:
                trainer.save(named=False)
    trainer.sync_outcomes()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
