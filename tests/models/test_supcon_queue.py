"""SupCon with a queue: the loss against loops, what it has in common with MoCo, and the labels in the queue."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.networks import CONFIG, batch, moco
from support.networks import Tiny as Network

from moco.config import MoCHiConfig, SynCoConfig
from moco.kernels import contrastive_loss, labelled_loss
from moco.kernels.reference import synthesize
from moco.kernels.spec import hardest_rows
from moco.methods.negatives import HardNegatives, draw
from moco.methods.registry import METHODS
from moco.models.supcon_queue import UNLABELLED, LabelledMoCo

T = 0.2
RECIPES = {
    "none": METHODS["moco"].hooks.recipe(),
    "mochi": METHODS["mochi"].hooks.recipe(MoCHiConfig(s=5, s2=4)),
    "synco": METHODS["synco"].hooks.recipe(SynCoConfig(3, 3, 3, 2, 2, 2)),
}


def inputs(n=5, c=8, rows=24, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, queue = (
        F.normalize(torch.randn(m, c, generator=generator, dtype=torch.float64), dim=1).to(dtype) for m in (n, n, rows)
    )
    return q.requires_grad_(), k, queue


def draws(name, n=5, hard=6, c=8):
    made = draw(RECIPES[name], n, hard, c, key=1)
    return None if made is None else made.to("cpu", torch.float64)


def by_loops(q, k, queue, labels, queue_labels, n_hard, d):
    """SupCon's eq. 2 with the own key and the queue as candidates; synthetic negatives from other labels' rows."""
    total = torch.zeros((), dtype=q.dtype)
    for i in range(len(q)):
        logits = [q[i] @ k[i] / T] + [q[i] @ row / T for row in queue]
        positives = [0] + [1 + j for j in range(len(queue)) if queue_labels[j] == labels[i]]
        candidates = list(logits)
        if d is not None:
            other = (queue_labels != labels[i]).nonzero()[:, 0]
            rows, _ = hardest_rows((queue[other] @ q[i].detach())[None], min(n_hard, len(other)))
            ok = [bool(d.slots_a[i, s] < rows.shape[1]) for s in range(d.slots_a.shape[1])]
            first = d.counts[0]
            for s in range(d.counts[1]):
                ok[first + s] &= bool(d.slots_b[i, s] < rows.shape[1])
            one = d.rows(i, i + 1)
            clamped = type(one)(
                *[t.clamp(max=rows.shape[1] - 1) if not t.is_floating_point() else t for t in one.tensors()]
            )
            h = synthesize(q[i : i + 1].detach(), queue, other[rows], clamped)[0]
            candidates += [q[i] @ row / T for row, keep in zip(h, ok, strict=True) if keep]
        log_sum = torch.stack(candidates).logsumexp(0)
        total = total - sum(logits[p] - log_sum for p in positives) / len(positives)
    return total / len(q)


@pytest.mark.parametrize("filled", ["all", "half", "none", "one class", "few others"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_is_the_papers_loop(name, filled):
    labels = torch.tensor([0, 1, 2, 0, 1])
    queue_labels = torch.arange(24) % 3
    if filled in ("half", "none"):
        queue_labels[12 if filled == "half" else 0 :] = UNLABELLED
    if filled in ("one class", "few others"):
        labels, queue_labels = labels * 0, queue_labels * 0
    if filled == "few others":
        queue_labels[:4] = 1  # fewer than the 6 hardest that a query wants
    q, k, queue = inputs()
    d = draws(name)
    if filled == "one class" and d is not None:
        expected = by_loops(q, k, queue, labels, queue_labels, 6, None)  # nothing is left to mix
    else:
        expected = by_loops(q, k, queue, labels, queue_labels, 6, d)
    head = labelled_loss(q, k, queue, labels, queue_labels, temperature=T, n_hard=6, draws=d)
    torch.testing.assert_close(head.loss, expected, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(x, q, retain_graph=True)[0] for x in (head.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_with_a_label_of_its_own_for_every_row_it_is_the_head_of_moco(name):
    q, k, queue = inputs()
    d = draws(name)
    ours = labelled_loss(q, k, queue, torch.arange(5), torch.full((24,), UNLABELLED), temperature=T, n_hard=6, draws=d)
    plain = contrastive_loss(q, k, queue, temperature=T, n_hard=6, draws=d, impl="reference")
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(head.loss, q)[0] for head in (ours, plain)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("filled", [0, 12, 24])
def test_values_and_gradients_are_finite(dtype, filled):
    for same in (0, 1):
        q, k, queue = inputs(dtype=dtype)
        q = q.detach().requires_grad_()
        labels = torch.arange(5) * same
        queue_labels = torch.where(torch.arange(24) < filled, torch.arange(24) % 3 * same, UNLABELLED)
        head = labelled_loss(q, k, queue, labels, queue_labels, temperature=0.01, n_hard=6, draws=draws("synco"))
        (gradient,) = torch.autograd.grad(head.loss, q)
        assert head.loss.isfinite() and gradient.isfinite().all()
        assert head.hardest.isfinite() and 0 <= head.synthetic_mass <= 1


# ----------------------------------------------------------------------------------------------------- the model


LABELS = torch.arange(1000) % 3


def labelled(extra=None, **changes) -> LabelledMoCo:
    torch.manual_seed(0)
    return LabelledMoCo(Network(), Network(), replace(CONFIG, T=T, **changes), labels=LABELS, seed=1, extra=extra)


def test_the_first_step_is_mocos_because_no_row_has_a_label():
    im_q, im_k, _ = batch()
    ids = torch.tensor([0, 1, 2, 3, 4, 5])
    ours, plain = labelled()([im_q, im_k], ids, 0, 0), moco()([im_q, im_k], ids, 0, 0)
    torch.testing.assert_close(ours.loss, plain.loss)


def test_labels_enter_the_queue_with_their_keys_and_wrap_around():
    model = labelled(K=8)
    assert model.queue_labels.tolist() == [UNLABELLED] * 8
    im_q, im_k, _ = batch()
    for start in (1, 7, 500):
        ids = torch.arange(start, start + 6)
        model.enqueue(model([im_q, im_k], ids, 0, 0).keys, ids)
        filled = model.queue_ids >= 0
        assert torch.equal(model.queue_labels[filled], LABELS[model.queue_ids[filled]])
        assert (model.queue_labels[~filled] == UNLABELLED).all()
    assert "queue_labels" in model.state_dict() and "labels" not in model.state_dict()


def test_both_directions_of_a_symmetric_step_bring_their_labels():
    model = labelled(symmetric=True)
    im_q, im_k, ids = batch(seed=1)
    model.enqueue(model([im_q, im_k], ids, 0, 0).keys, ids)
    assert model.queue_labels[:12].tolist() == LABELS[ids].tolist() * 2
    assert model.chance == pytest.approx(2 * math.log(21))
    assert model.chance_formula == "2 ln(1+K)"


def test_a_snapshot_puts_the_labels_back():
    model = labelled(K=8)
    im_q, im_k, ids = batch()
    model.enqueue(model([im_q, im_k], ids, 0, 0).keys, ids)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    restore = model.snapshot(6)
    model.enqueue(model([im_q, im_k], ids + 1, 0, 1).keys, ids + 1)
    assert not torch.equal(model.queue_labels, before["queue_labels"])
    restore(torch.tensor(True))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_no_parent_of_a_synthetic_negative_has_the_querys_label():
    """A queue of one class: nothing may be mixed for its members, and everything for the others."""
    extra = HardNegatives(RECIPES["mochi"], 6, 4, 0, 0, torch.device("cpu"))
    model = labelled(extra=extra, n_hard=6)
    model.queue_labels.fill_(0)
    im_q, im_k, _ = batch()
    assert model([im_q, im_k], torch.full((6,), 3), 0, 0).statistics["synthetic_mass"] == 0
    assert model([im_q, im_k], torch.full((6,), 4), 0, 0).statistics["synthetic_mass"] > 0


def test_base_temperature_multiplies_loss_and_chance():
    im_q, im_k, ids = batch()
    scaled, plain = labelled(base_temperature=0.1), labelled()
    torch.testing.assert_close(scaled([im_q, im_k], ids, 0, 0).loss, 2 * plain([im_q, im_k], ids, 0, 0).loss)
    assert scaled.chance == pytest.approx(2 * plain.chance)
    assert (scaled.chance_formula, plain.chance_formula) == ("2 ln(1+K)", "ln(1+K)")
    assert labelled(base_temperature=0.1, symmetric=True).chance_formula == "4 ln(1+K)"


def test_rows_of_the_querys_class_are_no_false_negatives():
    model = labelled()
    model.queue_ids.copy_(torch.arange(20))
    assert model.measure(model.queue[:6], torch.arange(100, 106), LABELS).keys() == {"old_mass"}
