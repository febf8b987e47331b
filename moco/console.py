"""The commands moco-pretrain, moco-lincls, moco-semisup: the mains, their flags read before torch is imported."""

from importlib import import_module

from moco import signals


def pretrain() -> int:
    """main_pretrain.py; its exit code."""
    return _run("pretrain")


def lincls() -> int:
    """main_lincls.py; its exit code."""
    return _run("lincls")


def semisup() -> int:
    """main_semisup.py; its exit code."""
    return _run("semisup")


def _run(name: str) -> int:
    with signals.listening():
        args = getattr(import_module("moco.cli"), f"parse_{name}")()
        main = import_module(f"moco.mains.main_{name}")
        return main.distributed.launch(main.worker, args)
