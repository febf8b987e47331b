"""The step of MoCo against the paper's algorithm written as loops, and what a forward pass may change."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import rounding
from support.networks import MEAN, STD, batch, moco, step_inputs
from support.versions import bf16_sgd

from moco.config import MoCHiConfig, SynCoConfig
from moco.methods.negatives import HardNegatives
from moco.methods.registry import METHODS
from moco.models.inputs import normalise
from moco.models.moco import MoCo


def test_the_loss_is_infonce_written_as_loops():
    model = moco()
    im_q, im_k, ids = batch()
    with torch.no_grad():
        q = F.normalize(model.encoder_q(normalise(im_q, MEAN, STD)), dim=1)
        k = F.normalize(model.encoder_k(normalise(im_k, MEAN, STD)), dim=1)
    losses, firsts = [], 0
    for i in range(len(q)):
        positive = math.exp(float(q[i] @ k[i]) / 0.2)
        negatives = [math.exp(float(q[i] @ row) / 0.2) for row in model.queue]
        losses.append(-math.log(positive / (positive + sum(negatives))))
        firsts += positive > max(negatives)
    out = model([im_q, im_k], ids, 0, 0)
    assert out.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert float(out.statistics["top1"]) == pytest.approx(firsts / len(q))
    torch.testing.assert_close(out.keys, k)


def test_a_forward_pass_leaves_queue_and_key_encoder_alone():
    model = moco()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    model(*step_inputs(), 0, 0)
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed
    assert all("norm.running" in n or "num_batches" in n for n in changed)


def test_keys_enter_the_queue_in_order_and_no_synthetic_negative_does():
    recipe = METHODS["synco"].hooks.recipe(SynCoConfig(3, 3, 3, 2, 2, 2))
    extra = HardNegatives(recipe, 6, 4, 0, 0, torch.device("cpu"))
    model = moco(extra=extra, n_hard=6)
    im_q, im_k, ids = batch()
    out = model([im_q, im_k], ids, 0, 0)
    assert out.statistics["synthetic_mass"] > 0
    old = model.queue.clone()
    model.enqueue(out.keys, ids)
    assert torch.equal(model.queue[:6], out.keys)
    assert torch.equal(model.queue[6:], old[6:])
    assert model.queue_ids.tolist() == [*range(6), *[-1] * 14]
    assert int(model.queue_ptr) == 6


def test_key_encoder_moves_as_the_papers_loop_says():
    model = moco()
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(torch.randn_like(p))
    expected = [
        0.9 * k + 0.1 * q for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True)
    ]
    buffers = [b.clone() for b in model.encoder_k.buffers()]
    model.update_key_encoder()
    for k, e in zip(model.encoder_k.parameters(), expected, strict=True):
        torch.testing.assert_close(k, e)
    for now, then in zip(model.encoder_k.buffers(), buffers, strict=True):
        assert torch.equal(now, then)


def apart(m: float, dtype: torch.dtype = torch.float32, **settings) -> MoCo:
    """A model whose encoders differ, the same each time."""
    model = moco(**settings)
    model.m = m
    torch.manual_seed(1)
    for p in model.encoder_q.parameters():
        p.data.add_(torch.randn_like(p)).mul_(10 ** torch.randint(-3, 3, p.shape))
    model.encoder_q.to(dtype)
    model.encoder_k.to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, pytest.param(torch.bfloat16, marks=bf16_sgd)])
@pytest.mark.parametrize("m", [0.999, 0.99, 0.9, 0.6])
@pytest.mark.parametrize("due", [True, False])
def test_the_device_decides_in_one_pass_whether_the_key_encoder_moves(due, m, dtype):
    """As SGD it makes lerp's operations in lerp's order, so a CPU's bits are the same."""
    model, host = apart(m, dtype), apart(m, dtype)
    before = [p.clone() for p in model.encoder_k.parameters()]
    queries = [p.clone() for p in model.encoder_q.parameters()]
    model._follow_where(torch.tensor(due), *model._pairs())
    host.update_key_encoder(torch.tensor(due))
    for k, expected, old in zip(model.encoder_k.parameters(), host.encoder_k.parameters(), before, strict=True):
        assert torch.equal(k, expected)
        assert torch.equal(k, old) != due
    assert all(torch.equal(*pair) for pair in zip(model.encoder_q.parameters(), queries, strict=True))


