"""Contrastive pretraining of image encoders with synthetic hard negatives: what ``import moco`` offers.

A name is imported when it is first asked for, so ``import moco`` takes milliseconds and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moco import doors

if TYPE_CHECKING:
    from moco.errors import UserError
    from moco.library.criteria import DCLLoss, HCLLoss, MoCHiLoss, MoCoLoss, SimCLRLoss, SupConLoss, SynCoLoss

__version__ = "0.2.0"  # nowhere else: pyproject.toml reads it here

_MODULES = {  # of each public name
    "UserError": "moco.errors",
    "DCLLoss": "moco.library.criteria",
    "HCLLoss": "moco.library.criteria",
    "MoCHiLoss": "moco.library.criteria",
    "MoCoLoss": "moco.library.criteria",
    "SimCLRLoss": "moco.library.criteria",
    "SupConLoss": "moco.library.criteria",
    "SynCoLoss": "moco.library.criteria",
}

__all__ = [
    "DCLLoss",
    "HCLLoss",
    "MoCHiLoss",
    "MoCoLoss",
    "SimCLRLoss",
    "SupConLoss",
    "SynCoLoss",
    "UserError",
]

doors.check(__name__)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
