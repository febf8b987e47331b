"""The start files of docs/launch, with a scheduler's commands in place of the scheduler."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

FILES = {"slurm.sh": ("srun", "scontrol"), "pbs.sh": ("mpirun", "qsub")}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "code", "tries", "again"),
    [("slurm.sh", 75, "1", True), ("slurm.sh", 75, "20", False), ("slurm.sh", 0, "0", False),
     ("slurm.sh", 143, "0", False), ("pbs.sh", 75, "3", True), ("pbs.sh", 75, "0", False), ("pbs.sh", 2, "3", False)],
)  # fmt: skip
def test_a_job_is_submitted_again_after_75_alone(name, code, tries, again, tmp_path):
    starts, submits = FILES[name]
    for command, ends in ((starts, code), (submits, 0)):
        program = tmp_path / command
        program.write_text(f'#!/bin/sh\necho {command} "$@" >> {tmp_path}/called\nexit {ends}\n')
        program.chmod(0o755)
    own = {"SLURM_RESTART_COUNT": tries} if name == "slurm.sh" else {"TRIES": tries}
    own |= {"DATA": "my images", "SLURM_JOB_ID": "7", "PBS_O_WORKDIR": str(tmp_path)}
    environment = {**os.environ, **own, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(["bash", str(ROOT / "docs" / "launch" / name)], env=environment, check=False)
    assert ended.returncode == code
    first, *then = Path(tmp_path, "called").read_text().splitlines()
    assert first.startswith(f"{starts} python main_pretrain.py ")
    assert first.endswith(" --resume auto my images")
    resubmit = {"slurm.sh": "scontrol requeue 7", "pbs.sh": "qsub -v DATA=my images,TRIES=2 docs/launch/pbs.sh"}
    assert then == ([resubmit[name]] if again else [])
