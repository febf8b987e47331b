"""The benchmark of the contrastive head runs, and its variants compute what they are called."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "contrastive_head.py"
SMALL = ["--n", "4", "--k", "300", "--dim", "16", "--hard", "20", "--counts", "5", "4", "6", "2", "3", "2"]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_contrastive_head", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_prints_a_table(bench, capsys):
    assert bench.main([*SMALL, "--repeats", "2", "--no-memory"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0][2:] for row in rows] == list(bench.VARIANTS)


def test_peak_memory_comes_from_a_fresh_process(bench):
    peak = bench.child_peak(bench.OURS, SMALL)
    assert peak == "n/a" or int(peak) >= 0


def test_variants_agree(bench):
    p = bench.make_problem(bench.parse(SMALL))
    loss = {name: bench.forward_backward(variant, p) for name, variant in bench.VARIANTS.items()}
    gradient = p.q.grad.clone()
    assert loss["ours, no synthetic"] == pytest.approx(loss[bench.BASE], rel=1e-5)
    assert loss[bench.OURS] == pytest.approx(loss["reference, SynCo"], rel=1e-5)
    assert loss[bench.NAIVE] == pytest.approx(loss[bench.OURS], rel=1e-5)
    bench.forward_backward(bench.plain_moco, p)
    assert float((gradient - p.q.grad).abs().max()) < 1e-6
