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

import torch.distributed as dist

from moco.errors import UserError, one_line

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
        plan: :class:`moco.distributed.launcher.LaunchPlan`.
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
