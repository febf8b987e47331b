"""How a program becomes processes: one, several that it starts itself, or one of those that a scheduler started."""

from __future__ import annotations

import contextlib
import linecache
import multiprocessing.process
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco import errors, owner, run_folder, signals
from moco.distributed import collectives, meeting, watch
from moco.errors import OutageError, TrainingError, UserError, exit_code, one_line, refuse, tell

LOST = 0  # in reports of processes, where they have their exit code: only that another one is gone
EXIT_GRACE_SECONDS = 20  # how long the other processes may take to end after one has failed
EARLY_EXITS = [code + signals.LED_EARLY for code in signals.CODES.values()]
USAGE_GRACE_SECONDS = 3  # the same after a user's mistake: there is nothing to save, only sentences to collect
LISTENS, HAS_MET = 1, 2  # what a process that was started has come to


# ---------------------------------------------------------------------------------------------- who starts what


@dataclass(frozen=True)
class LaunchPlan:
    """How this program becomes processes. ``spawn`` > 0: start that many here; else be one of ``world_size``."""

    how: str  # "one process", "spawn", "torchrun", "SLURM", "PBS/MPI" or "flags"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    spawn: int = 0
    url: str = ""  # empty: environment rendezvous (torchrun) or none needed
    local_size: int = 1  # processes of this node, among which --batch-size is divided
    folder: str = ""  # private to this run, in which its processes meet where it started all of them
    one_node: bool = False  # all processes are known to be on this machine, so nobody else is listened to


def plan_launch(args: Any, gpus: int, env: Mapping[str, str]) -> LaunchPlan:
    """Decide from the flags (upstream's meaning) and a scheduler's variables; flags win over the environment.

    Args:
        args: multiprocessing_distributed, nproc, world_size, rank and dist_url; ``world_size`` and ``rank`` count nodes
            when processes are started here and processes otherwise, as upstream has it; -1 means not given.
        gpus: GPUs of this machine.
        env: the environment.
    """
    nproc, world_size, rank, url = args.nproc, args.world_size, args.rank, args.dist_url
    if nproc is not None and nproc < 1:
        raise UserError(f"--nproc is the number of processes and must be at least 1, not {nproc}.")
    if args.multiprocessing_distributed or nproc is not None:
        return _plan_spawn(nproc or gpus or 1, world_size, rank, url)
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size, local = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
        here = int(env.get("LOCAL_WORLD_SIZE", size))
        alone = here == size and ("LOCAL_WORLD_SIZE" in env or env.get("MASTER_ADDR") in meeting.LOOPBACK)
        return LaunchPlan("torchrun", rank, size, local, local_size=here, one_node=alone)
    if world_size > 1:
        if rank < 0 or not url:
            raise UserError("--world-size above 1 needs --rank and --dist-url tcp://HOST:PORT of the first process.")
        alone = urlsplit(url).hostname in meeting.LOOPBACK
        return LaunchPlan("flags", rank, world_size, rank % max(gpus, 1), 0, url, one_node=alone)
    return _plan_slurm(env) or _plan_mpi(env) or LaunchPlan("one process")


def _plan_spawn(nproc: int, nodes: int, node: int, url: str | None) -> LaunchPlan:
    nodes, node = max(nodes, 1), max(node, 0)
    if node >= nodes:
        raise UserError(f"--rank {node} is not below --world-size {nodes}; with several nodes ranks start at 0.")
    if nodes > 1 and not url:
        raise UserError("several nodes need --dist-url tcp://HOST:PORT with the first node's address.")
    return LaunchPlan("spawn", node * nproc, nodes * nproc, 0, nproc, url or "", nproc, one_node=nodes == 1)


def _plan_slurm(env: Mapping[str, str]) -> LaunchPlan | None:
    # srun sets the STEP variables; a plain `python` in a batch script has SLURM_NTASKS too, but no peers to wait for.
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks < 2 or "SLURM_PROCID" not in env:
        return None
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST", "")
    rank, local = int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0))
    machines = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    host = "127.0.0.1" if machines == 1 else first_host(nodes)
    url = _scheduled_url(env, host, env.get("SLURM_JOB_ID", ""))
    return LaunchPlan("SLURM", rank, tasks, local, 0, url, max(1, tasks // machines), one_node=machines == 1)


def _plan_mpi(env: Mapping[str, str]) -> LaunchPlan | None:
    for names in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ):
        rank, size, local, local_size = map(env.get, names)
        if rank and size and int(size) > 1:
            alone, here = local_size == size, int(local_size or size)
            host = linecache.getline(env.get("PBS_NODEFILE", ""), 1).strip()  # empty where there is no such file
            url = _scheduled_url(env, "127.0.0.1" if alone or not host else host, env.get("PBS_JOBID", ""))
            return LaunchPlan("PBS/MPI", int(rank), int(size), int(local or 0), 0, url, here, one_node=alone)
    return None


def _scheduled_url(env: Mapping[str, str], host: str, job: str) -> str:
    """Where the processes of a job meet: at its first host and a port of its number, unless the user chose."""
    number = int(re.sub(r"\D.*", "", job) or 0)
    return f"tcp://{env.get('MASTER_ADDR') or host}:{env.get('MASTER_PORT') or 20000 + number % 20000}"


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: ``node[03-05,9],gpu1`` gives ``node03``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodelist)
    return (match.group(1) + (match.group(2) or "")) if match else "127.0.0.1"


