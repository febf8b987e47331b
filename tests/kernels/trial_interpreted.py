"""The trial of the fused step, with the programs themselves: by triton's interpreter on smaller steps, or on a card.

Not collected by itself: the interpreter has to be chosen before triton is imported, so test_trial.py runs this file in
a process of its own, as anyone can:  TRITON_INTERPRET=1 python -m pytest tests/kernels/trial_interpreted.py
"""

import inspect

import conftest
import pytest
import torch

from moco.kernels import by_triton, trial

# Without an argument for the queue in bf16 the fused step has products by a library alone, which has no tf32x3.
PRECISIONS = list(trial.TOLERANCE) if "shadow" in inspect.signature(by_triton.compute).parameters else ["fp32"]
DEVICE = torch.device(getattr(conftest, "DEVICE", "cpu"))  # a card under ``pytest -m gpu``
conftest.mend_interpreter()


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    assert by_triton.interpreted() == (DEVICE.type == "cpu"), (
        "set TRITON_INTERPRET=1, or unset it and run pytest -m gpu"
    )
    if DEVICE.type == "cpu":
        monkeypatch.setattr(trial, "ROWS", 330)
        monkeypatch.setattr(trial, "COUNTS", (5, 4, 2, 2))
    trial.objection.cache_clear()
    yield
    trial.objection.cache_clear()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_programs_pass(precision, masked):
    assert trial.objection(DEVICE, 32, masked, precision) == ""
