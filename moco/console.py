"""The commands moco-pretrain, moco-lincls, moco-semisup: the mains, their flags read before torch is imported."""

from argparse import Namespace
from importlib import import_module

from moco import cli


def pretrain() -> int:
    """main_pretrain.py; its exit code."""
    return _run("main_pretrain", cli.parse_pretrain())


def lincls() -> int:
    """main_lincls.py; its exit code."""
    return _run("main_lincls", cli.parse_lincls())


def semisup() -> int:
    """main_semisup.py; its exit code."""
    return _run("main_semisup", cli.parse_semisup())


def _run(name: str, args: Namespace) -> int:
    main = import_module(f"moco.mains.{name}")
    return main.distributed.launch(main.worker, args)
