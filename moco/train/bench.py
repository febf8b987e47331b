"""Where the time of a run would go on this machine, and which flag would help.

    python -m moco.bench data|step|head|all [DIR] [flags of main_pretrain.py]

data: one process decodes, crops and augments; the loader with its workers. step: whole training steps on noise, by
part; with --aug-device gpu views are finished there. head: the loss alone. all: the three, and which of loader and
step is the slower. Nothing is trained or kept.

Legend: N images of a step, V views an image, L small crops an image of l x l pixels, C feature width, K queue rows,
h x w pixels.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from timeit import repeat, timeit
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import data, distributed
from moco.config import LocalCropConfig, MoCoConfig, PretrainConfig
from moco.errors import tell
from moco.kernels import Draws, contrastive_loss, describe
from moco.methods.registry import METHODS
from moco.models.base import Contrast, Momentum
from moco.models.moco import MoCo
from moco.models.supcon_queue import LabelledMoCo
from moco.train.diagnoses import loader_advice
from moco.train.plan import Progress
from moco.train.pretraining import Trainer
from moco.train.runlog import RunLog
from moco.train.setup import Views, build_model, loader_facts, prepare_training, view_settings

WARM_UP = 2  # steps: allocators, libraries and compilers do their work once
NO_CROPS = LocalCropConfig()
ON_DEVICE = "augmentation"  # the part of a step that finishes views there


def worker(args: Namespace) -> int:
    """One process of a benchmark; returns its exit code."""
    settings = {"download": args.download, "channels": args.channels, "levels": args.levels, "cache": args.cache}
    images = data.open_on_nodes(args.dataset, args.data, **settings).pretrain
    view = view_settings(args.settings.views, images)
    labels = data.class_labels(images, args.method) if METHODS[args.method].supervised else None
    args.seed = args.seed or 0
    batch = args.batch_size * distributed.nodes()
    queue = f"K {args.moco_k}" if args.family == "queue" else "no queue"
    _tell(f"{args.method}, {args.arch} at {view.size} px, batch {batch}, {queue}, {images.name}; "
          f"{distributed.processes()}, {torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    loads = parts = {}
    if args.what in ("data", "all"):
        loads = data_rows(images, view, args, batch)
        _tell(f"\n{loader_table(loads, args.views, args.local_crops)}")
    if args.what in ("step", "all"):
        parts = step_parts(len(images), view, args, batch, labels)
        _tell(f"\n{timing_table('part of a step', parts)}\n{batch * args.accum / sum(parts.values()):.0f} images/s")
    if args.what in ("head", "all"):
        _tell(f"\n{timing_table('the loss alone', head_seconds(args, view, labels), share=False)}")
    for line in verdict(loads, parts, batch * args.accum, settings_in_use(args, images, view)):
        _tell(f"\n{line}")
    return 0


def _tell(text: str) -> None:
    if distributed.is_main():
        tell(text)


def timing_table(what: str, seconds: dict[str, float], share: bool = True) -> str:
    """Milliseconds by row; with ``share`` also the share of their sum."""
    total = sum(seconds.values()) or 1.0
    lines = [f"| {what} | ms |" + " share |" * share, "| --- | ---: |" + " ---: |" * share]
    for name, value in seconds.items():
        lines.append(f"| {name} | {1e3 * value:.4g} |" + f" {100 * value / total:.1f} % |" * share)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- the data


def data_rows(images: data.Source, view: Views, args: Namespace, batch: int) -> dict[str, float]:
    """Seconds an image in one process for decode, crop and augment, and ``loader``, images a second with workers.

    Crops and augmentation are of all views. Parts are differences of whole items, taken in turn: the first views
    with nothing but the crop, then all of them. Fast decoding depends on the crops, so the two are one part; what
    --aug-device gpu leaves to the device is no part of the loader.
    """
    on_device, fast = args.aug_device == "gpu", args.decode == "fast"
    shape = {"size": view.size, "seed": args.seed, "views": args.views, "local": args.settings.views.local}
    whole = data.TwoViews(images, view.preset, crop_only=on_device, fast=fast, **shape)
    crops = data.TwoViews(images, replace(view.preset, order=("crop",)), fast=whole.fast, **shape)
    chosen = list(_readable(images, range(0, len(images), -(-len(images) // args.bench_images))))
    calls = {"decode": images.load, "crop": lambda i: crops[0, i], "augment": lambda i: whole[0, i]}
    if whole.fast:
        calls = {"decode and crop": calls["crop"], "augment": calls["augment"]}
    # of three: the first reading would measure the disk
    sums = [sum(min(repeat(partial(call, i), number=1, repeat=3)) for i in chosen) for call in calls.values()]
    steps = zip(calls, pairwise([0.0, *sums]), strict=True)
    found = {name: max(0.0, (after - before) / max(1, len(chosen))) for name, (before, after) in steps}
    if on_device:
        del found["augment"]
    world = distributed.world_size()
    return {**found, "loader": world * loader_rate(whole, args, batch // world)}


def _readable(images: data.Source, numbers: range) -> Iterator[int]:
    for number in numbers:
        with contextlib.suppress(data.BadImageError):
            images.load(number)
            yield number


def loader_rate(views: data.TwoViews, args: Namespace, batch: int) -> float:
    """Images a second from the loader by itself: ``bench_seconds`` long, after what the workers had in store."""
    sampler = data.EpochSampler(len(views), min(batch, len(views)), args.seed)
    workers = distributed.share_of_cores(args.workers)
    loader = data.two_views(views, sampler, workers, distributed.device())
    batches = _endless(loader.loader if isinstance(loader, data.Finishing) else loader, sampler)
    for _ in range(1 + 2 * workers):  # torch's loader prepares two batches a worker in advance
        next(batches)
    loaded, start = 0, time.perf_counter()
    while loaded == 0 or time.perf_counter() - start < args.bench_seconds:
        loaded += len(next(batches)["index"])
    return loaded / (time.perf_counter() - start)


def _endless(loader: data.Loader, sampler: data.EpochSampler) -> Iterator[dict]:
    for epoch in count():
        sampler.set_position(epoch)
        yield from loader


def loader_table(loads: dict[str, float], views: int, local: int = 0) -> str:
    """Of what :func:`data_rows` returns."""
    parts = {name: value for name, value in loads.items() if name != "loader"}
    alone = 1 / max(sum(parts.values()), 1e-9)
    small = f" and {local} small crops" * (local > 0)
    rows = timing_table(f"per image of {'two' if views == 2 else views} views{small}, one process", parts)
    return f"{rows}\n{alone:.0f} images/s per process, {loads['loader']:.0f} from the loader alone"


# ---------------------------------------------------------------------------------------------------- the step


def step_parts(
    images: int, view: Views, args: Namespace, batch: int, labels: np.ndarray | None
) -> dict[str, float]:  # fmt: skip
    """Seconds by part of a training step on noise, synthetic negatives active; the mean over ``bench_steps`` steps.

    labels: (images,) for the methods that need them. More images are made up where a step takes more.
    """
    images = max(images, batch * args.accum)
    with tempfile.TemporaryDirectory() as folder, RunLog(folder, tensorboard=False) as log:
        trainer = make_trainer(args.settings, view, log, folder, images, batch, labels)
        local = args.settings.views.local
        share = batch // distributed.world_size()
        source = noise(share, view, args.seed, torch.device("cpu"), images, args.views, local)
        if args.aug_device == "gpu":
            crops: Any = crops_alone(source, view, args.seed, args.views, local)  # as a loader's batches
            source = iter(data.Finishing(crops, view.preset.order, trainer.device))
        trainer.look_every = 1  # every step is measured, also on a GPU
        for steps in (WARM_UP, args.bench_steps):
            for _ in range(steps):
                trainer.step(source)
            parts = trainer.timer.take()
    waited = parts.pop("waiting for images", 0.0)  # noise is always there
    if args.aug_device == "gpu":
        parts[ON_DEVICE] = waited
    # There is a place in the step for what a method without a queue or a key encoder does not do.
    idle = {"queue": (), "batch": ("EMA", "enqueue")}.get(args.family, ("enqueue",))
    return {name: seconds for name, seconds in parts.items() if name not in idle}


def noise(
    n: int, view: Views, seed: int, device: torch.device, images: int = 1 << 20, views: int = 2,
    local: LocalCropConfig = NO_CROPS,
) -> Iterator[dict]:  # fmt: skip
    """The same noise again and again as a loader hands out batches of n, under new numbers below ``images``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, view.channels, view.size, view.size)
    q, k = (torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device) for _ in range(2))
    given = {"q": q, "k": k, "bad": torch.full((n,), -1)}
    if views > 2:  # (N, V - 2, channels, h, w)
        given["more"] = torch.stack([q] * (views - 2), dim=1)
    if local.count:  # (N, L, channels, l, l)
        side = local.beside(view.size).size
        given["local"] = torch.stack([q[:, :, :side, :side]] * local.count, dim=1)
    for first in count(0, n):
        yield {**given, "index": torch.arange(first, first + n, device=device) % images}