# ------------------------------------------------------------------------------------------------- starting


def launch(worker: Callable[[Any], int | None], args: Any) -> int:
    """Run ``worker(args)`` in every process that the flags or the scheduler ask for; return the exit code.

    ``args`` needs multiprocessing_distributed, nproc, world_size, rank, dist_url, dist_backend and gpu. A
    :class:`UserError` becomes one sentence on standard error and exit code 2. With max_restarts above 0 it also needs
    save_dir, resume and overwrite.
    """
    with signals.listening():
        return exit_code(lambda: _start(worker, args, getattr(args, "max_restarts", 0)))


def _start(worker: Callable[[Any], int | None], args: Any, restarts: int) -> int:
    try:
        plan = plan_launch(args, torch.cuda.device_count(), os.environ)
    except ValueError as error:
        raise UserError(
            f"--dist-url, or a scheduler's variable (RANK, WORLD_SIZE, SLURM_*, OMPI_*, PMI_*), is not what it should "
            f"be: {one_line(error)}."
        ) from error
    if plan.spawn:
        return _spawn_again(worker, args, plan, restarts) if restarts else _spawn(worker, args, plan)
    if restarts:
        raise UserError(
            "--max-restarts needs --nproc: a process that was killed cannot start itself again. Under torchrun "
            "give --max-restarts to torchrun and --resume auto here."
        )
    return _run(worker, args, plan)


def _spawn_again(worker: Callable, args: Any, plan: LaunchPlan, restarts: int) -> int:
    """:func:`_spawn`, and again from the newest good checkpoint of this run when a process crashed or was killed.

    A run whose images are gone waits for them as long as it may; one that then begins without them is a mistake to
    itself and the same outage here, where it is waited for as long before the next one.
    """
    before, outage = run_folder.written(args.save_dir), False
    for restart in range(restarts + 1):
        code = _spawn(worker, args, plan)
        again = outage and code == errors.USAGE_EXIT
        code = errors.OUTAGE_EXIT if again else code
        outage = code == errors.OUTAGE_EXIT
        # who sent a signal wants the run to end, even if the process it was for is gone
        if restart == restarts or code in (0, *errors.FINAL_EXITS) or signals.noted():
            return code
        if again:
            _pause(60 * args.data_patience)
        saved = run_folder.written(args.save_dir).items() - before.items()
        if saved:
            args = type(args)(**{**vars(args), "resume": "auto", "overwrite": False})
        where = run_folder.newest(args.save_dir) if saved else "where this run began, it had saved nothing yet"
        tell(f"restart {restart + 1} of {restarts}, from {where}", error=True)
    raise AssertionError


