"""Everything that knows about ranks: how processes start, who they are, what they exchange.

The only file that uses torch.distributed. Each function is also right for one process without a process group, so
no caller asks whether it is distributed.

Legend: B rows on this process, G = B * world_size rows over all processes.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from moco import files
from moco.errors import DIVERGED_EXIT, SIGTERM_EXIT, USAGE_EXIT, TrainingError, UserError

T = TypeVar("T")
GRACE_SECONDS = 20  # how long the other processes may take to end after one has failed
INTERRUPTED_EXIT = 130  # Ctrl-C
USAGE_GRACE_SECONDS = 3  # the same after a user's mistake: there is nothing to save, only sentences to collect
BEAT_SECONDS = 5.0  # between the signs of life of a process that others wait for
SILENCE_SECONDS = 600.0  # without one it counts as gone: what computes in one piece gives none, so not much sooner


# ---------------------------------------------------------------------------------------------- who starts what


@dataclass(frozen=True)
class Plan:
    """How this program becomes processes. ``spawn`` > 0: start that many here; else be one of ``world_size``."""

    how: str  # "one process", "spawn", "torchrun", "SLURM", "PBS/MPI" or "flags", for the log
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    spawn: int = 0
    url: str = ""  # empty: environment rendezvous (torchrun) or none needed
    local_size: int = 1  # processes of this node, among which --batch-size is divided


def plan_launch(
    *,
    multiprocessing: bool,
    nproc: int | None,
    world_size: int,
    rank: int,
    url: str | None,
    gpus: int,
    env: Mapping[str, str],
) -> Plan:
    """Decide from the flags (upstream's meaning) and a scheduler's variables; flags win over the environment.

    Args:
        multiprocessing, nproc, world_size, rank, url: the flags; ``world_size`` and ``rank`` count nodes when
            ``multiprocessing`` is on and processes when it is off, as upstream has it; -1 means not given.
        gpus: GPUs of this machine.
        env: the environment.
    """
    if nproc is not None and nproc < 1:
        raise UserError(f"--nproc is the number of processes and must be at least 1, not {nproc}.")
    if multiprocessing or nproc is not None:
        return _plan_spawn(nproc or gpus or 1, world_size, rank, url)
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size, local = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
        return Plan("torchrun", rank, size, local, local_size=int(env.get("LOCAL_WORLD_SIZE", size)))
    if world_size > 1:
        if rank < 0 or not url:
            raise UserError("--world-size above 1 needs --rank and --dist-url tcp://HOST:PORT of the first process.")
        return Plan("flags", rank, world_size, rank % max(gpus, 1), 0, url)
    return _plan_slurm(env) or _plan_mpi(env) or Plan("one process")


def _plan_spawn(nproc: int, nodes: int, node: int, url: str | None) -> Plan:
    nodes, node = max(nodes, 1), max(node, 0)
    if node >= nodes:
        raise UserError(f"--rank {node} is not below --world-size {nodes}; with several nodes ranks start at 0.")
    if nodes > 1 and not url:
        raise UserError("several nodes need --dist-url tcp://HOST:PORT with the first node's address.")
    url = url or f"tcp://127.0.0.1:{free_port()}"
    return Plan("spawn", node * nproc, nodes * nproc, 0, nproc, url, nproc)


def _plan_slurm(env: Mapping[str, str]) -> Plan | None:
    # srun sets the STEP variables; a plain `python` in a batch script has SLURM_NTASKS too, but no peers to wait for.
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks < 2 or "SLURM_PROCID" not in env:
        return None
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST", "")
    host = env.get("MASTER_ADDR") or first_host(nodes)
    port = env.get("MASTER_PORT") or str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000)
    rank, local = int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0))
    machines = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    return Plan("SLURM", rank, tasks, local, 0, f"tcp://{host}:{port}", max(1, tasks // machines))


def _plan_mpi(env: Mapping[str, str]) -> Plan | None:
    for rank_name, size_name, local_name, local_size_name in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ):
        if int(env.get(size_name, 1)) > 1 and rank_name in env:
            host = env.get("MASTER_ADDR") or _first_line(env.get("PBS_NODEFILE")) or "127.0.0.1"
            job = re.sub(r"\D.*", "", env.get("PBS_JOBID", "")) or "0"
            port = env.get("MASTER_PORT") or str(20000 + int(job) % 20000)
            rank, size, local = int(env[rank_name]), int(env[size_name]), int(env.get(local_name, 0))
            local_size = int(env.get(local_size_name, size))
            return Plan("PBS/MPI", rank, size, local, 0, f"tcp://{host}:{port}", local_size)
    return None


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: ``node[03-05,9],gpu1`` gives ``node03``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodelist)
    return (match.group(1) + (match.group(2) or "")) if match else "127.0.0.1"


def _first_line(path: str | None) -> str:
    if not path or not os.path.isfile(path):
        return ""
    with open(path, encoding="utf-8") as lines:
        return lines.readline().strip()


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ------------------------------------------------------------------------------------------------- starting


def launch(worker: Callable[[Any], int | None], args: Any) -> int:
    """Run ``worker(args)`` in every process that the flags or the scheduler ask for; return the exit code.

    ``args`` needs multiprocessing_distributed, nproc, world_size, rank, dist_url, dist_backend and gpu. A
    :class:`UserError` becomes one sentence on standard error and exit code 2. With max_restarts above 0 it also needs
    save_dir, resume and overwrite.
    """
    restarts = getattr(args, "max_restarts", 0)
    try:
        plan = _plan(args)
        if restarts and not plan.spawn:
            raise UserError(
                "--max-restarts needs --nproc: a process that was killed cannot start itself again. Under torchrun "
                "give --max-restarts to torchrun and --resume auto here."
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_EXIT
    if not plan.spawn:
        return _run(worker, args, plan)
    return _spawn_again(worker, args, plan, restarts) if restarts else _spawn(worker, args, plan, [])


def _plan(args: Any) -> Plan:
    return plan_launch(
        multiprocessing=args.multiprocessing_distributed,
        nproc=args.nproc,
        world_size=args.world_size,
        rank=args.rank,
        url=args.dist_url,
        gpus=torch.cuda.device_count(),
        env=os.environ,
    )


def _spawn_again(worker: Callable, args: Any, plan: Plan, restarts: int) -> int:
    """:func:`_spawn`, and again from the newest good checkpoint of this run when a process crashed or was killed."""
    before, signals = files.written(args.save_dir), []
    for restart in range(1, restarts + 1):
        code = _spawn(worker, args, plan, signals)
        if code in (0, USAGE_EXIT, DIVERGED_EXIT, SIGTERM_EXIT, INTERRUPTED_EXIT):  # another try would end likewise
            return code
        path = files.newest_good(args.save_dir, before)
        if signals:  # who sent one wants the run to end, even if the process it was for is gone
            return code
        if path:
            args = type(args)(**{**vars(args), "resume": path, "overwrite": False})
        where = path or "where this run began, it had saved nothing yet"
        print(f"restart {restart} of {restarts}, from {where}", file=sys.stderr, flush=True)
        plan = _plan(args)  # another free port
    return _spawn(worker, args, plan, signals)


def _run(worker: Callable[[Any], int | None], args: Any, plan: Plan) -> int:
    """This process is the run, or one of several that somebody else started."""
    try:
        return _work(worker, args, plan)
    except (UserError, TrainingError) as error:
        who = "error" if plan.world_size == 1 else f"error (rank {plan.rank})"
        print(f"{who}: {error}", file=sys.stderr, flush=True)
        return _exit_code(error)


def _work(worker: Callable[[Any], int | None], args: Any, plan: Plan) -> int:
    try:
        _join(plan, args.dist_backend, args.gpu)
        return worker(args) or 0
    finally:
        if dist.is_initialized():
            # Over torch 2.6's gloo a thread may still hold the last exchange's tensors: to let go of them it needs the
            # interpreter's lock, which destroying keeps while it waits for the thread, for ever.
            time.sleep(0.05)
            with contextlib.suppress(Exception):  # a peer that died must not hide this process's own reason
                dist.destroy_process_group()


def _exit_code(error: Exception) -> int:
    return USAGE_EXIT if isinstance(error, UserError) else DIVERGED_EXIT


_local_size, _local_rank = 1, 0  # set once, when this process joins


def _join(plan: Plan, backend: str | None, gpu: int | None) -> None:
    global _local_size, _local_rank
    _local_size, _local_rank = plan.local_size, plan.local_rank
    if torch.cuda.is_available():
        chosen = plan.local_rank % torch.cuda.device_count() if gpu is None else gpu
        if chosen >= torch.cuda.device_count():
            raise UserError(f"--gpu {chosen}: this machine has {torch.cuda.device_count()} GPUs, counted from 0.")
        torch.cuda.set_device(chosen)
    elif gpu is not None:
        raise UserError(f"--gpu {gpu}: this machine has no GPU; leave the flag out to run on the CPU.")
    if plan.world_size == 1:
        return
    fits = "nccl" if torch.cuda.is_available() else "gloo"
    backend = fits if backend in (None, "nccl") else backend
    # NCCL connects now, not in the first exchange, where a mistake would hang, and no barrier guesses the device
    bound: dict[str, Any] = {"device_id": device()} if "nccl" in backend and torch.cuda.is_available() else {}
    meeting: dict[str, Any] = (
        {"init_method": plan.url, "rank": plan.rank, "world_size": plan.world_size} if plan.url else {}
    )
    try:
        dist.init_process_group(backend, **meeting, **bound)
    except (RuntimeError, ValueError) as error:  # a port in use: DistNetworkError, in torch 2.6 only its base class
        raise UserError(f"the processes cannot meet at {plan.url or 'env://'}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _child(worker: Callable, args: Any, plan: Plan, threads: int, reports: Any) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        sys.exit(_work(worker, args, plan))
    except (UserError, TrainingError) as error:
        reports.put((_exit_code(error), str(error)))
        sys.exit(_exit_code(error))
    except Exception:
        # A peer's mistake breaks the connection here too: the parent prints this only if no one knows better.
        reports.put((1, traceback.format_exc()[-8000:]))
        sys.exit(1)


def _end_with_the_parent() -> None:
    """A parent that is killed outright can end nobody; without this its processes would train on unseen."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _spawn(worker: Callable, args: Any, plan: Plan, signals: list[int]) -> int:
    """Start ``plan.spawn`` processes, pass signals on to them (noted in ``signals``), end them all when one fails."""
    context = mp.get_context("spawn")
    threads = torch.get_num_threads()
    if not torch.cuda.is_available():
        threads = max(1, threads // plan.spawn)
    plans = [replace(plan, rank=plan.rank + local, local_rank=local) for local in range(plan.spawn)]
    reports = context.SimpleQueue()
    children = [context.Process(target=_child, args=(worker, args, mine, threads, reports)) for mine in plans]
    for child in children:
        child.start()
    _pass_signals_to(children, signals)
    try:
        code = _wait(children)
    except KeyboardInterrupt:
        code = INTERRUPTED_EXIT
    finally:
        for child in children:
            child.kill()
            child.join()
    return _explain(code, reports)


def _explain(code: int, reports: Any) -> int:
    """Print why the processes failed: one sentence if any of them has one, else their tracebacks."""
    told = []
    while not reports.empty():
        told.append(reports.get())
    sentences = [(known, text) for known, text in told if known != 1]
    if sentences:
        code, text = sentences[0]
        print(f"error: {text}", file=sys.stderr, flush=True)
    elif code > 128 and code != SIGTERM_EXIT:  # the others' tracebacks only say that it is gone
        why = f"a process was ended by signal {code - 128}" + ", perhaps for want of memory" * (code == 137)
        print(f"error: {why}; go on from the newest checkpoint with --resume auto.", file=sys.stderr, flush=True)
    else:
        for text in dict.fromkeys(text for _, text in told):
            print(text, file=sys.stderr, flush=True)
    return code


def _pass_signals_to(children: list, signals: list[int]) -> None:
    def forward(number: int, frame: Any) -> None:
        signals.append(number)
        for child in children:
            if child.is_alive() and child.pid:
                os.kill(child.pid, number)

    if threading.current_thread() is threading.main_thread():  # only it may set handlers
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, forward)


def _wait(children: list) -> int:
    """Wait for all; after the first failure the others get GRACE_SECONDS. Returns the first failure's code."""
    first, alive = 0, list(children)
    while alive:
        grace = USAGE_GRACE_SECONDS if first == USAGE_EXIT else GRACE_SECONDS
        ended = wait([child.sentinel for child in alive], timeout=grace if first else None)
        if not ended:
            break
        for child in [c for c in alive if c.sentinel in ended]:
            child.join()
            alive.remove(child)
            code = child.exitcode or 0
            first = first or (128 - code if code < 0 else code)
    return first


# ------------------------------------------------------------------------------------------------- who am I


def rank() -> int:
    """This process's number among all; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


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


def summary() -> str:
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


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def wait_without_timeout(work: Callable[[], T]) -> T:
    """``work()`` on every process; each returns when all are done, however long that takes.

    For what one process does for minutes while others have nothing to do. In a collective those would stand ten minutes
    over NCCL and thirty over gloo, and then end the run. Here they ask the store at which the processes met, which
    needs no other network than the start did. Whoever is at work gives signs of life there.

    Args:
        work: exchanges nothing with other processes.

    Raises:
        RuntimeError: another process failed in its work, or gave no sign of life for SILENCE_SECONDS.
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
    barrier()  # the process that holds the store must not leave while others ask it
    return made


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
            raise RuntimeError("another process failed in what this one waited for; its own message says why")
        if now - heard > SILENCE_SECONDS:
            raise RuntimeError(f"no sign of life for {SILENCE_SECONDS:g} s from the process that this one waited for")
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
    problems: list[Any] = [""] * world_size()
    dist.all_gather_object(problems, problem)
    for text in filter(None, problems):
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
    return z if world_size() == 1 else _GatherFeatures.apply(z)  # pyright: ignore[reportReturnType]


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.rows = len(z)
        return all_gather(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = sum_over_ranks(grads[0].contiguous())  # gloo has no reduce-scatter
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def all_reduce_sum_with_grad(values: Tensor) -> Tensor:
    """The sum of each entry over the processes, WITH a gradient: for statistics that a network is normalised by."""
    return values if world_size() == 1 else _AddOverRanks.apply(values)  # pyright: ignore[reportReturnType]


class _AddOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return sum_over_ranks(grads[0].contiguous())


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
    me, owner = rank(), permutation // rows
    chunks = permutation.view(size, rows)
    sent = [chunk[chunk // rows == me] - me * rows for chunk in chunks]  # to each process, in its order
    sources = owner.view(size, rows)[me]
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


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any process: one small reduction for all of them."""
    if world_size() == 1:
        return list(flags)
    x = torch.tensor([int(f) for f in flags], device=device(), dtype=torch.int32)
    return [bool(v) for v in max_over_ranks(x).tolist()]


@torch.no_grad()
def max_over_ranks(values: Tensor) -> Tensor:
    """The largest of each entry over the processes; on a GPU the host does not wait for it."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of each entry over the processes."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of each entry over the processes."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def from_main(value: Any) -> Any:
    """The main process's picklable value, on every process."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


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
    summary = x.contiguous().flatten()
    summary = summary.view(torch.int32 if summary.element_size() % 4 == 0 else torch.uint8).to(torch.int64)
    weights = torch.arange(summary.numel(), device=x.device) % 65521 + 1
    sums = torch.stack([summary.sum(), (summary * weights).sum()])
    return bool((all_gather(sums[None]) == sums).all())


# ----------------------------------------------------------------------------------------------------- models


def wrap(model: nn.Module) -> nn.Module:
    """Average gradients over the processes. Buffers are sent once, at the start: a 33.5 MB queue must not go out
    again with every forward, and BatchNorm's running statistics are those of the main process in checkpoints."""
    if world_size() == 1:
        return model
    broadcast_buffers(list(model.buffers()))
    ids = [torch.cuda.current_device()] if torch.cuda.is_available() else None
    ddp = nn.parallel.DistributedDataParallel
    named = inspect.signature(ddp.__init__).parameters
    resend = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"  # its older name
    never: dict[str, Any] = {resend: False}
    return ddp(model, device_ids=ids, gradient_as_bucket_view=True, **never)


def hold_gradients(model: nn.Module, hold: bool) -> contextlib.AbstractContextManager:
    """While held, backward adds to the local gradients and sends nothing (accumulation)."""
    if hold and isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
