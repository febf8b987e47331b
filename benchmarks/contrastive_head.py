"""The contrastive loss alone, forward and backward: plain MoCo as published, SynCo as released in spirit, and ours.

    python benchmarks/contrastive_head.py [--n 256 --k 65536 --hard 1024 --counts 256 256 256 64 64 64 --repeats 15]

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query.

All variants see the same tensors and the same draws and run in turn, so that a disturbance of the machine meets all of
them; the table gives medians. Drawing is timed on a line of its own. Peak memory is the rise of the resident set's
high-water mark over the inputs, in a fresh process a variant (Linux only). Dispatches are operators that reach the
dispatcher, views and backward included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moco.kernels import Draws, contrastive_head
from moco.methods import synco
from moco.negatives import draw


class Problem(NamedTuple):
    q: Tensor  # (N, C), requires grad
    k: Tensor  # (N, C)
    queue: Tensor  # (K, C)
    queue_t: Tensor  # (C, K), the layout of the published code
    draws: Draws | None
    hard: int
    temperature: float


def make_problem(args: argparse.Namespace) -> Problem:
    generator = torch.Generator().manual_seed(args.seed)
    queue = F.normalize(torch.randn(args.k, args.dim, generator=generator), dim=1)
    q = F.normalize(torch.randn(args.n, args.dim, generator=generator), dim=1)
    k = F.normalize(q + 0.1 * torch.randn(args.n, args.dim, generator=generator), dim=1)
    hard = min(args.hard, args.k)
    draws = draw(synco.recipe(*args.counts), args.n, hard, args.dim, generator)
    return Problem(q.requires_grad_(), k, queue, queue.T.contiguous(), draws, hard, args.temperature)


def moco_logits(p: Problem) -> Tensor:
    """(N, 1 + K) as published: einsum twice, the queue cloned, cat."""
    positive = torch.einsum("nc,nc->n", [p.q, p.k]).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", [p.q, p.queue_t.clone().detach()])
    return torch.cat([positive, negative], dim=1)


def plain_moco(p: Problem) -> Tensor:
    return F.cross_entropy(moco_logits(p) / p.temperature, torch.zeros(len(p.q), dtype=torch.long))


def naive_synco(p: Problem) -> Tensor:
    """Materialised, and for types 5 and 6 one autograd.grad call a negative, which is how SynCo was released."""
    logits, d = moco_logits(p), p.draws
    if d is None:
        return F.cross_entropy(logits / p.temperature, torch.zeros(len(p.q), dtype=torch.long))
    n_query, n_pair, n_sign, n_noise = d.counts
    n_delta = int((d.query_y[0] == 1).sum())  # perturbations are the last columns of the query group
    q = p.q.detach()
    rows = logits[:, 1:].detach().topk(p.hard, dim=1).indices.sort(1).values  # as slots count them
    a = p.queue[rows.gather(1, d.slots_a)]  # (N, S, C)
    b = p.queue[rows.gather(1, d.slots_b)]  # (N, Sp, C)
    of_mix, of_delta, of_pair, of_sign, of_noise = a.split([n_query - n_delta, n_delta, n_pair, n_sign, n_noise], 1)

    def with_gradient(parents: Tensor, weight: Tensor, direction: Callable[[Tensor], Tensor]) -> list[Tensor]:
        mixed = []
        for i in range(parents.shape[1]):
            n = parents[:, i].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(torch.einsum("nc,nc->n", q, n).sum(), n)
            mixed.append((n.detach() + weight[:, i : i + 1] * direction(gradient)).unsqueeze(1))
        return mixed

    x, y = d.query_x.unsqueeze(2), d.query_y.unsqueeze(2)
    mixed = [
        x[:, : n_query - n_delta] * q.unsqueeze(1) + y[:, : n_query - n_delta] * of_mix,
        d.pair_y.unsqueeze(2) * of_pair + d.pair_z.unsqueeze(2) * b,
        of_noise + d.noise_w.unsqueeze(2) * d.noise,
        *with_gradient(of_delta, d.query_x[:, n_query - n_delta :], lambda gradient: gradient),
        *with_gradient(of_sign, d.sign_v, torch.sign),
    ]
    h = F.normalize(torch.cat(mixed, dim=1), dim=2)  # (N, S, C)
    logits = torch.cat([logits, torch.einsum("nc,nsc->ns", p.q, h)], dim=1)
    return F.cross_entropy(logits / p.temperature, torch.zeros(len(p.q), dtype=torch.long))


def head(impl: str, synthetic: bool = True) -> Callable[[Problem], Tensor]:
    def run(p: Problem) -> Tensor:
        draws = p.draws if synthetic else None
        return contrastive_head(
            p.q, p.k, p.queue, temperature=p.temperature, n_hard=p.hard, draws=draws, impl=impl
        ).loss

    return run


BASE, NAIVE, OURS = "plain MoCo, as published", "naive SynCo", "ours, SynCo"
VARIANTS: dict[str, Callable[[Problem], Tensor]] = {
    BASE: plain_moco,
    NAIVE: naive_synco,
    "reference, SynCo": head("reference"),
    OURS: head("auto"),
    "ours, no synthetic": head("auto", synthetic=False),
}


def forward_backward(variant: Callable[[Problem], Tensor], p: Problem) -> float:
    p.q.grad = None
    loss = variant(p)
    loss.backward()
    return loss.item()


def time_all(p: Problem, repeats: int) -> dict[str, float]:
    """Median milliseconds of each variant, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(repeats + 2):  # two rounds warm allocator and library up
        for name, variant in VARIANTS.items():
            start = time.perf_counter()
            forward_backward(variant, p)
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(s) for name, s in seconds.items()}


