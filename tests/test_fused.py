"""The fused head without a GPU: its numbers by triton's interpreter, its machine code by triton's compilers."""

import contextlib
import re
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, environment, interpreted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moco import kernels
from moco.errors import UserError
from moco.kernels import Draws, contrastive_head, fused, resolve

pytest.importorskip("triton", reason="needs the package triton: pip install triton")

# Triton 3.2 knows no sm_100, up to 3.4 it has no linker of its own for gfx942, and 3.4, 3.5 and 3.7 spill 8 to 16 bytes
# in one program of 24.
TRITON = tuple(map(int, version("triton").split(".")[:2]))
judges_code = pytest.mark.skipif(
    TRITON < (3, 6) or TRITON == (3, 7), reason="machine code is judged with triton 3.6, or 3.8 and later"
)
LIMIT = 128  # registers a thread; two programs of 256 threads then fit a multiprocessor of 65,536 registers


def test_the_interpreted_programs_agree_with_the_reference():
    assert interpreted("fused_interpreted.py") >= 60


def test_runs_on_the_interpreted_programs():
    assert interpreted("runs_interpreted.py") >= 2


@judges_code
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    ("name", "width", "precision"),
    [
        ("select", 32, "fp32"),
        ("average", 32, "fp32"),
        ("head", 32, "fp32"),
        ("head", 128, "fp32"),
        ("head", 512, "fp32"),
        ("head", 128, "bf16"),
    ],
)
def test_it_compiles_without_spills(name, width, precision, target, resources, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = resources.signature
    probability = {"probability": f"*{precision}"} if name == "head" else {}
    monkeypatch.setattr(resources, "signature", lambda *program: {**types(*program), **probability})
    used = resources.usage(target, *resources.variants(width)[name])
    assert 0 < used.registers <= LIMIT
    assert used.spilled == 0
    assert used.shared <= 48 * 1024


def test_the_resource_reader_sees_a_spill(resources, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    starved = resources.usage("sm_90", *resources.variants(128)["head"], maxnreg=32)
    assert starved.registers <= 32
    assert starved.spilled > 0


def test_no_offset_of_a_matrix_is_computed_in_32_bits(resources, tmp_path, monkeypatch):
    # N K passes 2^31 long before memory ends; a query's number is widened before anything multiplies it.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in ("select", "head"):
        code = resources.compile_for("sm_90", *resources.variants(128)[name]).asm["ttir"]
        query = re.search(r"(%\S+) = tt.get_program_id x", code)
        assert query, code
        users = re.findall(rf".*{query.group(1)}\b(?! =).*", code)
        assert users
        assert all("arith.extsi" in line and "i64" in line for line in users)


class Operators(TorchDispatchMode):
    """What would be launched on a GPU, inside our operator too, and how float32 is multiplied meanwhile."""

    def __init__(self):
        super().__init__()
        self.names, self.products = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.moco.contrastive_head.default:
            with self:
                return kernels._compute(*args)
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        is_rounding = name == "to" and result.dtype != args[0].dtype  # else a view, by its schema
        if func.namespace == "aten" and (is_rounding or not is_view) and not name.startswith(("empty", "new_empty")):
            self.names.append(name)
        if "mm" in name:
            backend = torch.backends.cuda.matmul
            new = hasattr(backend, "fp32_precision")  # torch 2.9 on, and then the old question is an error
            self.products.append(backend.fp32_precision if new else torch.get_float32_matmul_precision())
        return result


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("precision", "library", "setting"),
    [
        ("fp32", ["addmm_", "mm"], ("ieee", "highest")),
        ("tf32", ["addmm_", "mm"], ("tf32", "high")),
        ("bf16", ["to", "to", "add_", "mm", "mm"], ("ieee", "highest")),
    ],
)
def test_a_step_is_at_most_nine_launches_and_the_host_waits_for_none(precision, library, setting, masked, monkeypatch):
    """On tensors of a GPU that have no data: whatever asks for a value, so that no graph could capture it, raises."""
    launched = []
    monkeypatch.setattr(fused, "_launch", lambda program, *_, **__: launched.append(program.fn.__name__))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(kernels, "gpu_has_bf16", lambda: True)
    with FakeTensorMode():

        def of(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="cuda")

        slots = of(4, 8, dtype=torch.int64)
        draws = Draws(slots, slots[:, :2], *[of(4, 2) for _ in range(6)], of(4, 2, 16))
        ids = {name: of(rows, dtype=torch.int64) for name, rows in (("ids", 4), ("queue_ids", 50))} if masked else {}
        q = of(4, 16).requires_grad_()
        with Operators() as operators:
            head = contrastive_head(
                q, of(4, 16), of(50, 16), temperature=0.2, n_hard=9, draws=draws, impl="triton", precision=precision,
                **ids,
            )  # fmt: skip
            assert head.loss.grad_fn is not None
            # Autograd's engine wants a real GPU: what it would call, without it.
            saved = SimpleNamespace(saved_tensors=head.loss.grad_fn.saved_tensors, draws=[])
            with torch.no_grad():
                gradient, *others = kernels._backward(saved, of(), None, None, None, None)
    assert (gradient.shape, gradient.dtype) == (q.shape, torch.float32)
    assert not any(others)
    assert launched == ["select", "head", "average"]
    # The library's products and what they need, and the gradient times the incoming scalar.
    assert sorted(operators.names) == sorted([*library, "mul"])
    assert set(operators.products) <= set(setting)


def test_where_it_runs(monkeypatch):
    assert resolve("triton", "cuda") == "triton"
    assert resolve("auto", "cuda") == "triton"  # if it passes its trial: test_trial.py
    assert resolve("auto", "cpu") == resolve("auto", "mps") == "cpu"
    with pytest.raises(UserError, match="needs a GPU.*--head-impl auto"):
        resolve("triton", "cpu")
    monkeypatch.setattr(fused, "available", lambda: False)
    assert resolve("auto", "cuda") == "cpu"
    with pytest.raises(UserError, match="pip install triton"):
        resolve("triton", "cuda")


def test_nothing_imports_triton_before_a_launch():
    code = "import sys, moco.kernels.views; assert not [name for name in sys.modules if name.startswith('triton')]"
    subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, check=True, timeout=300)
