"""Where the time of a run would go on this machine, and which flag would help.

    python -m moco.bench data|step|head|all [DIR] [flags of main_pretrain.py]

data: one process decodes, crops and augments; the loader with its workers. step: whole training steps on noise, by
part. head: the loss alone. all: the three, and which of loader and step is the slower. Nothing is trained or kept.

Legend: N queries, C feature width, K queue rows.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from main_pretrain import build_model, make_plan, view_settings
from moco import data, distributed, engine, options
from moco.builder import MoCo
from moco.encoder import strided_point
from moco.kernels import Draws, contrastive_head, describe
from moco.meters import RunLog

WARM_UP = 2  # steps: allocators, libraries and compilers do their work once


def worker(args: Namespace) -> int:
    """One process of a benchmark; returns its exit code."""
    images = data.open_sources(args.dataset, args.data, download=args.download, channels=args.channels).pretrain
    view = view_settings(args, images)
    args.seed = args.seed or 0
    tell = functools.partial(print, flush=True) if distributed.is_main() else _silent
    batch = args.batch_size * distributed.nodes()
    tell(f"{args.method}, {args.arch} at {view.size} px, batch {batch}, K {args.moco_k}, {images.name}; "
         f"{distributed.words()}, {torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    loads = parts = {}
    if args.what in ("data", "all"):
        loads = data_rows(images, view, args, batch)
        tell(f"\n{loader_table(loads)}")
    if args.what in ("step", "all"):
        parts = step_parts(images, view, args, batch)
        tell(f"\n{table('part of a step', parts)}\n{batch * args.accum / sum(parts.values()):.0f} images/s")
    if args.what in ("head", "all"):
        tell(f"\n{table('the loss alone', head_seconds(args, view), share=False)}")
    for line in verdict(loads, parts, batch * args.accum, settings_in_use(args)):
        tell(f"\n{line}")
    return 0


def _silent(*_: object) -> None:
    return None


def table(what: str, seconds: dict[str, float], share: bool = True) -> str:
    """Milliseconds by row; with ``share`` also the share of their sum."""
    total = sum(seconds.values()) or 1.0
    lines = [f"| {what} | ms |" + " share |" * share, "| --- | ---: |" + " ---: |" * share]
    for name, value in seconds.items():
        lines.append(f"| {name} | {1e3 * value:.4g} |" + f" {100 * value / total:.1f} % |" * share)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- the data


def data_rows(images: data.Source, view: Namespace, args: Namespace, batch: int) -> dict[str, float]:
    """Seconds an image in one process for decode, crop and augment, and ``loader``, images a second with workers.

    Crops and augmentation are of both views. Parts are differences of whole items, taken in turn: the first views
    with nothing but the crop, then all of them.
    """
    whole = data.TwoViews(images, view.preset, view.size, args.seed)
    crops = data.TwoViews(images, replace(view.preset, order=("crop",)), view.size, args.seed)
    chosen = range(0, len(images), -(-len(images) // args.bench_images))
    decode, crop, augment = 0.0, 0.0, 0.0
    for index in chosen:
        # of three: the first reading would measure the disk
        loaded = seconds_of(lambda i=index: images.load(i), 3)
        cropped, finished = (seconds_of(lambda i=index, x=views: x[0, i], 3) for views in (crops, whole))
        decode, crop, augment = decode + loaded, crop + cropped - loaded, augment + finished - cropped
    n, world = len(chosen), distributed.world_size()
    rate = loader_rate(whole, batch // world, distributed.share_of_cores(args.workers), args)
    return {"decode": decode / n, "crop": max(0.0, crop / n), "augment": max(0.0, augment / n), "loader": rate * world}


def seconds_of(call: Callable[[], object], tries: int = 1) -> float:
    """Of one call on the host, the fastest of ``tries``."""
    found = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def loader_rate(views: data.TwoViews, batch: int, workers: int, args: Namespace) -> float:
    """Images a second from the loader by itself: ``bench_seconds`` long, after what the workers had in store."""
    sampler = data.EpochSampler(len(views), min(batch, len(views)), args.seed)
    batches = _endless(data.make_loader(views, sampler, workers), sampler)
    for _ in range(1 + 2 * workers):  # torch's loader prepares two batches a worker in advance
        next(batches)
    images, start = 0, time.perf_counter()
    while images == 0 or time.perf_counter() - start < args.bench_seconds:
        images += len(next(batches)["index"])
    return images / (time.perf_counter() - start)


def _endless(loader: data.Loader, sampler: data.EpochSampler) -> Iterator[dict]:
    for epoch in count():
        sampler.set_position(epoch)
        yield from loader


def loader_table(loads: dict[str, float]) -> str:
    """Of what :func:`data_rows` returns."""
    parts = {name: value for name, value in loads.items() if name != "loader"}
    alone = 1 / max(sum(parts.values()), 1e-9)
    rows = table("an image, two views, one process", parts)
    return f"{rows}\n{alone:.0f} images/s a process, {loads['loader']:.0f} from the loader by itself"


# ---------------------------------------------------------------------------------------------------- the step


def step_parts(images: data.Source, view: Namespace, args: Namespace, batch: int) -> dict[str, float]:
    """Seconds by part of a training step on noise, synthetic negatives active; the mean over ``bench_steps`` steps."""
    with tempfile.TemporaryDirectory() as folder, RunLog(folder, tensorboard=False) as log:
        trainer = make_trainer(args, view, log, folder, max(len(images), batch * args.accum), batch)
        source = noise(batch // distributed.world_size(), view, args.seed, torch.device("cpu"))
        for number in range(WARM_UP + args.bench_steps):
            trainer.look_every = 1  # every step is measured, also on a GPU
            trainer.step(source)
            if number == WARM_UP - 1:
                trainer.parts.take()
        parts = trainer.parts.take()
    parts.pop("waiting for images", None)  # noise is always there
    return parts


def noise(n: int, view: Namespace, seed: int, device: torch.device, images: int = 1 << 20) -> Iterator[dict]:
    """The same noise again and again as a loader hands out batches of n, under new numbers below ``images``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, view.channels, view.size, view.size)
    q, k = (torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device) for _ in range(2))
    bad = torch.full((n,), -1)
    for first in count(0, n):
        yield {"q": q, "k": k, "index": torch.arange(first, first + n, device=device) % images, "bad": bad}


