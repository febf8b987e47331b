"""Draws by the Triton program, run by triton's interpreter on the CPU: those of the definition in torch.

Not collected by itself: the interpreter has to be chosen before triton is imported, so test_draws.py runs this file in
a process of its own, as anyone can:  TRITON_INTERPRET=1 python -m pytest tests/kernels/draws_interpreted.py
"""

import warnings

import conftest
import pytest
import torch

from moco.config import MoCHiConfig, SynCoConfig
from moco.kernels import by_triton, draws
from moco.methods import mochi, negatives, synco
from moco.methods.negatives import Synthetic, draw, synthetic

DEVICE = torch.device(getattr(conftest, "DEVICE", "cpu"))  # a card under ``pytest -m gpu``
conftest.mend_interpreter()


@pytest.fixture(autouse=True)
def interpreter():
    assert by_triton.interpreted() == (DEVICE.type == "cpu"), (
        "set TRITON_INTERPRET=1, or unset it and run pytest -m gpu"
    )


RECIPES = {
    "synco": synco.recipe(SynCoConfig(9, 8, 7, 5, 6, 4)),
    "the paper's extrapolation": synco.recipe(SynCoConfig(3, 200, 2, 1, 1, 1, extrapolation="paper")),
    "mochi": mochi.recipe(MoCHiConfig(140, 20)),
    "noise alone": (synthetic("noise", 3),),
    "sign alone": (synthetic("adversarial", 1),),
    "a kind twice": (synthetic("mixup", 5), synthetic("noise", 2), Synthetic("mixup", 5, 0.2, 0.3)),
}


def pair(recipe, n, hard, dim, key):
    rows = negatives.counted(recipe)
    both = (
        draws.by_triton(rows, n, hard, dim, key, DEVICE),
        draws.by_torch(rows, n, hard, dim, key, torch.device("cpu")),
    )
    return zip(vars(both[0]).items(), vars(both[1]).values(), strict=True)


@pytest.mark.parametrize(
    ("n", "hard", "dim", "key"), [(1, 1, 1, 0), (3, 1024, 128, 2**63 - 1), (5, 20, 37, 12345), (2, 7, 512, 2**40)]
)
@pytest.mark.parametrize("name", list(RECIPES))
def test_they_are_the_defined_ones(name, n, hard, dim, key):
    for (field, found), right in pair(RECIPES[name], n, hard, dim, key):
        assert found.dtype == right.dtype, field
        assert found.is_contiguous(), field
        tolerance = 0 if field.startswith("slots") else draws.APPROXIMATION if field == "noise" else 1e-6
        torch.testing.assert_close(found.cpu(), right, rtol=0, atol=tolerance)


def test_blocks_do_not_show(monkeypatch):
    rows = negatives.counted(RECIPES["synco"])
    whole = draws.by_triton(rows, 3, 20, 12, 5, DEVICE).tensors()
    monkeypatch.setattr(draws, "BLOCK_S", 16)
    for one, other in zip(whole, draws.by_triton(rows, 3, 20, 12, 5, DEVICE).tensors(), strict=True):
        assert torch.equal(one, other)


def test_a_program_that_agrees_is_used_in_one_launch(monkeypatch):
    run, launches = by_triton.run_program, []
    monkeypatch.setattr(
        by_triton, "run_program", lambda *given, **more: launches.append(given[1]) or run(*given, **more)
    )
    monkeypatch.setattr(negatives, "by_counter", lambda device: True)
    draws.agrees.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = draw(RECIPES["synco"], 4, 20, 12, 5, DEVICE)
    assert found is not None
    assert launches[1:] == [(4, 1 + 5)]  # after the comparison's
