"""The contrastive loss alone, forward and backward: plain MoCo as published, SynCo as released in spirit, and ours.

    python -m benchmarks.speed.contrastive_loss [--sizes 256x65536 32x65536 64x16384] [--device cuda] [--json FILE]

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query.

All variants see the same tensors and the same draws and run in turn, in a new order every round, so that a disturbance
of the machine meets all of them; tables give medians. A turn is two calls: the second is the time, the first, with
caches that another variant has filled, stands in the columns "after another". Drawing is timed on a line of its own.
The floor is what no implementation can do without, two products and one reading of the queue, at the best bandwidth and
matrix rate that this device showed in this run; the floor of the stages (kernel_bytes.py) also sends the (N, K) matrix
through memory between them, which a block of queries that stays in a cache need not. On a GPU a time is that between
two CUDA events, with a cold L2 cache.

Peak memory is above the inputs: on a CPU the rise of the resident set's high-water mark in a fresh process a variant
(Linux only), on a GPU the allocator's. Calls are what torch.profiler sees: operators on a CPU, those inside others and
views included; launches on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.kernel_bytes import NOTHING, floor_bytes, floor_seconds, least, stages
from benchmarks.timing import rounds, turns
from moco import files
from moco.config import SynCoConfig
from moco.errors import UserError
from moco.kernels import Draws, contrastive_loss, resolve_precision
from moco.kernels.matmul import product
from moco.methods import synco
from moco.methods.negatives import draw

# ------------------------------------------------------------------------------------------------ what is compared


class Problem(NamedTuple):
    q: Tensor  # (N, C), requires grad
    k: Tensor  # (N, C)
    queue: Tensor  # (K, C)
    queue_t: Tensor  # (C, K), the layout of the published code
    draws: Draws | None
    hard: int
    temperature: float


def make_problem(args: argparse.Namespace, size: tuple[int, int]) -> Problem:
    """Random unit rows and draws for (N, K), on the device."""
    n, total = size
    generator = torch.Generator().manual_seed(args.seed)
    queue = F.normalize(torch.randn(total, args.dim, generator=generator), dim=1)
    q = F.normalize(torch.randn(n, args.dim, generator=generator), dim=1)
    k = F.normalize(q + 0.1 * torch.randn(n, args.dim, generator=generator), dim=1)
    hard = min(args.hard, total)
    draws = draw(synco.recipe(SynCoConfig(*args.counts)), n, hard, args.dim, args.seed)
    q, k, queue = (t.to(args.device) for t in (q, k, queue))
    draws = None if draws is None else draws.to(args.device)
    return Problem(q.requires_grad_(), k, queue, queue.T.contiguous(), draws, hard, args.temperature)


def moco_logits(p: Problem) -> Tensor:
    """(N, 1 + K) as published: einsum twice, the queue cloned, cat."""
    positive = torch.einsum("nc,nc->n", [p.q, p.k]).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", [p.q, p.queue_t.clone().detach()])
    return torch.cat([positive, negative], dim=1)


def no_label(p: Problem) -> Tensor:
    """(N,) the positive is the first logit."""
    return torch.zeros(len(p.q), dtype=torch.long, device=p.q.device)


def plain_moco(p: Problem) -> Tensor:
    return F.cross_entropy(moco_logits(p) / p.temperature, no_label(p))


def naive_synco(p: Problem) -> Tensor:
    """Materialised, and for types 5 and 6 one autograd.grad call a negative, which is how SynCo was released."""
    logits, d = moco_logits(p), p.draws
    if d is None:
        return F.cross_entropy(logits / p.temperature, no_label(p))
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
    return F.cross_entropy(logits / p.temperature, no_label(p))


def head(impl: str, precision: str = "auto", synthetic: bool = True) -> Callable[[Problem], Tensor]:
    def run(p: Problem) -> Tensor:
        draws = p.draws if synthetic else None
        return contrastive_loss(
            p.q, p.k, p.queue, temperature=p.temperature, n_hard=p.hard, draws=draws, impl=impl, precision=precision
        ).loss

    return run


class Variant(NamedTuple):
    run: Callable[[Problem], Tensor]
    rates: tuple[str, ...] = ("fp32",)  # of matrix products it may use; the fastest makes its floor
    synthetic: bool = True


BASE, NAIVE, REFERENCE = "plain MoCo, as published", "naive SynCo", "reference"
FP32, AUTO, PLAIN, FUSED = "cpu, fp32", "cpu, auto", "cpu, auto, no synthetic", "triton, fp32"
VARIANTS: dict[str, Variant] = {
    BASE: Variant(plain_moco, synthetic=False),
    NAIVE: Variant(naive_synco),
    REFERENCE: Variant(head("reference")),
    FP32: Variant(head("cpu", "fp32")),
    AUTO: Variant(head("cpu"), ("fp32", "bf16")),
    PLAIN: Variant(head("cpu", synthetic=False), ("fp32", "bf16"), synthetic=False),
    FUSED: Variant(head("triton", "fp32")),
    "triton, tf32": Variant(head("triton", "tf32"), ("tf32",)),
    "triton, tf32x3": Variant(head("triton", "tf32x3"), ("tf32",)),  # three products of tf32
    "triton, bf16": Variant(head("triton", "bf16"), ("bf16",)),
}


class Goal(NamedTuple):
    """``what`` of a variant is at most ``limit`` times that of another one (or at most ``limit``, for None)."""

    device: str
    size: tuple[int, int] | None  # (N, K), None for any
    what: str
    variant: str
    other: str | None
    limit: float


LARGE, FEW, SHORT = (256, 65536), (32, 65536), (64, 16384)
GOAL_SHAPE = (128, 1024, 960)  # C, H, S
GOALS = (
    Goal("cpu", LARGE, "ms", AUTO, BASE, 0.45),
    Goal("cpu", LARGE, "ms", FP32, BASE, 0.6),
    Goal("cpu", LARGE, "ms", AUTO, NAIVE, 1 / 6),
    Goal("cpu", LARGE, "peak_mib", AUTO, BASE, 1.0),
    Goal("cpu", FEW, "ms", AUTO, BASE, 0.7),
    Goal("cpu", SHORT, "ms", AUTO, BASE, 1.5),
    Goal("cuda", None, "ms", FUSED, BASE, 1.0),
    Goal("cuda", None, "peak_mib", FUSED, BASE, 1.0),
    Goal("cuda", None, "calls", FUSED, None, 10),
)

# ------------------------------------------------------------------------------------------------------- measuring


def step(variant: Variant, p: Problem) -> Tensor:
    """Forward and backward; the loss ()."""
    p.q.grad = None
    loss = variant.run(p)
    loss.backward()
    return loss.detach()


def refusal(call: Callable[[], Any]) -> str:
    """Why this machine cannot make the call, or an empty string."""
    try:
        call()
    except (UserError, torch.OutOfMemoryError) as error:
        return str(error).splitlines()[0]
    return ""


def speeds(device: str, side: int, repeats: int = 7) -> dict[str, float]:
    """What this device does at best: bytes a second of a copy, operations a second of the heads' way to multiply.

    Args: side: of the matrices; the copy reads and writes 65,536 times as many floats.
    """
    known = {kind: functools.partial(resolve_precision, kind, "cpu", device) for kind in ("fp32", "tf32", "bf16")}
    kinds = [kind for kind, resolved in known.items() if not refusal(resolved)]
    factor = torch.randn(side, side, device=device)
    source = torch.ones(65536 * side, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {kind: functools.partial(product, factor, factor, kind) for kind in kinds}
    taken = rounds({**calls, "copy": lambda: target.copy_(source)}, repeats, device)
    work = {**dict.fromkeys(kinds, 2 * side**3), "copy": 2 * source.numel() * source.element_size()}
    return {name: 1e3 * work[name] / min(ms) for name, ms in taken.items()}


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Standard error of this process goes nowhere: torch's profiler writes lines of its own there."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def count_calls(variant: Variant, p: Problem) -> int:
    """Operators on a CPU; kernels, copies and fills on a GPU."""
    on_gpu = p.q.is_cuda
    with silenced(), profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as seen:
        step(variant, p)
        if on_gpu:
            torch.cuda.synchronize()
    if on_gpu:
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events() or ())
    return sum(event.name.startswith("aten::") for event in seen.events() or ())


def captured(variant: Variant, p: Problem) -> str:
    """Whether a CUDA graph can hold a step and replays it to the same loss and gradient, else why not."""

    def outcome() -> tuple[Tensor, Tensor]:
        loss = step(variant, p)
        assert p.q.grad is not None
        return loss, p.q.grad

    expected = outcome()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(variant, p)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            found = outcome()
    except RuntimeError as error:
        return f"no: {str(error).splitlines()[0]}"
    graph.replay()
    same = all(torch.allclose(one, other) for one, other in zip(found, expected, strict=True))
    return "yes" if same else "replays to other numbers"


# ---------------------------------------------------------------------------------------------------------- memory


def resident(field: str) -> float:
    """MiB of a field (VmRSS, VmHWM) of this process; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {field} in the process status")


