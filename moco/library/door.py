"""A command's module that is a function as well: ``moco.embed(...)`` beside ``python -m moco.embed``.

``moco.embed`` is one object whatever was imported first, as Python puts a submodule that is imported under its name
into the package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """Calling it calls the function of its name in :mod:`moco.library.program`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _function(self)(*args, **options)

    __doc__ = property(lambda self: _function(self).__doc__)  # type: ignore[assignment]
    __signature__ = property(lambda self: _function(self).__signature__)


def _function(module: ModuleType) -> Callable[..., Any]:
    return getattr(import_module("moco.library.program"), module.__name__.rpartition(".")[2])


def callable_module(name: str) -> ModuleType:
    """The module that calls this with its ``__name__``, made callable."""
    module = sys.modules[name]
    if name != "__main__":
        module.__class__ = CallableModule
    return module
