"""The parts of benchmarks/gpu.py: one module each, whose ``run(found)`` measures and notes what it finds."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

TRAINING = ("torchvision", "PIL", "tqdm", "sklearn")  # what a training step imports beyond torch, numpy and triton


@dataclass(frozen=True)
class Part:
    """``seconds`` it may take; ``alone``: it times, so nothing runs beside it; ``needs``: packages, besides torch;
    ``usual``: it runs unless others are named."""

    seconds: int
    alone: bool
    about: str
    needs: tuple[str, ...] = ("numpy", "triton")
    usual: bool = True

    def missing(self) -> list[str]:
        """Those that this machine's Python lacks."""
        return [name for name in ("torch", *self.needs) if importlib.util.find_spec(name) is None]


# In the order in which the parts that run alone do, the long ones last; where time runs out, they are left out. On an
# H200 whose host needs 10 us for a small operator, machine took 21 s, loss 44, and a setting of steps 60.
PARTS = {
    "machine": Part(40, True, "versions, bandwidth, rates of products"),
    "errors": Part(150, False, "the fused loss and its gradient against float64"),
    "ties": Part(90, False, "the hardest set among ties and rows that are left out"),
    "manners": Part(120, False, "same bits, host waits, CUDA graphs, streams, launches"),
    "views": Part(90, False, "views finished on the card against PIL's pixels", ("numpy", "triton", *TRAINING)),
    "tests": Part(200, False, "pytest -m gpu", ("numpy", "triton", "pytest", "timm", *TRAINING)),
    "sanitizer": Part(130, False, "compute-sanitizer on small cases"),
    "loss": Part(80, True, "microseconds of the loss beside plain MoCo, naive SynCo and lightly's MoCo"),
    "norms": Part(30, True, "BatchNorm in parts, and images made floats", ("numpy", "triton", *TRAINING)),
    "views_time": Part(30, True, "views by Triton and by torch's operators", ("numpy", "triton", *TRAINING)),
    "steps": Part(170, True, "whole ResNet-50 steps, SynCo beside plain MoCo", ("numpy", "triton", *TRAINING)),
    "compiled": Part(100, True, "whole ResNet-50 steps with --compile", ("numpy", "triton", *TRAINING)),
    "tuning": Part(120, True, "the fused step in other sizes of its programs", usual=False),
}
