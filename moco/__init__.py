"""Contrastive pretraining of image encoders with synthetic hard negatives: what ``import moco`` offers.

A name is imported when it is first asked for, so ``import moco`` takes milliseconds and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moco import doors

if TYPE_CHECKING:
    from moco.config import MoCHiConfig, SynCoConfig
    from moco.embed import embed
    from moco.errors import MocoError, OutageError, TrainingError, UserError
    from moco.export import export
    from moco.library.criteria import DCLLoss, HCLLoss, MoCHiLoss, MoCoLoss, SimCLRLoss, SupConLoss, SynCoLoss
    from moco.library.encoder import Encoder, load_encoder
    from moco.library.momentum import MoCo
    from moco.library.negatives import hard_negatives
    from moco.library.program import evaluate, pretrain
    from moco.library.results import Embedding, RunResult
    from moco.neighbours import neighbours

__version__ = "0.2.0"  # nowhere else: pyproject.toml reads it here

_MODULES = {  # of each public name
    "DCLLoss": "moco.library.criteria",
    "Embedding": "moco.library.results",
    "Encoder": "moco.library.encoder",
    "HCLLoss": "moco.library.criteria",
    "MoCHiConfig": "moco.config",
    "MoCHiLoss": "moco.library.criteria",
    "MoCo": "moco.library.momentum",
    "MoCoLoss": "moco.library.criteria",
    "MocoError": "moco.errors",
    "OutageError": "moco.errors",
    "RunResult": "moco.library.results",
    "SimCLRLoss": "moco.library.criteria",
    "SupConLoss": "moco.library.criteria",
    "SynCoConfig": "moco.config",
    "SynCoLoss": "moco.library.criteria",
    "TrainingError": "moco.errors",
    "UserError": "moco.errors",
    "embed": "moco.embed",
    "evaluate": "moco.library.program",
    "export": "moco.export",
    "hard_negatives": "moco.library.negatives",
    "load_encoder": "moco.library.encoder",
    "neighbours": "moco.neighbours",
    "pretrain": "moco.library.program",
}

__all__ = [
    "DCLLoss",
    "Embedding",
    "Encoder",
    "HCLLoss",
    "MoCHiConfig",
    "MoCHiLoss",
    "MoCo",
    "MoCoLoss",
    "MocoError",
    "OutageError",
    "RunResult",
    "SimCLRLoss",
    "SupConLoss",
    "SynCoConfig",
    "SynCoLoss",
    "TrainingError",
    "UserError",
    "embed",
    "evaluate",
    "export",
    "hard_negatives",
    "load_encoder",
    "neighbours",
    "pretrain",
]

doors.check(__name__)  # python -m of a module that is no command ends here


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
