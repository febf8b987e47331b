"""Controls of an ablation: each equals a plain loop over queries and rows in float64, with as many extra negatives.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S extra negatives a query.
"""

import math

import pytest
import torch
from conftest import rounding
from support.loss import T, problem

from moco import MoCHiLoss, MoCoLoss, SynCoLoss
from moco.config import MoCHiConfig, MoCoConfig, NegativesConfig, SynCoConfig
from moco.errors import UserError
from moco.kernels import contrastive_loss, labelled_loss
from moco.kernels import draws as by_counters
from moco.methods import controls, mochi, negatives
from moco.methods.negatives import HardNegatives
from moco.methods.registry import CONTROLS

N, K, C, H = 5, 67, 16, 12
FEW, MANY = NegativesConfig("synco", SynCoConfig(3, 2, 2, 1, 1, 1)), NegativesConfig("mochi", MoCHiConfig(18, 13))
COUNTS = {"synco": 10, "mochi": 31}  # below H, and between 2 H and 3 H


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def way(request, monkeypatch):
    """Both ways to draw."""
    monkeypatch.setattr(negatives, "by_counter", lambda device: request.param == "as on a GPU")
    monkeypatch.setattr(by_counters, "agrees", lambda device: False)


def hook(of: NegativesConfig, control: str | None) -> HardNegatives:
    config = MoCoConfig(C=C, K=K, n_hard=H, negatives=NegativesConfig(of.method, of.recipe, control=control))
    return HardNegatives.of(config, 3, 0, torch.device("cpu"))


def extra_rows(of: NegativesConfig, control: str, similar: list[float], i: int, left_out: set[int]) -> list[int]:
    """The rows that query i has once more, by the table in moco/methods/controls.py and the method's draws."""
    allowed = [j for j in range(len(similar)) if j not in left_out]
    by_hardness = sorted(allowed, key=lambda j: -similar[j])
    if control == "reweight":
        copies = math.ceil(COUNTS[of.method] / H)
        few = math.ceil(COUNTS[of.method] / copies)
        rows = sorted(by_hardness[:few])
        return [rows[s % len(rows)] for s in range(COUNTS[of.method])]
    listed = sorted(allowed) if control == "random" else sorted(by_hardness[:H])
    config = MoCoConfig(C=C, K=K, n_hard=K if control == "random" else H, negatives=of)
    drawn = HardNegatives.of(config, 3, 0, torch.device("cpu"))(N, 0, 9)  # of the method itself
    assert drawn is not None
    return [listed[s] for s in drawn.slots_a[i].tolist() if s < len(listed)]


def plain_loop(of, control, q, k, queue, left_out):
    """Loss, its gradient, and the mass of the extra negatives, from sums of exponentials alone."""
    q = q.clone().requires_grad_()
    losses, masses = [], []
    for i in range(len(q)):
        similar = [torch.dot(q[i], row) for row in queue]
        extra = extra_rows(of, control, [float(s.detach()) for s in similar], i, left_out[i])
        of_queue = sum(torch.exp(s / T) for j, s in enumerate(similar) if j not in left_out[i])
        of_extra = sum(torch.exp(similar[j] / T) for j in extra)
        positive = torch.exp(torch.dot(q[i], k[i]) / T)
        losses.append(-torch.log(positive / (positive + of_queue + of_extra)))
        masses.append(float((of_extra / (positive + of_queue + of_extra)).detach()))
    loss = torch.stack(losses).mean()
    (gradient,) = torch.autograd.grad(loss, q)
    return float(loss.detach()), gradient, sum(masses) / len(masses)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("of", [FEW, MANY], ids=["fewer than H", "more than H"])
