"""Which methods there are: a row here and a file beside it each. No torch here, so that flags are read at once.

>>> METHODS["mochi"].hooks.recipe(MoCHiConfig(s=512, s2=256))
>>> METHODS["hcl"].hooks.loss(InBatchConfig(beta=0.5))
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """The methods that one model trains.

    Args:
        model: MODULE:FUNCTION, (encoders.., config, context) -> (model, a line for the log).
        encoders: how many it takes.
        figure: what its log says besides what all models' say, names with a space between.
        refuses: settings that mean nothing to it.
    """

    model: str
    encoders: int
    figure: str
    refuses: tuple[str, ...] = ()

    @property
    def build(self) -> Callable[..., Any]:
        """The function, imported now."""
        module, _, name = self.model.partition(":")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        family: one of FAMILIES.
        file: the module that fills the family's hook: ``recipe(config)`` of synthetic negatives for "queue", else
            ``loss(config)``.
        supervised: images of one class are the same, not the views of one image alone.
        queue: whether --moco-k makes it a method with a queue.
        defaults: of its settings, where neither the command line nor a file names them.
    """

    family: str
    file: str
    supervised: bool = False
    queue: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def hooks(self) -> Any:
        """The file, imported now."""
        return importlib.import_module(self.file)


_OF_A_QUEUE = ("symmetric", "bn_splits", "mask_same_image", "head_impl", "hard_start_epoch")
_MOCO_V3S_OWN = ("moco_mlp_dim", "moco_m_cos", "stop_grad_conv1")
_NOT_MOCO_V3S = (*_OF_A_QUEUE, "mlp")
FAMILIES = {
    "queue": Family("moco.models.build:with_queue", 2, "synthetic_mass old_mass", _MOCO_V3S_OWN),
    "batch": Family("moco.models.build:in_batch", 1, "no_positive", _OF_A_QUEUE + _MOCO_V3S_OWN),
    "momentum": Family("moco.models.moco_v3:build", 2, "", _NOT_MOCO_V3S),
}

_SUPCONTRAST = {"mlp": True, "aug": "supcon"}  # SupContrast's
_SCALED = {**_SUPCONTRAST, "base_temperature": 0.07}
_MOCO_V3 = {"moco_dim": 256, "moco_m": 0.99, "moco_t": 1.0, "aug": "v3"}  # of its public code
METHODS = {
    "moco": Method("queue", "moco.methods.moco"),
    "mochi": Method("queue", "moco.methods.mochi"),
    "synco": Method("queue", "moco.methods.synco"),
    "simclr": Method("batch", "moco.methods.simclr", defaults=_SCALED),
    "supcon": Method("batch", "moco.methods.supcon", supervised=True, queue=True, defaults=_SCALED),
    "hcl": Method("batch", "moco.methods.hcl", defaults=_SUPCONTRAST),
    "dcl": Method("batch", "moco.methods.dcl", defaults=_SUPCONTRAST),
    "moco_v3": Method("momentum", "moco.methods.moco_v3", defaults=_MOCO_V3),
}
ALIASES = {"mocov3": "moco_v3"}
# What can take the place of a method's synthetic negatives (moco/methods/controls.py): the rows that are copied.
CONTROLS = {
    "random": "random queue rows",
    "hardest": "its {hard} hardest queue rows, drawn as the parents are",
    "reweight": "its {hard} hardest queue rows, as many of each",
}
