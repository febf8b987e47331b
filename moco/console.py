"""The command `moco`, and moco-pretrain, moco-lincls and moco-semisup: flags are read before torch is imported."""

import sys
from functools import partial
from importlib import import_module

import moco
from moco import doors, resources, signals
from moco.errors import USAGE_EXIT, tell


def main(how: str = "moco") -> int:
    """``moco NAME ...``, or the list of names; the exit code. ``how``: it is typed."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in doors.NAMES:
        return run(name, argv)
    if name in ("-h", "--help"):
        tell(doors.listing(how))
        return 0
    if name in ("-V", "--version"):
        tell(f"moco {moco.__version__}")
        return 0
    if name.startswith("-"):
        tell(f"error: {name} is no flag of {how} itself; the command comes first: {how} COMMAND {name}", error=True)
    else:
        tell(f"error: {how} has no command {name}{doors.instead(name, how)}", error=True)
    return USAGE_EXIT


def run(name: str, argv: list[str] | None = None) -> int:
    """A command of :data:`moco.doors.COMMANDS`; its exit code. ``argv``: its words (default: this process's)."""
    work = _main if name in doors.MAINS else _other
    return signals.run(partial(work, name, argv), signals.BEFORE if name in doors.MAINS else "stopped") or 0


def _main(name: str, argv: list[str] | None) -> int:
    args = getattr(import_module("moco.cli"), f"parse_{name}")(argv)
    main = import_module(doors.MODULES[name])
    return main.distributed.launch(main.worker, args)


def _other(name: str, argv: list[str] | None) -> int:
    if name == "detection" and not resources.INSTALLED:
        sys.path.insert(0, str(resources.MAINS))  # the top of a checkout, which need not be the folder one is in
    module = doors.MODULES[name]
    return import_module(f"{module}.__main__" if name in ("data", "report", "sweep") else module).main(argv)


def pretrain() -> int:
    """main_pretrain.py; its exit code."""
    return run("pretrain")


def lincls() -> int:
    """main_lincls.py; its exit code."""
    return run("lincls")


def semisup() -> int:
    """main_semisup.py; its exit code."""
    return run("semisup")
