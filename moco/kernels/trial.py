"""The fused step on trial: a process that first meets a device compares it with the definition there, and its time
with that of the closed forms.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query (Sq, Sp, Ss, Sn
of spec.py), T temperature.

Both run in a thread of their own, where neither autograd's state, nor autocast, nor a mode of the caller holds.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.kernels import by_triton, closed_form, reference
from moco.kernels.matmul import operands
from moco.kernels.spec import Draws, LossOutput

Given = ParamSpec("Given")
Returned = TypeVar("Returned")

# Of the compared step: rows and draws that fill no block of a program, two parts of the queue, and every group.
QUERIES, ROWS, COUNTS, TEMPERATURE = 3, 8459, (24, 16, 8, 8), 0.2
HARDEST = slice(24, 64)  # among these numbers of hardest rows the one is taken whose set no rounding changes
# What loss, gradient and statistics may differ by is a / C + b: four times and more what correct rounding does to these
# very steps, also where a library adds the terms of all rows one after another, and in fp32 and tf32x3 less than plain
# tf32 does (tests/kernels/test_trial.py).
TOLERANCE = {"fp32": (8e-4, 5e-6), "tf32x3": (8e-4, 5e-6), "tf32": (2e-2, 2e-4), "bf16": (8e-2, 1e-3)}
SECONDS = 0.03  # for which each of the two is timed, after a first call, but
CALLS = (5, 50)  # at least and at most so often


class Size(NamedTuple):
    """What decides how long a step takes."""

    n: int
    rows: int  # K
    width: int  # C
    hard: int  # H
    counts: tuple[int, int, int, int]  # of synthetic negatives
    masked: bool
    temperature: float


class Problem(NamedTuple):
    """The arguments of a step in float32, but for the precision."""

    q: Tensor  # (N, C) unit rows, as k and queue (K, C) have them
    k: Tensor
    queue: Tensor
    temperature: float
    hard: int
    draws: Draws | None
    ids: Tensor | None  # (N,)
    queue_ids: Tensor | None  # (K,)

    def to(self, device: torch.device, dtype: torch.dtype) -> Problem:
        """The same elsewhere; indices stay int64."""
        q, k, queue = (t.to(device, dtype) for t in self[:3])
        ids, queue_ids = (t if t is None else t.to(device) for t in (self.ids, self.queue_ids))
        draws = None if self.draws is None else self.draws.to(device, dtype)
        return self._replace(q=q, k=k, queue=queue, draws=draws, ids=ids, queue_ids=queue_ids)


def apart(work: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """``work`` in a thread of its own."""

    @functools.wraps(work)
    def elsewhere(*given: Given.args, **more: Given.kwargs) -> Returned:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work, *given, **more).result()

    return elsewhere


# ------------------------------------------------------------------------------------------------- does it agree


@functools.cache
@apart
def objection(device: torch.device, width: int, masked: bool, precision: str) -> str:
    """Why the fused step must not be used, or an empty string: triton is missing, cannot compile, or differs.

    Compared in value and gradient with the reference in float64, on steps of QUERIES queries with a fixed seed: with
    synthetic negatives, without, and with similarities that are equal by the hundred.
    """
    allowed = tolerance(precision, width)

    def compare() -> str:
        worst = max(difference(p, by_fused(p, device, precision), allowed) for p in problems(width, masked))
        return "" if worst <= allowed else f"it differs from the reference by {worst:.1g}, and {allowed:g} is allowed"

    return by_triton.fault(compare)


@functools.cache
@apart
def objection_at(device: torch.device, size: Size, precision: str) -> str:
    """The same at the size of a run, for which programs are compiled: compared with the closed forms on the device.

    Queries are coordinate axes and the queue's rows are rounded to bf16, so that similarities, and with them the
    hardest set, are the same in every precision. Nothing is said where the closed forms find no memory.
    """

    def compare() -> str:
        problem = _of_size(device, size)
        axes = torch.eye(size.width, device=device)[torch.arange(size.n, device=device) % size.width]
        problem = problem._replace(q=axes, queue=problem.queue.bfloat16().float())
        with torch.no_grad(), operands("fp32", device.type == "cuda"):
            ours = by_triton.compute(*problem, precision, True, problem.queue.bfloat16())
            _wait(device)
            try:
                theirs = closed_form.compute(*problem, "fp32", True)
            except torch.OutOfMemoryError:
                return ""
        same_ranks = (ours[0].rank == theirs[0].rank).float().mean()  # a positive may round to a row's similarity
        error = _worst_error(ours, theirs) if same_ranks >= 0.99 else torch.inf
        allowed = tolerance(precision, size.width) * max(1.0, size.rows / ROWS) ** 0.5  # longer sums round more
        differs = f"it differs from the closed forms by {error:.1g}, and {allowed:.2g} is allowed"
        return "" if error <= allowed else f"at {size.n} queries and {size.rows} rows {differs}"

    return by_triton.fault(compare)


def _worst_error(found: tuple[LossOutput, Tensor | None], right: tuple[LossOutput, Tensor | None]) -> float:
    """The largest difference of two steps: of the loss, relative; of the gradient, in norm; of the statistics.
    Infinite for what is not a number."""
    (head, gradient), (head_right, gradient_right) = found, right
    assert gradient is not None and gradient_right is not None
    errors = torch.stack([
        (head.loss - head_right.loss).abs() / head_right.loss.clamp(min=1e-6),
        (gradient - gradient_right).norm() / gradient_right.norm().clamp(min=1e-6),
        (head.hardest - head_right.hardest).abs(),
        (head.synthetic_mass - head_right.synthetic_mass).abs(),
    ])  # fmt: skip
    return float(errors.max()) if bool(errors.isfinite().all()) else torch.inf


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tolerance(precision: str, width: int) -> float:
    """What the fused step may differ by from the reference."""
    per_feature, least = TOLERANCE[precision]
    return per_feature / width + least


def by_fused(problem: Problem, device: torch.device, precision: str) -> tuple[LossOutput, Tensor]:
    """Head and gradient (N, C, float64) on the CPU, as the device computes them."""
    p = problem.to(device, torch.float32)
    with operands("fp32", p.q.is_cuda):
        head, gradient = by_triton.compute(*p, precision, True, p.queue.bfloat16())
    assert gradient is not None
    return LossOutput(*(t.cpu() for t in head)), gradient.cpu().double()


def difference(problem: Problem, found: tuple[LossOutput, Tensor], slack: float) -> float:
    """How far ``found`` is from the reference in float64, see ``_worst_error``; infinite where a rank is that of no
    positive similarity within ``slack`` of the right one."""
    p = problem.to(torch.device("cpu"), torch.float64)
    head = reference.contrastive_loss(p.q.requires_grad_(), *p[1:])
    (gradient,) = torch.autograd.grad(head.loss, p.q)
    right = head._replace(loss=head.loss.detach()), gradient
    return _worst_error(found, right) if _rank_fits(problem, found[0].rank, slack) else torch.inf


def _rank_fits(problem: Problem, rank: Tensor, slack: float) -> bool:
    q, k, queue, *_ = problem.to(torch.device("cpu"), torch.float64)
    similarities, positive = _similarities(problem), torch.linalg.vecdot(q, k).unsqueeze(1)
    slack = slack if bool((queue.bfloat16() != queue).any()) else 0.0  # what no precision rounds has one rank
    least, most = ((similarities > positive + by).sum(1) for by in (slack, -slack))
    return bool(((least <= rank) & (rank <= most)).all())


def _similarities(problem: Problem) -> Tensor:
    """(N, K) in float64, -inf where a row is left out."""
    similarities = problem.q.double() @ problem.queue.double().T
    if problem.ids is None:
        return similarities
    return similarities.masked_fill(problem.ids.unsqueeze(1) == problem.queue_ids, -torch.inf)


def problems(width: int, masked: bool) -> Iterator[Problem]:
    """The compared steps, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    q, queue = _unit(QUERIES, width, generator), _unit(ROWS, width, generator)
    k = F.normalize(q + 0.3 * _unit(QUERIES, width, generator), dim=1)
    ids = (torch.arange(QUERIES), torch.arange(ROWS) % (2 * QUERIES)) if masked else (None, None)
    plain = Problem(q, k, queue, TEMPERATURE, 0, None, *ids)
    yield plain
    hard = _firm(_similarities(plain))
    yield plain._replace(hard=hard, draws=some_draws(QUERIES, COUNTS, hard, width, generator))
    # Few levels, all of which every precision has: which of equal rows belong to the set is defined, and rounds to
    # nothing else.
    q, k, queue = (_coarse(n, width, generator) for n in (QUERIES, QUERIES, ROWS))
    hard = HARDEST.start
    yield Problem(q, k, queue, TEMPERATURE, hard, some_draws(QUERIES, COUNTS, hard, width, generator), *ids)


