"""Every part of benchmarks/gpu.py at its dry sizes, by triton's interpreter; test_gpu_parts.py runs this file."""

import importlib
import json

import pytest
from conftest import assert_runs_there, mend_interpreter

mend_interpreter()

from benchmarks.gpu_parts import PARTS  # noqa: E402
from benchmarks.gpu_parts.findings import OK, Findings  # noqa: E402

# numpy's own words where the interpreter meets the NaN that a part puts in
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")
LEAST = {
    "errors": 20,
    "ties": 12,
    "manners": 3,
    "views": 8,
    "steps": 2,
    "norms": 2,
    "tuning": 4,
}  # checks that a part makes


@pytest.fixture(autouse=True)
def interpreter():
    assert_runs_there()


@pytest.mark.parametrize("name", PARTS)
def test_a_part_runs_and_finds_nothing_wrong(name, tmp_path):
    assert PARTS[name].missing() == []
    found = Findings(tmp_path / "part.json", dry=True)
    importlib.import_module(f"benchmarks.gpu_parts.{name}").run(found)
    left = json.loads((tmp_path / "part.json").read_text())["rows"]
    assert left == found.rows
    assert left
    asked = [row for row in left if row["verdict"]]
    assert [row for row in asked if row["verdict"] != OK] == []
    assert len(asked) >= LEAST.get(name, 0)


def test_another_row_among_equals_is_seen(tmp_path, monkeypatch):
    """The definition takes the lower of two equal rows; a reference that takes the higher is another set."""
    from benchmarks.gpu_parts import ties
    from moco.kernels import reference

    def higher(similarity, hard):
        values, rows = similarity.flip(1).sort(dim=1, descending=True, stable=True)
        rows = (similarity.shape[1] - 1 - rows)[:, :hard].sort(1).values
        return rows, similarity.gather(1, rows)

    monkeypatch.setattr(reference, "hardest_rows", higher)
    monkeypatch.setattr(ties, "SIZES", ((4, 303, 20),))
    found = Findings(tmp_path / "part.json", dry=True)
    ties.run(found)
    assert {row["verdict"] for row in found.rows} == {"WRONG"}


def test_a_wrong_gradient_is_seen(tmp_path, monkeypatch):
    from benchmarks.gpu_parts import errors, problems

    right = problems.both_passes

    def wrong(p, impl="triton", **how):
        head, gradient = right(p, impl, **how)
        return head, gradient * (1.001 if impl == "triton" else 1)

    monkeypatch.setattr(errors, "both_passes", wrong)
    monkeypatch.setattr(errors, "DRY", ("as published",))
    found = Findings(tmp_path / "part.json", dry=True)
    errors.run(found)
    assert [row["verdict"] for row in found.rows if row["what"].startswith("error, ")] == ["WRONG"]