def test_a_key_encoder_follows_with_any_momentum():
    for m in (0.5, 0.3, 0.0):
        model, host = apart(m), apart(m)
        model._follow_where(torch.tensor(True), *model._pairs())
        host.update_key_encoder()
        for k, e, q in zip(model.encoder_k.parameters(), *host._pairs(), strict=True):
            assert ((k - e).abs() <= rounding(4) * (q.abs() + e.abs() + apart(m).encoder_k.fc.weight.abs().max())).all()


@pytest.mark.parametrize("due", [True, False])
def test_pairs_that_one_operator_does_not_take_follow_too_and_the_log_says_so(due):
    model, host = apart(0.9), apart(0.9)
    gpu = torch.device("cuda")
    assert model.slow_reason(torch.device("cpu")) == ""
    for m in (model, host):
        weight = m.encoder_k.fc.weight
        weight.data = weight.data.t().contiguous().t()  # of another layout than the query encoder's
        assert weight.stride() != m.encoder_q.fc.weight.stride()
    meta = copy.deepcopy(model).to("meta")
    assert meta.slow_reason(torch.device("meta")).startswith("1 parameters of the key encoder follow in three passes")
    assert meta.slow_reason(gpu).startswith(f"{len(list(meta.encoder_k.parameters()))} parameters")
    model._follow_where(torch.tensor(due), *model._pairs())
    host.update_key_encoder(torch.tensor(due))
    for k, e, q in zip(model.encoder_k.parameters(), *host._pairs(), strict=True):
        assert ((k - e).abs() <= (rounding(4) * (q.abs() + e.abs()) if due else 0)).all()


def test_an_encoder_that_has_not_moved_stays_bit_for_bit():
    model = moco()
    model.update_key_encoder()
    for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        assert torch.equal(q, k)
        assert not k.requires_grad