def _unit(n: int, width: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(n, width, generator=generator, device=generator.device), dim=1)


def _coarse(n: int, width: int, generator: torch.Generator) -> Tensor:
    """(n, C) unit rows whose four entries, or one, are halves."""
    entries = 4 if width >= 4 else 1
    places = torch.rand(n, width, generator=generator).argsort(1)[:, :entries]
    signs = torch.randint(2, (n, entries), generator=generator) * 2.0 - 1
    return torch.zeros(n, width).scatter_(1, places, signs * entries**-0.5)


def _firm(similarities: Tensor) -> int:
    """H in HARDEST at which the H-th largest of similarities (N, K) and the next are farthest apart, for the query
    for which they are nearest."""
    largest = similarities.topk(HARDEST.stop + 1, dim=1).values
    return HARDEST.start + 1 + int((largest[:, :-1] - largest[:, 1:])[:, HARDEST].amin(0).argmax())


def some_draws(
    n: int, counts: tuple[int, int, int, int], hard: int, width: int, generator: torch.Generator
) -> Draws | None:
    """Draws of n queries, ``counts`` a group, with the generator and on its device; None for none."""
    total, (n_query, n_pair, n_sign, n_noise), device = sum(counts), counts, generator.device
    if not total:
        return None
    slots_a, slots_b = (torch.randint(hard, (n, size), generator=generator, device=device) for size in (total, n_pair))
    x = torch.rand(n, n_query, generator=generator, device=device) - 0.5
    y = torch.rand(n, n_pair, generator=generator, device=device)
    v, w = (torch.full((n, size), 0.01, device=device) for size in (n_sign, n_noise))
    noise = torch.randn(n, n_noise, width, generator=generator, device=device)
    return Draws(slots_a, slots_b, x, 1 - x, y, 1 - y, v, w, noise)


