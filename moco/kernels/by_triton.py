"""The contrastive head on a GPU, in seven Triton launches (triton_kernels.py) that fill it with 32 queries too.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query (Sq, Sp, Ss, Sn
of spec.py), T temperature.

A step, forward and backward, none of whose launches the host waits for:

1. ``score``: similarities (N, K) = q queue^T, and what a tile of them says while it is in registers: sums of
   exponentials, rank of the positive, maxima of buckets                    fp32: a library product first
2. ``compact``: candidates for the hardest set, from a floor by the maxima   only with synthetic negatives
3. ``exact``: the hardest set                                                only with synthetic negatives
4. ``draws``: synthetic negatives, their sums and vectors                    only with synthetic negatives
5. ``combine``: loss, statistics, and the part of the gradient that is no matrix product
6. ``pull``: probabilities queue, split over K                               fp32: ``weigh``, then 7, then the library
7. ``finish``: the gradient, three means
8. backward: the gradient times the incoming scalar

Importing this file does not import triton; the first call does.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moco.kernels.matmul import operands, product
from moco.kernels.spec import LossOutput

# Chosen so that no target and no width spills a register (benchmarks/speed/kernel_resources.py); other sizes have not
# been timed on a GPU (README.md has the times of these).
SCORE_K = 64  # rows of a tile of ``score``
QUERIES = 64  # its queries, and those of ``pull``
BLOCK_C = 32  # features at a time in its product
COMPACT_K = 2048  # similarities at a time in ``compact``
PULL_K = 32  # rows at a time in ``pull``
PULL_C = 128  # features of one of its programs
DRAWS_TILE = 4096  # elements of the block of draws, C rounded up times their number
PART = 32  # features of a program of ``combine`` and ``finish``
MOST_MAXIMA = 16384  # bucket maxima that a program of ``compact`` holds in registers
LISTED = 2048  # candidates at a time in ``exact``
ROUNDS = 16  # at most so many blocks in a row in ``compact`` and ``pull``, at 65,536 rows
FILL = 128  # at least so many programs a launch, for the 108 to 148 multiprocessors of the GPUs that this is for

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of what programs read and write
programs = functools.cache(lambda file="triton_kernels": importlib.import_module(f"moco.kernels.{file}"))


@functools.cache
def available() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def fault(compare: Callable[[], str]) -> str:
    """What speaks against Triton programs on a device: what ``compare`` finds, or the first line of what it raises, for
    triton lacks a C compiler, Python's headers, a driver, ... and says so in as many ways."""
    if not available():
        return "the package triton is not installed"
    try:
        return compare()
    except Exception as error:
        return (str(error).splitlines() or [repr(error)])[0]


def agrees(compare: Callable[[], str], otherwise: str) -> bool:
    """Whether ``compare`` finds no ``fault``; where triton is installed it warns of one, and of what is done then.

    A caller asks once a process and case, so that a run neither ends where triton cannot compile nor trains on wrong
    numbers.
    """
    why = fault(compare)
    if why and available():
        warnings.warn(f"{otherwise}, not by triton: {why}", RuntimeWarning, stacklevel=3)
    return not why


def on_gpu(x: Tensor) -> bool:
    """Whether x lies where triton runs programs."""
    return x.is_cuda


