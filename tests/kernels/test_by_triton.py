"""The fused head without a GPU: its numbers by triton's interpreter, its machine code by triton's compilers."""

import contextlib
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, environment, interpreted
from support.machine_code import judges_code
from support.versions import dataless_gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moco import kernels
from moco.errors import UserError
from moco.kernels import Draws, by_triton, contrastive_loss, resolve
from moco.kernels.by_triton import COMPACT_K, MOST_MAXIMA, PULL_K, GridPlan

# Bytes of shared memory of which a program may have all: a smaller GPU of the generation, or the other way to share it.
LEAST_SHARED = {"sm_80": 99 << 10, "sm_90": 113 << 10, "sm_100": 113 << 10, "gfx942": 64 << 10}


def test_the_interpreted_programs_agree_with_the_reference():
    assert interpreted("kernels/by_triton_interpreted.py") >= 60


def test_runs_on_the_interpreted_programs():
    assert interpreted("runs/runs_interpreted.py") >= 2


@judges_code
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(("queries", "width"), [(32, 128), (256, 128), (32, 32), (256, 512), (256, 100)])
def test_it_compiles_without_spills(queries, width, target, resources, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    precisions = ("tf32x3", "bf16") if width == 128 else ("tf32x3",)
    for name, variant in resources.variants(width, queries, precisions).items():
        for aligned in (True, False) if name.startswith(("score", "pull")) else (False,):
            used = resources.usage(target, *variant, aligned=aligned)
            assert 0 < used.registers <= 256, (name, aligned)
            assert used.spilled == 0, (name, aligned)
            assert used.shared <= LEAST_SHARED[target], (name, aligned)


UNUSUAL = [GridPlan(1, 65536, 128, 1024, 960), GridPlan(17, 65536, 200, 1024, 960), GridPlan(64, 65536, 128, 4096, 960),
           GridPlan(64, 4096, 128, 1024, 960), GridPlan(8, 1 << 20, 64, 1024, 960),
           GridPlan(4096, 65536, 128, 10_000, 960)]  # fmt: skip


@judges_code
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("plan", UNUSUAL, ids=str)
def test_unusual_sizes_compile_without_spills(plan, target, resources, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in ("score", "exact", "draws", "pull"):
        program, constants = getattr(by_triton.programs(), name), plan.constants()[name]
        assert resources.usage(target, program, constants, "tf32x3", plan.width, aligned=False).spilled == 0, name


def test_sizes_of_one_are_numbers_that_the_compiler_knows(resources, tmp_path, monkeypatch):
    """The launcher passes an argument of 1 as a constant, which no operator of a tensor may be asked of."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ones = ("N", "K", "H", "tiles", "splits", "blocks", "Sq", "Sp", "Ss", "Sn", "closed", "stride_a", "stride_b")
    for name, constants in GridPlan(1, 1, 16, 1, 8).constants(masked=True).items():
        program = getattr(by_triton.programs(), name)
        known = {**constants, **{one: 1 for one in ones if one in program.arg_names}}
        assert resources.usage("sm_90", program, known, "tf32x3", 16).spilled == 0, name


@judges_code
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_the_precisions_chosen_by_name_compile_without_spills(precision, resources, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, variant in resources.variants(128, 256, (precision,)).items():
        if name.startswith(("score", "pull", "weigh")):
            assert all(resources.usage("sm_90", *variant, aligned=aligned).spilled == 0 for aligned in (True, False))


def test_the_resource_reader_sees_a_spill(resources, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    starved = resources.usage("sm_90", *resources.variants(128)["draws"], maxnreg=24)
    assert starved.registers <= 24
    assert starved.spilled > 0


def test_no_offset_of_a_matrix_is_computed_in_32_bits(resources, tmp_path, monkeypatch):
    # N K passes 2^31 long before memory ends; a query's number is widened before anything multiplies it.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, variant in resources.variants(128, precisions=("bf16",)).items():
        code = resources.compile_for("sm_90", *variant).asm["ttir"]
        query = re.search(r"(%\S+) = tt.get_program_id x", code)
        assert query, code
        users = re.findall(rf".*{query.group(1)}\b(?! =).*", code)
        assert users
        assert all("arith.extsi" in line and "i64" in line for line in users), name


SIZES = [(n, total, width, hard) for n in (1, 3, 32, 256, 1000, 4096) for total in (1, 77, 4096, 65536, 262144)
         for width in (16, 128, 512) for hard in (1, 64, 1024, 5000, 65536) if hard <= total]  # fmt: skip


def test_every_plan_covers_what_there_is_and_fills_a_gpu():
    for n, total, width, hard in SIZES:
        plan = GridPlan(n, total, width, hard, 960)
        what = (n, total, width, hard)
        assert plan.chunks * plan.chunk >= total, what
        assert plan.splits * plan.split >= total, what
        assert plan.blocks * plan.block_s >= 960, what
        assert plan.stride >= total, what
        assert plan.bucket == 0 or (plan.maxima >= total // plan.bucket >= hard and plan.maxima <= MOST_MAXIMA), what
        for size in (plan.chunks, plan.room, plan.listing, plan.block_s, plan.block_n, plan.padded):
            assert size & (size - 1) == 0, what
        assert math.prod(plan.grids()["pull"][1:]) < 65536, what  # what a GPU takes beside its first dimension
        assert all(grid[1] < 65536 for grid in plan.grids().values()), what
    for n in (32, 64, 256):
        plan = GridPlan(n, 65536, 128, 1024, 960)
        assert min(math.prod(grid) for grid in plan.grids().values()) >= 100
        assert plan.chunk // COMPACT_K <= 16
        assert plan.split // PULL_K <= 16


def test_what_the_launches_read_is_counted_from_the_machine_code(resources, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    table = resources.occupancy(32).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in table] == list(GridPlan(32, 65536, 128, 1024, 960).grids())
    assert all(int(line.split("|")[2].replace(",", "")) >= 100 for line in table)
    assert all(int(line.split("|")[4]) >= 16 for line in table)  # a thread asks for a wide word at least
    copy = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r;"
    code = f"ld.global.v4.b32 a;\n$L__BB0_1:\nld.global.b32 {{b}};\n{copy}"
    assert resources.loads(code) == 16 + 4 + 16
    assert resources.loads(code + "\n@%p1 bra $L__BB0_1;") == 4 + 16


class Operators(TorchDispatchMode):
    """What would be launched on a GPU, inside our operator too, and how float32 is multiplied meanwhile."""

    def __init__(self):
        super().__init__()
        self.names, self.products = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.moco.contrastive_loss.default:
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


@dataless_gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [16, 13])
@pytest.mark.parametrize(
    ("precision", "library", "setting"),
    [
        ("fp32", ["addmm_", "mm"], ("ieee", "highest")),
        ("tf32", [], ()),
        ("tf32x3", [], ()),
        ("bf16", [], ()),
    ],
)
def test_a_step_is_at_most_ten_launches_and_the_host_waits_for_none(
    precision, library, setting, width, masked, monkeypatch
):
    """On tensors of a GPU that have no data: whatever asks for a value, so that no graph could capture it, raises."""
    launched = []
    monkeypatch.setattr(by_triton, "run_program", lambda program, *_, **__: launched.append(program.fn.__name__))
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(kernels, "gpu_has_bf16", lambda: True)
    with FakeTensorMode():

        def of(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="cuda")

        slots = of(4, 8, dtype=torch.int64)
        draws = Draws(slots, slots[:, :2], *[of(4, 2) for _ in range(6)], of(4, 2, width))
        ids = {name: of(rows, dtype=torch.int64) for name, rows in (("ids", 4), ("queue_ids", 50))} if masked else {}
        q = of(4, width).requires_grad_()
        with Operators() as operators:
            head = contrastive_loss(
                q, of(4, width), of(50, width), temperature=0.2, n_hard=9, draws=draws, impl="triton",
                precision=precision, **ids,
            )  # fmt: skip
            assert head.loss.grad_fn is not None
            # Autograd's engine wants a real GPU: what it would call, without it.
            saved = SimpleNamespace(saved_tensors=head.loss.grad_fn.saved_tensors, draws=[])
            with torch.no_grad():
                gradient, *others = kernels._backward(saved, of(), None, None, None, None)
    assert (gradient.shape, gradient.dtype) == (q.shape, torch.float32)
    assert not any(others)
    own = ["weigh", "finish"] if precision == "fp32" else ["pull", "finish"]
    assert launched == ["score", "compact", "exact", "draws", "combine", *own]
    assert sorted(operators.names) == sorted([*library, "mul"])  # the last by the incoming scalar
    assert set(operators.products) <= set(setting)


def test_where_it_runs(monkeypatch):
    assert resolve("triton", "cuda") == "triton"
    assert resolve("auto", "cuda") == "triton"  # if it passes its trial: test_trial.py
    assert resolve("auto", "cpu") == resolve("auto", "mps") == "cpu"
    with pytest.raises(UserError, match="needs a GPU.*--head-impl auto"):
        resolve("triton", "cpu")
    monkeypatch.setattr(by_triton, "available", lambda: False)
    assert resolve("auto", "cuda") == "cpu"
    with pytest.raises(UserError, match="pip install triton"):
        resolve("triton", "cuda")


def test_nothing_imports_triton_before_a_launch():
    heavy = "[name for name in sys.modules if name.startswith('moco') and name.endswith('triton_kernels')]"
    code = f"import sys, moco.data.augment.by_triton; assert not {heavy}"
    subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, check=True, timeout=300)