def crops_alone(
    batches: Iterator[dict], view: Views, seed: int, views: int = 2, local: LocalCropConfig = NO_CROPS
) -> Iterator[dict]:
    """The batches, their views crops, with drawn parameters of what is left to be done to them."""
    first = next(batches)
    source = data.ArraySource("noise", first["q"].permute(0, 2, 3, 1).squeeze(3).numpy(), channels=view.channels)
    drawing = data.TwoViews(source, view.preset, view.size, seed, crop_only=True, views=views, local=local)
    items = [drawing[0, i] for i in range(len(source))]
    drawn = {name: torch.stack([item[name] for item in items]) for name in items[0] if name.endswith("_params")}
    for batch in batches:
        yield {**batch, **drawn}


def make_trainer(
    config: PretrainConfig, view: Views, log: RunLog, folder: str, images: int, batch: int,
    labels: np.ndarray | None = None,
) -> Trainer:  # fmt: skip
    """What main_pretrain.worker makes of the same flags, where all synthetic negatives have started.

    labels: of any number of images, repeated for ``images``.
    """
    seed = config.seed or 0
    torch.manual_seed(seed)
    world = distributed.world_size()
    classes = None if labels is None else np.resize(labels, images)
    model, _ = build_model(config, view, seed, images, batch // world, classes)
    sampler = data.EpochSampler(images, batch, seed, world, distributed.rank())
    optimizer, scaler, plan, _ = prepare_training(model, config, view, sampler)
    epoch, step = config.model.negatives.last_start() if isinstance(config.model, MoCoConfig) else (0, 0)
    if reason := model.slow_reason(distributed.device()):
        log.line(reason)
    model.train()
    progress, source = Progress(seed, epoch=epoch, step=step), data.ArraySource("noise", np.empty((0, 1, 1)))
    never: Any = Namespace(asked=lambda: 0)  # a signal ends a benchmark at once
    return Trainer(model, optimizer, scaler, plan, progress, log, never, folder, sampler, source, max_bad_images=0)


# ---------------------------------------------------------------------------------------------------- the head


def head_seconds(args: Namespace, view: Views, labels: np.ndarray | None) -> dict[str, float]:
    """Median seconds of the loss with its gradient, by what it is of, taking turns: the run's, and with a queue the
    same in fp32 and plain MoCo's."""
    n = args.batch_size // distributed.local_size()
    classes = None if labels is None else np.resize(labels, max(len(labels), n))
    model, _ = build_model(args.settings, view, args.seed, 1 << 20 if classes is None else len(classes), n, classes)
    calls = _heads_with_queue(args, model, n) if isinstance(model, MoCo) else _head_of_batch(args, model, n)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP + args.bench_steps):
        for name, call in calls.items():
            found[name].append(timeit(partial(_both_passes, *call), number=1))
    return {name: statistics.median(values[WARM_UP:]) for name, values in found.items()}


