"""benchmarks/gpu.py: every part runs dry, no failure stops the rest, limits hold, and the verdicts are those of the
numbers."""

import importlib
import json
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, environment, interpreted


@pytest.fixture(scope="module")
def gpu(script):
    return script("gpu")


@pytest.fixture(scope="module")
def judge(script):
    return script("gpu_parts.verdicts")


def test_every_part_runs_dry(gpu):
    pytest.importorskip("triton", reason="needs the package triton: pip install triton")
    assert interpreted("benchmarks/gpu_dry.py") == len(gpu.PARTS) + 2


# Running ------------------------------------------------------------------------------------------------------------

NOTE = """
import signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.gpu_parts.findings import Findings
found = Findings(Path({file!r}), dry=True)
found.note("before", 1.5, "us", good=True)
{then}
"""
THEN = {
    "ends": "found.keep('')",
    "raises": "raise SystemExit('no such thing')",
    "hangs": "time.sleep(60)",
    "ignores": "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)",
    "writes nothing": "Path({file!r}).unlink(); raise SystemExit('died')",
}


@pytest.fixture
def begun(gpu, tmp_path, monkeypatch):
    """A run whose parts are small programs: {part: (what it does after its first row, seconds)}."""
    order = []

    def run(what, left=1000.0):
        def begin(self, name, seconds):
            file = str(tmp_path / f"{name}.json")
            order.append(name)
            then, limit = what.get(name, ("ends", 30))
            code = NOTE.format(root=str(ROOT), file=file, then=THEN[then].format(file=file))
            return gpu.begin(name, [sys.executable, "-c", code], tmp_path, min(limit, seconds))

        monkeypatch.setattr(gpu.Run, "begin", begin)
        return gpu.measure(list(gpu.PARTS), gpu.Run(tmp_path, False, time.monotonic() + left)), order

    return run


def test_one_failure_stops_nothing_and_what_was_found_is_kept(begun, gpu, judge, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "GRACE", 0.3)
    begins = time.monotonic()
    what = {"errors": ("raises", 30), "ties": ("hangs", 1), "views": ("ignores", 1), "loss": ("writes nothing", 30)}
    found, _ = begun(what)
    assert time.monotonic() - begins < 20
    assert list(found) == list(gpu.PARTS)
    assert {name: part["exit_code"] for name, part in found.items() if part["exit_code"]} == {
        "errors": 1, "ties": -15, "views": -9, "loss": 1,
    }  # fmt: skip
    for name, part in found.items():
        assert [row["value"] for row in part["rows"]] == ([] if name == "loss" else [1.5]), name
        assert bool(part["error"]) == (name in what), name
    assert found["loss"]["error"] == "left nothing; its log ends:   before: 1.5 us ok\ndied\n"
    text = gpu.write(tmp_path, found, tmp_path, 9.0)
    assert "| part ties: checks that are right | 1 of 1; did not end by itself | all | missed |" in text
    assert "| part steps: checks that are right | 1 of 1 | all | met |" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["parts"] == found
    assert (tmp_path / "table.md").read_text().startswith(text)
    assert "######## ties\n" in (tmp_path / "log.txt").read_text()
    assert {line.split(":")[0] for line in judge.wrong(found)} == set(what)


def test_parts_that_time_run_alone_and_where_time_runs_out_they_are_left_out(begun, gpu):
    _, order = begun({})
    beside = [name for name, part in gpu.PARTS.items() if not part.alone]
    assert order[0] == "machine"
    assert order[1 : len(beside) + 1] == beside
    found, order = begun({}, left=20)
    assert {name for name, part in found.items() if "left_out" in part} == set(gpu.PARTS) - set(beside)


def test_a_part_whose_packages_are_missing_is_left_out_by_name(begun, script, monkeypatch):
    parts = script("gpu_parts")
    find = importlib.util.find_spec
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None if name == "PIL" else find(name))
    found, order = begun({})
    without = {name for name, part in parts.PARTS.items() if "PIL" in part.needs}
    assert without == {name for name, part in found.items() if "left_out" in part} == set(parts.PARTS) - set(order)
    assert found["steps"] == {"left_out": "this Python has no PIL"}
    assert {"errors", "ties", "manners", "loss", "machine"} <= set(order)


