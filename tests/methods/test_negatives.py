"""Recipes and draws of synthetic negatives.

Legend: N queries, C feature width, H hardest rows a query, S synthetic negatives a query.
"""

import pytest
import torch

from moco.config import MoCHiConfig, SynCoConfig
from moco.errors import UserError
from moco.kernels import draws as by_counters
from moco.methods import mochi, negatives, synco
from moco.methods.negatives import GROUPS, KINDS, HardNegatives, active, draw, sentences, starting_at, synthetic
from moco.methods.registry import METHODS
from moco.seeding import key


@pytest.fixture(autouse=True, params=["as on a CPU", "as on a GPU"])
def way(request, monkeypatch):
    """Both ways to draw have all of these properties; triton's numbers are the definition's: test_draws.py."""
    monkeypatch.setattr(negatives, "by_counter", lambda device: request.param == "as on a GPU")
    monkeypatch.setattr(by_counters, "agrees", lambda device: False)


RANGES = {  # hard_negatives: one coefficient a synthetic feature, U(low, high)
    "mixup": (0, 1),
    "interpolation": (0, 0.5),
    "extrapolation": (1, 1.5),
    "extrapolation-paper": (1, 1.5),
    "noise": (0.01, 0.01),
    "perturbation": (0.01, 0.01),
    "adversarial": (0.01, 0.01),
}


def drawn(recipe, n=200, hard=40, dim=6, step=0, rank=0):
    return draw(recipe, n, hard, dim, key("draws", 7, step, rank))


def coefficient(kind, d):
    """The published coefficient of each draw, from the weights."""
    return {
        "mixup": d.pair_y,
        "interpolation": d.query_x,
        "extrapolation": d.query_y,
        "extrapolation-paper": -d.query_x,
        "noise": d.noise_w,
        "perturbation": d.query_x,
        "adversarial": d.sign_v,
    }[kind]


@pytest.mark.parametrize("kind", list(KINDS))
def test_coefficients_are_uniform_over_the_published_range(kind):
    low, high = RANGES[kind]
    c = coefficient(kind, drawn((synthetic(kind, 50),)))
    assert c.shape == (200, 50)
    if low == high:
        assert torch.equal(c, torch.full_like(c, low))
    else:
        assert low <= float(c.min()) < low + 0.01
        assert high - 0.01 < float(c.max()) <= high
        shares = torch.histc(c, 10, low, high) / c.numel()
        assert float((shares - 0.1).abs().max()) < 0.02  # 6 standard deviations of a share of 10,000


@pytest.mark.parametrize("kind", list(KINDS))
def test_weights_of_each_kind(kind):
    d = drawn((synthetic(kind, 50),))
    c = coefficient(kind, d)
    expected = {
        "mixup": (d.pair_z, 1 - c),
        "interpolation": (d.query_y, 1 - c),
        "extrapolation": (d.query_x, 1 - c),
        "extrapolation-paper": (d.query_y, 1 + c),
        "perturbation": (d.query_y, torch.ones_like(c)),
    }
    if kind in expected:
        torch.testing.assert_close(*expected[kind], rtol=0, atol=1e-6)
    assert sum(d.counts) == d.slots_a.shape[1] == 50  # nothing but this kind


def test_slots_are_uniform_over_the_hardest_set_with_replacement():
    d = drawn(mochi.recipe(MoCHiConfig(300, 100)))
    for slots in (d.slots_a, d.slots_b):
        assert int(slots.min()) == 0
        assert int(slots.max()) == 39
        counts = slots.flatten().bincount(minlength=40) / slots.numel()
        assert float((counts - 1 / 40).abs().max()) < 0.005
    assert not torch.equal(d.slots_a[:, 100:], d.slots_b)  # the pair's columns come after the query's


def test_noise_is_standard_normal():
    noise = drawn((synthetic("noise", 60),)).noise
    assert noise.shape == (200, 60, 6)
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02


def test_columns_stand_in_groups_whatever_the_order_of_the_recipe():
    d = drawn(tuple(reversed(synco.recipe(SynCoConfig(6, 5, 4, 3, 2, 1)))))
    assert d.counts == (6 + 5 + 2, 4, 1, 3)
    assert d.slots_a.shape == (200, 21)
    assert d.slots_b.shape == (200, 4)


