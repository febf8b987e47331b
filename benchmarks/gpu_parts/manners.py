"""How the fused loss behaves: same bits, no host wait, few launches, CUDA graphs, other streams, torch.compile."""

from __future__ import annotations

import functools

import torch

from moco import kernels
from moco.methods.negatives import HardNegatives

from . import clock
from .findings import Findings
from .problems import FULL, Case, Problem, both_passes, make, same_bits

LAUNCHES = 12  # of the loss, forward and backward
PRECISIONS = [name for name in kernels.PRECISIONS if name != "auto"]
INTERPRETED = ("fp32", "bf16")
SMALL = Case("", 64, 16384)


def run(found: Findings) -> None:
    ways = [("triton", precision) for precision in PRECISIONS if not found.dry or precision in INTERPRETED]
    for n in (2,) if found.dry else (32, 256):
        case = Case("", n)
        p = make(case.tiny() if found.dry else case, found.device)
        for impl, precision in (*ways, ("auto", "auto")):
            with found.guarded(f"{impl} {precision}, N {n}"):
                calls(found, f"{impl} {precision}, N {n}", functools.partial(both_passes, p, impl, precision))
    if found.dry:
        return
    for precision in PRECISIONS:
        with found.guarded(f"CUDA graph, {precision}"):
            graph(found, precision)
    with found.guarded("another stream"):
        another_stream(found)
    with found.guarded("torch.compile"):
        compiled(found)
    drawing(found)


def calls(found: Findings, name: str, call: functools.partial) -> None:
    first = call()
    same = all(same_bits(first, call()) for _ in range(3))
    found.note(f"same bits four times, {name}", "", good=same)
    if found.dry:
        return
    with clock.counted_waits() as waits:
        call()
    found.note(f"host waits, {name}", len(waits), "; ".join(waits)[:160], not waits)
    seen = clock.kernels(call)
    taken, launches = clock.total(seen)
    found.note(f"launches, {name}", launches, f"{taken:.0f} us: {clock.longest(seen)}", launches <= LAUNCHES)
    found.note(f"host time, {name}", clock.host_microseconds(call, found.device), "us")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    found.note(f"peak memory, {name}", (torch.cuda.max_memory_allocated() - before) / 2**20, "MiB")


def graph(found: Findings, precision: str) -> None:
    p = make(SMALL, found.device)
    call = functools.partial(both_passes, p, "triton", precision)
    replayed, result = clock.graph_of(call)
    same = True
    for seed in (5, 6):  # other numbers in the same memory
        put(p, make(SMALL, found.device, seed))
        replayed.replay()
        torch.cuda.synchronize()
        same = same and same_bits(result, call())
    found.note(f"CUDA graph, {precision}", "replays to the same bits" if same else "replays to others", good=same)


@torch.no_grad()
def put(p: Problem, fresh: Problem) -> None:
    assert p.draws is not None and fresh.draws is not None
    for old, new in zip((*p[:3], *p.draws.tensors()), (*fresh[:3], *fresh.draws.tensors()), strict=True):
        old.copy_(new)


def another_stream(found: Findings) -> None:
    p = make(SMALL, found.device)
    expected = both_passes(p)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        got = both_passes(p)
    side.synchronize()
    found.note("another stream, same bits", "", good=same_bits(got, expected))


def compiled(found: Findings) -> None:
    p = make(SMALL, found.device)
    q = p.q.requires_grad_()

    def loss(q: torch.Tensor) -> torch.Tensor:
        how = {"temperature": 0.2, "n_hard": p.hard, "draws": p.draws, "impl": "triton", "precision": "tf32"}
        return kernels.contrastive_loss(q * 1.0, p.k, p.queue, **how).loss

    made = torch.compile(loss, fullgraph=True)
    (eager,), (other,) = (torch.autograd.grad(f(q), q) for f in (loss, made))
    found.note("torch.compile, same bits", "", good=torch.equal(eager, other))


def drawing(found: Findings) -> None:
    extra = HardNegatives(FULL, 1024, 128, 0, 0, torch.device(found.device))
    for n in (32, 256):
        with found.guarded(f"drawing, N {n}"):
            call = functools.partial(extra, n, 10, 7)
            taken, launches = clock.total(clock.kernels(call))
            found.note(
                f"drawing, N {n}",
                clock.microseconds(call, found.device),
                f"us, {launches:.0f} launches, {taken:.0f} us on the card",
            )
