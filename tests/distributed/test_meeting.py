"""Who can come to where the processes of one machine meet, and what they send there."""

import functools
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import ROOT
from support.ports import free_port

from moco import distributed
from moco.distributed import collectives

LISTENS = "0A"  # a socket's state in /proc/net
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
VALUES = [
    None, True, 0, -(2**70), 0.1, -0.0, 5e-324, float("inf"), "", "n\udcffa\x00\u00fc\U0001f9a2", [], (), {},
    {"flags": {"--lr": [0.03, 1 / 3], "--mean": (0.5,), "--wd": None}, 3: ((1, "x"), [False])},
]  # fmt: skip


def listening() -> list[str]:
    """The addresses on which this process listens."""
    own = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            own.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the folder's own
            continue
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == LISTENS and f"socket:[{row[9]}]" in own]


def meeting(folder: Path, args) -> int:
    """A worker that notes where it listens and what it was sent."""
    dist.distributed_c10d._tensor_to_object = None  # pyright: ignore[reportAttributeAccessIssue]  (torch's unpickling)
    main = distributed.is_main()
    got = [distributed.from_main(value if main else "another") for value in VALUES]
    nan = distributed.from_main(float("nan") if main else 0.0)
    assert collectives._texts("\udcff" * distributed.rank()) == ["", "\udcff"]
    with pytest.raises(TypeError, match="Path"):
        collectives._plain({"a": [folder]})
    found = listening(), os.environ["GLOO_SOCKET_IFNAME"], repr(got) == repr(VALUES), nan != nan
    (folder / f"rank{distributed.rank()}").write_text(repr(found))
    return 0


@pytest.mark.dist
@pytest.mark.parametrize("how", ["--nproc", "SLURM"])
def test_nobody_from_outside_is_listened_to_and_nothing_is_unpickled(how, tmp_path, start):
    work = functools.partial(meeting, tmp_path)
    if how == "--nproc":
        programs = [start("--nproc", 2, "unused", main=work)]
    else:
        job = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": socket.gethostname()}
        job["MASTER_PORT"] = str(free_port())
        programs = [start("unused", main=work, SLURM_PROCID=str(n), SLURM_LOCALID=str(n), **job) for n in (0, 1)]
    assert [program.end() for program in programs] == [0] * len(programs), [program.text for program in programs]
    for rank in (0, 1):
        addresses, device, equal, nan = eval((tmp_path / f"rank{rank}").read_text())
        assert addresses, "gloo listens somewhere"
        assert set(addresses) <= set(LOOPBACK)
        assert (device, equal, nan) == ("lo", True, True)


def dying(args) -> int:
    """A worker of two, one of which is killed while the other waits for it."""
    if distributed.rank():
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.largest(1)
    return 0


def private(folder: Path, args) -> int:
    """A worker that shows the folder in which it meets others, and waits."""
    (place,) = Path(os.environ["TMPDIR"]).glob("moco-*")
    (folder / f"mode{distributed.rank()}").write_text(f"{place.stat().st_mode & 0o777:o}")
    time.sleep(100)
    return 0


@pytest.mark.dist
def test_the_folder_is_private_and_gone_afterwards(tmp_path, start):
    place = tmp_path / "temporary"
    place.mkdir()
    program = start("--nproc", 2, "unused", main=dying, TMPDIR=str(place))
    assert program.end() == 137, program.text
    assert [*place.iterdir()] == []
    program = start("--nproc", 2, "unused", main=functools.partial(private, tmp_path), TMPDIR=str(place))
    shown = [tmp_path / "mode0", tmp_path / "mode1"]
    while not all(file.exists() and file.read_text() for file in shown):
        assert program.process.is_alive(), program.text
        time.sleep(0.01)
    assert [file.read_text() for file in shown] == ["700", "700"]
    os.kill(program.pid, signal.SIGKILL)  # the children notice, and clean up
    while [*place.iterdir()]:
        time.sleep(0.01)


def test_no_file_asks_torch_for_pickles():
    files = [path for room in ("moco", "detection", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    assert [path for path in files if re.search(r"\b\w+_object(_list)?\(", path.read_text())] == []
