"""Whole training runs on the fused head, by triton's interpreter on the CPU or compiled on a card.

As kernels/by_triton_interpreted.py, of which test_by_triton.py says how it is run:  TRITON_INTERPRET=1 python -m pytest
tests/runs/runs_interpreted.py  `pytest -m gpu` runs it compiled, with the views finished on the card.
"""

import pytest
from conftest import SYNCO, TINY, assert_runs_there, differences, load, mend_interpreter

mend_interpreter()
FUSED = [*TINY, "--method", "synco", *SYNCO, "--head-impl", "triton", "--knn-every", 0]


@pytest.fixture(autouse=True)
def interpreter():
    assert_runs_there()


def trained(in_process, folder, images, *words):
    """The checkpoint of a run of a few steps."""
    assert in_process(*FUSED, *words, "--save-dir", folder, images) == 0
    return load(folder)


def test_two_runs_with_one_seed_have_the_same_bits(image_folder, tmp_path, in_process, capsys):
    one, other = (trained(in_process, tmp_path / name, image_folder, "--steps", 2) for name in "ab")
    assert differences(one, other) == []
    assert "triton" in capsys.readouterr().out
    assert one["run"]["step"] == 2
    assert all(bool(value.isfinite().all()) for value in one["state_dict"].values())
    shorter = trained(in_process, tmp_path / "c", image_folder, "--steps", 1)
    assert any(name.startswith(".state_dict.module.encoder_q") for name in differences(one, shorter))  # it trained


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(image_folder, tmp_path, in_process):
    whole = trained(in_process, tmp_path / "whole", image_folder, "--epochs", 1)
    parts = [tmp_path / "parts", image_folder, "--epochs", 1, "--max-minutes", 0]
    assert in_process(*FUSED, *parts[2:], "--save-dir", *parts[:2]) == 75  # stops after a step
    assert load(tmp_path / "parts")["run"]["step"] < whole["run"]["step"]
    resumed = trained(in_process, tmp_path / "parts", image_folder, "--epochs", 1, "--resume", "auto")
    assert differences(whole["state_dict"], resumed["state_dict"]) == []