def make_trainer(
    args: Namespace, view: Namespace, log: RunLog, folder: str, images: int, batch: int
) -> engine.Trainer:  # fmt: skip
    """What main_pretrain.worker makes of the same flags, in the first epoch that has all synthetic negatives."""
    torch.manual_seed(args.seed)
    device, world = distributed.device(), distributed.world_size()
    model, _ = build_model(args, view, args.seed, images, batch // world)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    sampler = data.EpochSampler(images, batch, args.seed, world, distributed.rank())
    broken = strided_point(model.encoder_q, view.channels, view.size) if device.type == "cpu" else ""
    plan = make_plan(args, len(sampler), engine.pick_amp(args.amp, device, broken))
    model.train()
    return engine.Trainer(
        model=model,
        wrapped=distributed.wrap(model),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=plan.amp is torch.float16),
        plan=plan,
        progress=engine.Progress(args.seed, epoch=max([args.hard_start_epoch, *args.type_starts.values()])),
        log=log,
        stop=Namespace(flags=lambda: (False, False)),  # type: ignore[arg-type]  # a signal ends a benchmark at once
        save_dir=folder,
        sampler=sampler,
        source=Namespace(name="noise"),  # type: ignore[arg-type]
        max_bad_images=0,
    )


# ---------------------------------------------------------------------------------------------------- the head


