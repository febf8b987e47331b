"""What a small set needs otherwise than the defaults, which are of 1.3 million photographs: the rules, and --auto.

It takes what they say for the flags that were left open. Every rule is a function of numbers; docs/own_data.md has the
reasons. No torch here.

Legend: n images, B images a step, T steps of a run, E its epochs, K queue rows, m momentum of the key encoder.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from moco.config import typed
from moco.data.registry import dataset_of
from moco.errors import UserError

LEAVE = ", or leave it to --auto"  # how a sentence that names a flag ends
STEPS = {"queue": 16, "batch": 4, "momentum": 4}  # of an epoch at least, by family: the last two compare one batch
MOMENTA = (0.999, 0.99, 0.95, 0.9)
LEFT = 0.01  # at most, of the key encoder's first weights at the end
PUBLISHED_EPOCHS = 200  # of MoCo's, MoCHi's and SynCo's recipes, of which 120, 160 and 10 are shares
ENLARGED = 2  # times that pixels may be enlarged
DEFAULT_SIZE, SMALL = 224, 64  # of views; from SMALL down encoders have the 3x3 stem


class Place(NamedTuple):
    """What a run has beside its flags: n, the images' short side in pixels (0: not known, or the data set's own is
    taken anyway), nodes and processes of a node."""

    images: int
    side: float = 0
    nodes: int = 1
    processes: int = 1


# ------------------------------------------------------------------------------------------------------- the rules


def power_of_two(most: int) -> int:
    """The largest one up to ``most``, at least 1."""
    return 1 << max(0, most.bit_length() - 1)


def fitting_size(side: float) -> int:
    """The views' side for images of this short side, a multiple of 32 as networks divide by it; 0 where the default
    fits."""
    return max(32, 32 * math.floor(side / 32 + 0.5)) if 0 < side < DEFAULT_SIZE / ENLARGED else 0


def fitting_batch(images: int, processes: int, steps: int) -> int:
    """Images a step for an epoch of at least so many ``steps``, but not fewer than 16 images where the set has twice as
    many; a power of two in each of the processes, 2 there at least."""
    most = min(max(images // steps, 16), images // 2)
    return processes * max(2, power_of_two(most // processes))


def fitting_queue(images: int, batch: int = 1, steps: float = math.inf) -> int:
    """K: at most half of the images, so that a key is gone before its image comes again, and what a quarter of the run
    fills; at least a batch."""
    return power_of_two(int(max(min(images // 2, batch * steps / 4), batch if steps < math.inf else 1)))


def fitting_momentum(steps: float) -> float:
    """m: the largest of MOMENTA of which T steps leave at most LEFT of the key encoder's first weights."""
    return next((m for m in MOMENTA if m**steps <= LEFT), MOMENTA[-1])


def fitting_start(epochs: int, steps: int, fill: float, stop: int | None = None) -> int:
    """The first epoch with synthetic negatives: the recipes' share, 10 of 200, but once keys have filled the queue, and
    inside the run. ``steps``: of an epoch. ``fill``: steps until the queue is full."""
    first = max(round(epochs * 10 / PUBLISHED_EPOCHS), math.ceil(fill / steps))
    last = epochs - 1 if stop is None else min(epochs, stop) - 1
    return max(0, min(first, last))


def fitting_milestones(total: int) -> list[int]:
    """The recipes' 120 and 160 of 200, for so many epochs or, where a run counts them, steps; none below 5."""
    return [round(0.6 * total), round(0.8 * total)] if total >= 5 else []


