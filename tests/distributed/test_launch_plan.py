"""How flags and schedulers' variables become processes, decided without starting any."""

import sys
from argparse import Namespace
from datetime import timedelta

import pytest
import torch

from moco import console, doors
from moco.distributed import collectives, launcher, meeting
from moco.distributed.launch_plan import LaunchPlan, first_host, plan_launch
from moco.errors import UserError

HOUR = timedelta(hours=1)
NOTHING = {"multiprocessing_distributed": False, "nproc": None, "world_size": -1, "rank": -1, "dist_url": None}


def plan(gpus=0, env=None, **flags):
    return plan_launch(Namespace(**{**NOTHING, **flags}), gpus, env or {})


def test_no_flags_is_one_process():
    p = plan()
    assert (p.how, p.rank, p.world_size, p.spawn) == ("one process", 0, 1, 0)


def test_upstreams_flags_start_one_process_a_gpu():
    p = plan(multiprocessing_distributed=True, world_size=1, rank=0, dist_url="tcp://localhost:10001", gpus=8)
    assert (p.spawn, p.world_size, p.rank, p.local_size, p.url) == (8, 8, 0, 8, "tcp://localhost:10001")


def test_upstreams_flags_on_the_second_node_of_two():
    p = plan(multiprocessing_distributed=True, world_size=2, rank=1, dist_url="tcp://first:1", gpus=8)
    assert (p.spawn, p.world_size, p.rank) == (8, 16, 8)


def test_upstreams_flags_without_a_gpu_run_as_typed():
    p = plan(multiprocessing_distributed=True, world_size=1, rank=0)
    assert (p.spawn, p.world_size) == (1, 1)


def test_nproc_alone_starts_processes_that_need_no_port():
    p = plan(nproc=2)
    assert (p.spawn, p.world_size, p.url, p.one_node) == (2, 2, "", True)