def head_seconds(args: Namespace, view: Namespace) -> dict[str, float]:
    """Median seconds of the loss with its gradient: as the run computes it, in fp32, and plain MoCo's, taking turns."""
    device = distributed.device()
    n = args.batch_size // distributed.local_size()
    model, _ = build_model(args, view, args.seed, 1 << 20, n)
    assert isinstance(model, MoCo)  # options.parse_bench saw to it
    generator = torch.Generator().manual_seed(args.seed)
    q, k = (F.normalize(torch.randn(n, args.moco_dim, generator=generator), dim=1).to(device) for _ in range(2))
    epoch = max([args.hard_start_epoch, *args.type_starts.values()])
    draws = model.extra(n, epoch, 0) if model.extra else None
    named = describe(args.head_impl, args.head_precision, device)
    calls = {f"{args.method}, {named}": (draws, args.head_precision), f"{args.method}, in fp32": (draws, "fp32"),
             f"plain moco, {named}": (None, args.head_precision)}  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(WARM_UP + args.bench_steps):
        for name, (mixed, precision) in calls.items():
            seconds = seconds_of(lambda m=mixed, p=precision: _head(args, q, k, model.queue, m, p))
            if number >= WARM_UP:
                found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def _head(args: Namespace, q: Tensor, k: Tensor, queue: Tensor, draws: Draws | None, precision: str) -> None:
    head = contrastive_head(
        q.requires_grad_(), k, queue, temperature=args.moco_t, n_hard=args.n_hard if draws else 0, draws=draws,
        impl=args.head_impl, precision=precision,
    )  # fmt: skip
    head.loss.backward()
    float(q.grad.sum()) if q.grad is not None else 0.0  # waits for a GPU
    q.grad = None


# -------------------------------------------------------------------------------------------------- the verdict


def settings_in_use(args: Namespace) -> dict[str, object]:
    """What the advice depends on."""
    device = distributed.device()
    return {
        "gpu": device.type == "cuda", "workers": distributed.share_of_cores(args.workers) * distributed.local_size(),
        "cores": distributed.cores(), "amp": args.amp != "off", "channels_last": args.channels_last,
        "compile": args.compile, "exact_head": describe(args.head_impl, args.head_precision, device).endswith("fp32"),
    }  # fmt: skip


def verdict(loads: dict[str, float], parts: dict[str, float], batch: int, settings: dict) -> list[str]:
    """Sentences: which part is the slowest of what was measured, and which flag would help."""
    said = []
    if parts:
        slowest = max((name for name in parts if name != "other"), key=lambda name: parts[name])
        share = 100 * parts[slowest] / sum(parts.values())
        said.append(f"In the step the most goes to {slowest} ({share:.0f} %): {_step_advice(slowest, settings)}")
    if loads:
        slowest = max(("decode", "crop", "augment"), key=lambda name: loads[name])
        said.append(f"In the loader the most goes to {slowest}: {_loader_advice(settings)}")
    if loads and parts:
        step, loader = batch / sum(parts.values()), loads["loader"]
        name = "loader" if loader < step else "step"
        both = "" if settings["gpu"] else "; on a CPU they share the cores, so a run is slower than either"
        said.append(f"The bottleneck is the {name}: loader {loader:.0f} images/s, step {step:.0f}{both}.")
    return said


def _step_advice(part: str, settings: dict) -> str:
    if part in ("q forward", "q backward", "k forward"):
        flags = [("--amp auto", not settings["amp"]), ("--channels-last", not settings["channels_last"]),
                 ("--compile", settings["gpu"] and not settings["compile"])]  # fmt: skip
        wanted = [flag for flag, missing in flags if missing]
        if wanted:
            return f"try {' '.join(wanted)}."
        return "the encoders are the bound; only a smaller -a or --size is faster."
    return {
        "head": "try --head-precision bf16." if settings["exact_head"] else "fewer synthetic negatives or --moco-k.",
        "shuffle": "more images a process; with --bn-splits 1 or a network without BatchNorm nothing is shuffled.",
        "transfer": "smaller --size; views travel as bytes already.",
    }.get(part, "a larger --batch-size has fewer of them.")


def _loader_advice(settings: dict) -> str:
    if settings["workers"] < settings["cores"]:
        return f"try -j {settings['cores']} (now {settings['workers']})."
    return f"all {settings['cores']} cores load already; store the images smaller, or train on a machine with more."


def main(argv: list[str] | None = None) -> int:
    return distributed.launch(worker, options.parse_bench(argv))


if __name__ == "__main__":
    sys.exit(main())
