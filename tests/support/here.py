"""The functions of moco.library.program with their runs in this process, and with sizes at which they take little."""

import json
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from moco import distributed, errors
from moco.library import child

# Of every run, and what is the most of a number.
SMALL = {"arch": "test_resnet", "size": 16, "workers": 0, "amp": "off", "print_freq": 1, "split": "train",
         "few_shot_shots": [1]}  # fmt: skip
MOST = {"epochs": 1, "batch_size": 8, "moco_k": 20, "moco_dim": 16, "points": 12,
        "few_shot_way": 2, "few_shot_episodes": 2, "few_shot_queries": 2}  # fmt: skip


def runner(patch: pytest.MonkeyPatch, small: dict[str, Any] | None = None) -> Callable[[str, Namespace], int]:
    """What takes the place of :func:`moco.library.child.run`; ``small``: settings of every run that has them."""

    def run(worker: str, args: Namespace) -> int:
        module, _, name = worker.partition(":")
        vars(args).update({key: value for key, value in (small or {}).items() if key in args})
        if small:
            numbers = {key: most for key, most in MOST.items() if (getattr(args, key, None) or 0) > most}
            vars(args).update(numbers)
        said: list[str] = []
        with patch.context() as inside:
            inside.setattr(errors, "_caller", said.append)
            code = distributed.launch(getattr(import_module(module), name), args)
        return child._answer(code, "".join(json.dumps(text) + "\n" for text in said))

    return run


def run_here(patch: pytest.MonkeyPatch, small: dict[str, Any] | None = None) -> None:
    """Until ``patch`` is undone a run is no process, but answers as one."""
    patch.setattr(child, "run", runner(patch, small))
