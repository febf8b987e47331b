"""Minutes and images until a k-NN accuracy: MoCo v2 of lightly's building blocks against ours, in one process.

    python -m benchmarks.accuracy.time_to_accuracy [--images 5000] [--epochs 20] [--seeds 0 1 2] [--target P] [flags]

The flags are main_pretrain.py's, such as -a resnet18 --stem cifar --moco-k 16384. Without --target the accuracy is,
in each seed, the highest that both runs reached: a rule that can be named before the runs.

Needs `pip install lightly` unless --only ours. The same network, images in memory, batch, rate and its cosine, K, m, T,
bf16 and channels_last, MoCo v2's views by each one's own code, BatchNorm over the whole batch, no row masked. The two
train in turn, an epoch each, the first of them changing, so that both meet the machine as it is. After every epoch
our k-NN (k=200, T=.1, encoder features, bank = the images trained on) reads both; its time does not count. Seconds are
those of the processor (of one thread, no loader process), which other work on the machine does not lengthen; those of
the clock are recorded too. Every epoch is a line of --out, and finished seeds are not run again.

Legend: N images a batch, C feature width, K queue rows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.peers import TAR, Lightly, Setting, open_cifar
from moco import cli, data, distributed
from moco.cli.pretrain import pretrain_config
from moco.errors import UserError
from moco.eval.features import EvalData, FeatureExtractor
from moco.eval.knn import evaluate_knn
from moco.models.encoder import build_encoder, strided_point
from moco.train import pretraining
from moco.train.bench import make_trainer
from moco.train.plan import learning_rate
from moco.train.runlog import RunLog
from moco.train.setup import view_settings

ROOT = Path(__file__).resolve().parents[2]
SETTING = ["--method", "moco", "-a", "test_resnet", "--stem", "imagenet", "--size", "32", "-b", "128", "--lr", "0.06",
           "--wd", "5e-4", "--cos", "--mlp", "--moco-k", "2048", "--moco-m", "0.99", "--moco-t", "0.2", "--aug-plus",
           "--bn-splits", "1", "--no-mask-same-image", "--hard-start-epoch", "0", "--dataset", "folder"]  # fmt: skip
BASE, OURS = "lightly", "ours"
Epoch = Callable[[int], None]


def ours(run: Namespace, view: Namespace, source: data.Source, log: RunLog, folder: str) -> tuple[nn.Module, Epoch]:
    """The encoder, and a call that trains an epoch, as main_pretrain.py does."""
    trainer = make_trainer(pretrain_config(run), view, log, folder, len(source), run.batch_size)
    on_device, fast = run.aug_device == "gpu", run.decode == "fast"
    views = data.TwoViews(source, view.preset, view.size, run.seed, on_device, fast)
    batches = data.two_views(views, trainer.sampler, 0, distributed.device())

    def epoch(number: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.run_epoch(batches)

    return trainer.model.encoder_q, epoch


def lightly(run: Namespace, setting: Setting, source: data.Source, amp: torch.dtype | None) -> tuple[nn.Module, Epoch]:
    """The same of lightly's blocks."""
    torch.manual_seed(run.seed)
    made = Lightly(setting, source, amp, run.channels_last)

    def epoch(number: int) -> None:
        for group in made.optimizer.param_groups:
            group["lr"] = learning_rate(run.lr, number, run.epochs, cosine=run.cos, milestones=run.schedule)
        made.q.train()
        for batch in made.batches:
            made.step(batch)

    return made.backbone, epoch