def test_all_counts_zero_is_plain_moco_bit_for_bit():
    extra = HardNegatives(METHODS["synco"].hooks.recipe(SynCoConfig(0, 0, 0, 0, 0, 0)), 6, 4, 0, 0, torch.device("cpu"))
    results = []
    for options in ({}, {"extra": extra, "n_hard": 6}):
        model = moco(**options)
        out = model(*step_inputs(), 0, 0)
        out.loss.backward()
        results.append((out.loss, *[p.grad for p in model.encoder_q.parameters()]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("epoch", "on"), [(0, False), (2, True), (4, True), (5, False)])
def test_synthetic_negatives_are_active_in_their_epochs_only(epoch, on):
    recipe = METHODS["mochi"].hooks.recipe(MoCHiConfig(s=4, s2=2))
    extra = HardNegatives(recipe, 6, 4, 0, 0, torch.device("cpu"), start=2, stop=5)
    plain, mixed = moco(), moco(extra=extra, n_hard=6)
    a, b = plain(*step_inputs(), epoch, 0), mixed(*step_inputs(), epoch, 0)
    assert (a.loss != b.loss) == on
    assert (b.statistics["synthetic_mass"] > 0) == on


def test_draws_depend_on_seed_number_and_rank_alone():
    make = partial(HardNegatives, METHODS["mochi"].hooks.recipe(MoCHiConfig(s=8, s2=8)), 6, 4)
    cpu = torch.device("cpu")
    again = [make(0, 0, cpu)(5, 0, 7).slots_a for _ in range(2)]
    assert torch.equal(*again)
    for other in (make(1, 0, cpu)(5, 0, 7), make(0, 1, cpu)(5, 0, 7), make(0, 0, cpu)(5, 0, 8)):
        assert not torch.equal(other.slots_a, again[0])


def test_symmetric_is_the_sum_of_both_directions():
    model, one = moco(symmetric=True), moco()
    im_q, im_k, ids = batch()
    out = model([im_q, im_k], ids, 0, 0)
    there = one([im_q, im_k], ids, 0, 0)
    back = one([im_k, im_q], ids, 0, 0)
    assert out.loss.item() == pytest.approx((there.loss + back.loss).item(), rel=rounding(2))
    assert out.keys.shape == (12, 4)
    model.enqueue(out.keys, ids)
    assert model.queue_ids[:12].tolist() == [*range(6), *range(6)]
    torch.testing.assert_close(model.queue[:6], there.keys)
    torch.testing.assert_close(model.queue[6:12], back.keys)


def test_rows_of_the_same_image_are_left_out():
    model = moco(mask_same_image=True)
    im_q, im_k, ids = batch()
    model.enqueue(model([im_q, im_k], ids, 0, 0).keys, ids)
    out = model([im_q, im_k], ids, 1, 1)
    q, k = out.q, out.paired
    losses = []
    for i in range(6):
        logits = [float(q[i] @ row) / 0.2 for j, row in enumerate(model.queue) if int(model.queue_ids[j]) != i]
        positive = float(q[i] @ k[i]) / 0.2
        losses.append(torch.logsumexp(torch.tensor([positive, *logits]), 0).item() - positive)
        assert len(logits) == 19
    assert out.loss.item() == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_shuffling_in_one_process_changes_the_order_but_not_the_pairs():
    im_q, im_k, ids = batch()
    plain, shuffled = moco(), moco(shuffle=True)
    a, b = plain([im_q, im_k], ids, 0, 3), shuffled([im_q, im_k], ids, 0, 3)
    torch.testing.assert_close(a.keys, b.keys)  # one BatchNorm group: the order cannot matter


@pytest.mark.parametrize("bad", [False, True])
def test_the_queue_in_bf16_follows_every_change_of_the_queue(bad):
    model = moco(loss_impl="triton", loss_precision="bf16")
    keys = F.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    for _ in range(3):  # around the end of the queue
        restore = model.snapshot(12)
        model.enqueue(keys, torch.arange(12))
        assert torch.equal(model.shadow, model.queue.bfloat16())
        restore(torch.tensor(bad))
        assert torch.equal(model.shadow, model.queue.bfloat16())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert "shadow" not in state
    other = moco(loss_impl="triton", loss_precision="bf16", seed=2)
    assert not torch.equal(other.shadow, model.shadow)
    other.load_state_dict(state)
    assert torch.equal(other.shadow, model.shadow) and torch.equal(other.shadow, other.queue.bfloat16())
    plain = moco(loss_impl="triton", loss_precision="tf32x3")
    plain.load_state_dict(state)
    assert plain.shadow is None


def test_a_snapshot_puts_back_everything_a_step_touches():
    model = moco(K=8)
    im_q, im_k, ids = batch()
    model.enqueue(model([im_q, im_k], ids, 0, 0).keys, ids)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    restore = model.snapshot(12)
    for draw in (1, 2):  # wraps around and replaces every row
        model.enqueue(model([im_q, im_k], ids, 0, draw).keys, ids)
    assert not torch.equal(model.queue, before["queue"])
    changed = {n: v.clone() for n, v in model.state_dict().items()}
    restore(torch.tensor(False))
    for name, value in model.state_dict().items():
        assert torch.equal(value, changed[name]), name
    restore(torch.tensor(True))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_floats_are_taken_as_already_normalised():
    model = moco()
    im_q, im_k, ids = batch()
    a = model([im_q, im_k], ids, 0, 0)
    b = model([normalise(im_q, MEAN, STD), normalise(im_k, MEAN, STD)], ids, 0, 0)
    assert torch.equal(a.loss, b.loss)


@pytest.mark.parametrize(("rows", "hard"), [(None, 1), (5, 5)], ids=["plain", "synthetic"])
def test_false_negatives_are_of_the_rows_that_synthetic_negatives_are_made_from(rows, hard):
    """Without any of one row in 64."""
    recipe = METHODS["synco"].hooks.recipe(SynCoConfig(3, 3, 3, 2, 2, 2))
    extra = HardNegatives(recipe, rows, 4, 0, 0, torch.device("cpu")) if rows else None
    model, labels = moco(extra=extra, n_hard=rows or 9), torch.arange(1000) % 3
    q, ids = F.normalize(torch.randn(6, 4), dim=1), torch.arange(100, 106)
    assert model.measure(q, ids, labels) == {}  # rows that were drawn at random have no class
    model.queue_ids.copy_(torch.arange(20))
    assert model.measure(q, ids).keys() == {"old_mass"}
    nearest = (q @ model.queue.T).topk(hard, dim=1).indices
    alike = (labels[nearest] == labels[ids][:, None]).float().mean()
    found = model.measure(q, ids, labels)
    assert found == {"old_mass": found["old_mass"], "false_negatives": pytest.approx(float(alike))}
