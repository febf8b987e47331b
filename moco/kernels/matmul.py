"""The two library matrix products of a step, with operands of a chosen precision and sums in float32.

Everything else of the head stays in float32 and so does the queue. Rounding the operands of s = q . n to bf16 (8 bits)
moves it by at most 2^-8 |q| |n|, a random walk of 2e-4 for unit rows of 128 features; tf32 (11 bits) by an eighth.

What torch offers on a CPU is a permission, not an order: told that bf16 will do, it hands a float32 product to oneDNN,
and oneDNN rounds the operands where that is faster on this processor (with AMX), and not where it is not (AVX-512 of an
AMD EPYC, a few rows). So nobody knows beforehand what runs. ``library_rounding`` asks, with operands whose rounding
shows, and ``product`` rounds by hand wherever the library would not.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import platform
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

PRECISIONS = ("auto", "fp32", "tf32", "tf32x3", "bf16")
ALL, NONE, SOME = "all", "none", "some"  # of a product's operands, what the library rounds
BETWEEN = 1 + 2**-9  # a float32 number that bf16 has not: it becomes 1


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether torch's library knows how to multiply bf16 on this processor (AVX-512 BF16, AMX, SVE BF16)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def bf16_is_faster() -> bool:
    """Whether "auto" multiplies in bf16 on this CPU: its library does so by itself, which is where there is a gain.

    A question of what the machine can do, not of a clock, so that a resumed run gets the same answer.
    """
    return cpu_has_bf16() and library_rounding(torch.empty(256, 128), torch.empty(4096, 128).T) == ALL


@functools.cache
def _by_amd() -> bool:
    """Whether AMD made this processor: there oneDNN's float32 product takes half the time of MKL's, which torch prefers
    (measured on an EPYC of Zen 5, benchmarks/speed/contrastive_loss.py)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return any("AuthenticAMD" in line for line in itertools.islice(lines, 16))
    except OSError:
        return "AuthenticAMD" in platform.processor()


def gpu_has_bf16() -> bool:
    """Whether this torch (2.8 on) multiplies bf16 into a float32 result on a GPU."""
    return hasattr(torch.ops.aten.mm, "dtype")


@contextlib.contextmanager
def operands(precision: str, on_gpu: bool) -> Iterator[None]:
    """Torch's float32 products inside may round their operands to ``precision``, with fp32 not at all, whatever the
    process is set to; that setting returns after. For the device's own kind of products, a GPU's or a CPU's."""
    backend = torch.backends.cuda.matmul if on_gpu else getattr(torch.backends.mkldnn, "matmul", None)
    if backend is None or not hasattr(backend, "fp32_precision"):  # torch before 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision({"fp32": "highest", "tf32": "high", "bf16": "medium"}[precision])
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    before = backend.fp32_precision
    backend.fp32_precision = "ieee" if precision == "fp32" else precision
    try:
        yield
    finally:
        backend.fp32_precision = before


class _Permission:
    """``operands`` on a CPU for several threads: the setting is the process's, so threads that want the same share it
    and others wait for their turn."""

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.holders, self.precision, self.setting = 0, "", contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self, precision: str) -> Iterator[None]:
        with self.turn:
            self.turn.wait_for(lambda: not self.holders or self.precision == precision)
            if not self.holders:
                self.precision = precision
                self.setting.enter_context(operands(precision, on_gpu=False))
            self.holders += 1
        try:
            yield
        finally:
            with self.turn:
                self.holders -= 1
                if not self.holders:
                    self.setting.close()
                    self.turn.notify_all()


_permission = _Permission()


def library_rounding(a: Tensor, b: Tensor) -> str:
    """What torch rounds to bf16 in a @ b on a CPU where it may: ``ALL`` of the operands, ``NONE`` or ``SOME``.

    Found by one product of the same shapes and strides, once for each; no number of ``a`` and ``b`` is read.
    """
    return _rounding(a.shape, a.stride(), b.shape, b.stride(), torch.get_num_threads())


@functools.cache
def _rounding(a_shape, a_stride, b_shape, b_stride, threads: int) -> str:
    a, b = (
        torch.empty_strided(shape, stride, dtype=torch.float32, device="cpu").fill_(BETWEEN)
        for shape, stride in ((a_shape, a_stride), (b_shape, b_stride))
    )
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _permission("bf16"):
        found = (a @ b) / max(1, a_shape[1])  # of rounded operands 1, of others BETWEEN^2
    if bool((found == 1).all()):
        return ALL
    return NONE if bool(((found - BETWEEN**2).abs() < 1e-4).all()) else SOME


def product(a: Tensor, b: Tensor, precision: str, out: Tensor | None = None) -> Tensor:
    """a (n, p) @ b (p, m), summed and returned in float32 (float64 for float64), into ``out`` (n, m) if given.

    precision: of the operands, "fp32" (as they are), "tf32" or "bf16". Operands may come in bf16 already.
    """
    if a.is_cuda and precision == "bf16":
        return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32, out=out)
    if a.is_cuda:
        setting = operands(precision, on_gpu=True)
    else:
        a, b, allowed = _for_cpu(a, b, precision)
        setting = _permission(allowed)
    with setting:
        return torch.mm(a, b, out=out)


def _for_cpu(a: Tensor, b: Tensor, precision: str) -> tuple[Tensor, Tensor, str]:
    """Operands as they are to be multiplied, and what torch may round them to."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    a, b = a.to(wide), b.to(wide)
    if precision == "bf16":
        if library_rounding(a, b) != ALL:
            a, b = a.bfloat16().to(wide), b.bfloat16().to(wide)
        return a, b, "bf16"
    to_onednn = wide == torch.float32 and a.device.type == "cpu" and _by_amd() and cpu_has_bf16()
    if to_onednn and library_rounding(a, b) == NONE:
        return a, b, "bf16"  # a permission that is not used, and the way to oneDNN
    return a, b, "fp32"
