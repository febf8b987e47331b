"""The benchmark of a whole step makes real steps, in pairs, and its ratios are those of steps of one round."""

import pytest
import torch

from moco import distributed

TINY = ["-a", "test_resnet", "--size", "16", "-b", "8", "--moco-k", "1100", "--moco-dim", "16", "--amp", "off"]


@pytest.fixture(scope="module")
def bench(script):
    return script("speed.training_step")


def test_it_prints_a_ratio_for_each_method(bench, capsys):
    assert bench.main(["--rounds", "2", *TINY]) == 0
    out = capsys.readouterr().out
    assert out.startswith("test_resnet at 16 px, batch 8, K 1100, one process on")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["plain", "moco", "synco", "mochi"]
    assert all(float(row[2]) > 0 and " to " in row[3] for row in rows[1:])
    assert [row[-1].rpartition(" ")[0] for row in rows] == ["", "", "<= 1.05:", "<= 1.05:"]


def weights(trainer):
    """All parameters of each of the two encoders, copied."""
    encoders = (trainer.model.encoder_q, trainer.model.encoder_k)
    return [torch.cat([p.detach().flatten() for p in encoder.parameters()]) for encoder in encoders]


def test_each_trainer_makes_a_whole_step_of_its_method_a_round(bench, monkeypatch):
    seen = {}
    measure = bench.measure

    def spy(trainers, source, rounds):
        before = {name: weights(t) for name, t in trainers.items()}
        found = measure(trainers, source, rounds)
        seen.update({name: (t, before[name]) for name, t in trainers.items()})
        return found

    monkeypatch.setattr(bench, "measure", spy)
    assert bench.main(["--rounds", "2", "--methods", "synco", *TINY]) == 0
    mass = {}
    for name, (trainer, before) in seen.items():
        assert trainer.progress.step == 4  # two rounds before the two that count
        assert int(trainer.model.queue_ptr) == 4 * 8
        assert trainer.model.queue_ids.unique().numel() == 4 * 8 + 1  # all numbers differ, the rest is empty
        assert not any(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
        mass[name] = float(trainer.last.statistics["synthetic_mass"])
    assert mass["plain"] == 0
    assert mass["synco"] > 0


def test_ratios_are_taken_within_rounds(bench):
    # The machine slowed down tenfold in the last two rounds; the step itself costs 4 % more, once 8 %.
    found = {"plain": [100, 100, 1000, 1000], "moco": [100, 100, 1000, 1000], "synco": [104, 108, 1040, 1040]}
    lines = bench.report(found).splitlines()
    assert lines[2] == "| plain | 550 |  |  |  |  |"
    assert lines[3] == "| moco | 550 | 1.000 | 1.000 to 1.000 | 1.000 |  |"
    assert lines[4] == "| synco | 574 | 1.040 | 1.040 to 1.050 | 1.040 | <= 1.05: met |"
    assert "missed" in bench.report({**found, "synco": [106, 106, 1060, 1060]})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["--rounds", "1"], "quartiles need at least 2"), (["--moco-k", "0"], "--moco-k must be at least 1"),
     (["--head-impl", "triton", "--rounds", "2"], "--head-impl triton needs a GPU")],
)  # fmt: skip
def test_a_wrong_flag_is_one_sentence(bench, words, sentence, capsys):
    if sentence.endswith("GPU") and distributed.device().type == "cuda":
        words = ["--gpu", "99"]
        sentence = "--gpu 99"
    try:
        code = bench.main([*TINY, *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert sentence in capsys.readouterr().err
