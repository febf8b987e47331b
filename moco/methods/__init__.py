"""Methods by name. One method is one file with ``recipe(...)``: the synthetic negatives its paper adds to MoCo.

>>> METHODS["mochi"].recipe(s=512, s2=256)
"""

from types import ModuleType

from . import mochi, moco, synco

METHODS: dict[str, ModuleType] = {"moco": moco, "mochi": mochi, "synco": synco}
