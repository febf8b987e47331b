"""compute-sanitizer over ragged small cases of the loss and of the views: no access out of bounds, no race."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from moco.config import SynCoConfig
from moco.methods import synco

from .findings import Findings
from .problems import Case, both_passes, make

ROOT = Path(__file__).resolve().parents[2]
CASES = (
    Case("", 3, 101, 16, 12, synco.recipe(SynCoConfig(5, 4, 3, 2, 3, 1)), masked=True),
    Case("", 2, 2100, 100, 33, synco.recipe(SynCoConfig(5, 4, 3, 2, 3, 1))),
    Case("", 2, 2100, 33, 33, synco.recipe(SynCoConfig(5, 4, 3, 2, 3, 1)), precision="bf16"),
)
DONE = "small cases done"


def run(found: Findings) -> None:
    places = [shutil.which("compute-sanitizer"), *map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))]
    tool = next(filter(None, places), None)
    if found.dry:
        small("cpu")
        found.note("compute-sanitizer", "needs a GPU")
        return
    if tool is None:
        found.note("compute-sanitizer", "not installed: not run")
        return
    for check in ("memcheck", "racecheck"):
        with found.guarded(check):
            checked(found, tool, check)


def checked(found: Findings, tool: str, check: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); " \
           "from benchmarks.gpu_parts import sanitizer; sanitizer.small('cuda')"  # fmt: skip
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", check, sys.executable, "-c", code]
    child = subprocess.run(command, capture_output=True, text=True, env=env, timeout=110)
    text = child.stdout + child.stderr
    print(text[-20000:])
    clean = DONE in text and ("ERROR SUMMARY: 0 errors" in text or "0 hazards" in text)
    summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line or DONE in line]
    found.note(check, "; ".join(summary)[:200] or text.strip()[-200:], good=clean)


def small(device: str) -> None:
    """What is run under the sanitizer."""
    for case in CASES[:1] if device == "cpu" else CASES:
        both_passes(make(case, device), precision=case.precision)
    if device == "cuda":
        torch.cuda.synchronize()
    print(DONE, flush=True)