@pytest.mark.parametrize(
    ("here", "env", "flags"),
    [
        (True, {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, {}),
        (False, {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, {}),
        (False, {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "first"}, {}),
        (True, {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost"}, {}),
        (True, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, {}),
        (False, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "2"}, {}),
        (False, {"PMI_RANK": "0", "PMI_SIZE": "2"}, {}),
        (True, {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}, {}),
        (True, {}, {"world_size": 2, "rank": 0, "dist_url": "tcp://127.0.0.1:9"}),
        (False, {}, {"world_size": 2, "rank": 0, "dist_url": "tcp://first:9"}),
        (False, {}, {"world_size": 2, "rank": 0, "dist_url": "tcp://first:9", "nproc": 4}),
    ],
)
def test_whether_all_processes_are_here(here, env, flags):
    assert plan(env=env, **flags).one_node == here


def test_one_node_of_a_scheduler_meets_at_this_machines_own_name():
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "gpu7", "SLURM_JOB_ID": "5"}
    assert plan(env=slurm).url == "tcp://127.0.0.1:20005"
    assert plan(env={**slurm, "MASTER_ADDR": "gpu7"}).url == "tcp://gpu7:20005"


def test_torchrun():
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    p = plan(env=env)
    assert (p.how, p.rank, p.world_size, p.local_rank, p.local_size, p.url) == ("torchrun", 5, 8, 1, 4, "")


def test_slurm():
    env = {
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[07,09]",
        "SLURM_JOB_ID": "123",
    }
    p = plan(env=env)
    assert (p.how, p.rank, p.world_size, p.local_rank, p.local_size) == ("SLURM", 9, 16, 1, 8)
    assert p.url == "tcp://gpu07:20123"


def test_a_batch_script_without_srun_is_one_process():
    # sbatch sets these for the script itself, which has no peers
    p = plan(env={"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "5"})
    assert p.how == "one process"


def test_pbs_with_open_mpi(tmp_path):
    nodes = tmp_path / "nodes"
    nodes.write_text("first\nfirst\nsecond\nsecond\n")
    env = {
        "PBS_NODEFILE": str(nodes),
        "PBS_JOBID": "77.server",
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    p = plan(env=env)
    assert (p.how, p.rank, p.world_size, p.local_rank, p.local_size) == ("PBS/MPI", 3, 4, 1, 2)
    assert p.url == "tcp://first:20077"


def test_one_process_per_call_with_flags():
    p = plan(world_size=2, rank=1, dist_url="tcp://h:1")
    assert (p.how, p.rank, p.world_size, p.spawn) == ("flags", 1, 2, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nproc": 0}, "--nproc"),
        ({"multiprocessing_distributed": True, "world_size": 2, "rank": 0}, "--dist-url"),
        ({"multiprocessing_distributed": True, "world_size": 2, "rank": 2, "dist_url": "tcp://h:1"}, "--rank 2"),
        ({"world_size": 2}, "--rank"),
    ],
)
def test_impossible_launches_are_sentences(changes, words):
    with pytest.raises(UserError, match=words):
        plan(**changes)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("node[03-05,9],x", "node03"), ("a[1]", "a1"), ("", "127.0.0.1")],
)
def test_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


# ------------------------------------------------------------------------------------------- joining the others


@pytest.mark.parametrize(
    ("backend", "gpus", "url", "expected"),
    [
        (None, 4, "tcp://here:1", {"backend": "nccl", "device_id": torch.device("cuda", 2)}),
        ("nccl", 4, "", {"backend": "nccl", "device_id": torch.device("cuda", 2)}),
        ("cpu:gloo,cuda:nccl", 2, "", {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device("cuda", 0)}),
        ("gloo", 4, "tcp://here:1", {"backend": "gloo"}),
        ("nccl", 0, "tcp://here:1", {"backend": "gloo"}),
        (None, 0, "", {"backend": "gloo"}),
    ],
)
def test_nccl_is_started_with_its_device(backend, gpus, url, expected, monkeypatch):
    asked, chosen = [], []
    for name, answer in (("is_available", gpus > 0), ("device_count", gpus)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, url, **how: asked.append({"backend": backend, "url": url, **how}),
    )
    for name in ("_local_size", "_local_rank"):
        monkeypatch.setattr(collectives, name, getattr(collectives, name))
    meeting.join(LaunchPlan("spawn", 6, 8, 2, 0, url, 4), backend, None, HOUR)
    everywhere = {"url": url or "env://", "rank": 6, "world_size": 8, "store": None, "timeout": HOUR}
    assert asked == [everywhere | {"device_id": None} | expected]


def test_one_process_joins_nobody(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("joined"))
    meeting.join(LaunchPlan("one process"), None, None, HOUR)


# ------------------------------------------------------------------------------------------- one of several GPUs


@pytest.fixture
def told(monkeypatch, capsys, alone, restored):
    """``told(gpus, *words)``: what the command `moco` says, on a machine with so many GPUs, before it begins."""
    monkeypatch.setattr(launcher, "_run", lambda *_: 0)
    monkeypatch.setattr(launcher, "start_all", lambda *_: 0)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)

    def run(gpus: int, *words: str, script: str = "/bin/moco") -> str:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(sys, "argv", [script, *words])
        assert console.run(words[0], list(words[1:])) == 0
        return capsys.readouterr().err

    return run


PLAIN = {
    "pretrain": ["DIR"], "lincls": ["DIR"], "semisup": ["DIR"], "embed": ["CKPT", "DIR"], "retrieval": ["CKPT", "DIR"],
    "bench": ["all", "DIR"],
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_command_says_that_it_takes_one_gpu_of_several(name, told):
    said = told(4, name, *PLAIN[name])
    assert said == (
        "1 of this machine's 4 GPUs is used; for all of them add --multiprocessing-distributed or --nproc 4, "
        f"or type `torchrun --nproc-per-node 4 -m moco {name} ...`\n"
    )
    script = doors.MODULES[name].rpartition(".")[2] + ".py"
    assert told(4, name, *PLAIN[name], script=script).endswith(f" `torchrun --nproc-per-node 4 {script} ...`\n")
    of_a_function = '1 of this machine\'s 4 GPUs is used; for all of them add --nproc 4, or in Python nproc="all"\n'
    assert told(4, name, *PLAIN[name], script="-c") == of_a_function


@pytest.mark.parametrize(
    ("gpus", "words", "env"),
    [
        (0, [], {}),
        (1, [], {}),
        (4, ["--gpu", "2"], {}),
        (4, ["--nproc", "1"], {}),
        (4, ["--multiprocessing-distributed"], {}),
        (4, ["--world-size", "4", "--rank", "0", "--dist-url", "tcp://localhost:1"], {}),
        (4, [], {"RANK": "0", "WORLD_SIZE": "1"}),
        (4, [], {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}),
    ],
)
def test_who_chose_is_told_nothing(gpus, words, env, told, monkeypatch):
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    assert told(gpus, "lincls", "DIR", *words) == ""


def test_a_batch_script_without_srun_is_told_too(told, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert told(4, "lincls", "DIR").count("1 of this machine's 4 GPUs") == 1