def time_draws(args: argparse.Namespace, p: Problem) -> float:
    """Median milliseconds of drawing a batch's synthetic negatives, which every SynCo has to do."""
    seconds, generator = [], torch.Generator()
    for _ in range(args.repeats + 2):
        start = time.perf_counter()
        draw(synco.recipe(*args.counts), args.n, p.hard, args.dim, generator)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2:])


class CountDispatches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_dispatches(variant: Callable[[Problem], Tensor], p: Problem) -> int:
    with CountDispatches() as counter:
        p.q.grad = None
        variant(p).backward()
    return counter.count


def resident(field: str) -> float:
    """MiB of a field (VmRSS, VmHWM) of this process; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {field} in the process status")


def peak_of(args: argparse.Namespace) -> float:
    """MiB that one call of the variant adds at its peak, in this process, which should be a fresh one."""
    variant = VARIANTS[args.memory_of]
    small = argparse.Namespace(**{**vars(args), "n": 2, "k": 64, "hard": 16, "counts": [2] * 6})
    forward_backward(variant, make_problem(small))  # libraries allocate their own memory now, not below
    p = make_problem(args)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    forward_backward(variant, p)
    return resident("VmHWM") - before


def child_peak(name: str, argv: Sequence[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--memory-of", name]
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    return child.stdout.strip() if child.returncode == 0 else "n/a"


def table(args: argparse.Namespace, argv: Sequence[str]) -> str:
    p = make_problem(args)
    median = time_all(p, args.repeats)
    shape = f"N={args.n} K={args.k} C={args.dim} H={p.hard} S={sum(args.counts)} T={args.temperature}"
    lines = [
        f"{shape}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.repeats} rounds",
        "",
        "| loss, forward + backward | median ms | x plain MoCo | x naive SynCo | peak MiB | dispatches | loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, variant in VARIANTS.items():
        peak = "not asked" if args.no_memory else child_peak(name, argv)
        cells = [
            name,
            f"{median[name]:.1f}",
            f"{median[name] / median[BASE]:.2f}",
            f"{median[name] / median[NAIVE]:.2f}",
            peak,
            str(count_dispatches(variant, p)),
            f"{forward_backward(variant, p):.5f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Drawing, not in the table: {time_draws(args, p):.1f} ms."]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=256, help="queries (default: 256)")
    parser.add_argument("--k", type=int, default=65536, help="queue rows (default: 65536)")
    parser.add_argument("--dim", type=int, default=128, help="feature width C (default: 128)")
    parser.add_argument("--hard", type=int, default=1024, help="hardest rows a query (default: 1024)")
    parser.add_argument("--counts", type=int, nargs=6, default=[256, 256, 256, 64, 64, 64], metavar="n",
                        help="SynCo's n1 .. n6 (default: 256 256 256 64 64 64)")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds (default: 15)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory", action="store_true", help="leave the memory column out")
    parser.add_argument("--memory-of", choices=list(VARIANTS), help="only print this variant's peak, in MiB")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{peak_of(args):.0f}" if args.memory_of else table(args, argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