def peak_here(args: argparse.Namespace) -> float:
    """MiB that one call of the variant adds at its peak, in this process, which should be a fresh one."""
    variant = VARIANTS[args.memory_of]
    small = argparse.Namespace(**{**vars(args), "hard": 16, "counts": [2] * 6})
    step(variant, make_problem(small, (2, 64)))  # libraries allocate their own memory now, not below
    p = make_problem(args, args.sizes[0])
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    step(variant, p)
    return max(0.0, resident("VmHWM") - before)  # Linux counts pages in batches, so a few may be missing from it


def peak_mib(name: str, args: argparse.Namespace, p: Problem) -> float | None:
    """MiB above the inputs; None where it was not asked for or the system does not tell."""
    if args.no_memory:
        return None
    if p.q.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(VARIANTS[name], p)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    argv = ["--sizes", f"{len(p.q)}x{len(p.queue)}", "--memory-of", name, "--counts", *map(str, args.counts)]
    for option in ("dim", "hard", "temperature", "threads", "seed"):
        argv += [f"--{option}", str(getattr(args, option))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(Path(__file__).resolve()), *argv]
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    return float(child.stdout) if child.returncode == 0 else None


# --------------------------------------------------------------------------------------------------------- results


def measure(args: argparse.Namespace, size: tuple[int, int], speed: dict[str, float]) -> dict[str, Any]:
    """Everything about one size, as --json writes it."""
    p = make_problem(args, size)
    steps = {name: functools.partial(step, variant, p) for name, variant in VARIANTS.items()}
    refused = {name: why for name, call in steps.items() if (why := refusal(call))}
    here = {name: variant for name, variant in VARIANTS.items() if name not in refused}
    taken = turns({name: steps[name] for name in here}, args.repeats, args.device, row=2)
    ms = {name: statistics.median(second for _, second in each) for name, each in taken.items()}
    after = {name: statistics.median(first for first, _ in each) for name, each in taken.items()}
    counts = NOTHING if p.draws is None else p.draws.counts
    rows = {}
    for name, variant in here.items():
        shape = stages(*size, args.dim, p.hard, counts if variant.synthetic else NOTHING)
        pace = speed["copy"], max(speed[kind] for kind in variant.rates if kind in speed)
        floor = 1e3 * floor_seconds([least(*size, args.dim)], *pace)
        rows[name] = {
            "ms": ms[name],
            "of_moco": ms[name] / ms[BASE],
            "of_naive": ms[name] / ms[NAIVE] if NAIVE in ms else None,
            "after_ms": after[name],
            "after_of_moco": after[name] / after[BASE],
            "gb_per_s": floor_bytes(shape) / ms[name] / 1e6,
            "floor_ms": floor,
            "of_floor": ms[name] / floor,
            "stages_ms": 1e3 * floor_seconds(shape, *pace),
            "peak_mib": peak_mib(name, args, p),
            "calls": count_calls(variant, p),
            "loss": float(step(variant, p)),
        }
    if args.device == "cuda":
        for name in (name for name in here if name.startswith("triton")):
            rows[name]["cuda_graph"] = captured(here[name], p)
    drawing = functools.partial(
        draw, synco.recipe(SynCoConfig(*args.counts)), size[0], p.hard, args.dim, args.seed, args.device
    )
    return {
        "n": size[0], "k": size[1], "c": args.dim, "h": p.hard, "s": sum(args.counts), "t": args.temperature,
        "variants": rows, "refused": refused,
        "drawing_ms": statistics.median(rounds({"": drawing}, args.repeats, args.device)[""]),
    }  # fmt: skip


