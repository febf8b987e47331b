"""The benchmark of the contrastive head runs, its variants compute what they are called, its counts are those of a
naive count, and the README of the kernels shows what the script prints."""

import json
import os
import sys

import pytest
import torch
from conftest import ROOT, rounding

SMALL = ["--dim", "16", "--hard", "20", "--counts", "5", "4", "6", "2", "3", "2", "--speed-side", "16"]
SIZES = ["--sizes", "4x300", "2x100"]


@pytest.fixture(scope="module")
def bench(script):
    return script("speed.contrastive_loss")


@pytest.fixture(scope="module")
def counts(script):
    return script("speed.kernel_bytes")


def cells(line):
    return [cell.strip() for cell in line.strip("|\n ").split("|")]


def test_it_prints_every_size_and_writes_the_same_numbers(bench, capsys, tmp_path):
    file = tmp_path / "head.json"
    assert bench.main([*SIZES, *SMALL, "--repeats", "1", "--no-memory", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    about = json.loads(file.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["head.json"]
    assert [(result["n"], result["k"]) for result in about["sizes"]] == [(4, 300), (2, 100)]
    tables = out.split("| loss, forward + backward |")[1:]
    for result, table in zip(about["sizes"], tables, strict=True):
        lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
        printed = {cells(line)[0]: cells(line)[1:] for line in lines[: len(result["variants"])]}
        assert set(printed) == set(bench.VARIANTS) - set(result["refused"])
        assert result["variants"][bench.NAIVE]["calls"] > result["variants"][bench.REFERENCE]["calls"]
        for name, row in result["variants"].items():
            assert printed[name][0] == f"{row['ms']:.1f}"
            assert printed[name][-1] == f"{row['loss']:.5f}"
            assert row["of_moco"] == pytest.approx(row["ms"] / result["variants"][bench.BASE]["ms"])
            assert row["of_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
            assert 0 < row["floor_ms"] <= row["stages_ms"]
            assert row["calls"] > 10
    assert out.count("Verdict at") == 2


def test_a_variant_that_cannot_run_says_why(bench, capsys, monkeypatch):
    assert bench.main([*SIZES[:2], *SMALL, "--repeats", "1", "--no-memory"]) == 0
    assert "Not measured: triton, fp32; " in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        bench.main(["--device", "cuda"])
    assert stop.value.code == 2
    assert "finds no GPU here; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["256", "x4", "0x4", "4x-3", "axb"])
def test_a_wrong_size_is_one_sentence(bench, word, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--sizes", word])
    assert stop.value.code == 2
    assert "write N and K as in 256x65536" in capsys.readouterr().err


def test_peak_memory_comes_from_a_fresh_process(bench):
    args = bench.parse([*SIZES[:2], *SMALL])
    peak = bench.peak_mib(bench.AUTO, args, bench.make_problem(args, (4, 300)))
    if sys.platform == "linux":
        assert 0 <= peak < 100
    else:
        assert peak is None


def test_the_profiler_writes_nothing_to_standard_error(bench, capfd):
    p = bench.make_problem(bench.parse(SMALL), (4, 300))
    assert bench.count_calls(bench.VARIANTS[bench.BASE], p) > 5
    print("afterwards", file=sys.stderr)
    os.write(2, b"and here\n")
    assert sorted(capfd.readouterr().err.splitlines()) == ["afterwards", "and here"]


def test_variants_agree(bench):
    p = bench.make_problem(bench.parse(SMALL), (4, 300))
    outcome = {}
    for name, variant in bench.VARIANTS.items():
        if not bench.refusal(lambda variant=variant: bench.step(variant, p)):
            outcome[name] = bench.step(variant, p).item(), p.q.grad.clone()
    exact = {name for name in outcome if bench.VARIANTS[name].rates == ("fp32",)}
    for name, (loss, gradient) in outcome.items():
        like = bench.REFERENCE if bench.VARIANTS[name].synthetic else bench.BASE
        tolerance = rounding(300 + 16 / 0.2) if name in exact else 2e-2  # auto may take bf16 operands
        assert loss == pytest.approx(outcome[like][0], rel=tolerance), name
        off = float((gradient - outcome[like][1]).norm() / outcome[like][1].norm())
        assert off < (rounding(300 + 16 / 0.2) if name in exact else 2e-2), name  # sums over rows, and exponents
    assert outcome[bench.NAIVE][0] > outcome[bench.BASE][0]


def test_rounds_are_interleaved_and_the_first_two_not_counted(script, monkeypatch):
    timing = script("timing")
    calls = []
    taken = {"a": iter([9.0, 9.0, 1.0, 5.0, 3.0]), "b": iter([9.0, 9.0, 2.0, 2.0, 8.0])}

    def clock(call, device):
        call()
        return next(taken[calls[-1]])

    monkeypatch.setattr(timing, "milliseconds", clock)
    found = timing.rounds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, "cpu")
    assert found == {"a": [1.0, 5.0, 3.0], "b": [2.0, 2.0, 8.0]}
    assert [sorted(calls[i : i + 2]) for i in range(0, 10, 2)] == [["a", "b"]] * 5


def test_a_turn_is_calls_in_a_row(script, monkeypatch):
    timing = script("timing")
    calls = []
    monkeypatch.setattr(timing, "milliseconds", lambda call, device: call() or float(len(calls)))
    found = timing.turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 1, "cpu", row=2)
    assert len(calls) == 2 * 2 * (timing.WARM_UP + 1)
    assert all(calls[i] == calls[i + 1] for i in range(0, len(calls), 2))
    assert sorted(found["a"] + found["b"]) == [[9.0, 10.0], [11.0, 12.0]]


@pytest.mark.parametrize(("ratio", "words"), [(0.44, "met"), (0.46, "missed")])
def test_goals_are_judged_against_the_measured_ratio(bench, ratio, words):
    rows = {bench.BASE: {"ms": 100.0, "peak_mib": 10.0}, bench.NAIVE: {"ms": 600.0, "peak_mib": 50.0}}
    rows |= {bench.AUTO: {"ms": 100 * ratio, "peak_mib": None}, bench.FP32: {"ms": 60.0, "peak_mib": 1.0}}
    result = {"n": 256, "k": 65536, "c": 128, "h": 1024, "s": 960, "variants": rows}
    judged = [found for goal in bench.GOALS if (found := bench.judge(goal, result, "cpu"))]
    assert [found["verdict"] for found in judged] == [words, "met", "met", "not measured"]
    assert judged[0]["found"] == pytest.approx(ratio)
    assert not [goal for goal in bench.GOALS if bench.judge(goal, {**result, "h": 512}, "cpu")]
    sizes = [(256, 65536), (32, 65536), (64, 16384)]
    assert {goal.size for goal in bench.GOALS if goal.device == "cpu"} == set(sizes)
    assert bench.parse([]).sizes == sizes


def test_speeds_are_work_over_the_best_time(bench, monkeypatch):
    monkeypatch.setattr(bench, "rounds", lambda calls, repeats, device: dict.fromkeys(calls, [3.0, 2.0, 9.0]))
    found = bench.speeds("cpu", 16)
    assert found == {"fp32": 2 * 16**3 / 2e-3, "bf16": 2 * 16**3 / 2e-3, "copy": 2 * 4 * 65536 * 16 / 2e-3}


# ------------------------------------------------------------------------------------------------ bytes


def test_stages_count_what_the_tensors_hold(counts, bench):
    """Bytes of the floor, from tensors of a real problem instead of from formulas."""
    p = bench.make_problem(bench.parse(SMALL), (4, 300))
    d, n, k, c, hard = p.draws, 4, 300, 16, 20
    matrix, q, queue = torch.empty(n, k).nbytes, p.q.nbytes, p.queue.nbytes
    rows, values = torch.empty(n, hard, dtype=torch.int32).nbytes, torch.empty(n, hard).nbytes
    drawn = sum(getattr(d, name).nbytes for name in type(d).__dataclass_fields__)
    of_query, of_pair, of_sign, of_noise = d.counts
    gathered = n * (2 * of_pair + of_sign + of_noise) * c * 4
    statistics = n * (4 + 8 + 4 + 4)  # loss, rank, largest similarity, synthetic mass
    assert gathered < queue
    found = {stage.name: stage for stage in counts.stages(n, k, c, hard, d.counts)}
    assert found["similarities"].floor == queue + q + matrix
    assert found["hardest set"].floor == matrix + rows + values
    assert found["head"].floor == 2 * matrix + rows + values + drawn + gathered + 3 * q + statistics
    assert found["gradient"].floor == matrix + queue + 2 * q
    assert found["similarities"].flops == found["gradient"].flops == 2 * n * k * c


def test_launches_count_what_the_programs_ask_for(counts):
    n, k, c, hard, drawn = 32, 65536, 128, 1024, (256, 256, 64, 64)
    plan = counts.GridPlan(n, k, c, hard, sum(drawn))
    asked = counts.launches(plan, drawn)
    matrix, queue = 4 * n * k, 4 * k * c
    tiles, chunks, maxima = 1024, 8, 4096
    assert asked["score"] == queue + tiles * 2 * 4 * n * c + matrix + 4 * n * maxima + 12 * n * tiles
    assert asked["compact"] == matrix + chunks * 4 * n * maxima + 8 * int(1.15 * n * hard)
    assert asked["pull"] == matrix + queue + 4 * 128 * n * c
    assert list(asked) == [name for name in plan.grids() if name != "weigh"]
    assert asked["draws"] > n * (640 + 256) * c * 4  # a row a draw, one more a pair


def test_without_draws_nothing_is_selected_or_gathered(counts):
    names = [stage.name for stage in counts.stages(4, 300, 16, 20, counts.NOTHING)]
    assert names == ["similarities", "head", "gradient"]
    head = counts.stages(4, 300, 16, 20, counts.NOTHING)[1]
    assert head.floor == 2 * 4 * 300 * 4 + 3 * 4 * 16 * 4 + 4 * 20


def test_the_floor_takes_the_slower_of_memory_and_products(counts):
    one = [counts.Stage("a", 100, 50)]
    assert counts.floor_seconds(one, bandwidth=10.0, rate=1000.0) == 10.0
    assert counts.floor_seconds(one, bandwidth=1000.0, rate=10.0) == 5.0
    assert counts.floor_seconds(one + one, bandwidth=10.0, rate=1000.0) == 20.0


def test_the_readme_of_the_kernels_shows_the_printed_bytes(counts):
    readme = (ROOT / "moco" / "kernels" / "README.md").read_text(encoding="utf-8")
    assert counts.table() in readme
