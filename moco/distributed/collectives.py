"""Who the processes are and what they exchange. Each function is also right for one process without a process group.

Legend: B rows on this process, G = B * world_size rows over all processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moco.errors import UserError, one_line

__all__ = [
    "all_gather",
    "all_gather_with_grad",
    "all_reduce_sum_with_grad",
    "all_to_all_blocks",
    "any_text",
    "broadcast_buffers",
    "by_main",
    "cores",
    "device",
    "exchange_rows",
    "first_on_node",
    "from_main",
    "hold_gradients",
    "is_main",
    "largest",
    "local_size",
    "max_over_ranks",
    "made_by_main",
    "mean_over_ranks",
    "nodes",
    "processes",
    "rank",
    "same_on_all_ranks",
    "share_of_cores",
    "sum_over_ranks",
    "wait_without_timeout",
    "world_size",
    "wrap",
]

T = TypeVar("T")


class PeerLost(RuntimeError):
    """Another process is gone, whose own message says why: one sentence."""


BEAT_SECONDS = 5.0  # between the signs of life of a process that others wait for
SILENCE_SECONDS = 600.0  # without one it counts as gone: what computes in one piece gives none, so not much sooner


# ------------------------------------------------------------------------------------------------- who am I


def rank() -> int:
    """This process's number among all; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


_local_size, _local_rank = 1, 0  # see set_place


def set_place(local_size: int, local_rank: int) -> None:
    """Say once, when this process joins, how many there are on its node and which of them it is."""
    global _local_size, _local_rank
    _local_size, _local_rank = local_size, local_rank


def local_size() -> int:
    """How many processes run on this node."""
    return _local_size


