"""What the loss asks of the host beside its launches: called as torch's operator, as under torch.compile, and eagerly.

    python -m benchmarks.speed.host_time [--n 32] [--rounds 15]

No GPU is needed: the fused step prepares its launches and none is made. Ratios are of one run, whose rounds take turns;
the time itself is that of this machine. A small operator's time stands beside it for scale.
Legend: N queries, C feature width, K queue rows.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch

from benchmarks.gpu_parts.problems import Case, Problem, make
from moco import kernels
from moco.kernels import by_triton

CALLS = 40  # of a round


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """The fused step on a CPU: everything but its programs, whose results are then whatever the memory held."""
    with (
        mock.patch.object(by_triton, "run_program"),
        mock.patch.object(kernels, "_implementation", lambda _, precision, __: (by_triton, precision)),
        mock.patch.object(torch.cuda, "device_of", return_value=contextlib.nullcontext()),
    ):
        yield


def step(p: Problem, compiling: bool) -> None:
    """Forward and backward, as the operator where ``compiling``."""
    q = p.q.detach().requires_grad_()
    how = {"temperature": 0.2, "n_hard": p.hard, "draws": p.draws, "impl": "triton", "precision": "tf32x3"}
    with mock.patch.object(torch.compiler, "is_compiling", return_value=compiling):
        loss = kernels.contrastive_loss(q, p.k, p.queue, **how).loss
    loss.backward()


def seconds(call: Callable[[], object]) -> float:
    """Of one of CALLS in a row."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def measure(n: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a call by round."""
    p, small = make(Case("", n, 4096), "cpu"), torch.zeros(1)
    ways = {
        "operator": functools.partial(step, p, True),
        "eager": functools.partial(step, p, False),
        "a small operator": functools.partial(small.add_, 1),
    }
    with without_launches():
        for call in ways.values():
            seconds(call)
        found = [{name: seconds(call) for name, call in ways.items()} for _ in range(rounds)]
    return {name: [one[name] for one in found] for name in ways}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=32, help="queries N (default: 32)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that take turns, at least 2 (default: 15)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = measure(args.n, args.rounds)
    for name, taken in found.items():
        ratios = [one / base for one, base in zip(taken, found["operator"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        told = f"{middle:.3f} of the operator's ({low:.3f} to {high:.3f})"
        print(f"{name}: {1e6 * statistics.median(taken):.0f} us on this host, {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