def _pause(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not signals.noted():
        time.sleep(min(1.0, seconds))


def _run(worker: Callable[[Any], int | None], args: Any, plan: LaunchPlan) -> int:
    """This process is the run, or one of several that somebody else started."""
    signals.of_several(plan.rank, scheduled=plan.world_size > 1)
    report = partial(refuse, who="error: " if plan.world_size == 1 else f"error (rank {plan.rank}): ")
    try:
        return _work(worker, args, plan, report)
    except (UserError, TrainingError, OutageError) as error:
        report(error)
        return error.exit_code
    except RuntimeError as error:
        lost = collectives.lost_peer(error)
        if not lost:
            raise
        report(lost)
        return errors.OUTAGE_EXIT


def _work(
    worker: Callable[[Any], int | None], args: Any, plan: LaunchPlan, report: Callable[[str], None],
    met: Callable[[], None] = lambda: None,
) -> int:  # fmt: skip
    """``report`` is given a sentence before the watcher ends this process, which cannot raise in its main thread;
    ``met`` is called once the processes have met."""
    minutes = getattr(args, "hang_minutes", 0)
    # a process that stands still is named before the exchange that waits for it is given up
    patience = timedelta(minutes=max(30.0, (watch.FIRST_STEP + 1) * minutes))
    try:
        _join(plan, args.dist_backend, args.gpu, patience)
        met()
        with watch.watching(minutes, getattr(args, "save_dir", ""), report):
            return worker(args) or 0
    except (MemoryError, RuntimeError, OSError) as error:
        if said := errors.of_the_disk(error):
            raise OutageError(said) from error
        if "Too many open files" in str(error):
            raise UserError("too many open files; raise the limit (ulimit -n 65536) or lower --workers.") from error
        if _of_memory(error):
            what = "out of memory; lower --batch-size, --size, --moco-k or --workers, or free some"
            raise OutageError(f"{what} ({one_line(error, 160)}).") from error
        raise
    finally:
        owner.release()
        if dist.is_initialized():
            # Over torch 2.6's gloo a thread may still hold the last exchange's tensors: to let go of them it needs the
            # interpreter's lock, which destroying keeps while it waits for the thread, for ever.
            time.sleep(0.05)
            with contextlib.suppress(Exception):  # a peer that died must not hide this process's own reason
                dist.destroy_process_group()


def _of_memory(error: Exception) -> bool:
    """Whether a device or this machine had no memory: of GPUs a class of its own, of the CPU's allocator words."""
    words = "can't allocate memory", "size calculation overflowed"
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _join(plan: LaunchPlan, backend: str | None, gpu: int | None, patience: timedelta) -> None:
    """``patience``: how long an exchange may last."""
    collectives.set_place(plan.local_size, plan.local_rank)
    if torch.cuda.is_available():
        chosen = plan.local_rank % torch.cuda.device_count() if gpu is None else gpu
        if chosen >= torch.cuda.device_count():
            raise UserError(f"--gpu {chosen}: this machine has {torch.cuda.device_count()} GPUs, counted from 0.")
        torch.cuda.set_device(chosen)
    elif gpu is not None:
        raise UserError(f"--gpu {gpu}: this machine has no GPU; leave the flag out to run on the CPU.")
    if plan.world_size == 1:
        return
    if backend in (None, "nccl"):
        backend = "nccl" if torch.cuda.is_available() else "gloo"
    # NCCL connects now, not in the first exchange, where a mistake would hang, and no barrier guesses the device
    bound = collectives.device() if "nccl" in backend and torch.cuda.is_available() else None
    if plan.one_node:
        meeting.listen_to_this_machine_only()
    url = plan.url or "env://"
    try:
        store = meeting.private_store(plan, os.environ, patience)
        dist.init_process_group(
            backend, url if store is None else None, rank=plan.rank, world_size=plan.world_size, store=store,
            timeout=patience, device_id=bound,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:  # a port in use: DistNetworkError, in torch 2.6 its base class
        raise _cannot_meet(plan, url, one_line(error)) from error


def _cannot_meet(plan: LaunchPlan, url: str, why: str) -> UserError | OutageError:
    """In a folder that was made for it only one that is gone can be missing."""
    if plan.folder:
        return OutageError(f"the processes cannot meet: {why}; go on with --resume auto.")
    other = "; give another port by --dist-url (or MASTER_PORT)." * ("in use" in why)
    return UserError(f"the processes cannot meet at {url}: {why}{other}")


def _child(worker: Callable, args: Any, plan: LaunchPlan, threads: int, reports: Any, listening: Any) -> None:
    signals.begin(led=True)
    listening[plan.local_rank] = LISTENS
    signals.of_several(plan.rank, scheduled=False)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_parent, args=(plan.folder,), daemon=True).start()

    def report(sentence: str) -> None:
        reports.put((errors.OUTAGE_EXIT, sentence))

    def met() -> None:
        listening[plan.local_rank] = HAS_MET

    try:
        sys.exit(_work(worker, args, plan, report, met))
    except (UserError, TrainingError, OutageError) as error:
        reports.put((error.exit_code, str(error)))
        sys.exit(error.exit_code)
    except Exception as error:
        # A peer's mistake breaks the connection here too: the parent prints this only if no one knows better.
        lost = collectives.lost_peer(error)
        reports.put((LOST, lost) if lost else (1, traceback.format_exc()[-8000:]))
        sys.exit(errors.OUTAGE_EXIT if lost else 1)


def _end_with_the_parent(folder: str) -> None:
    """A parent that is killed outright can end nobody; without this its processes would train on unseen."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        owner.release()
        os._exit(1)


def _spawn(worker: Callable, args: Any, plan: LaunchPlan) -> int:
    """Start ``plan.spawn`` processes, pass signals on to them, end them all when one fails, or at a second Ctrl-C."""
    context = mp.get_context("spawn")
    threads = torch.get_num_threads()
    if not torch.cuda.is_available():
        threads = max(1, threads // plan.spawn)
    alive, listening = {}, context.RawArray("b", plan.spawn)
    with signals.led_by(partial(_pass_on, alive, listening)):
        folder = meeting.private_folder() if plan.one_node else ""
        reports = context.SimpleQueue()  # the first one starts multiprocessing's tracker, which unblocks signals
        signals.block()
        try:
            for local in range(plan.spawn):
                mine = replace(plan, rank=plan.rank + local, local_rank=local, folder=folder)
                child = context.Process(target=_child, args=(worker, args, mine, threads, reports, listening))
                child.start()
                alive[child] = local
            for number in signals.noted():  # those that came before all were there
                _pass_on(alive, listening, number, signals.twice())
            code = _wait(
                alive, partial(_late, listening, plan, getattr(args, "hang_minutes", 0), time.monotonic()), reports
            )
        finally:
            for child in list(alive):
                child.kill()
                child.join(EXIT_GRACE_SECONDS)
                # at the end Python would wait for one that no signal ends, as a dead disk has it
                multiprocessing.process._children.discard(child)  # pyright: ignore[reportAttributeAccessIssue]
            shutil.rmtree(folder, ignore_errors=True)
    if signals.noted() and not all(listening):
        code = signals.LED_EARLY + (signals.code() or 0)
    return _explain(code, reports)


def _pass_on(alive: dict[Any, int], listening: Any, number: int, again: bool) -> None:
    """Send a signal to the processes that are left; one that still imports, or all at the second time, is killed."""
    for child, local in list(alive.items()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number if listening[local] and not again else signal.SIGKILL)


def _explain(code: int, reports: Any) -> int:
    """Print why the processes failed: one sentence if any of them has one, else their tracebacks."""
    if signals.twice():
        tell(signals.TWICE, error=True)
        return signals.code() or 0
    if code in EARLY_EXITS:
        tell(signals.said(), error=True)
        return code - signals.LED_EARLY
    told = []
    while not reports.empty():
        told.append(reports.get())
    sentences = [(known, text) for known, text in told if known > 1]
    if sentences:
        code, text = sentences[0]
        refuse(text)
    elif code > 128 and code not in errors.FINAL_EXITS:  # the others' tracebacks only say that it is gone
        why = f"a process was ended by signal {code - 128}" + ", perhaps for want of memory" * (code == 137)
        refuse(f"{why}; go on from the newest checkpoint with --resume auto.")
    else:
        tracebacks = [(text, "") for text in dict.fromkeys(text for known, text in told if known == 1)]
        lost = [(f"{text}; go on with --resume auto.", "error: ") for known, text in told if known == LOST]
        for text, who in tracebacks or lost[:1]:
            refuse(text, who)
    return code


def _late(listening: Any, plan: LaunchPlan, minutes: float, begun: float) -> tuple[float | None, str]:
    """Seconds until a process that has not met the others stands still, None where none does, and what is said then:
    it is not watched before, and the others wait for it for half an hour."""
    late = [plan.rank + local for local, state in enumerate(listening) if state != HAS_MET]
    if not late or not minutes:
        return None, ""
    limit = watch.FIRST_STEP * minutes
    names = ", ".join(map(str, late[: watch.MANY]))
    sentence = f"rank {names} has not met the others {limit:g} minutes after the start; go on with --resume auto."
    return max(0.0, begun + 60 * limit - time.monotonic()), sentence


def _wait(alive: dict[Any, int], late: Callable[[], tuple[float | None, str]], reports: Any) -> int:
    """Wait for all; after the first failure the others get EXIT_GRACE_SECONDS. Returns the first failure's code; one
    that may only tell of another's end, OUTAGE_EXIT, gives way to it. ``late``: :func:`_late`."""
    first = 0
    while alive and first not in EARLY_EXITS:
        grace = USAGE_GRACE_SECONDS if first == errors.USAGE_EXIT else EXIT_GRACE_SECONDS
        left, sentence = late()
        if left == 0 and not first:
            reports.put((errors.OUTAGE_EXIT, sentence))
            return errors.OUTAGE_EXIT
        ended = wait([child.sentinel for child in alive], timeout=grace if first else left)
        if not ended and first:
            break
        for child in [c for c in alive if c.sentinel in ended]:
            child.join()
            del alive[child]
            code = child.exitcode or 0
            first = first if first not in (0, errors.OUTAGE_EXIT) or not code else 128 - code if code < 0 else code
    return first