@pytest.mark.parametrize("control", list(CONTROLS))
def test_a_control_is_a_plain_loop(control, of, impl, masked):
    q, k, queue, _ = problem(N, K, C, H)
    ids, queue_ids = torch.arange(N), torch.arange(K) % (2 * N)
    left_out = [{j for j in range(K) if masked and j % (2 * N) == i} for i in range(N)]
    extra = hook(of, control)
    draws = extra(N, 0, 9)
    assert draws is not None
    assert sum(draws.counts) == COUNTS[of.method]
    q.requires_grad_()
    masks = {"ids": ids, "queue_ids": queue_ids} if masked else {}
    head = contrastive_loss(q, k, queue, temperature=T, n_hard=extra.hard, draws=draws, impl=impl, **masks)
    (gradient,) = torch.autograd.grad(head.loss, q)
    loss, wanted, mass = plain_loop(of, control, q.detach(), k, queue, left_out)
    assert float(head.loss.detach()) == pytest.approx(loss, rel=1e-13)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)
    assert float(head.synthetic_mass) == pytest.approx(mass, rel=1e-12)


def test_reweighting_adds_ln_2_to_the_logits_of_the_s_hardest():
    """With S of at most H; MoCo's loss with these logits."""
    q, k, queue, _ = problem(N, K, C, H)
    extra = hook(FEW, "reweight")
    head = contrastive_loss(q, k, queue, temperature=T, n_hard=extra.hard, draws=extra(N, 0, 0), impl="cpu")
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / T
    hardest = 1 + (q @ queue.T).topk(COUNTS[FEW.method], 1).indices
    weighed = logits.scatter_add(1, hardest, torch.full(hardest.shape, math.log(2), dtype=torch.float64))
    assert float(head.loss.detach()) == pytest.approx(float(weighed.logsumexp(1).sub(logits[:, 0]).mean()), rel=1e-13)


@pytest.mark.parametrize("control", list(CONTROLS))
def test_a_control_with_labels_copies_rows_of_other_labels(control):
    q, k, queue, _ = problem(N, K, C, H)
    labels, queue_labels = torch.arange(N), torch.arange(K) % (2 * N)
    extra = hook(FEW, control)
    draws = extra(N, 0, 9)
    q.requires_grad_()
    head = labelled_loss(
        q, k, queue, labels, queue_labels, temperature=T, n_hard=extra.hard, draws=draws and draws.to(dtype=q.dtype)
    )
    (gradient,) = torch.autograd.grad(head.loss, q)
    p = q.detach().clone().requires_grad_()
    losses = []
    for i in range(N):
        same = {j for j in range(K) if j % (2 * N) == i}
        similar = [torch.dot(p[i], row) / T for row in queue]
        copied = extra_rows(FEW, control, [float(s.detach()) for s in similar], i, same)
        own = torch.dot(p[i], k[i]) / T
        total = torch.log(sum(torch.exp(s) for s in [own, *similar, *(similar[j] for j in copied)]))
        losses.append(sum(total - s for s in [own, *(similar[j] for j in same)]) / (1 + len(same)))
    loss = torch.stack(losses).mean()
    (wanted,) = torch.autograd.grad(loss, p)
    assert float(head.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-13)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("way")
def test_hardest_copies_the_methods_own_parents_draw_by_draw():
    mine, methods = hook(FEW, "hardest")(N, 0, 9), hook(FEW, None)(N, 0, 9)
    assert mine is not None
    assert methods is not None
    assert torch.equal(mine.slots_a, methods.slots_a)
    assert not torch.equal(mine.slots_a, hook(FEW, "hardest")(N, 0, 10).slots_a)  # pyright: ignore[reportOptionalMemberAccess]
    assert mine.counts == (10, 0, 0, 0)
    assert bool((mine.query_x == 0).all())
    assert bool((mine.query_y == 1).all())


def test_random_copies_are_of_all_rows_alike():
    config = MoCoConfig(C=C, K=K, n_hard=H, negatives=NegativesConfig("mochi", MoCHiConfig(40, 40), control="random"))
    draws = HardNegatives.of(config, 3, 0, torch.device("cpu"))(2000, 0, 0)
    assert draws is not None
    counts = draws.slots_a.flatten().bincount(minlength=K) / draws.slots_a.numel()
    assert len(counts) == K
    assert float((counts - 1 / K).abs().max()) < 6 * math.sqrt(1 / K / draws.slots_a.numel())


