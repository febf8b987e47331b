"""Where and when trials run: one a GPU, a share of the cores each, or SLURM jobs; each once, whoever else works."""

from __future__ import annotations

import math
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from moco import resources
from moco.errors import UserError, one_line
from moco.sweep import trial as trials
from moco.sweep.spec import Run, Trial
from moco.sweep.trial import Record, Slot

Before = Mapping[str, "str | None"]  # by folder, the attempt that ended there before the sweep began


class Local:
    """Trials on this machine, at most one a slot; ``poll`` is the time in seconds between two looks at them."""

    poll = 0.1

    def __init__(self, run: Run, stop: threading.Event) -> None:
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in local_slots(run):
            self._free.put(slot)
        self.size, self.minutes, self.stop = self._free.qsize(), run.minutes, stop
        self._threads = ThreadPoolExecutor(self.size)

    def submit(self, trial: Trial, before: str | None) -> Any:
        """Begin; the returned job has ``done`` and ``result``."""
        return self._threads.submit(self._run, trial, before)

    def _run(self, trial: Trial, before: str | None) -> None:
        slot = self._free.get()
        try:
            trials.run_trial(trial, slot, self.minutes, before, self.stop)
        finally:
            self._free.put(slot)

    def close(self, jobs: list[Any]) -> None:
        """Wait for what runs; when ``stop`` is set, that is the time its trials take to save."""
        self._threads.shutdown(wait=True, cancel_futures=True)


class SlurmTrial:
    """What a SLURM job does. Preempted or near its time limit, submitit queues it again, and the trial resumes."""

    def __call__(self, trial: Trial, minutes: float | None, before: str | None) -> None:
        trials.run_trial(trial, Slot(), minutes, before)

    def checkpoint(self, *arguments: Any) -> Any:
        """submitit's name for what a requeued job does."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


class Slurm:
    """Trials as jobs of a cluster; the executor is submitit's, whose jobs have ``done``, ``result`` and ``cancel``."""

    poll = 2.0

    def __init__(self, run: Run, out: str, executor: Any = None) -> None:
        self.size, self.minutes = run.slots or 10**9, run.minutes
        parameters = dict(run.slurm or {})
        if run.minutes and "timeout_min" not in parameters:
            parameters["timeout_min"] = math.ceil(run.minutes) + 5  # to start, and to save
        self._executor = executor or _submitit(parameters, os.path.join(out, "slurm"))

    def submit(self, trial: Trial, before: str | None) -> Any:
        """Put a job into the queue."""
        try:
            return self._executor.submit(SlurmTrial(), trial, self.minutes, before)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise UserError(f"SLURM does not take the job: {one_line(error)}") from error

    def close(self, jobs: list[Any]) -> None:
        """Cancel jobs that have not ended; the next sweep resumes what they had begun."""
        for job in jobs:
            job.cancel()


def _submitit(parameters: dict[str, Any], folder: str) -> Any:
    submitit = resources.package("submitit", "slurm", "run: slurm needs the package submitit")
    try:
        executor = submitit.AutoExecutor(folder, cluster=parameters.pop("cluster", "slurm"))
        executor.update_parameters(**{"name": "sweep", **parameters})
    except (TypeError, ValueError, RuntimeError, NameError) as error:
        raise UserError(f"run: slurm is not what submitit takes: {one_line(error)}") from error
    return executor


def local_slots(run: Run) -> list[Slot]:
    """The shares of this machine: ``gpus_per_trial`` GPUs each, or without GPUs ``slots`` equal parts of its cores.

    Raises:
        UserError: fewer GPUs than one trial needs.
    """
    gpus = [] if run.slots else run.gpus or _visible_gpus()
    if run.gpus_per_trial > max(len(gpus), 1):
        raise UserError(f"run gpus_per_trial is {run.gpus_per_trial}, but there are {len(gpus)} GPUs to use.")
    n = len(gpus) // run.gpus_per_trial or run.slots or 1
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    slots = []
    for i in range(n):
        mine = tuple(cores[i * len(cores) // n : (i + 1) * len(cores) // n])
        ids = ",".join(gpus[i * run.gpus_per_trial : (i + 1) * run.gpus_per_trial])
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(mine))))
        slots.append(Slot({"CUDA_VISIBLE_DEVICES": ids, "OMP_NUM_THREADS": threads}, mine))
    return slots


def _visible_gpus() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")  # ids of a trial are those outside, not torch's count from 0
    return given.split(",")[:count] if given else [str(i) for i in range(count)]


def run_all(todo: list[Trial], pool: Local | Slurm, before: Before, stop: threading.Event, say: Callable) -> None:
    """Run each trial once, until all are settled or ``stop`` is set; records are in the trials' folders.

    Args:
        todo: of different folders.
        before: by folder, see :func:`moco.sweep.trial.settled`.
        say: gets (trial, record) when a trial settles.
    """
    waiting, jobs = list(todo), {}
    try:
        while (waiting or jobs) and not stop.is_set():
            _look(waiting, jobs, pool, before, say)
            stop.wait(pool.poll if jobs or waiting else 0)
    except BaseException:
        stop.set()  # what runs in threads would keep this process alive
        raise
    finally:
        pool.close(list(jobs))


def _look(waiting: list[Trial], jobs: dict[Any, Trial], pool: Local | Slurm, before: Before, say: Callable) -> None:
    for job in [job for job in jobs if job.done()]:
        trial = jobs.pop(job)
        _collect(job, trial, before.get(trial.folder))
        waiting.insert(0, trial)  # settled now, unless another sweep runs it
    for trial in list(waiting):
        if len(jobs) >= pool.size:
            break
        record = trials.settled(trial.folder, before.get(trial.folder))
        if record:
            waiting.remove(trial)
            say(trial, record)
        elif not trials.running(trial.folder):
            waiting.remove(trial)
            jobs[pool.submit(trial, before.get(trial.folder))] = trial


def _collect(job: Any, trial: Trial, before: str | None) -> None:
    """A job that could not even write its record (a node that failed, a full disk) is a failed trial."""
    try:
        job.result()
    except Exception as error:
        if not trials.settled(trial.folder, before):
            os.makedirs(trial.folder, exist_ok=True)
            trials.write_record(trial, Record(trials.FAILED, None, 0.0, f"the job failed: {one_line(error)}"))
