"""Starting a program: it is the run, starts several processes of it, or is one of those that a scheduler started."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moco import doors, errors, run_folder, signals
from moco.distributed import collectives
from moco.distributed.launch_plan import ALONE, LaunchPlan, plan_launch
from moco.distributed.spawn import ASKED, start_all, stop_code, take_part
from moco.errors import OutageError, TrainingError, UserError, exit_code, one_line, refuse, tell


def launch(worker: Callable[[Any], int | None], args: Any) -> int:
    """Run ``worker(args)`` in every process that the flags or the scheduler ask for; return the exit code.

    ``args`` needs multiprocessing_distributed, nproc, world_size, rank, dist_url, dist_backend and gpu. A
    :class:`UserError` becomes one sentence on standard error and exit code 2. With max_restarts above 0 it also needs
    save_dir, resume and overwrite.
    """
    signals.stop_with(stop_code(args))
    with signals.listening():
        return exit_code(lambda: _start(worker, args, getattr(args, "max_restarts", 0)))


def _start(worker: Callable[[Any], int | None], args: Any, restarts: int) -> int:
    gpus = torch.cuda.device_count()
    try:
        plan = plan_launch(args, gpus, os.environ)
    except ValueError as error:
        raise UserError(
            f"--dist-url, or a scheduler's variable (RANK, WORLD_SIZE, SLURM_*, OMPI_*, PMI_*), is not what it should "
            f"be: {one_line(error)}."
        ) from error
    if plan.spawn:
        code = _spawn_again(worker, args, plan, restarts) if restarts else start_all(worker, args, plan)
        return errors.STOP_EXIT if code == ASKED else code
    if restarts:
        raise UserError(
            "--max-restarts needs --nproc: a process that was killed cannot start itself again. Under torchrun "
            "give --max-restarts to torchrun and --resume auto here."
        )
    if plan.how == ALONE and gpus > 1 and args.gpu is None:
        tell(of_many(gpus), error=True)
    return _run(worker, args, plan)


def of_many(gpus: int) -> str:
    """What a plain command, or a function that runs one, is told on a machine with several GPUs."""
    torchrun = doors.under_torchrun(gpus)
    typed = f"add --multiprocessing-distributed or --nproc {gpus}, or type `{torchrun}`"
    more = typed if torchrun else f'add --nproc {gpus}, or in Python nproc="all"'
    return f"1 of this machine's {gpus} GPUs is used; for all of them {more}"


def _spawn_again(worker: Callable, args: Any, plan: LaunchPlan, restarts: int) -> int:
    """:func:`start_all`, and again from the newest good checkpoint of this run when a process crashed or was killed.

    A run whose images are gone waits for them as long as it may; one that then begins without them is a mistake to
    itself and the same outage here, where it is waited for as long before the next one.
    """
    before, outage = run_folder.written(args.save_dir), False
    for restart in range(restarts + 1):
        code = start_all(worker, args, plan)
        again = outage and code == errors.USAGE_EXIT
        code = errors.OUTAGE_EXIT if again else code
        outage = code == errors.OUTAGE_EXIT
        # who sent a signal wants the run to end, even if the process it was for is gone
        if restart == restarts or code in (0, ASKED, *errors.FINAL_EXITS) or signals.noted():
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
        return take_part(worker, args, plan, report)
    except (UserError, TrainingError, OutageError) as error:
        report(error)
        return error.exit_code
    except RuntimeError as error:
        lost = collectives.lost_peer(error)
        if not lost:
            raise
        report(lost)
        return errors.OUTAGE_EXIT