def test_the_plain_command_needs_no_package_to_list_its_parts(gpu):
    words = [sys.executable, "-S", "-E", str(ROOT / "benchmarks" / "gpu.py"), "--list"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=True)
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(gpu.PARTS)
    assert sum(part.seconds for part in gpu.PARTS.values() if part.alone and part.usual) <= 450


def test_without_a_gpu_each_part_says_so(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["--parts", "ties", "--out", str(tmp_path)]) == 1
    assert "torch finds no GPU; --dry runs on a CPU" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "results.json", "table.md"]


def test_make_gpu_runs_it(gpu):
    if shutil.which("make") is None:
        pytest.fail("the tests are started by make")
    done = subprocess.run(["make", "-n", "gpu"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ".venv/bin/python benchmarks/gpu.py" in done.stdout


@pytest.mark.parametrize("order", ["{test} {verdict} [  3%]", "[gw1] [  3%] {verdict} {test} "])
def test_tests_that_failed_are_named(order, script, tmp_path, capsys):
    tests, findings = script("gpu_parts.tests"), script("gpu_parts.findings")
    one, other = "tests/runs/test_gpu.py::test_a[fp32-(5, 67)-False]", "tests/kernels/by_triton_interpreted.py::test_b"
    lines = [order.format(test=one, verdict="PASSED"), order.format(test=other, verdict="FAILED"), "gibberish",
             f"FAILED {other} - AssertionError: assert 1", ""]  # fmt: skip
    found = findings.Findings(tmp_path / "part.json", dry=False)
    tests.report(found, [line.strip() for line in lines])
    assert [(row["value"], row["verdict"]) for row in found.rows] == [(1, "ok"), (other, "WRONG")]
    assert {path.split("/")[-1] for path in tests.FILES} >= {
        "test_gpu.py",
        "by_triton_interpreted.py",
        "views_interpreted.py",
    }


# Verdicts -----------------------------------------------------------------------------------------------------------


def part_of(numbers):
    rows = [{"what": name, "value": value, "unit": "", "verdict": ""} for name, value in numbers.items()]
    return {"loss": {"rows": rows, "error": ""}}


def test_goals_ask_for_rows_that_the_parts_write(script, judge):
    loss, steps = script("gpu_parts.loss"), script("gpu_parts.steps")
    names = [loss.row(*size, variant, what) for size in loss.SIZES for variant in loss.bench.VARIANTS
             for what in (loss.EVENTS, loss.GRAPH, loss.MEMORY)]  # fmt: skip
    whats = ("time relative to moco", "host waits")
    names += [
        steps.row(*setting, method, what) for setting in steps.SETTINGS for method in steps.METHODS for what in whats
    ]
    assert judge.PLAIN == loss.bench.BASE
    rows = judge.judged(part_of(dict.fromkeys(names, 1.0)))
    assert judge.UNKNOWN not in {row["verdict"] for row in rows}
    assert len(rows) == 8 + 5 + 8


@pytest.mark.parametrize(
    ("of_plain", "of_floor", "verdicts"),
    [(0.5, 1.5, ("met", "met")), (0.51, 1.51, ("missed", "missed")), (None, None, ("not measured", "not measured"))],
)
def test_verdicts_are_those_of_the_numbers(of_plain, of_floor, verdicts, judge):
    size, numbers = "N 32, K 65536", dict[str, float]()
    if of_plain is not None:
        numbers = {
            f"{size}, {judge.FUSED}, us by events": 100 * of_plain,
            f"{size}, {judge.PLAIN}, us by events": 100.0,
        }
        numbers[f"{size}, {judge.FUSED}, us by graph"] = 41 * of_floor
    rows = {row["what"]: row for row in judge.judged(part_of(numbers))}
    asked = rows[f"loss, tf32, relative to plain MoCo, {size}, us by events"]
    assert (asked["verdict"], asked["limit"]) == (verdicts[0], "at most 0.5")
    assert asked["value"] == of_plain
    assert rows[f"loss, tf32, over the H100's floor of 41 us, {size}"]["verdict"] == verdicts[1]
