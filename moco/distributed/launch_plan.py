"""How a program becomes processes: one, several that it starts itself, or one of those that a scheduler started."""

from __future__ import annotations

import linecache
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from moco.distributed import meeting
from moco.errors import UserError

ALONE = "one process"


@dataclass(frozen=True)
class LaunchPlan:
    """How this program becomes processes. ``spawn`` > 0: start that many here; else be one of ``world_size``."""

    how: str  # ALONE, "spawn", "torchrun", "SLURM", "PBS/MPI" or "flags"
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
    return _plan_slurm(env) or _plan_mpi(env) or LaunchPlan(ALONE)


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