# -------------------------------------------------------------------------------------------- and how long it takes


@apart
def relative_time(device: torch.device, size: Size, precision: str, closed: str) -> float:
    """Time of the fused step in ``precision`` over that of the closed forms in ``closed``, medians, with a gradient.

    Infinite where the fused step finds no memory, or fails, 0 where only the closed forms do.
    """
    try:
        problem = _of_size(device, size)
    except torch.OutOfMemoryError:
        return torch.inf
    ways = (by_triton.compute, precision), (closed_form.compute, closed)
    calls = [functools.partial(compute, *problem, operand, True) for compute, operand in ways]
    for call in calls:
        seconds(call, device)  # compiles
    taken: list[list[float]] = [[], []]
    while len(taken[0]) < CALLS[0] or (len(taken[0]) < CALLS[1] and sum(map(sum, taken)) < 2 * SECONDS):
        for times, call in zip(taken, calls, strict=True):
            times.append(seconds(call, device))
    ours, theirs = map(statistics.median, taken)
    return torch.inf if ours == torch.inf else ours / theirs


@apart
def device_time(device: torch.device, size: Size, precision: str) -> float:
    """Median seconds of the fused step on the device, with a gradient; infinite where it finds no memory or fails.

    On a GPU a CUDA graph is replayed, so that the host's share does not count: it is that of all precisions, and while
    a GPU is busy with the encoders it is hidden.
    """
    try:
        step = functools.partial(by_triton.compute, *_of_size(device, size), precision, True)
        if seconds(step, device) == torch.inf:  # which compiles: a capture must not
            return torch.inf
        replay = _replay(step, device) if device.type == "cuda" else step  # step stays: a graph reads its tensors
    except Exception:  # no memory, or what a capture refuses
        return torch.inf
    return statistics.median(seconds(replay, device) for _ in range(CALLS[1]))


def _replay(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A launch of all that ``call`` launches, as a CUDA graph of the device, which need not be this thread's."""
    graph = torch.cuda.CUDAGraph()
    alone = {"stream": torch.cuda.Stream(device), "capture_error_mode": "thread_local"}
    with torch.cuda.device(device), torch.no_grad(), operands("fp32", True), torch.cuda.graph(graph, **alone):
        call()
    return graph.replay


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call to its end on the device; infinite where it finds no memory or fails."""
    _wait(device)
    begun = time.perf_counter()
    try:
        with torch.no_grad(), operands("fp32", device.type == "cuda"):
            call()
            _wait(device)
    except Exception:  # no memory, or what a launch refuses: a process that raised here would leave others waiting
        return torch.inf
    return time.perf_counter() - begun


def _of_size(device: torch.device, size: Size) -> Problem:
    """Random unit rows on the device."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, queue = (_unit(n, size.width, generator) for n in (size.n, size.n, size.rows))
    ids = (torch.arange(n, device=device) if size.masked else None for n in (size.n, size.rows))
    hard = min(size.hard, size.rows)
    draws = some_draws(size.n, size.counts, hard, size.width, generator)
    return Problem(q, k, queue, size.temperature, hard if draws is not None else 0, draws, *ids)
