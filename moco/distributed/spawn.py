"""Processes that a run starts itself, each of which takes part in it; they end together."""

from __future__ import annotations

import contextlib
import multiprocessing.process
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco import errors, owner, signals
from moco.distributed import collectives, meeting, watch
from moco.distributed.launch_plan import LaunchPlan
from moco.errors import MocoError, OutageError, TrainingError, UserError, one_line, refuse, tell

LOST = 0  # in reports of processes, where they have their exit code: only that another one is gone
EXIT_GRACE_SECONDS = 20  # how long the other processes may take to end after one has failed
EARLY_EXITS = [code + signals.LED_EARLY for code in (0, *signals.CODES.values())]
ASKED = 76  # of a process whose run has stopped as it was asked to, which is no outage to be tried again
USAGE_GRACE_SECONDS = 3  # the same after a user's mistake: there is nothing to save, only sentences to collect
LISTENS, HAS_MET = 1, 2  # what a process that was started has come to


def take_part(
    worker: Callable[[Any], int | None], args: Any, plan: LaunchPlan, report: Callable[[str], None],
    met: Callable[[], None] = lambda: None,
) -> int:  # fmt: skip
    """``report`` is given a sentence before the watcher ends this process, which cannot raise in its main thread;
    ``met`` is called once the processes have met."""
    minutes = getattr(args, "hang_minutes", 0)
    # a process that stands still is named before the exchange that waits for it is given up
    patience = timedelta(minutes=max(30.0, (watch.FIRST_STEP + 1) * minutes))
    try:
        signals.stop_with(stop_code(args))
        meeting.join(plan, args.dist_backend, args.gpu, patience)
        met()
        with watch.watching(minutes, getattr(args, "save_dir", ""), report):
            code = worker(args) or 0
            if code == errors.STOP_EXIT:  # some launchers end all processes as soon as one has such a code
                collectives.by_main(lambda: None)
            return code
    except (MemoryError, RuntimeError, OSError) as error:
        if known := _in_words(error):
            raise known from error
        raise
    finally:
        owner.release()
        if dist.is_initialized():
            # Over torch 2.6's gloo a thread may still hold the last exchange's tensors: to let go of them it needs the
            # interpreter's lock, which destroying keeps while it waits for the thread, for ever.
            time.sleep(0.05)
            with contextlib.suppress(Exception):  # a peer that died must not hide this process's own reason
                dist.destroy_process_group()


def stop_code(args: Any) -> int:
    """The exit code of a run that a time limit or SIGUSR1 has stopped: --stop-code, by default STOP_EXIT. torchrun
    would take that for a failure: it starts the processes again, and its own exit code is 1."""
    asked = getattr(args, "stop_code", None)
    default = 0 if "TORCHELASTIC_RUN_ID" in os.environ else errors.STOP_EXIT
    return default if asked is None else asked


def known_error(error: BaseException) -> MocoError | None:
    """With what a run ends that this error ends; None where it is nobody's but a programmer's."""
    if isinstance(error, MocoError):
        return error
    lost = collectives.lost_peer(error)
    return OutageError(lost) if lost else _in_words(error)


def _in_words(error: BaseException) -> MocoError | None:
    """What a library's error means, of the disk, too many open files or memory."""
    if said := errors.of_the_disk(error):
        return OutageError(said)
    if "Too many open files" in str(error):
        return UserError("too many open files; raise the limit (ulimit -n 65536) or lower --workers.")
    if _of_memory(error):
        what = "out of memory; lower --batch-size, --size, --moco-k or --workers, or free some"
        return OutageError(f"{what} ({one_line(error, 160)}).")
    return None


def _of_memory(error: BaseException) -> bool:
    """Whether a device or this machine had no memory: of GPUs a class of its own, of the CPU's allocator words."""
    words = "can't allocate memory", "size calculation overflowed"
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


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
        code = take_part(worker, args, plan, report, met)
        sys.exit(ASKED if code == errors.STOP_EXIT else code)
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


def start_all(worker: Callable, args: Any, plan: LaunchPlan) -> int:
    """Start ``plan.spawn`` processes, pass signals on to them, end them all when one fails, or at a second Ctrl-C. The
    exit code, ASKED in place of STOP_EXIT."""
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
