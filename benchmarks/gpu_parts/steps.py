"""Whole ResNet-50 steps at 224 px: SynCo's beside plain MoCo's in turns, the encoders alone, and what the host does."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from moco.train import pretraining

from . import clock
from .findings import Findings
from .training import a_trainer

BLOCKS = 5  # of steps of each method, taking turns
METHODS = {
    "moco": ["--method", "moco"],
    "synco": ["--method", "synco"],
    "synco, triton tf32": ["--method", "synco", "--head-impl", "triton", "--head-precision", "tf32"],
}
SETTINGS = ((32, 1), (256, 1), (32, 8), (256, 8))  # images a step, parts of BatchNorm


def row(batch: int, splits: int, method: str, what: str) -> str:
    """The name of a number, for the verdicts too."""
    return f"N {batch}, bn-splits {splits}, {method}, {what}"


def run(found: Findings) -> None:
    for batch, splits in ((8, 4),) if found.dry else SETTINGS:
        with found.guarded(f"N {batch}, bn-splits {splits}"), contextlib.ExitStack() as stack:
            compared(found, batch, splits, stack)
        if not found.dry:
            torch.cuda.empty_cache()


def compared(
    found: Findings, batch: int, splits: int, stack: contextlib.ExitStack, methods: dict[str, list[str]] = METHODS
) -> None:
    """All methods at one setting, the first of them the one that the others are relative to."""
    first = next(iter(methods))
    usual = ["-b", str(batch), "--bn-splits", str(splits)]
    trainers = {
        name: stack.enter_context(a_trainer([*usual, *argv], found.dry))
        for name, argv in methods.items()
        if "triton" not in name or (splits == 1 and not found.dry)
    }
    steps = 1 if found.dry else 6 if batch > 64 else 20
    for trainer, source in trainers.values():
        for _ in range(1 if found.dry else 4):
            trainer.step(source)
    taken = in_turns({name: functools.partial(t.step, source) for name, (t, source) in trainers.items()}, steps, found)
    middle = {name: statistics.median(seconds) for name, seconds in taken.items()}
    alone = encoders_alone(trainers[first][0], batch, steps, found)
    for name, seconds in middle.items():
        found.note(row(batch, splits, name, "images/s"), batch / seconds, f"{1e3 * seconds:.2f} ms a step")
        found.note(row(batch, splits, name, "share of the encoders' speed alone"), alone / seconds)
        if name != first:
            ratios = [own / plain for own, plain in zip(taken[name], taken[first], strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
            found.note(
                row(batch, splits, name, f"time relative to {first}"), ratio, f"quartiles {low:.3f} to {high:.3f}"
            )
        step_by_step(found, row(batch, splits, name, ""), *trainers[name])
    for name, (trainer, _) in trainers.items():
        trainer.sync_outcomes()
        found.note(row(batch, splits, name, "steps that were not finite"), trainer.progress.bad_steps, "",
                   not trainer.progress.bad_steps)  # fmt: skip


def in_turns(calls: dict[str, Callable[[], None]], steps: int, found: Findings) -> dict[str, list[float]]:
    """Seconds a step of each call, by blocks of ``steps`` of them that take turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for block in range(2 if found.dry else BLOCKS):
        order = list(calls) if block % 2 else list(calls)[::-1]
        for name in order:
            taken[name].append(seconds_of(calls[name], steps, found.device))
    return taken


def seconds_of(call: Callable[[], object], times: int, device: str) -> float:
    """Of one call, of so many in a row."""
    clock.sync(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    clock.sync(device)
    return (time.perf_counter() - start) / times


def encoders_alone(trainer: pretraining.Trainer, batch: int, steps: int, found: Findings) -> float:
    """Seconds of q forward and backward and k forward of the same model, on images that are floats already."""
    model, amp, device = trainer.model, trainer.plan.amp, found.device
    size = model.encoder_q.built["size"]
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=model.layout)

    def call() -> None:
        with torch.autocast(device, amp, enabled=amp is not None):
            q = model.encoder_q(images)
            with torch.no_grad():
                model.encoder_k(images)
        q.backward(torch.ones_like(q))
        model.zero_grad(set_to_none=True)

    seconds_of(call, 1 if found.dry else 4, device)
    return statistics.median(seconds_of(call, steps, device) for _ in range(1 if found.dry else 3))


def step_by_step(found: Findings, name: str, trainer: pretraining.Trainer, source: Iterator[dict]) -> None:
    """Of one step: what the host needs, its kernels, how long the card is busy, its parts, peak memory, host waits."""
    step = functools.partial(trainer.step, source)
    found.note(f"{name}host", clock.host_microseconds(step, found.device, 1 if found.dry else 5) / 1e3, "ms")
    trainer.look_every = 1
    trainer.timer.take()
    for _ in range(1 if found.dry else 4):
        step()
    parts = trainer.timer.take()
    trainer.look_every = 10**9
    whole = sum(parts.values()) or 1.0
    told = ", ".join(f"{part} {1e3 * seconds:.2f}" for part, seconds in parts.items())
    found.note(f"{name}head", 100 * parts.get("head", 0.0) / whole, f"% of the step; ms: {told}")
    if found.dry:
        return
    torch.cuda.reset_peak_memory_stats()
    with clock.counted_waits() as waits:
        step()
    found.note(f"{name}host waits", len(waits), "; ".join(sorted(set(waits)))[:160], not waits)
    found.note(f"{name}peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB, with the other methods' models")
    busy, launches = clock.total(clock.kernels(step, 2))
    found.note(f"{name}kernels", launches, f"{busy / 1e3:.2f} ms of the card")