@pytest.mark.parametrize(
    ("control", "count", "rows"),
    [(None, 10, 12), ("hardest", 10, 12), ("random", 10, 67), ("reweight", 10, 10), ("reweight", 12, 12),
     ("reweight", 13, 7), ("reweight", 24, 12), ("reweight", 25, 9), ("reweight", 0, 12)],
)  # fmt: skip
def test_the_rows_that_a_control_copies_from(control, count, rows):
    assert controls.rows_of(control, H, K, count) == rows


@pytest.mark.parametrize("count", range(1, 40))
def test_reweighting_deals_its_copies_out_evenly_over_no_more_than_h_rows(count):
    rows = controls.rows_of("reweight", H, K, count)
    draws = negatives.draw(mochi.recipe(MoCHiConfig(count, 0)), 2, rows, C, 0)
    assert draws is not None
    copies = controls.copies(draws, dealt=rows).slots_a[1].bincount(minlength=rows)
    assert (len(copies), int(copies.sum())) == (rows, count)
    assert rows <= H
    assert int(copies.max()) - int(copies.min()) <= 1
    assert int(copies.max()) == math.ceil(count / H)


# ------------------------------------------------------------------------------------------------------ the library


@pytest.mark.parametrize("loss", [SynCoLoss, MoCHiLoss])
@pytest.mark.parametrize("control", [None, "none", *CONTROLS])
def test_the_modules_take_a_control(loss, control):
    """The loss of a module is that of its hook's draws."""
    torch.manual_seed(0)
    q, k = torch.randn(N, C), torch.randn(N, C)
    counts = {"s": 6, "s2": 4} if loss is MoCHiLoss else {"n1": 3, "n2": 2, "n3": 2, "n4": 1, "n5": 1, "n6": 1}
    made = loss(C, K, 0.2, n_hard=H, control=control, **counts)
    plain, queue = MoCoLoss(C, K, 0.2), made.queue.clone()
    given = float(made(q, k).detach())
    of = NegativesConfig("mochi", MoCHiConfig(6, 4)) if loss is MoCHiLoss else FEW
    of = NegativesConfig(of.method, of.recipe, control=made.negatives.control)
    config = MoCoConfig(C=C, K=K, n_hard=H, negatives=of)
    extra = HardNegatives.of(config, 0, 0, torch.device("cpu"))
    unit = [x / x.norm(dim=1, keepdim=True) for x in (q, k)]
    head = contrastive_loss(*unit, queue, temperature=0.2, n_hard=extra.hard, draws=extra(N, 0, 0))
    assert given == pytest.approx(float(head.loss.detach()), rel=rounding(K + 10))
    assert given > float(plain(q, k))
    assert (f"control={control}" in repr(made)) == (control in CONTROLS)


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="control must be one of none, random, hardest, reweight, not 'harder'"):
        SynCoLoss(C, K, control="harder")
    with pytest.raises(TypeError, match="control"):
        MoCoLoss(C, K, control="random")  # pyright: ignore[reportCallIssue]
    apart = NegativesConfig("synco", SynCoConfig(), kind_epochs={"noise": 3}, control="reweight")
    with pytest.raises(UserError, match="leave --type-starts out, or take --control hardest"):
        HardNegatives.of(MoCoConfig(n_hard=H, negatives=apart), 0, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("control", "copied"),
    [
        ("random", "10 copies per query of random queue rows, from"),
        ("hardest", "10 copies per query of its 12 hardest queue rows, drawn as the parents are, from"),
        ("reweight", "10 copies per query of its 10 hardest queue rows, as many of each, from"),
    ],
)
def test_the_log_names_the_control_and_what_it_replaces(control, copied):
    said = hook(FEW, control).summary()
    kinds = "interpolation 3, extrapolation 2, mixup 2, noise 1, perturbation 1, adversarial 1"
    assert said.startswith(f"control {control}: in place of synthetic negatives ({kinds}) {copied} epoch 0")
