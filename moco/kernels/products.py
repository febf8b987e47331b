"""The two library matrix products of a step, with operands of a chosen precision and sums in float32.

Everything else of the head stays in float32 and so does the queue. Rounding the operands of s = q . n to bf16 (8 bits)
moves it by at most 2^-8 |q| |n|, a random walk of 2e-4 for unit rows of 128 features; tf32 (11 bits) by an eighth.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

PRECISIONS = ("auto", "fp32", "tf32", "bf16")


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 itself (AVX-512 BF16, AMX, SVE BF16) and torch's library uses it."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def gpu_has_bf16() -> bool:
    """Whether this torch (2.8 on) multiplies bf16 into a float32 result on a GPU."""
    return hasattr(torch.ops.aten.mm, "dtype")


@contextlib.contextmanager
def operands(precision: str, on_gpu: bool) -> Iterator[None]:
    """Torch's float32 products inside round their operands to ``precision``, fp32 not at all, whatever the process is
    set to; that setting returns after. For the device's own kind of products, a GPU's or a CPU's."""
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


def product(a: Tensor, b: Tensor, precision: str, out: Tensor | None = None) -> Tensor:
    """a (n, p) @ b (p, m), summed and returned in float32 (float64 for float64), into ``out`` (n, m) if given.

    precision: of the operands, "fp32" (as they are), "tf32" or "bf16". Operands may come in bf16 already.
    """
    if precision == "bf16" and a.is_cuda:
        return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32, out=out)
    if precision == "bf16" and not cpu_has_bf16():  # the same numbers, without the gain
        a, b = a.bfloat16(), b.bfloat16()
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    with operands(precision, a.is_cuda):
        return torch.mm(a.to(wide), b.to(wide), out=out)


def add_product_(total: Tensor, a: Tensor, b: Tensor, precision: str) -> None:
    """total (n, m) += a (n, p) @ b (p, m), see ``product``; one launch on a GPU, two with bf16 operands."""
    if precision == "bf16":
        total += product(a, b, precision)
        return
    with operands(precision, a.is_cuda):
        total.addmm_(a, b)
