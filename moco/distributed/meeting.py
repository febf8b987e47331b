"""Where processes meet, and who else may come: nobody, where all of them are on one machine.

torch's store has no secret, and neither have gloo's and NCCL's sockets: who reaches the store of a run can end it. By
default they listen on every interface of the machine.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from moco.distributed import collectives
from moco.errors import OutageError, UserError, one_line

LOOPBACK = ("localhost", "127.0.0.1", "::1")  # names by which only this machine is reached


def private_folder() -> str:
    """A new folder that only this user may enter, for the processes that a run starts, which removes it."""
    try:
        return tempfile.mkdtemp(prefix="moco-")
    except OSError as error:
        raise UserError(f"no temporary folder for the processes to meet in: {one_line(error)}; set TMPDIR.") from error


def listen_to_this_machine_only() -> None:
    """Let gloo's and NCCL's own sockets be those of the loopback device, unless the user has chosen a device.

    NCCL takes every name that begins with the one given, unless "=" stands before it. Not run on GPUs.
    """
    name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def private_store(plan: Any, env: Mapping[str, str], patience: timedelta) -> Any:
    """The store of the processes of one machine, closed to others; None: torch's own, a port on every interface.

    Where the run started its processes itself the store is a file in their private folder, so there is no port to lose
    to another program either. Where somebody else did, and they meet at this machine's own name, it is a port of the
    loopback device, which this machine's users can reach. torchrun's agents bring a store of their own.

    Args:
        plan: :class:`moco.distributed.launch_plan.LaunchPlan`.
        env: the environment, of which torchrun's variables are read.
        patience: how long processes wait for each other there.

    Raises:
        OSError, RuntimeError: the port is taken, or nobody answers there.
    """
    if plan.folder:
        store = dist.FileStore(os.path.join(plan.folder, "store"), plan.world_size)  # pyright: ignore[reportPrivateImportUsage]
        store.set_timeout(patience)
        return store
    agents = not plan.url and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if agents or not plan.one_node:
        return None
    url = urlsplit(plan.url or f"tcp://{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT', '')}")
    if url.scheme != "tcp" or url.hostname not in LOOPBACK or not url.port:
        return None
    main, listening = plan.rank == 0, None
    if main:
        with socket.socket() as opened:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(("127.0.0.1", url.port))
            opened.listen(2048)
            listening = opened.detach()  # now the store's
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", url.port, plan.world_size, main, patience, master_listen_fd=listening, use_libuv=False
    )  # torch 2.6's libuv takes no socket that listens already


def join(plan: Any, backend: str | None, gpu: int | None, patience: timedelta) -> None:
    """Take this process's device, and meet the others of its run; ``patience``: how long an exchange may last."""
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
        listen_to_this_machine_only()
    url = plan.url or "env://"
    try:
        store = private_store(plan, os.environ, patience)
        dist.init_process_group(
            backend, url if store is None else None, rank=plan.rank, world_size=plan.world_size, store=store,
            timeout=patience, device_id=bound,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:  # a port in use: DistNetworkError, in torch 2.6 its base class
        raise _cannot_meet(plan, url, one_line(error)) from error


def _cannot_meet(plan: Any, url: str, why: str) -> UserError | OutageError:
    """In a folder that was made for it only one that is gone can be missing."""
    if plan.folder:
        return OutageError(f"the processes cannot meet: {why}; go on with --resume auto.")
    other = "; give another port by --dist-url (or MASTER_PORT)." * ("in use" in why)
    return UserError(f"the processes cannot meet at {url}: {why}{other}")
