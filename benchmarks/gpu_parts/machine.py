"""Versions, and the ceilings of this card: bandwidth, rates of square products, the host's launches."""

from __future__ import annotations

import functools
import importlib
import os
import platform
import shutil
import subprocess

import torch

from moco.kernels.matmul import product

from . import clock
from .findings import Findings

PACKAGES = ("torch", "triton", "numpy", "torchvision", "timm", "sklearn", "PIL", "pytest", "lightly")
TOOLS = ("gcc", "compute-sanitizer", "ncu")


def run(found: Findings) -> None:
    found.note("python, kernel, cores", f"{platform.python_version()}, {platform.release()}, {os.cpu_count()}")
    for name in PACKAGES:
        try:
            found.note(name, getattr(importlib.import_module(name), "__version__", "there"))
        except Exception as error:  # of a package that is there and does not fit, anything
            found.note(name, f"not there: {error}"[:120])
    for tool in TOOLS:
        found.note(tool, shutil.which(tool) or "not on PATH")
    if not found.dry:
        with found.guarded("card"):
            card(found)
    speeds(found)


def card(found: Findings) -> None:
    about = torch.cuda.get_device_properties(0)
    found.note("card", about.name)
    found.note("multiprocessors", about.multi_processor_count)
    found.note("memory", about.total_memory / 2**30, "GiB")
    found.note("L2", about.L2_cache_size / 2**20, "MiB")
    found.note("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    with found.guarded("nvidia-smi"):
        fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        found.note("nvidia-smi", said)


def speeds(found: Findings) -> None:
    device = found.device
    with found.guarded("copy"):
        source = torch.ones(1 << (16 if found.dry else 29), device=device)
        target = torch.empty_like(source)
        taken = clock.microseconds(lambda: target.copy_(source), device, 10, 3)
        found.note("copy", 8e-3 * source.numel() / taken, "GB/s read and written")
    side = 64 if found.dry else 8192
    for precision in ("fp32", "bf16") if found.dry else ("fp32", "tf32", "bf16"):
        with found.guarded(f"products, {precision}"):
            factor = torch.randn(side, side, device=device)
            factor = factor.bfloat16() if precision == "bf16" else factor
            taken = clock.microseconds(functools.partial(product, factor, factor, precision), device, 7, 2)
            found.note(f"products, {precision}", 2e-6 * side**3 / taken, "TFLOP/s")
    small = torch.zeros(1, device=device)
    found.note("host, one small operator", clock.host_microseconds(lambda: small.add_(1), device, 2000), "us")
