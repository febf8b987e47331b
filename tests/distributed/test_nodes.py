"""Two nodes, as two rendezvous agents of torchrun's on one machine: they train, lose a worker, and go on.

The agents are threads here and their workers come from the tests' server of processes, which saves four times the
seconds of importing torch. What they say to each other, and the processes that they start and restart, are torchrun's.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from conftest import TINY, Worker, differences, load
from support.ports import free_port
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import main_pretrain
from moco import cli, distributed
from moco.train.pretraining import Trainer


def dying(args) -> int:
    """A worker of which rank 1 is killed in the third epoch of its first life."""
    original = Trainer.step

    def step(self, batches):
        if (distributed.rank(), self.progress.step, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (1, 7, "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, batches)

    Trainer.step = step
    return main_pretrain.worker(args)


def program(words: list[str], out: str) -> None:
    """What torchrun starts on a node: main_pretrain.py with these flags."""
    code = distributed.launch(Worker(Path(out), dying), cli.parse_pretrain(words))
    if code:
        os._exit(code)


def agent(port: int, number: int, words: list[str], out: Path, ended: list[int]) -> None:
    """torchrun --nnodes 2 --nproc-per-node 1 --max-restarts 2 of node ``number``."""
    config = LaunchConfig(
        min_nodes=2, max_nodes=2, nproc_per_node=1, run_id="two-nodes", rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}", rdzv_configs={"is_host": number == 0, "timeout": 60},
        max_restarts=2, monitor_interval=0.1, start_method="forkserver", local_addr="127.0.0.1",
    )  # fmt: skip
    elastic_launch(config, program)(words, str(out))
    ended.append(number)


@pytest.mark.dist
def test_two_nodes_lose_a_worker_and_end_as_if_they_had_not(
    image_folder, tmp_path, start, in_process, capsys, monkeypatch
):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # see docs/launch/torchrun.sh
    words = [*TINY, "--save-every", 1, "--resume", "auto", image_folder]
    alone = start(*words, "--nproc", 2, "--epochs", 4, "--save-dir", tmp_path / "one")
    # --batch-size is a node's: twice 4 here, 8 on the one node that is compared with
    mine = [*map(str, words), "-b", "4", "--epochs", "4", "--save-dir", str(tmp_path / "nodes")]
    port, ended = free_port(), []
    outputs = [tmp_path / f"node{n}" for n in (0, 1)]
    agents = [
        threading.Thread(target=agent, args=(port, n, mine, out, ended), daemon=True) for n, out in enumerate(outputs)
    ]
    for thread in agents:
        thread.start()
    for thread in agents:
        thread.join(200)
    text = "".join(out.read_text() for out in outputs)
    assert sorted(ended) == [0, 1], text
    assert "2 processes (gloo) on cpu, batch 8" in text
    assert text.count("from epoch 0, step 0 of 12") == 1
    assert text.count("from epoch 2, step 6 of 12") == 1  # the newest checkpoint when rank 1 was killed in step 7
    assert text.count("rank 1 is process") == 2

    assert alone.end() == 0, alone.text
    assert differences(load(tmp_path / "nodes"), load(tmp_path / "one")) == []

    capsys.readouterr()
    assert in_process(*words, "--epochs", 5, "--save-dir", tmp_path / "nodes") == 0  # one process from now on
    said = capsys.readouterr().out
    assert "one process on cpu, batch 8" in said
    assert "from epoch 4, step 12 of 15" in said
    assert load(tmp_path / "nodes")["epoch"] == 5