def test_draws_are_a_function_of_their_key():
    first, again = drawn(synco.recipe()), drawn(synco.recipe())
    elsewhere = [drawn(synco.recipe(), step=1), drawn(synco.recipe(), rank=1)]
    for name, tensor in vars(first).items():
        assert torch.equal(tensor, getattr(again, name))
    for other in elsewhere:
        assert not torch.equal(first.slots_a, other.slots_a)
        assert not torch.equal(first.noise, other.noise)


def columns(recipe, d, kind):
    """Everything drawn for a kind: parents, weights and noise, from the order that Draws documents."""
    rows = [row for group in GROUPS for row in recipe if KINDS[row.kind].group == group and row.count]
    start = sum(row.count for row in rows[: [row.kind for row in rows].index(kind)])
    group = KINDS[kind].group
    same = [row for row in rows if KINDS[row.kind].group == group]
    inside = sum(row.count for row in same[: [row.kind for row in same].index(kind)])
    count = next(row.count for row in rows if row.kind == kind)
    names = {"query": ("query_x", "query_y"), "pair": ("pair_y", "pair_z", "slots_b"), "sign": ("sign_v",),
             "noise": ("noise_w", "noise")}[group]  # fmt: skip
    return [d.slots_a[:, start : start + count], *(getattr(d, name)[:, inside : inside + count] for name in names)]


@pytest.mark.parametrize("off", range(6))
def test_an_ablation_is_paired(off):
    """Without one kind all others keep parents, coefficients and noise."""
    counts = [6, 5, 4, 3, 2, 1]
    whole = synco.recipe(SynCoConfig(*counts))
    part = synco.recipe(SynCoConfig(*(0 if i == off else count for i, count in enumerate(counts))))
    all_, fewer = drawn(whole), drawn(part)
    for kind in [row.kind for row in part if row.count]:
        for one, other in zip(columns(whole, all_, kind), columns(part, fewer, kind), strict=True):
            assert one.numel()
            assert torch.equal(one, other)
    reordered = drawn(tuple(reversed(whole)))
    assert torch.equal(columns(tuple(reversed(whole)), reordered, "mixup")[0], columns(whole, all_, "mixup")[0])
    # MoCHi's two kinds are those of SynCo: the methods are paired where they share one.
    types = drawn(mochi.recipe(MoCHiConfig(4, 6)))
    assert torch.equal(types.slots_b, all_.slots_b)


def test_kinds_and_rows_of_one_kind_draw_for_themselves():
    d = drawn((synthetic("perturbation", 9), synthetic("interpolation", 9), synthetic("perturbation", 9)))
    one, two, three = d.slots_a.split(9, dim=1)
    assert not torch.equal(one, two)
    assert not torch.equal(one, three)
    code, paper = (drawn((synthetic(kind, 9),)) for kind in ("extrapolation", "extrapolation-paper"))
    assert torch.equal(code.slots_a, paper.slots_a)  # the two formulas on the same parents
    assert torch.equal(code.query_y, -paper.query_x)


def test_nothing_to_draw_is_none():
    assert drawn(()) is None
    assert drawn(synco.recipe(SynCoConfig(0, 0, 0, 0, 0, 0))) is None
    assert drawn(METHODS["moco"].hooks.recipe()) is None


def test_a_batch_without_noise_holds_no_noise():
    assert drawn(mochi.recipe(MoCHiConfig(3, 2))).noise.shape == (200, 0, 6)


def test_rows_and_to():
    d = drawn(synco.recipe())
    part = d.rows(3, 5).to(dtype=torch.float64)
    assert torch.equal(part.slots_a, d.slots_a[3:5])
    assert part.slots_a.dtype == torch.int64
    assert part.noise.dtype == part.query_x.dtype == torch.float64


def test_schedule():
    recipe = starting_at(mochi.recipe(MoCHiConfig(4, 2)), {"mixup": 12}, {})
    kinds = {e: [row.kind for row in active(recipe, e, start=10, stop=20)] for e in (9, 10, 11, 12, 19, 20)}
    both = ["mixup", "interpolation"]
    assert kinds == {9: [], 10: both[1:], 11: both[1:], 12: both, 19: both, 20: []}
    assert active(recipe, 10_000) == recipe
    assert active(synco.recipe(SynCoConfig(n1=0)), 0)[0].kind == "extrapolation"