LossCall = tuple[Tensor, Callable[[], Tensor]]  # what gets a gradient, and a function that returns the loss


def _both_passes(leaf: Tensor, loss: Callable[[], Tensor]) -> None:
    loss().backward()
    float(leaf.grad.sum()) if leaf.grad is not None else 0.0  # waits for a GPU
    leaf.grad = None


def _heads_with_queue(args: Namespace, model: MoCo, n: int) -> dict[str, LossCall]:
    device = distributed.device()
    generator = torch.Generator().manual_seed(args.seed)
    q, k = (F.normalize(torch.randn(n, args.moco_dim, generator=generator), dim=1).to(device) for _ in range(2))
    q.requires_grad_()
    epoch, step = model.config.negatives.last_start()
    impl, own_precision = model.config.loss_impl, model.config.loss_precision

    def head(draws: Draws | None, precision: str) -> LossCall:
        n_hard = model.config.n_hard if draws else 0
        settings = {"temperature": args.moco_t, "n_hard": n_hard, "impl": impl, "precision": precision}
        return q, lambda: contrastive_loss(q, k, model.queue, draws=draws, **settings).loss

    named = describe(impl, own_precision, device)
    if isinstance(model, LabelledMoCo):
        classes = torch.randint(len(model.labels), (args.moco_k,), generator=generator)
        model.queue_labels.copy_(model.labels[classes.to(device)])
        ids = torch.arange(n, device=device)
        own = {f"{args.method} with a queue, in fp32": (q, lambda: model.contrast(q, k, ids, epoch, 0, step).loss)}
    else:
        draws = model.extra(n, epoch, 0, step) if model.extra else None
        own = {f"{args.method}, {named}": head(draws, own_precision), f"{args.method}, in fp32": head(draws, "fp32")}
    return {**own, f"plain moco, {named}": head(None, own_precision)}