def judge(goal: Goal, result: dict[str, Any], device: str) -> dict[str, Any] | None:
    """A goal beside what was measured; None where it is not about this result."""
    size, shape = (result["n"], result["k"]), (result["c"], result["h"], result["s"])
    rows = result["variants"]
    if goal.device != device or goal.size not in (None, size) or shape != GOAL_SHAPE or goal.variant not in rows:
        return None
    found = rows[goal.variant][goal.what]
    if goal.other is not None:
        other = rows.get(goal.other, {}).get(goal.what)
        found = None if found is None or not other else found / other
    told = f"{goal.what}: {goal.variant}" + (f" / {goal.other}" if goal.other else "")
    verdict = "not measured" if found is None else "met" if found <= goal.limit else "missed"
    return {"size": f"{size[0]}x{size[1]}", "goal": told, "limit": goal.limit, "found": found, "verdict": verdict}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All sizes, as --json writes them."""
    side = args.speed_side or (1024 if args.device == "cpu" else 8192)
    speed = speeds(args.device, side)
    results = [measure(args, size, speed) for size in args.sizes]
    judged = [found for result in results for goal in GOALS if (found := judge(goal, result, args.device))]
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    about = {"device": name, "torch": torch.__version__, "rounds": args.repeats, "per_second": speed}
    return {**about, "sizes": results, "goals": judged}


# -------------------------------------------------------------------------------------------------------- printing


def number(value: Any, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


COLUMNS = (
    ("median ms", "ms", 1), ("x plain MoCo", "of_moco", 2), ("x naive SynCo", "of_naive", 2),
    ("ms after another", "after_ms", 1), ("x plain MoCo after another", "after_of_moco", 2),
    ("floor ms", "floor_ms", 2), ("x floor", "of_floor", 1), ("floor of stages ms", "stages_ms", 2),
    ("GB/s of stages", "gb_per_s", 1),
    ("peak MiB", "peak_mib", 0), ("calls", "calls", 0), ("loss", "loss", 5),
)  # fmt: skip


def report(about: dict[str, Any]) -> str:
    """The tables of a run: a summary with a column for each implementation, every size, the goals, the verdict."""
    speed = {name: f"{value / 1e9:,.0f}" for name, value in about["per_second"].items()}
    products = ", ".join(f"{value} in {name}" for name, value in speed.items() if name != "copy")
    lines = [f"{about['device']}, torch {about['torch']}, float32 inputs, {about['rounds']} rounds; measured here: "
             f"copy {speed['copy']} GB/s, products {products} Gflop/s", ""]  # fmt: skip
    used = [name for name in VARIANTS if any(name in result["variants"] for result in about["sizes"])]
    medians = [
        [f"{r['n']}, {r['k']:,}", *(number(r["variants"].get(name, {}).get("ms"), 1) for name in used)]
        for r in about["sizes"]
    ]
    lines += markdown(["N, K: median ms", *used], medians)
    for result in about["sizes"]:
        lines += one_size(result)
    if about["goals"]:
        cells = [
            [g["size"], g["goal"], f"{g['limit']:.2f}", number(g["found"], 2), g["verdict"]] for g in about["goals"]
        ]
        lines += markdown(["size", "goal", "at most", "measured", ""], cells)
    return "\n".join([*lines, *map(verdict, about["sizes"])])


def one_size(result: dict[str, Any]) -> list[str]:
    shape = " ".join(f"{name.upper()}={result[name]}" for name in "nkchst")
    rows = [
        [name, *(number(row[key], digits) for _, key, digits in COLUMNS)] for name, row in result["variants"].items()
    ]
    lines = [shape, "", *markdown(["loss, forward + backward", *(title for title, *_ in COLUMNS)], rows)]
    for why in sorted(set(result["refused"].values())):
        names = [name for name, reason in result["refused"].items() if reason == why]
        lines.append(f"Not measured: {'; '.join(names)}: {why}.")
    graphs = {name: row["cuda_graph"] for name, row in result["variants"].items() if "cuda_graph" in row}
    lines += [f"{name}: captured in a CUDA graph: {found}." for name, found in graphs.items()]
    return [*lines, f"Drawing, not in the table: {result['drawing_ms']:.1f} ms.", ""]


def verdict(result: dict[str, Any]) -> str:
    """One line: the fastest of ours with all negatives, against the floor."""
    fast = [name for name, variant in VARIANTS.items() if variant.synthetic and name not in (NAIVE, REFERENCE)]
    ours = {name: row for name, row in result["variants"].items() if name in fast}
    name = min(ours, key=lambda name: ours[name]["ms"])
    row = ours[name]
    return (
        f"Verdict at N={result['n']}, K={result['k']}: {name} takes {row['ms']:.2f} ms, {row['of_floor']:.1f} x the "
        f"floor of {row['floor_ms']:.2f} ms ({row['ms'] / row['stages_ms']:.1f} x that of its stages) and "
        f"{row['of_moco']:.2f} x plain MoCo."
    )


def pair(word: str) -> tuple[int, int]:
    n, _, k = word.partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"{word}: write N and K as in 256x65536")
    return int(n), int(k)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--sizes", type=pair, nargs="+", default=[LARGE, FEW, SHORT], metavar="NxK",
        help="queries x queue rows (default: 256x65536 32x65536 64x16384)")  # fmt: skip
    add("--dim", type=int, default=128, help="feature width C (default: 128)")
    add("--hard", type=int, default=1024, help="number of hardest rows per query (default: 1024)")
    add("--counts", type=int, nargs=6, default=[256, 256, 256, 64, 64, 64], metavar="n",
        help="SynCo's n1 .. n6 (default: 256 256 256 64 64 64)")  # fmt: skip
    add("--temperature", type=float, default=0.2)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--repeats", type=int, default=15, help="timed rounds (default: 15)")
    add("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    add("--seed", type=int, default=0)
    add("--no-memory", action="store_true", help="leave the memory column out")
    add("--json", type=Path, metavar="FILE", help="write every number to this file too")
    add("--speed-side", type=int, default=0, help="side of the matrices that measure the device (default: by device)")
    add("--memory-of", choices=list(VARIANTS), help="only print this variant's peak at the first size, in MiB")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; leave it out to measure the CPU")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(f"{peak_here(args):.1f}")
        return 0
    about = run(args)
    print(report(about))
    if args.json:
        files.write_text(json.dumps(about, indent=1) + "\n", str(args.json))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