def nodes() -> int:
    """How many nodes train together; --batch-size is one node's, as upstream has it."""
    return max(1, world_size() // _local_size)


def share_of_cores(workers: int) -> int:
    """This process's share of the loader workers of a node, of which there are never more than its cores."""
    return -(-min(workers, cores()) // local_size())


def cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes() -> str:
    """Who trains, for the log."""
    where = f"{device().type} {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu"
    if world_size() == 1:
        return f"one process on {where}"
    return f"{world_size()} processes ({dist.get_backend()}) on {where}"


def is_main() -> bool:
    """Whether this process writes logs and checkpoints."""
    return rank() == 0


def device() -> torch.device:
    """Where this process computes: its GPU (chosen at the start) or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


# ------------------------------------------------------------------------------------------------- exchanges


def wait_without_timeout(work: Callable[[], T]) -> T:
    """``work()`` on every process; each returns when all are done, however long that takes.

    For what one process does for minutes while others have nothing to do. In a collective those would stand ten minutes
    over NCCL and thirty over gloo, and then end the run. Here they ask the store at which the processes met, which
    needs no other network than the start did. Whoever is at work gives signs of life there.

    Args:
        work: exchanges nothing with other processes.

    Raises:
        PeerLost: another process failed in its work, or gave no sign of life for SILENCE_SECONDS.
    """
    if world_size() == 1:
        return work()
    key = from_main(f"moco/{uuid.uuid4().hex}")  # torchrun's store outlives a restart, with all that was written to it
    store, ended = dist.distributed_c10d._get_default_store(), threading.Event()
    beating = threading.Thread(target=_beat, args=(store, key, ended), daemon=True)
    beating.start()
    outcome = "failed"
    try:
        made = work()
        outcome = "done"
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(RuntimeError):  # a store that is gone must not hide why the work failed
            store.add(f"{key}/{outcome}", 1)
    _wait_for_all(store, key)
    dist.barrier()  # the process that holds the store must not leave while others ask it
    return made


def lost_peer(error: BaseException) -> str:
    """A sentence, if an error only says that another process is gone or does not answer; else empty."""
    if isinstance(error, PeerLost):
        return str(error)
    library = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
    return f"the connection to another process is lost: {one_line(error)}" * library


def made_by_main(make: Callable[[], T]) -> T:
    """``make()`` of the main process, on every process, which wait as in :func:`wait_without_timeout`. What travels is
    as of :func:`from_main`. A UserError reaches all."""

    def made() -> tuple[Any, str]:
        try:
            return (make() if is_main() else None), ""
        except UserError as error:
            return None, str(error)

    value, problem = from_main(wait_without_timeout(made))
    if problem:
        raise UserError(problem)
    return value


def by_main(work: Callable[[], object]) -> None:
    """``work()`` in the main process alone, while the others wait as in :func:`wait_without_timeout`: for writing large
    files."""
    wait_without_timeout(work if is_main() else lambda: None)


def _beat(store: Any, key: str, ended: threading.Event) -> None:
    with contextlib.suppress(RuntimeError):  # a store that is gone: the main thread will find out
        while not ended.wait(BEAT_SECONDS):
            store.add(f"{key}/beats", 1)


def _wait_for_all(store: Any, key: str) -> None:
    begun = heard = time.monotonic()
    beats = 0
    while store.add(f"{key}/done", 0) < world_size():
        now = time.monotonic()
        beats, before = store.add(f"{key}/beats", 0), beats
        heard = now if beats > before else heard
        if store.add(f"{key}/failed", 0):
            raise PeerLost("another process failed in what this one waited for; its own message says why")
        if now - heard > SILENCE_SECONDS:
            raise PeerLost(f"no sign of life for {SILENCE_SECONDS:g} s from the process that this one waited for")
        time.sleep(min(1.0, 0.01 + (now - begun) / 10))  # a tenth of the wait at most is lost


def first_on_node(make: Callable[[], T], wait: bool) -> T:
    """``make()`` on every process; with ``wait`` one process of each node goes before the others.

    For what must happen once a node, such as a download, and may last, see :func:`wait_without_timeout`. A UserError of
    one process reaches all: the others would wait for it for ever.
    """
    if not wait or world_size() == 1:
        return make()

    def first() -> tuple[T | None, str]:
        try:
            return (make() if _local_rank == 0 else None), ""
        except UserError as error:
            return None, str(error)

    made, problem = wait_without_timeout(first)
    for text in filter(None, _texts(problem)):
        raise UserError(text)
    return make() if made is None else made


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """Rows of all processes in rank order, WITHOUT a gradient: for keys, ids and labels. (B, ...) -> (G, ...).

    A loss over gathered embeddings needs a gather with a backward instead: this one gives the right value and the
    wrong gradient.
    """
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_gather_with_grad(z: Tensor) -> Tensor:
    """Rows of all processes in rank order, WITH a gradient: for losses over gathered embeddings. (B, ...) -> (G, ...).

    A row's gradient is the sum of what the losses of all processes send to it. With gradients averaged over the
    processes, as :func:`wrap` does, the mean of their losses trains as one process with the whole batch would.
    """
    mine = slice(rank() * len(z), (rank() + 1) * len(z))
    return z if world_size() == 1 else _Exchange.apply(z, all_gather, mine)  # pyright: ignore[reportReturnType]


def all_reduce_sum_with_grad(values: Tensor) -> Tensor:
    """The sum of each entry over the processes, WITH a gradient: for statistics that a network is normalised by."""
    return values if world_size() == 1 else _Exchange.apply(values, sum_over_ranks, ...)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    """``exchange(x)``; the gradient of ``x`` is the part ``mine`` of the sum over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Callable[[Tensor], Tensor], mine: Any) -> Tensor:
        ctx.mine = mine
        return exchange(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return sum_over_ranks(grads[0].contiguous())[ctx.mine], None, None  # gloo has no reduce-scatter


@torch.no_grad()
def exchange_rows(x: Tensor, permutation: Tensor) -> Tensor:
    """Row i of process r becomes global row ``permutation[r * B + i]``; only rows that move are sent.

    Args:
        x: (B, ...) this process's rows; every process has B of them.
        permutation: (G,) int64 on the CPU, the same on every process, so no index has to be sent.

    Returns (B, ...). Each image crosses the network once, where gathering all of them sends world_size - 1 copies.
    """
    size, rows = world_size(), x.shape[0]
    if size == 1:
        return x[_beside(permutation, x)]
    me, wanted = rank(), permutation.view(size, rows)  # (size, B) what each process gets
    sent = [chunk[chunk // rows == me] - me * rows for chunk in wanted]  # to each process, in its order
    sources = wanted[me] // rows
    arrival = torch.argsort(sources, stable=True)  # received rows are grouped by source
    counts = torch.bincount(sources, minlength=size).tolist()
    outgoing = x[_beside(torch.cat(sent), x)].contiguous()
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, counts, [len(s) for s in sent])
    out = torch.empty_like(incoming)
    out[_beside(arrival, x)] = incoming
    return out


def _beside(index: Tensor, x: Tensor) -> Tensor:
    """``index`` on the device of ``x``; from ordinary memory a copy to a GPU would wait for all that it computes."""
    return index.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else index


@torch.no_grad()
def all_to_all_blocks(x: Tensor) -> Tensor:
    """Block r of the rows goes to process r. (G, ...) -> (G, ...), whose block r is what process r had for this one."""
    if world_size() == 1:
        return x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous())
    return out


def largest(*values: int) -> list[int]:
    """Of each number the largest over the processes: one small reduction for all of them."""
    if world_size() == 1:
        return list(values)
    return max_over_ranks(torch.tensor(values, device=device(), dtype=torch.int32)).tolist()


@torch.no_grad()
def max_over_ranks(values: Tensor) -> Tensor:
    """The largest of each entry over the processes; on a GPU the host does not wait for it."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of each entry over the processes."""
    return sum_over_ranks(values) / world_size()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of each entry over the processes."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def from_main(value: Any) -> Any:
    """The main process's value, on every process, equal to the last bit and of the same types.

    None, text, bool, int, float, and lists, tuples and dictionaries of such; the values of the others may be anything.
    It travels as JSON: what torch sends for an object is a pickle, which is code that the receiver runs.

    Raises:
        TypeError: anything else.
    """
    if world_size() == 1:
        return value
    sent = _as_bytes(json.dumps(_plain(value)) if is_main() else "")
    length = torch.tensor(len(sent), device=sent.device)
    dist.broadcast(length, src=0)
    sent = sent if is_main() else sent.new_empty(int(length))
    dist.broadcast(sent, src=0)
    return value if is_main() else _restored(json.loads(bytes(sent.tolist())))


def _texts(text: str) -> list[str]:
    """The ``text`` of every process, in rank order."""
    mine = _as_bytes(json.dumps(text))
    lengths = all_gather(torch.tensor([len(mine)], device=mine.device)).tolist()
    rows = all_gather(nn.functional.pad(mine, (0, max(lengths) - len(mine)))[None])  # (processes, longest)
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths, strict=True)]


