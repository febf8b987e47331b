"""The notebook is free of outputs, and its code runs from the first cell to the last."""

import json
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
from conftest import ROOT
from support import here

NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_has_no_outputs():
    assert NOTEBOOK["nbformat"] == 4
    assert len(CODE) >= 6
    for cell in CODE:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    assert set(NOTEBOOK["metadata"]) == {"kernelspec", "language_info"}


def test_the_notebook_runs(tmp_path, monkeypatch, alone, restored, capsys):
    """In this process, with an eighth of the digits and one epoch."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    here.run_here(monkeypatch, here.SMALL)
    digits = sklearn.datasets.load_digits()
    fewer = sklearn.utils.Bunch(images=digits.images[:240], target=digits.target[:240])
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: fewer)
    names: dict[str, object] = {}
    for number, cell in enumerate(CODE):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["run"].metrics["step"] == 24  # type: ignore[attr-defined]
    assert Path("runs/digits/embedding/embedding.png").exists()
    assert np.shape(names["rows"]) == (6, 48, 288)
    model, encoder, images = names["model"], names["encoder"], torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), encoder(images))  # type: ignore[attr-defined, operator]