def fitting_parts(batch: int) -> int | None:
    """Parts of a batch for BatchNorm: up to 8 of at least 8 images each, else 2; None where 2 do not divide it."""
    found = [parts for parts in range(2, 9) if batch % parts == 0 and batch // parts >= 8]
    return max(found, default=2 if batch % 2 == 0 and batch >= 4 else None)


# -------------------------------------------------------------------------------------- of the flags of one run


def batch_of(args: Namespace, place: Place) -> int:
    """B, of all nodes."""
    return args.batch_size * place.nodes


def epoch_of(args: Namespace, place: Place) -> int:
    """Steps of an epoch."""
    B = batch_of(args, place)
    batches = place.images // B if args.drop_last else -(-place.images // B)
    return max(1, batches // args.accum)


def length_of(args: Namespace, place: Place) -> tuple[int, int]:
    """T and E."""
    each = epoch_of(args, place)
    return (args.steps, -(-args.steps // each)) if args.steps else (args.epochs * each, args.epochs)


def _size(args: Namespace, place: Place) -> int | None:
    return fitting_size(place.side) or None


def _aug(args: Namespace, place: Place) -> str | None:
    """MoCo's for CIFAR; SupContrast's and those of named sets are of small images already."""
    of_photographs = args.aug in (None, "v1", "v3") and dataset_of(args.dataset).preset == "v1"
    return "cifar" if of_photographs and (args.size or DEFAULT_SIZE) <= SMALL else None


def _batch(args: Namespace, place: Place) -> int:
    steps = STEPS[args.family] * args.accum
    return min(args.batch_size, fitting_batch(place.images // place.nodes, place.processes, steps))


def _queue(args: Namespace, place: Place) -> int | None:
    batches = length_of(args, place)[0] * args.accum
    return min(args.moco_k, fitting_queue(place.images, batch_of(args, place), batches)) if _queued(args) else None


def _queued(args: Namespace) -> bool:
    return args.family == "queue"


def _momentum(args: Namespace, place: Place) -> float | None:
    steps = moves(args, length_of(args, place)[0])
    return None if args.family == "batch" else min(args.moco_m, fitting_momentum(steps))


def moves(args: Namespace, steps: int) -> float:
    """Steps that move the key encoder as far as T do with the momentum of --moco-m: MoCo v3's rises to 1."""
    return steps / 2 if args.family == "momentum" and args.moco_m_cos else steps


def _hardest(args: Namespace, place: Place) -> int | None:
    """An eighth of the queue, the demo's 256 of 2,048."""
    return min(args.n_hard, max(1, args.moco_k // 8)) if args.negatives == "synco" else None


def _counted(name: str) -> Callable[[Namespace, Place], int | None]:
    """A count of SynCo's, as the hardest rows are fewer than its 1,024."""

    def count(args: Namespace, place: Place) -> int | None:
        own = getattr(args, name)
        return min(own, -(-own * args.n_hard // 1024)) if args.negatives == "synco" else None

    return count


def _mochi(args: Namespace, place: Place) -> list[int] | None:
    """MoCHi's three numbers in the same way."""
    hard = min(args.n_hard, max(1, args.moco_k // 8))
    return [hard, *(-(-x * hard // args.n_hard) for x in (args.s, args.s2))] if args.negatives == "mochi" else None


def _start(args: Namespace, place: Place) -> int | None:
    epochs = length_of(args, place)[1]
    if args.negatives == "moco" or epochs >= PUBLISHED_EPOCHS:
        return None
    fill = args.moco_k / batch_of(args, place) / args.accum
    return fitting_start(epochs, epoch_of(args, place), fill, args.hard_stop_epoch)


def _milestones(args: Namespace, place: Place) -> list[int] | None:
    total = args.steps or args.epochs
    idle = args.cos or args.plateau is not None or (total == PUBLISHED_EPOCHS and not args.steps)
    return None if idle else fitting_milestones(total) or None


def _warm(args: Namespace, place: Place) -> int | None:
    """A tenth."""
    return max(1, args.epochs // 10) if args.warm and not args.steps and args.warm_epochs >= args.epochs else None


def _parts(args: Namespace, place: Place) -> int | None:
    alone = place.nodes * place.processes == 1 and _queued(args)
    return fitting_parts(args.batch_size) if alone and args.batch_size < 32 else None


RULES: dict[str, Callable[[Namespace, Place], Any]] = {  # in this order: a later one reads what an earlier one took
    "size": _size, "aug": _aug, "batch_size": _batch, "moco_k": _queue, "moco_m": _momentum, "n_hard": _hardest,
    **{name: _counted(name) for name in ("n1", "n2", "n3", "n4", "n5", "n6")}, "mochi": _mochi,
    "hard_start_epoch": _start, "schedule": _milestones, "warm_epochs": _warm, "bn_splits": _parts,
}  # fmt: skip


def choose(args: Namespace, place: Place, kept: Mapping[str, Any]) -> tuple[Namespace, str]:
    """The flags with what --auto takes for those that were left open (``args.left_open``), and a line that says it.

    kept: of a run that goes on, what cannot be another value, by name.

    Raises:
        UserError: what is given goes with none of it.
    """
    chosen, said = Namespace(**vars(args)), []
    for name, rule in RULES.items():
        value = kept.get(name, rule(chosen, place)) if name in args.left_open else None
        was = getattr(chosen, name)
        if value is not None and value != was:
            setattr(chosen, name, value)
            said.append(f"--{name.replace('_', '-')} {typed(value)} ({_default(chosen, name, was)})")
            if name == "mochi":
                chosen.n_hard, chosen.s, chosen.s2 = value
    _check(chosen, place)
    of = f"{place.images} images" + (f" of {place.side:g} px" if place.side else "")
    return chosen, f"--auto for {of}: " + (", ".join(said) or "the defaults fit")


def _default(args: Namespace, name: str, was: Any) -> str:
    if was is None:
        of_mochi = [args.n_hard, args.s, args.s2] if name == "mochi" else None
        was = {"size": DEFAULT_SIZE, "aug": "v1"}.get(name, of_mochi)
    return "default: what the batch allows" if was is None else f"default {typed(was)}"


def _check(args: Namespace, place: Place) -> None:
    if args.negatives != "moco" and args.n_hard > args.moco_k:
        raise UserError(
            f"--n-hard {args.n_hard} is more than the {args.moco_k} rows of the queue that --auto takes for "
            f"{place.images} images; lower it, or give --moco-k."
        )


# ------------------------------------------------------------------------------------------------- what is said


def misfits(args: Namespace, place: Place) -> Iterator[str]:
    """A warning for each flag, given or not, that a small set or a short run does not go with, beside those of
    :func:`queue_warning`, :func:`enlarged` and :func:`parts_warning`."""
    steps, _ = length_of(args, place)
    yield from _few_steps(args, place)
    if _queued(args) and args.moco_k <= place.images:
        yield from _unfilled(args, place, steps)
    if args.family != "batch":
        yield from _slow(args, steps)
    yield from _off_schedule(args)


def _few_steps(args: Namespace, place: Place) -> Iterator[str]:
    each, fit = epoch_of(args, place), _batch(args, place)
    if batch_of(args, place) <= place.images and each < STEPS[args.family] / 2 and fit < args.batch_size:
        left = place.images % batch_of(args, place) if args.drop_last else 0
        without = f" and leaves {left} images out" * bool(left)
        yield (
            f"warning: an epoch of {place.images} images is {_count(each, 'step')} of {batch_of(args, place)}"
            f"{without}: give --batch-size {fit}{LEAVE}."
        )


def _unfilled(args: Namespace, place: Place, steps: int) -> Iterator[str]:
    filled, fit = -(-args.moco_k // (batch_of(args, place) * args.accum)), _queue(args, place)
    if filled > steps / 2 and fit != args.moco_k:
        yield (
            f"warning: the queue's {args.moco_k} rows are random until it is full after {_count(filled, 'step')}, and "
            f"this run has {steps}: give --moco-k {fit}{LEAVE}."
        )


def _slow(args: Namespace, steps: int) -> Iterator[str]:
    left, fit = args.moco_m ** moves(args, steps), fitting_momentum(moves(args, steps))
    if left > 10 * LEFT and fit < args.moco_m:
        yield (
            f"warning: --moco-m {args.moco_m:g} leaves the key encoder {100 * left:.0f} % of its first weights at the "
            f"end of {_count(steps, 'step')}: give --moco-m {fit:g}{LEAVE}."
        )


def _off_schedule(args: Namespace) -> Iterator[str]:
    fit, total, unit = fitting_milestones(args.steps or args.epochs), args.steps or args.epochs, "epoch"
    if args.cos or args.plateau is not None or not args.schedule or not fit:
        return
    unit = "step" if args.steps else unit
    missed = [milestone for milestone in args.schedule if milestone >= total]
    which = "drops" if len(missed) == len(args.schedule) else f"also drops at {typed(missed)}"
    if missed:
        yield (
            f"warning: --schedule {typed(args.schedule)}, and the run ends after {_count(total, unit)}, before the "
            f"learning rate {which}: give --schedule {typed(fit)}{LEAVE}."
        )


def queue_warning(K: int, images: int, batch: int, steps: float = math.inf) -> str:
    """Of a queue with more rows than there are images, for the log; else empty. ``batch``: images a step."""
    if images >= K:
        return ""
    half, times = fitting_queue(images, batch, steps), K / images
    often = f"{times:,.0f}" if times >= 100 else f"{times:.3g}"
    return (
        f"warning: the queue has {K} rows for {images} images: each image is in it {often} times, the oldest "
        f"keys are {K // batch} steps old, and until then there are random rows; give --moco-k {half}{LEAVE}."
    )


def enlarged(side: float, size: int) -> str:
    """Of views larger than the images by more than ENLARGED times, likewise."""
    fit = fitting_size(side)
    if not side or size <= ENLARGED * side or not fit:
        return ""
    aug = " --aug cifar" * (fit <= SMALL)
    return (
        f"warning: --size {size} enlarges images whose short side is {side:g} px {size / side:.3g} times, which takes "
        f"longer and shows nothing more: give --size {fit}{aug}{LEAVE}."
    )


def parts_warning(parts: int, batch: int) -> str:
    """Of so many parts of a batch in which BatchNorm sees fewer than 4 images, likewise."""
    fit = fitting_parts(batch)
    if parts < 2 or batch / parts >= 4 or fit is None or fit >= parts:
        return ""
    return (
        f"warning: BatchNorm sees a batch of {batch} in {parts} parts of {batch // parts} images, whose mean and "
        f"variance say little: give --bn-splits {fit}{LEAVE}."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