def run_program(program, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Every launch of a program passes here; with an empty grid there is none."""
    if all(grid):
        program[grid](*arguments, **constants)


def interpreted() -> bool:
    """Whether triton runs programs on the CPU: TRITON_INTERPRET=1 was set when it was first imported."""
    from triton.runtime.jit import JITFunction

    return not isinstance(programs().score, JITFunction)


def power_of_two(x: int) -> int:
    """The least power of two that is no less than x."""
    return 1 << max(0, x - 1).bit_length()


def _up(x: int, step: int) -> int:
    return -(-x // step) * step


@dataclass
class GridPlan:
    """How a step of N queries is cut into programs: grids, and the sizes that programs know when they are compiled."""

    n: int
    total: int  # K
    width: int  # C
    hard: int  # H, 0 without synthetic negatives
    draws: int  # S

    def __post_init__(self) -> None:
        n, total, width = self.n, self.total, self.width
        odd = width % 16 > 0  # whose addresses take registers
        self.block_n = min(QUERIES // 2 if odd else QUERIES, max(16, power_of_two(n)))  # queries of a tile
        # Elements from a query's similarities to the next one's: every row begins at a multiple of 64 bytes.
        self.stride = _up(total, 16)
        self.tiles = -(-total // SCORE_K)
        self.bucket = self._bucket()
        self.maxima = self.tiles * (SCORE_K // self.bucket) if self.bucket else 0  # W, bucket maxima a query
        # Blocks of operands on their way in ``score``: one where two would spill on an older GPU (sm_80).
        self.stages = 1 if odd or self.bucket == 8 else 2
        # M, the chunks that a query's rows are looked through in: enough to fill the device, or for ROUNDS each.
        enough = math.ceil(max(2 * FILL / n, total / (ROUNDS * COMPACT_K)))
        self.chunks = min(32, power_of_two(-(-total // COMPACT_K)), power_of_two(enough))
        self.chunk = _up(-(-total // self.chunks), COMPACT_K)
        # R, candidates of a chunk that are listed: four times a chunk's share of the set.
        self.room = max(16, power_of_two(4 * self.hard) // self.chunks)
        # Candidates of a chunk at a time in ``exact``; fewer where it would keep 8 bytes on the stack.
        listed = LISTED // 4 if not self.bucket else LISTED // 2 if self.chunks == 16 else LISTED
        self.step = min(self.room, listed // self.chunks)
        # Programs a query of ``exact``: each lists the set's part in some of the chunks.
        self.listing = min(self.chunks, max(1, power_of_two(FILL // n)))
        self.padded = max(16, power_of_two(width))
        self.block_s = max(1, min(64, DRAWS_TILE // self.padded // (1 + odd)))  # draws of a program
        self.blocks = -(-self.draws // self.block_s)
        self.parts = -(-width // PART)  # programs a query of ``combine`` and ``finish``
        # Features of a program of ``pull``: its sums take as many registers for 64 queries as for 32.
        self.pull_c = min(PULL_C if self.block_n <= 32 else PULL_C // 2, self.padded)
        # Parts of the rows that ``pull`` multiplies side by side: of ROUNDS blocks at most, or as many as fill a GPU
        # eight times, whichever is fewer, for partial sums are written and read.
        tiles = -(-n // self.block_n) * -(-width // self.pull_c)
        enough = math.ceil(max(FILL / tiles, min(8 * FILL / tiles, total / (ROUNDS * PULL_K))))
        self.splits = -(-total // _up(-(-total // enough), PULL_K))
        self.split = _up(-(-total // self.splits), PULL_K)  # rows of one

    def _bucket(self) -> int:
        """Rows of a bucket, the most that leave 4 H buckets, or 2 H where those are too many; 0 for no buckets.

        With 4 H maxima a floor is reached by 1.15 H rows in random order, with 8 H by 1.07 H, with 2 H by 1.39 H.
        """
        size = SCORE_K
        wanted = (4 if 8 * self.hard <= MOST_MAXIMA else 2) * self.hard
        while size > 1 and self.total < wanted * size:
            size //= 2
        return size if self.hard and self.tiles * (SCORE_K // size) <= MOST_MAXIMA else 0

    def grids(self, gradient: bool = True, pulled: bool = True) -> dict[str, tuple[int, ...]]:
        """Programs of each launch; pulled: the gradient's product with the queue is no library's."""
        of_query = -(-self.n // self.block_n)
        synthetic = {
            "compact": (self.n, self.chunks),
            "exact": (self.n, self.listing),
            "draws": (self.n, self.blocks),
        }
        return {
            "score": (self.tiles, of_query),
            **(synthetic if self.hard else {}),
            "combine": (self.n, self.parts if gradient else 1),
            "weigh": (self.n, -(-self.total // COMPACT_K)),
            "pull": (of_query, self.splits, -(-self.width // self.pull_c)),
            "finish": (self.n, self.parts) if pulled else (1, 1),
        }

    def constants(self, precision: str = "tf32x3", masked: bool = False, gradient: bool = True) -> dict[str, dict]:
        """What each program is compiled for, and how: ``num_warps`` where not 4, ``num_stages`` of its loop's loads."""
        amd = torch.version.hip  # whose GPUs multiply float32 as it is, at a rate that makes parts useless
        pulled = precision != "fp32"
        product = {"PRECISION": precision if precision == "bf16" or (pulled and not amd) else "ieee"}
        return {
            "score": {
                "MASKED": masked, "PRODUCT": pulled, **product, "BUCKET": self.bucket, "BLOCK_N": self.block_n,
                "BLOCK_K": SCORE_K, "BLOCK_C": min(BLOCK_C, self.padded), "num_warps": 8, "num_stages": self.stages,
            },
            "compact": {
                "R": self.room, "BLOCK_W": power_of_two(self.maxima), "BLOCK_K": COMPACT_K, "num_warps": 8,
            },
            "exact": {
                "WHOLE": not self.bucket, "M": self.chunks, "OWN": self.chunks // self.listing, "R": self.room,
                "STEP": self.step, "num_warps": 8,
            },
            "draws": {"GRADIENT": gradient, "BLOCK_S": self.block_s, "BLOCK_C": self.padded, "num_warps": 8},
            "combine": {
                "GRADIENT": gradient, "BLOCK_T": min(1024, power_of_two(self.tiles)), "BLOCK_S": 32,
                "BLOCK_C": self.padded, "PART": PART,
            },
            "weigh": {"BLOCK_K": COMPACT_K},
            "pull": {
                **product, "BLOCK_N": self.block_n, "BLOCK_K": PULL_K, "BLOCK_C": self.pull_c, "num_warps": 8,
                "num_stages": 3,
            },
            "finish": {"GRADIENT": gradient and pulled, "BLOCK_N": 256, "BLOCK_M": 64, "PART": PART},
        }  # fmt: skip


@functools.lru_cache(maxsize=64)
def planned(size: tuple[int, int, int, int, int], precision: str, masked: bool, want_gradient: bool):
    """Plan, grids and constants of steps of one size (N, K, C, H, S): the same at each step, and most of what a step
    asks of Python."""
    plan = GridPlan(*size)
    grids = plan.grids(want_gradient, pulled=want_gradient and precision != "fp32")
    return plan, grids, plan.constants(precision, masked, want_gradient)


def _by_rows(t: Tensor) -> Tensor:
    """t (N, M) with its elements of a row adjacent; a copy only where they are not."""
    return t if t.stride(1) == 1 or t.shape[1] < 2 else t.contiguous()


def _aligned(t: Tensor) -> Tensor:
    """t, contiguous, and at a place where a load of 16 bytes may begin; a copy only where it is not."""
    begins_wide = t.storage_offset() * t.element_size() % 16 == 0
    return t.contiguous() if begins_wide else t.clone(memory_format=torch.contiguous_format)


def compute(q, k, queue, temperature, n_hard, draws, ids, queue_ids, precision, want_gradient, shadow=None):
    """``reference.contrastive_loss`` on a GPU, in float32: (LossOutput, dloss/dq (N, C) or None).

    Same arguments, same numbers up to rounding, and the precision of the products' operands. Without a gradient to
    form the probabilities are not formed.

    Args:
        shadow: the queue (K, C) in bfloat16 where the caller keeps it, for products with operands in bf16.
    """
    with torch.cuda.device_of(q):
        step = _Step(q, k, queue, temperature, n_hard, draws, precision, want_gradient, ids is not None)
        operand = step.queue if shadow is None or precision != "bf16" else _aligned(shadow)
        return step.run(operand, ids, queue_ids)


class _Step:
    """One call: its plan, its inputs as the programs want them, and its launches."""

    def __init__(self, q, k, queue, temperature, n_hard, draws, precision, want_gradient, masked):
        measured = queue.dtype != torch.float32  # rows rounded to half precision are not unit: their length is read
        self.q, self.k, self.queue = _aligned(q), _aligned(k), _aligned(queue.to(torch.float32))
        self.places = self.q, self.q.stride(0), self.k, self.k.stride(0)
        self.draws, self.precision, self.want_gradient = draws, precision, want_gradient
        self.pulled = want_gradient and precision != "fp32"
        synthetic = 0 if draws is None else draws.slots_a.shape[1]
        size = len(q), len(queue), q.shape[1], n_hard if synthetic else 0, synthetic
        self.plan, self.grids, self.constants = planned(size, precision, masked, want_gradient)
        self.inverse_t, self.scale = 1 / temperature, 1 / (temperature * len(q))
        self.closed = 0 if measured or draws is None else draws.counts[0]

    def launch(self, name: str, *arguments) -> None:
        run_program(getattr(programs(), name), self.grids[name], *arguments, **self.constants[name])

    def run(self, operand: Tensor, ids: Tensor | None, queue_ids: Tensor | None) -> tuple[LossOutput, Tensor | None]:
        """Loss, statistics and gradient. operand (K, C): the queue as the products take it."""
        q, plan = self.q, self.plan
        sim, maxima, sums = self.score(operand, ids, queue_ids)
        negatives = self.synthesize(*self.hardest(sim, maxima)) if plan.hard else (q, q, q)  # which are not read

        per_query = loss, hardest, share, tops, weights = q.new_empty(5, plan.n).unbind()
        rank = q.new_empty(plan.n, dtype=torch.int64)
        vector = q.new_empty(plan.n, plan.width) if self.want_gradient else q
        self.launch(
            "combine", *self.places, *sums, *negatives, vector, tops, weights, loss, rank, hardest, share, plan.width,
            plan.tiles, plan.blocks, self.inverse_t, self.scale,
        )  # fmt: skip
        means = self.finish(sim, operand, vector, per_query)
        return LossOutput(means[0], rank, *means[1:]), vector if self.want_gradient else None

    def score(self, operand: Tensor, ids: Tensor | None, queue_ids: Tensor | None):
        """Similarities (N, stride), keys of bucket maxima (N, W) and three statistics of each tile (N, tiles)."""
        q, plan = self.q, self.plan
        sim = q.new_empty(plan.n, plan.stride)
        if self.precision == "fp32":
            product(q, self.queue.T, "fp32", out=sim[:, : plan.total])
        masks = [None if x is None else x.contiguous() for x in (ids, queue_ids)]
        maxima = q.new_empty(plan.n, plan.maxima, dtype=torch.int32)
        largest, total = q.new_empty(2, plan.n, plan.tiles).unbind()
        above = q.new_empty(plan.n, plan.tiles, dtype=torch.int32)
        self.launch(
            "score", *self.places, operand, sim, plan.stride, *masks, maxima, largest, total, above, plan.n,
            plan.total, plan.width, plan.maxima, plan.tiles, self.inverse_t,
        )  # fmt: skip
        return sim, maxima, (largest, total, above)

    def hardest(self, sim: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
        """``spec.hardest_rows``: rows (N, H) int32 and their similarities (N, H)."""
        q, plan = self.q, self.plan
        near = q.new_empty(plan.n, plan.chunks, plan.room if plan.bucket else 0)
        near_rows = torch.empty_like(near, dtype=torch.int32)
        counts = q.new_empty(plan.n, plan.chunks, dtype=torch.int32)
        listed = near, near_rows, counts, q.new_empty(plan.n, dtype=torch.int32)
        if plan.bucket:
            self.launch(
                "compact", sim, plan.stride, maxima, *listed, plan.total, plan.hard, plan.maxima, plan.chunk,
                plan.hard // 8,
            )  # fmt: skip
        rows, values = q.new_empty(plan.n, plan.hard, dtype=torch.int32), q.new_empty(plan.n, plan.hard)
        self.launch("exact", sim, plan.stride, *listed, rows, values, plan.total, plan.hard, plan.chunk)
        return rows, values

    def synthesize(self, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each block of draws the largest cosine, the sum of exponentials in its units, both (N, blocks), and the
        sum of vectors (N, blocks, C)."""
        plan, d, q = self.plan, self.draws, self.q
        slots_a, slots_b = _by_rows(d.slots_a), _by_rows(d.slots_b)
        kinds = [t.contiguous() for t in (d.query_x, d.query_y, d.pair_y, d.pair_z, d.sign_v, d.noise_w)]
        largest, total = q.new_empty(2, plan.n, plan.blocks).unbind()
        vectors = q.new_empty(plan.n, plan.blocks, plan.width if self.want_gradient else 0)
        self.launch(
            "draws", q, q.stride(0), self.queue, rows, values, slots_a, slots_a.stride(0), slots_b, slots_b.stride(0),
            *kinds, _aligned(d.noise), largest, total, vectors, plan.width, plan.hard, *d.counts, self.closed,
            self.inverse_t,
        )  # fmt: skip
        return largest, total, vectors

    def finish(self, sim: Tensor, operand: Tensor, vector: Tensor, per_query: tuple[Tensor, ...]) -> list[Tensor]:
        """Adds the product with the queue to ``vector``; returns the three means."""
        plan, partial = self.plan, vector
        loss, hardest, share, tops, weights = per_query
        if self.pulled:
            partial = vector.new_empty(plan.splits, plan.n, plan.width)
            self.launch(
                "pull", sim, plan.stride, tops, weights, operand, partial, plan.n, plan.total, plan.width, plan.split,
                self.inverse_t,
            )  # fmt: skip
        elif self.want_gradient:
            self.launch("weigh", sim, plan.stride, tops, weights, plan.total, self.inverse_t)
        means = [vector.new_empty(()) for _ in range(3)]
        self.launch("finish", partial, vector, loss, hardest, share, *means, plan.n, plan.width, plan.splits)
        if self.want_gradient and not self.pulled:
            with operands("fp32", vector.is_cuda):
                vector.addmm_(sim[:, : plan.total], self.queue)
        return means