def _head_of_batch(args: Namespace, model: Contrast, n: int) -> dict[str, LossCall]:
    device = distributed.device()
    rows = n if isinstance(model, Momentum) else args.views * n  # that go through the encoder together
    z = torch.randn(rows, args.moco_dim, generator=torch.Generator().manual_seed(args.seed)).to(device).requires_grad_()
    model.encoder_q = given = nn.Identity()
    given.register_forward_hook(lambda *_: z)  # outputs that are there already, in the place of an encoder's
    if isinstance(model, Momentum):
        model.encoder_k = given
    images, ids = torch.zeros(n, 1, 1, 1, device=device), torch.arange(n, device=device)
    return {f"{args.method}, in fp32": (z, lambda: model([images] * args.views, ids).loss)}


# -------------------------------------------------------------------------------------------------- the verdict


def settings_in_use(args: Namespace, images: data.Source, view: Views) -> dict[str, Any]:
    """What the advice depends on."""
    return loader_facts(args, images, view) | {
        "amp": args.amp != "off", "channels_last": args.channels_last, "compile": args.compile,
        "queue": args.family == "queue", "exact_head": METHODS[args.method].family == "queue"
        and describe(args.head_impl, args.head_precision, distributed.device()).endswith(("fp32", "tf32x3")),
    }  # fmt: skip


def verdict(loads: dict[str, float], parts: dict[str, float], batch: int, settings: dict) -> list[str]:
    """Sentences: which part is the slowest of what was measured, and which flag would help."""
    said = []
    if parts:
        slowest = max((name for name in parts if name != "other"), key=lambda name: parts[name])
        share = 100 * parts[slowest] / sum(parts.values())
        said.append(f"Most of the step's time goes to {slowest} ({share:.0f} %): {_step_advice(slowest, settings)}")
    if loads:
        slowest = max((name for name in loads if name != "loader"), key=lambda name: loads[name])
        said.append(f"Most of the loader's time goes to {slowest}: {loader_advice(settings, slowest)}")
    if loads and parts:
        step, loader = batch / sum(parts.values()), loads["loader"]
        name = "loader" if loader < step else "step"
        both = "" if settings["gpu"] else "; on a CPU they share the cores, so a run is slower than either"
        said.append(f"The bottleneck is the {name}: loader {loader:.0f} images/s, step {step:.0f}{both}.")
    return said


def _step_advice(part: str, settings: dict) -> str:
    if part in ("q forward", "q backward", "k forward"):
        flags = {"--amp auto": "amp", "--channels-last": "channels_last", "--compile": "compile"}
        wanted = " ".join(flag for flag, name in flags.items() if not settings[name])
        return f"try {wanted}." if wanted else "the encoders are the bound; only a smaller -a or --size is faster."
    head = "fewer synthetic negatives or --moco-k." if settings["queue"] else "it grows with the square of the batch."
    return {
        "head": "try --head-precision bf16." if settings["exact_head"] else head,
        ON_DEVICE: "--aug-device cpu leaves it to the loader's processes.",
        "shuffle": "more images a process; with --bn-splits 1 or a network without BatchNorm nothing is shuffled.",
        "transfer": "smaller --size; views travel as bytes already.",
    }.get(part, "a larger --batch-size has fewer of them.")