def test_starts_in_epochs_and_steps():
    recipe = starting_at(
        synco.recipe(SynCoConfig(extrapolation="paper")), {"mixup": 3}, {"extrapolation": 7, "noise": 5}
    )
    assert [(row.start_epoch, row.start_step) for row in recipe] == [(0, 0), (0, 7), (3, 0), (0, 5), (0, 0), (0, 0)]
    counts = {(e, s): len(active(recipe, e, start=1, step=s)) for e in (0, 1, 3) for s in (4, 5, 6, 7)}
    assert counts == {
        (0, 4): 0, (0, 5): 0, (0, 6): 0, (0, 7): 0, (1, 4): 3, (1, 5): 4, (1, 6): 4, (1, 7): 5,
        (3, 4): 4, (3, 5): 5, (3, 6): 5, (3, 7): 6,
    }  # fmt: skip


@pytest.mark.parametrize("steps", [1, 9, 10, 12, 25])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (2, None), (3, 4), (4, 5), (6, None)])
@pytest.mark.parametrize(("epochs", "in_steps"), [({}, {}), ({"mixup": 4}, {"interpolation": 12}), ({}, {"mixup": 9})])
def test_kinds_that_never_start_are_those_of_no_step(steps, start, stop, epochs, in_steps):
    """Five steps an epoch, every step looked at."""
    recipe = starting_at(mochi.recipe(MoCHiConfig(4, 2)), epochs, in_steps)
    extra = HardNegatives(recipe, 8, 6, 0, 0, torch.device("cpu"), start, stop)
    seen = {row.kind for step in range(steps) for row in active(recipe, step // 5, start, stop, step)}
    assert set(extra.missed(steps, 5)) == {"mixup", "interpolation"} - seen
    said = sentences(extra, steps, 5)
    assert [line.startswith("warning: ") for line in said] == [False] + [True] * (len(seen) < 2)
    assert all("the synthetic negatives never start, as" in line for line in said[1:]) == (not seen or len(seen) == 2)


def test_the_log_names_kinds_counts_and_starts():
    recipe = starting_at(
        synco.recipe(SynCoConfig(n3=0, n4=0, n5=0, n6=0)), {"extrapolation": 20}, {"interpolation": 700}
    )
    said = [HardNegatives(recipe, 1024, 8, 0, 0, torch.device("cpu"), 10, stop).summary() for stop in (None, 50)]
    kinds = "interpolation 256 (from step 700), extrapolation 256 (from epoch 20)"
    hardest = "synthetic negatives per query, from its 1024 hardest queue rows, from epoch 10 (counted from 0) to"
    assert said == [f"{hardest} {end}: {kinds}" for end in ("the end", "epoch 49")]
    nothing = HardNegatives(synco.recipe(SynCoConfig(0, 0, 0, 0, 0, 0)), 9, 8, 0, 0, torch.device("cpu"))
    (line,) = sentences(nothing, 10, 5)
    assert line.endswith("none, all counts are 0")
    assert sentences(None, 10, 5) == []


def test_published_recipes():
    assert METHODS["moco"].hooks.recipe() == ()
    assert [(r.kind, r.count, r.low, r.high) for r in METHODS["mochi"].hooks.recipe(MoCHiConfig(1024, 128))] == [
        ("mixup", 1024, 0.0, 1.0),
        ("interpolation", 128, 0.0, 0.5),
    ]
    assert [(r.kind, r.count, r.low, r.high) for r in METHODS["synco"].hooks.recipe()] == [
        ("interpolation", 256, 0.0, 0.5),
        ("extrapolation", 256, 1.0, 1.5),
        ("mixup", 256, 0.0, 1.0),
        ("noise", 64, 0.01, 0.01),
        ("perturbation", 64, 0.01, 0.01),
        ("adversarial", 64, 0.01, 0.01),
    ]
    assert synco.recipe(SynCoConfig(extrapolation="paper"))[1].kind == "extrapolation-paper"
    assert synco.recipe(SynCoConfig(sigma=0.5))[3].low == synco.recipe(SynCoConfig(sigma=0.5))[3].high == 0.5


def test_each_count_switches_its_own_type():
    for i, kind in enumerate(["interpolation", "extrapolation", "mixup", "noise", "perturbation", "adversarial"]):
        counts = [0] * 6
        counts[i] = 3
        assert [row.kind for row in active(synco.recipe(SynCoConfig(*counts)), 0)] == [kind]


def test_user_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="use one of mixup"):
        synthetic("mixdown", 3)
    with pytest.raises(UserError, match="count of 0 or more"):
        mochi.recipe(MoCHiConfig(-1, 2))
    with pytest.raises(UserError, match="code or paper"):
        synco.recipe(SynCoConfig(extrapolation="both"))
    with pytest.raises(UserError, match="smaller one first"):
        negatives.Synthetic("mixup", 3, 0.7, 0.2)
