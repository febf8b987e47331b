"""The fused head without a GPU: its numbers by triton's interpreter, its machine code by triton's compilers."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from moco.errors import UserError
from moco.kernels import fused, resolve

pytest.importorskip("triton", reason="needs the package triton: pip install triton")

LIMIT = 128  # registers a thread; two programs of 256 threads then fit a multiprocessor of 65,536 registers


def test_the_interpreted_programs_agree_with_the_reference():
    """All of fused_interpreted.py, in a process that chose the interpreter before triton was imported."""
    suite = Path(__file__).with_name("fused_interpreted.py")
    words = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(suite)]
    env = environment(TRITON_INTERPRET="1")
    child = subprocess.run(words, env=env, capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert child.returncode == 0, child.stdout + child.stderr
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed, child.stdout
    assert int(passed.group(1)) >= 60
    assert "skipped" not in child.stdout


@pytest.fixture(scope="module")
def resources():
    spec = importlib.util.spec_from_file_location("kernel_resources", ROOT / "benchmarks" / "kernel_resources.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    ("name", "width"), [("select", 32), ("average", 32), ("head", 32), ("head", 128), ("head", 512)]
)
def test_it_compiles_without_spills(name, width, target, resources, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
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


def test_where_it_runs(monkeypatch):
    assert resolve("triton", "cuda") == "triton"
    assert resolve("auto", "cuda") == resolve("auto", "cpu") == resolve("auto", "mps") == "cpu"
    with pytest.raises(UserError, match="needs a GPU.*--head-impl auto"):
        resolve("triton", "cpu")
    monkeypatch.setattr(fused, "available", lambda: False)
    with pytest.raises(UserError, match="pip install triton"):
        resolve("triton", "cuda")


def test_nothing_imports_triton_before_a_launch():
    code = "import sys, moco.kernels; assert not {'triton', 'moco.kernels.programs'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, check=True, timeout=300)
