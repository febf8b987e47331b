"""Images a second of whole training on CIFAR-10, loader included: ours row by row against the released SynCo code,
MoCo v2 of lightly's building blocks, and the encoders alone.

    python -m benchmarks.speed.whole_step [--synco CHECKOUT] [--lightly] [--rounds 7] [flags of main_pretrain.py]

CHECKOUT is a clone of github.com/giakoumoglou/synco; --lightly needs `pip install lightly`. Without flags: ResNet-18
with the 3x3 stem at 32 px, batch 128, K 16,384, SynCo's published counts, MoCo v2's views, two threads, one loader
process each, BatchNorm over the whole batch and no row masked, as in the others' code; the row "defaults" is the last
row with both left to main_pretrain.py's own choice. Each row is the one above it and one thing more.

In every round each row makes one step, in a new order; ratios are taken within rounds, and their median is printed. A
loader process begins the next batch when one is taken and is done long before the step is, so a step carries the cost
of a batch. "encoders alone" is a query forward and backward and a key forward on images that lie ready, no more. The
rows with --compile, lightly's and "encoders alone" too, have both encoders compiled by torch: minutes at first.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms as T

from benchmarks.peers import TAR, InMemory, Lightly, Setting, endless, loader, open_cifar, published, released
from benchmarks.speed.input_path import blurred
from benchmarks.timing import rounds
from moco import cli, data, distributed
from moco.cli.pretrain import pretrain_config
from moco.models.moco import MoCo
from moco.train import pretraining
from moco.train.bench import make_trainer
from moco.train.runlog import RunLog
from moco.train.setup import build_model, view_settings

ROOT = Path(__file__).resolve().parents[2]
SETTING = ["-a", "resnet18", "--size", "32", "-b", "128", "--moco-k", "16384", "--moco-t", "0.2",
           "--mlp", "--aug-plus", "--hard-start-epoch", "0", "--seed", "0", "--dataset", "folder"]  # fmt: skip
SAME = ["--bn-splits", "1", "--no-mask-same-image"]
SYNCO, PLAIN = ["--method", "synco"], ["--method", "moco"]
LADDER = {
    "ours: fp32, reference head, torchvision's loader": ["--amp", "off", "--no-channels-last"],
    "+ bf16": ["--amp", "bf16", "--no-channels-last"],
    "+ channels_last": ["--amp", "bf16", "--channels-last"],
    "+ head in closed form": ["--amp", "bf16", "--channels-last", "--head-impl", "cpu"],
    "+ our loader": ["--amp", "bf16", "--channels-last", "--head-impl", "cpu"],
    "+ --compile": ["--amp", "bf16", "--channels-last", "--head-impl", "cpu", "--compile"],
}
BEST, COMPILED, RELEASED, DEFAULTS = "+ our loader", "+ --compile", "released SynCo", "defaults"
BOUND, LIGHTLY, OURS = "encoders alone", "MoCo, lightly", "MoCo, ours"
BOTH = " " + COMPILED  # rows that exist with and without it
ROWS = (RELEASED, *LADDER, *(row + how for row in (DEFAULTS, OURS, BOUND, LIGHTLY) for how in ("", BOTH)))
GOALS = (
    (BEST, RELEASED, 3.0), (BEST, BOUND, 0.9), (OURS, LIGHTLY, 1.0), (BEST, LIGHTLY, 1.0), (COMPILED, RELEASED, 3.0),
    (COMPILED, BOUND + BOTH, 0.9), (COMPILED, LIGHTLY, 1.0), (OURS + BOTH, LIGHTLY + BOTH, 1.0),
)  # fmt: skip
Step = Callable[[], Any]


class Numbered(Dataset):
    """Two views by torchvision, as our trainer takes them."""

    def __init__(self, source: data.Source, size: int):
        view = published(size, T.Lambda(blurred))
        self.images = InMemory(source, lambda image: (view(image), view(image)))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        q, k = self.images[index][0]
        return {"q": q, "k": k, "index": index, "bad": -1}


def ours(
    trainer: pretraining.Trainer, source: data.Source, view: Namespace, setting: Setting, own_loader: bool
) -> Step:
    """A step of main_pretrain.py's trainer, with its own loader or with torchvision's views."""
    batches = endless(loader(Numbered(source, view.size), setting))
    if own_loader:
        views = data.TwoViews(source, view.preset, view.size, trainer.progress.seed)
        made = data.two_views(views, trainer.sampler, setting.workers, distributed.device())
        batches = epochs(made, trainer.sampler)
    return functools.partial(trainer.step, batches)


def epochs(batches: Any, sampler: data.EpochSampler) -> Iterator[dict]:
    """Epoch after epoch of our loader, each in its own order."""
    while True:
        yield from batches
        sampler.set_position(sampler.epoch + 1)


def encoders_alone(model: MoCo, amp: torch.dtype | None, batch: int, view: Namespace) -> Step:
    """q forward and backward, k forward, in the model's layout; images and the gradient of q are given."""
    images = torch.randn(batch, view.channels, view.size, view.size).contiguous(memory_format=model.layout)

    def step() -> None:
        with torch.autocast("cpu", amp, enabled=amp is not None):
            q: Tensor = model.encoder_q(images)  # (N, C)
            with torch.no_grad():
                model.encoder_k(images)
        q.backward(torch.ones_like(q))
        model.zero_grad(set_to_none=True)

    return step