def any_text(text: str) -> str:
    """The first of the processes' texts that is not empty, on every process; empty where all are."""
    return text if world_size() == 1 else next(filter(None, _texts(text)), "")


def _as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device=device())


def _plain(value: Any) -> Any:
    """``value`` in JSON's types. Tuples and dictionaries are marked; the latter are pairs, as JSON's keys are text."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(one) for one in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(one)] for key, one in value.items()]}
    raise TypeError(f"a {type(value).__name__} does not travel between processes")


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(one) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    items = _restored(items)
    return tuple(items) if kind == "tuple" else dict(items)


@torch.no_grad()
def broadcast_buffers(buffers: list[Tensor]) -> None:
    """Give every process the main process's buffers, in place."""
    if world_size() > 1:
        for buffer in buffers:
            dist.broadcast(buffer, src=0)


@torch.no_grad()
def same_on_all_ranks(x: Tensor) -> bool:
    """Whether ``x`` has the same bits everywhere, by two checksums of its words (one weighs positions)."""
    if world_size() == 1:
        return True
    numbers = x.contiguous().flatten()
    numbers = numbers.view(torch.int32 if numbers.element_size() % 4 == 0 else torch.uint8).to(torch.int64)
    weights = torch.arange(numbers.numel(), device=x.device) % 65521 + 1
    sums = torch.stack([numbers.sum(), (numbers * weights).sum()])
    return bool((all_gather(sums[None]) == sums).all())


# ----------------------------------------------------------------------------------------------------- models


def wrap(model: nn.Module) -> nn.Module:
    """Average gradients over the processes. Buffers are sent once, at the start: a 33.5 MB queue must not go out
    again with every forward, and BatchNorm's running statistics are those of the main process in checkpoints."""
    if world_size() == 1:
        return model
    ids = [torch.cuda.current_device()] if torch.cuda.is_available() else None
    wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False  # from now on; as an argument it has two names
    return wrapped


def hold_gradients(model: nn.Module, hold: bool) -> contextlib.AbstractContextManager:
    """While held, backward adds to the local gradients and sends nothing (accumulation)."""
    if hold and isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