def train(args: Namespace, run: Namespace, sources: data.Sources) -> list[dict]:
    """One seed of all contestants: a record an epoch each."""
    assert sources.train is not None and sources.val is not None
    view = view_settings(pretrain_config(run).views, sources.pretrain)
    network = build_encoder(run.arch, run.moco_dim, stem=run.stem, size=view.size)
    amp = pretraining.pick_amp(run.amp, distributed.device(), strided_point(network, view.channels, view.size))
    extractor = FeatureExtractor(EvalData(view.size, 500), distributed.device(), view.mean, view.std, amp)
    found = []
    with tempfile.TemporaryDirectory() as folder, RunLog(folder, tensorboard=False) as log:
        runs = {}
        if BASE in args.only:
            runs[BASE] = lightly(run, Setting.of(run, view.size, 0), sources.pretrain, amp)
        if OURS in args.only:
            runs[OURS] = ours(run, view, sources.pretrain, log, folder)
        spent = {name: (0.0, 0.0) for name in runs}
        for epoch in range(run.epochs):
            for name in sorted(runs, reverse=epoch % 2 == 1):
                encoder, train_epoch = runs[name]
                cpu, clock = time.process_time(), time.perf_counter()
                train_epoch(epoch)
                cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
                spent[name] = (spent[name][0] + cpu, spent[name][1] + clock)
                accuracy = evaluate_knn(encoder, sources.train, sources.val, extractor)[200]
                images = (epoch + 1) * (len(sources.pretrain) // run.batch_size * run.batch_size)
                found.append({"run": name, "seed": run.seed, "epoch": epoch + 1, "images": images, "knn": accuracy,
                              "cpu_s": round(spent[name][0], 2), "clock_s": round(spent[name][1], 2)})  # fmt: skip
                print(json.dumps(found[-1]), flush=True)
    return found


def reached(records: list[dict], target: float) -> dict | None:
    """The first record with the accuracy."""
    return next((record for record in records if record["knn"] >= target), None)


def common(runs: list[list[dict]]) -> float:
    """The highest accuracy that every run reached."""
    return min(max(record["knn"] for record in run) for run in runs)


def report(records: list[dict], target: float | None) -> str:
    """A line a run and seed, and means over the seeds; ratios between runs of one seed.

    target: percent; None for the highest that all runs of a seed reached.
    """
    lines = ["| run | seed | images/s | final k-NN | target | epochs to it | seconds to it |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    by: dict[tuple[str, int], list[dict]] = {}
    for record in records:
        by.setdefault((record["run"], record["seed"]), []).append(record)
    goals = {seed: common([by[key] for key in by if key[1] == seed]) if target is None else target for _, seed in by}
    for (name, seed), mine in sorted(by.items()):
        first, last = reached(mine, goals[seed]), mine[-1]
        when = [f"{first['epoch']}", f"{first['cpu_s']:.0f}"] if first else ["never", ""]
        cells = [name, str(seed), f"{last['images'] / last['cpu_s']:.0f}", f"{last['knn']:.2f}", f"{goals[seed]:.2f}"]
        cells += when
        lines.append("| " + " | ".join(cells) + " |")
    pairs = [(by[BASE, seed], by[OURS, seed]) for name, seed in by if name == OURS and (BASE, seed) in by]
    if not pairs:
        return "\n".join(lines)
    speed = statistics.mean(a[-1]["cpu_s"] / b[-1]["cpu_s"] for a, b in pairs)
    gains = [b[-1]["knn"] - a[-1]["knn"] for a, b in pairs]
    lines += ["", f"ours / lightly, images/s: {speed:.2f} (mean over {len(pairs)} seeds)",
              "final k-NN, ours minus lightly, by seed: " + ", ".join(f"{gain:+.2f}" for gain in gains)]  # fmt: skip
    times = [[reached(run, goals[run[0]["seed"]]) for run in pair] for pair in pairs]
    hits = [(a["cpu_s"], b["cpu_s"]) for a, b in times if a and b]
    if hits:
        sooner = sum(a for a, _ in hits) / sum(b for _, b in hits)
        lines.append(f"seconds to the target, lightly / ours: {sooner:.2f} (over {len(hits)} seeds where both did)")
    return "\n".join(lines)


def worker(args: Namespace) -> int:
    """Train what is missing, print the table."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    sources, records = None, []
    asked = {"queries": args.queries, "threads": args.threads, "argv": args.argv}
    for seed in args.seeds:
        path = args.out / f"{'_'.join(args.only)}_{args.images}x{args.epochs}_seed{seed}.jsonl"
        if not path.exists():
            sources = sources or open_cifar(args.data, args.out, args.images, args.queries)
            argv = [*SETTING, *args.argv, "--epochs", str(args.epochs), "--seed", str(seed)]
            found = train(args, cli.parse_pretrain(argv), sources)
            path.write_text("".join(json.dumps(record | asked) + "\n" for record in found), encoding="utf-8")
        kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if any(kept[0].get(name, value) != value for name, value in asked.items()):
            raise UserError(f"{path} holds a run with other flags; choose another --out.")
        records += kept
    print(f"\n{args.arch}, {args.images} images x {args.epochs} epochs, batch {args.batch_size}, K {args.moco_k}, "
          f"{args.queries} queries, {args.threads} thread, amp {args.amp}, torch {torch.__version__}\n")  # fmt: skip
    print(report(records, args.target))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=TAR, help="tar or folder of train/CLASS/*.jpg, test/CLASS/*.jpg")
    parser.add_argument("--images", type=int, default=5000, help="number of training images, equal per class")
    parser.add_argument("--queries", type=int, default=2000, help="number of held-out images, equal per class")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, help="k-NN accuracy in percent (default: the highest both reached)")
    parser.add_argument("--only", nargs="+", choices=(BASE, OURS), default=[BASE, OURS], help="default: both")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "time_to_accuracy")
    args, args.argv = parser.parse_known_args(argv)
    run = cli.parse_pretrain([*SETTING, *args.argv])
    return distributed.launch(worker, Namespace(**{**vars(run), **vars(args)}))


if __name__ == "__main__":
    sys.exit(main())
