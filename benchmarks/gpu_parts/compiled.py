"""Whole ResNet-50 steps with the encoders as CUDA graphs: SynCo's beside plain MoCo's in turns, and encoders alone."""

from __future__ import annotations

import contextlib

import torch

from .findings import Findings
from .steps import compared

GRAPHS = ["--compile", "--compile-mode", "reduce-overhead"]
METHODS = {f"{name}, compiled": ["--method", name, *GRAPHS] for name in ("moco", "synco")}
BATCHES = (32, 256)  # images a step


def run(found: Findings) -> None:
    if found.dry:  # a CPU's compiler takes minutes, and is another one
        found.note("compiled steps", "need a GPU")
        return
    for batch in BATCHES:
        with found.guarded(f"N {batch}, compiled"), contextlib.ExitStack() as stack:
            torch.compiler.reset()  # else the second size is compiled for any size
            compared(found, batch, 1, stack, METHODS)
        torch.cuda.empty_cache()
