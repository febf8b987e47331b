"""Methods by name. One method is one file that fills the hook of its family.

With a queue ``recipe(...)``: the synthetic negatives that its paper adds to MoCo. Without one ``loss(...)``: how the
other images of a batch count, and ``supervised``: whether images of one class are the same or views of one image.

>>> METHODS["mochi"].recipe(MoCHiConfig(s=512, s2=256))
>>> BATCH_METHODS["hcl"].loss(InBatchConfig(beta=0.5))
"""

from types import ModuleType

from moco.methods import dcl, hcl, mochi, moco, simclr, supcon, synco

METHODS: dict[str, ModuleType] = {"moco": moco, "mochi": mochi, "synco": synco}
BATCH_METHODS: dict[str, ModuleType] = {"simclr": simclr, "supcon": supcon, "hcl": hcl, "dcl": dcl}
