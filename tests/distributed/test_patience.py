"""Waiting for what one process does alone, longer than the process group lets a collective last."""

import functools
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from moco import distributed
from moco.distributed import collectives
from moco.errors import UserError

LIMIT, LONG = 2.0, 3.0  # seconds that a collective may last here, and that the work takes


def impatient() -> None:
    """From here on a collective may last LIMIT."""
    dist.barrier()  # the meeting itself may take longer
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=LIMIT))


def waiting(folder: Path, args) -> int:
    """A worker of three on what it takes for two nodes, [0, 1] and [2]; what it saw is written to ``folder``."""
    impatient()
    rank, calls = distributed.rank(), []
    collectives._local_rank = (0, 1, 0)[rank]

    def make() -> str:
        calls.append(time.monotonic())
        time.sleep(LONG if rank == 2 else 0)
        return f"made by {rank}"

    begun = time.monotonic()
    made = distributed.first_on_node(make, wait=True)
    waited = calls[0] - begun > LIMIT
    alone = []
    distributed.by_main(lambda: alone.append(rank))

    def refuse() -> None:
        if rank == 2:
            raise UserError("give another folder.")

    try:
        distributed.first_on_node(refuse, wait=True)
        told = ""
    except UserError as error:
        told = str(error)
    (folder / str(rank)).write_text(repr((made, len(calls), waited, alone, told)))
    return 0


@pytest.mark.dist
def test_work_of_one_process_outlasts_the_limit_of_collectives(tmp_path, start):
    program = start("--nproc", 3, "unused", main=functools.partial(waiting, tmp_path))
    assert program.end() == 0, program.text
    found = [eval((tmp_path / str(rank)).read_text()) for rank in range(3)]
    told = "give another folder."
    assert found == [
        ("made by 0", 1, False, [0], told), ("made by 1", 1, True, [], told), ("made by 2", 1, False, [], told),
    ]  # fmt: skip


def dying(how: str, args) -> int:
    """A worker of two, one of which does not come back from its work: the main one, or the other."""
    impatient()
    collectives.SILENCE_SECONDS = 0.5
    collectives.BEAT_SECONDS = 60.0 if how == "silence" else 0.1

    def work() -> None:
        if distributed.rank() != (0 if how == "killed" else 1):
            return
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1.2)
        if how == "failed":
            raise ZeroDivisionError("what went wrong")

    distributed.wait_without_timeout(work)
    return 0


@pytest.mark.dist
@pytest.mark.parametrize(
    ("how", "code", "sentences"),
    [
        ("killed", 137, ["error: a process was ended by signal 9"]),
        ("failed", 1, ["ZeroDivisionError: what went wrong"]),
        ("silence", 75, ["error: no sign of life for 0.5 s from the process that this one waited for"]),
    ],
)
def test_who_waits_ends_when_the_one_at_work_is_gone(how, code, sentences, start):
    program = start("--nproc", 2, "unused", main=functools.partial(dying, how))
    assert program.end() == code, program.text
    assert all(sentence in program.text for sentence in sentences), program.text
    assert program.text.count("Traceback") == (how == "failed")  # of who failed, not of who waited