def steps(args: Namespace, source: data.Source, stack: contextlib.ExitStack) -> dict[str, Step]:
    """The rows that are asked for, ready to be called."""
    run = cli.parse_pretrain([*SETTING, *SAME, *args.argv, *SYNCO])
    view = view_settings(pretrain_config(run).views, source)
    setting = Setting.of(run, view.size, args.workers)
    work = stack.enter_context(tempfile.TemporaryDirectory())
    log = stack.enter_context(RunLog(work, tensorboard=False))
    counts = {name: getattr(run, name) for name in ("n_hard", "n1", "n2", "n3", "n4", "n5", "n6")}
    fast = LADDER[BEST]
    rows = {name: [*SAME, *SYNCO, "--head-impl", "reference", *flags] for name, flags in LADDER.items()}
    rows |= {DEFAULTS: [*SYNCO], OURS: [*SAME, *PLAIN, *fast], BOUND: [*SAME, *PLAIN, *fast]}
    rows |= {name + BOTH: [*rows[name], "--compile"] for name in (DEFAULTS, OURS, BOUND)}

    def make(name: str) -> Step:
        if name == RELEASED:
            return released(args.synco, setting, source, counts)
        if name.startswith(LIGHTLY):
            return lightly(setting, source, pretraining.pick_amp("bf16", distributed.device()), name.endswith(COMPILED))
        row = cli.parse_pretrain([*SETTING, *args.argv, *rows[name]])
        if name.startswith(BOUND):
            model, _ = build_model(pretrain_config(row), view, row.seed, len(source), run.batch_size)
            assert isinstance(model, MoCo)
            return encoders_alone(
                model.train(), pretraining.pick_amp(row.amp, distributed.device()), run.batch_size, view
            )
        trainer = make_trainer(pretrain_config(row), view, log, work, len(source), run.batch_size)
        theirs = name in LADDER and list(LADDER).index(name) < list(LADDER).index(BEST)
        return ours(trainer, source, view, setting, own_loader=not theirs)

    left_out = [RELEASED] * (not args.synco) + [LIGHTLY, LIGHTLY + BOTH] * (not args.lightly)
    wanted = [name for name in args.rows if name not in left_out]
    first = (RELEASED, LIGHTLY, LIGHTLY + BOTH)  # what cannot be imported is said before anything is compiled
    made = {name: make(name) for name in sorted(wanted, key=lambda name: name not in first)}
    return {name: made[name] for name in wanted}


def lightly(setting: Setting, source: data.Source, amp: torch.dtype | None, compiled: bool) -> Step:
    """A step of MoCo v2 of lightly's blocks, its encoders compiled or not."""
    moco = Lightly(setting, source, amp, channels_last=True)
    if compiled:
        moco.q.compile()
        moco.k.compile()
    batches = endless(moco.batches)
    return lambda: moco.step(next(batches))


def ratios(found: dict[str, list[float]], name: str, base: str) -> list[float]:
    """How many times as fast as ``base``: first quartile, median and third quartile over the rounds."""
    each = [b / a for a, b in zip(found[name], found[base], strict=True)]
    return statistics.quantiles(each, n=4, method="inclusive")


def report(found: dict[str, list[float]], batch: int) -> str:
    """The table, and what became of the goals."""
    lines = ["| row | median ms | images/s | quartiles | speed-up over the row above | x released | of encoders |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    ladder = [name for name in (RELEASED, *LADDER) if name in found]
    for name, taken in found.items():
        middle = statistics.median(taken)
        slow, _, fast = (1e3 * batch / x for x in reversed(statistics.quantiles(taken, n=4, method="inclusive")))
        above = ladder[ladder.index(name) - 1] if name in ladder[1:] else None
        cells = [name, f"{middle:.0f}", f"{1e3 * batch / middle:.1f}", f"{slow:.1f} to {fast:.1f}"]
        cells += [f"{ratios(found, name, base)[1]:.2f}" if base in found else "" for base in (above, RELEASED, BOUND)]
        lines.append("| " + " | ".join(cells) + " |")
    for name, base, goal in GOALS:
        if name in found and base in found:
            low, got, high = ratios(found, name, base)
            verdict = "met" if got >= goal else "missed"
            lines.append(f"\n{name} / {base}: {got:.2f} ({low:.2f} to {high:.2f}), goal {goal:.1f}: {verdict}")
    return "\n".join(lines)


def worker(args: Namespace) -> int:
    """Measure and print, in the one process that a benchmark is."""
    torch.set_num_threads(args.threads)
    source = open_cifar(args.data, args.out, args.images, 10).pretrain
    with contextlib.ExitStack() as stack:
        found = rounds(steps(args, source, stack), args.rounds, "cpu")
    batch = args.batch_size
    print(f"{args.arch}, batch {batch}, K {args.moco_k}, {args.threads} threads, {args.workers} loader processes, "
          f"torch {torch.__version__}, {args.rounds} rounds\n")  # fmt: skip
    print(report(found, batch))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synco", type=Path, metavar="DIR", help="checkout of the released code")
    parser.add_argument("--lightly", action="store_true", help="also MoCo v2 of lightly's building blocks")
    parser.add_argument("--data", type=Path, default=TAR, help="tar or folder of train/CLASS/*.jpg, test/CLASS/*.jpg")
    parser.add_argument("--images", type=int, default=5000, help="number of training images (default: 5000)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each row, at least 2 (default: 7)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help="default: all there are")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of each row (default: 1)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "whole_step", help="where a tar's images go")
    args, args.argv = parser.parse_known_args(argv)
    if args.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    run = cli.parse_pretrain([*SETTING, *SAME, *args.argv])
    return distributed.launch(worker, Namespace(**{**vars(run), **vars(args)}))


if __name__ == "__main__":
    sys.exit(main())
