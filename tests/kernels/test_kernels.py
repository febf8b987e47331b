"""The contrastive head: definition (loops from the papers), equivalence of the implementations, properties.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query.
"""

import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import rounding
from support.loss import ALL_TYPES, ONE_TYPE, T, assert_same_training, problem, run, tensors, train
from support.versions import dataless_gpu
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moco import kernels
from moco.config import MoCHiConfig, SynCoConfig
from moco.errors import UserError
from moco.kernels import (
    Draws,
    closed_form,
    contrastive_loss,
    describe,
    hardest_rows,
    labelled,
    labelled_loss,
    matmul,
    resolve,
    resolve_precision,
)
from moco.kernels.reference import synthesize
from moco.kernels.spec import LossOutput
from moco.kernels.topk import _on_device, hardest
from moco.methods import mochi, synco
from moco.methods.negatives import draw, synthetic

BOTH = ("reference", "cpu")


def assert_same(a, b, tolerance=1e-12):
    (head_a, gradient_a), (head_b, gradient_b) = a, b
    for x, y in zip(head_a, head_b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient_a, gradient_b, rtol=tolerance, atol=tolerance)


# Definition ---------------------------------------------------------------------------------------------------------

PAPER = {  # u of one synthetic negative, as MoCHi and SynCo write it; c is the coefficient
    "mixup": lambda q, a, b, e, c: c * a + (1 - c) * b,
    "interpolation": lambda q, a, b, e, c: c * q + (1 - c) * a,
    "extrapolation": lambda q, a, b, e, c: q + c * (a - q),
    "extrapolation-paper": lambda q, a, b, e, c: a + c * (a - q),
    "noise": lambda q, a, b, e, c: a + c * e,
    "perturbation": lambda q, a, b, e, c: a + c * torch.func.grad(lambda n: q @ n)(a),
    "adversarial": lambda q, a, b, e, c: a + c * torch.func.grad(lambda n: q @ n)(a).sign(),
}


def loops(q, k, queue, parts, hard):
    """Loss, gradient and ranks from the papers' formulas, a query and a negative at a time; parts: (kind, c, draws)."""
    q = q.detach().requires_grad_()
    total, ranks, mass = torch.zeros((), dtype=torch.float64), [], 0.0
    for i in range(len(q)):
        scores = (queue @ q[i].detach()).tolist()
        hardest = sorted(sorted(range(len(queue)), key=lambda j: -scores[j])[:hard])
        negatives = [q[i] @ row for row in queue]
        for kind, c, d in parts:
            for s in range(d.slots_a.shape[1]):
                a = queue[hardest[d.slots_a[i, s]]]
                b = queue[hardest[d.slots_b[i, s]]] if d.slots_b.shape[1] else a
                e = d.noise[i, s].double() if d.noise.shape[1] else a
                u = PAPER[kind](q[i].detach(), a, b, e, c)
                negatives.append(q[i] @ (u / u.norm()))
        positive = q[i] @ k[i]
        denominator = torch.exp(positive / T) + sum(torch.exp(n / T) for n in negatives)
        total = total - torch.log(torch.exp(positive / T) / denominator)
        ranks.append(sum(bool(n > positive) for n in negatives[: len(queue)]))
        mass += sum((torch.exp(n / T) / denominator).item() for n in negatives[len(queue) :])
    loss = total / len(q)
    return float(loss.detach()), torch.autograd.grad(loss, q)[0], ranks, mass / len(q)


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("kind", [None, *PAPER])
def test_the_loss_is_the_papers_loop(kind, impl):
    c = 0.3 if kind is None or "extra" not in kind else 1.3
    recipe = () if kind is None else (synthetic(kind, 5, c),)
    q, k, queue, draws = problem(n=3, rows=23, dim=7, hard=6, recipe=recipe)
    k = F.normalize(k + 0.9 * queue[:3], dim=1)  # some negatives beat the positive
    # float32 draws carry c rounded; the loop takes the same number
    c = float(torch.tensor(c))
    if draws is not None and kind in ("mixup", "interpolation"):
        parts = [(kind, c, draws)]
        draws = draws.to(dtype=torch.float64)
        one_minus = torch.full_like(draws.pair_y if kind == "mixup" else draws.query_y, 1 - c)
        name = "pair_z" if kind == "mixup" else "query_y"
        draws = Draws(**{**vars(draws), name: one_minus})
    else:
        parts = [] if draws is None else [(kind, c, draws)]
    loss, gradient, ranks, mass = loops(q, k, queue, parts, hard=6)
    head, got = run(q, k, queue, draws, impl, hard=6)
    rounding = 1e-6 if kind and "extra" in kind else 1e-13  # 1 - c and 1 + c were rounded in float32
    assert float(head.loss) == pytest.approx(loss, rel=rounding)
    torch.testing.assert_close(got, gradient, rtol=rounding, atol=rounding)
    assert head.rank.tolist() == ranks
    assert float(head.synthetic_mass) == pytest.approx(mass, rel=rounding)
    assert float(head.hardest) == pytest.approx(float((q @ queue.T).amax(1).mean()), rel=1e-13)


def test_reference_passes_gradcheck_where_negatives_do_not_move_with_the_query():
    # h is a constant of the loss, so a numerical derivative sees the same function only if no weight of q is in it.
    q, k, queue, draws = problem(n=2, rows=15, dim=5, hard=6, recipe=(synthetic("mixup", 3), synthetic("noise", 2)))
    for impl in BOTH:
        for d in (None, draws):

            def loss(q, d=d, impl=impl):
                return contrastive_loss(q, k, queue, temperature=T, n_hard=6, draws=d, impl=impl).loss

            assert torch.autograd.gradcheck(loss, q.detach().requires_grad_())


def test_no_gradient_flows_through_a_synthetic_negative_nor_to_key_and_queue():
    q, k, queue, draws = problem()
    for impl in BOTH:
        tensors = [t.clone().requires_grad_() for t in (q, k, queue)]
        contrastive_loss(*tensors, temperature=T, n_hard=12, draws=draws, impl=impl).loss.backward()
        assert tensors[0].grad is not None
        assert tensors[1].grad is None
        assert tensors[2].grad is None


# Equivalence --------------------------------------------------------------------------------------------------------

SHAPES = [  # n, rows, dim, hard
    (1, 1, 3, 1),
    (1, 64, 8, 4),
    (5, 67, 16, 12),
    (4, 33, 5, 33),
    (3, 300, 24, 9),  # buckets, ragged tail
    (2, 512, 32, 16),  # buckets, no tail
    (7, 1031, 20, 40),
]


@pytest.mark.parametrize("temperature", [0.02, 0.2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("recipe", [(), ALL_TYPES, *ONE_TYPE.values()], ids=["none", "all", *ONE_TYPE])
def test_closed_forms_equal_the_reference(recipe, shape, temperature):
    n, rows, dim, hard = shape
    tensors = problem(n, rows, dim, hard, recipe, seed=rows)
    reference, closed = (run(*tensors, impl, hard, temperature) for impl in BOTH)
    assert_same(reference, closed, 1e-10 if temperature < 0.03 else 1e-12)


def test_more_synthetic_negatives_than_hard_rows():
    tensors = problem(hard=4, recipe=mochi.recipe(MoCHiConfig(40, 24)))
    assert_same(run(*tensors, "reference", 4), run(*tensors, "cpu", 4))


def test_n_hard_above_the_queue_is_the_queue():
    tensors = problem(rows=9, hard=9)
    assert_same(run(*tensors, "cpu", hard=9), run(*tensors, "cpu", hard=1000), 0)


@pytest.mark.parametrize("impl", BOTH)
def test_n_hard_is_only_about_synthetic_negatives(impl):
    q, k, queue, _ = problem()
    assert_same(run(q, k, queue, None, impl, hard=0), run(q, k, queue, None, impl, hard=12), 0)


def test_blocks_do_not_show(monkeypatch):
    tensors = problem(n=11, rows=200, hard=10)
    whole = run(*tensors, "cpu", 10)
    monkeypatch.setattr(closed_form, "GROUP_ELEMENTS", 5 * 200)
    monkeypatch.setattr(closed_form, "BLOCK_ELEMENTS", 3 * 200)
    monkeypatch.setattr(closed_form, "PAIR_ROWS", 5)
    monkeypatch.setattr(closed_form, "COUNT_COLUMNS", 7)
    assert_same(whole, run(*tensors, "cpu", 10))


@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.2])
def test_float32_is_as_near_to_float64_as_eager_is(temperature):
    # Few enough draws and rows that no two similarities round across the edge of the hardest set.
    tensors = problem(n=16, rows=500, dim=64, hard=20, seed=3)
    edge = (tensors[0] @ tensors[2].T).sort(1, descending=True).values
    assert float((edge[:, 19] - edge[:, 20]).min()) > 1e-6
    gold, gold_gradient = run(*tensors, "reference", 20, temperature)
    errors = {}
    for impl in BOTH:
        low = [t.float() for t in tensors[:3]]
        head, gradient = run(*low, tensors[3], impl, 20, temperature)
        assert head.loss.dtype == torch.float32
        loss_error = abs(float(head.loss) - float(gold.loss)) / float(gold.loss)
        gradient_error = float((gradient - gold_gradient).norm() / gold_gradient.norm())
        errors[impl] = loss_error, gradient_error
    for ours, eager in zip(errors["cpu"], errors["reference"], strict=True):
        assert ours <= 2 * eager + rounding(64 / temperature) / 64**0.5


def test_evaluation_gives_the_same_numbers_without_a_gradient():
    q, k, queue, draws = problem()
    trained, _ = run(q, k, queue, draws, "cpu")
    seen = contrastive_loss(q, k, queue, temperature=T, n_hard=12, draws=draws)
    assert not seen.loss.requires_grad
    for a, b in zip(trained, seen, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_backward_multiplies_by_what_comes_in_and_reaches_the_encoder():
    q, k, queue, draws = problem()
    _, gradient = run(q, k, queue, draws, "cpu")
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    (3 * contrastive_loss(weight * q, k, queue, temperature=T, n_hard=12, draws=draws).loss).backward()
    torch.testing.assert_close(weight.grad, 3 * (gradient * q).sum(), rtol=1e-12, atol=1e-12)


def test_second_derivative_of_the_closed_forms_is_refused():
    q, k, queue, draws = problem()
    q.requires_grad_()
    loss = contrastive_loss(q, k, queue, temperature=T, n_hard=12, draws=draws, impl="cpu").loss
    with pytest.raises(RuntimeError, match="use impl='reference'"):
        torch.autograd.grad(loss, q, create_graph=True)
    loss = contrastive_loss(q, k, queue, temperature=T, n_hard=12, draws=draws, impl="reference").loss
    assert torch.autograd.grad(loss, q, create_graph=True)[0].requires_grad


def test_statistics_carry_no_gradient():
    q, k, queue, draws = problem()
    q.requires_grad_()
    for impl in BOTH:
        head = contrastive_loss(q, k, queue, temperature=T, n_hard=12, draws=draws, impl=impl)
        assert head.loss.requires_grad
        assert not any(t.requires_grad for t in head[1:])
        assert head.rank.dtype == torch.int64


# Whole steps --------------------------------------------------------------------------------------------------------


def test_one_step_and_fifty_train_the_same_encoder():
    assert_same_training(train("cpu"), train("reference"))


def test_bf16_products_train_along_the_same_curve():
    sizes = {"n": 16, "rows": 1024, "dim": 64}  # large enough that no library leaves the rounding out
    (gold, *_), (losses, *_) = (train("cpu", precision, **sizes) for precision in ("fp32", "bf16"))
    assert not torch.equal(losses, gold)
    # A row that rounding carries across the edge of the hardest set shifts what a query's draws point at: single steps
    # differ by 1 %, which the run does not keep.
    torch.testing.assert_close(losses, gold, rtol=0.03, atol=0)
    torch.testing.assert_close(losses.mean(), gold.mean(), rtol=2e-3, atol=0)


# The operator -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("impl", BOTH)
def test_torch_compile_traces_it_whole_and_once(impl, backend):
    counter = CompileCounterWithBackend(backend)
    masks = {"ids": torch.arange(5), "queue_ids": torch.arange(67) % 7}

    def step(x, k, queue, draws):
        q = F.normalize(2 * x, dim=1)
        head = contrastive_loss(q, k, queue, temperature=T, n_hard=12, draws=draws, impl=impl, **masks)
        return LossOutput(3 * head.loss, head.rank, head.hardest, head.synthetic_mass)  # torch 2.6 traces no slice

    torch.compiler.reset()
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for seed in range(3):
        q, k, queue, draws = problem(dtype=torch.float32, seed=seed)
        q.requires_grad_()
        for autocast in (False, True) if seed else (False,):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                (head, gradient), (other, other_gradient) = (
                    (head, torch.autograd.grad(head.loss, q)[0])
                    for head in (f(q, k, queue, draws) for f in (step, compiled))
                )
            assert not any(t.requires_grad for t in other[1:])
            for a, b in zip(tensors(head, gradient), tensors(other, other_gradient), strict=True):
                assert torch.equal(a, b)
    assert counter.frame_count == 2  # with and without autocast: nothing of a step is baked into the graph
    with torch.no_grad():
        assert torch.equal(compiled(q, k, queue, draws).loss, step(q, k, queue, draws).loss)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own look
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
def test_the_operator_keeps_torchs_promises(masked, drawn):
    q, k, queue, draws = problem(dtype=torch.float32)
    ids = (torch.arange(5), torch.arange(67) % 7) if masked else (None, None)
    for wants_gradient in (False, True):
        tensors = (q.requires_grad_(wants_gradient), k, queue, draws.tensors() if drawn else [], *ids)
        arguments = (*tensors, T, 12, "cpu", "fp32", wants_gradient, None)
        torch.library.opcheck(torch.ops.moco.contrastive_loss.default, arguments)


# Precision ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["as the processor has it", "rounded by hand"])
def bf16_somehow(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(matmul, "library_rounding", lambda a, b: matmul.NONE)


def sum_rounding(a, b):
    """Bound on what a @ b in float32 may err by in any order of its p sums: p 2^-24 |a| |b| (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1)."""
    return a.shape[1] * 2**-24 * (a.double().abs() @ b.double().abs())


def settings():
    backends = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    return [getattr(b, "fp32_precision", None) for b in backends], torch.get_float32_matmul_precision()


# n, p, m: single numbers, what a library is too small for, ragged, the two products of a step
PRODUCTS = [(1, 1, 1), (2, 16, 67), (5, 32, 300), (48, 96, 300), (3, 700, 32), (32, 128, 16384), (33, 900, 128)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_a_product_rounds_its_operands_and_nothing_else(shape, turned, bf16_somehow):
    """Whatever the library does with a permission to round at this size and with these strides."""
    n, p, m = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator) for size in ((n, p), (p, m)))
    b = b.T.contiguous().T if turned else b
    before = settings()
    for precision, low in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        exact = a.to(low).double() @ b.to(low).double()
        bound = sum_rounding(a.to(low), b.to(low))
        out = torch.empty(n, m)
        assert matmul.product(a, b, precision, out=out) is out
        assert ((out - exact).abs() <= bound).all()
        assert ((matmul.product(a.to(low), b.to(low), precision) - exact).abs() <= bound).all()
    assert float((exact - a.double() @ b.double()).norm()) > 2 * float(bound.norm())  # so the bound tells them apart
    with pytest.raises(RuntimeError):
        matmul.product(torch.ones(2, 3), torch.ones(2, 3), "bf16")
    assert settings() == before


def test_what_the_library_rounds_is_asked_and_not_supposed(monkeypatch):
    a, b = torch.randn(40, 96), torch.randn(500, 96).T
    found = matmul.library_rounding(a, b)
    with matmul.operands("bf16", on_gpu=False):
        got = (a @ b).double()
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    bound = sum_rounding(a, b)
    assert found in (matmul.ALL, matmul.NONE)
    assert bool(((got - rounded).abs() <= bound).all()) == (found == matmul.ALL)
    assert bool(((got - a.double() @ b.double()).abs() <= bound).all()) == (found == matmul.NONE)
    matmul._rounding.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matmul.library_rounding(a, b) == found  # not autocast's rounding
    # A library that rounds one operand alone is told apart from both.
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, y: torch.mm(x.bfloat16().float(), y))
    assert matmul._rounding.__wrapped__(a.shape, a.stride(), b.shape, b.stride(), 1) == matmul.SOME


@pytest.mark.parametrize(("rounds", "amd", "setting"), [
    ("none", True, "bf16"), ("none", False, "fp32"), ("all", True, "fp32"), ("some", True, "fp32"),
])  # fmt: skip
def test_fp32_goes_by_way_of_a_permission_only_where_nobody_makes_use_of_it(rounds, amd, setting, monkeypatch):
    monkeypatch.setattr(matmul, "library_rounding", lambda a, b: rounds)
    monkeypatch.setattr(matmul, "_by_amd", lambda: amd)
    monkeypatch.setattr(matmul, "cpu_has_bf16", lambda: True)
    a, b = torch.randn(3, 8), torch.randn(8, 5)
    x, y, used = matmul._for_cpu(a, b, "fp32")
    assert (x is a, y is b, used) == (True, True, setting)
    assert matmul._for_cpu(a.double(), b.double(), "fp32")[2] == "fp32"
    x, y, used = matmul._for_cpu(a, b, "bf16")
    by_hand = a if rounds == "all" else a.bfloat16().float()
    assert torch.equal(x, by_hand)
    assert used == "bf16"


def test_threads_that_want_another_precision_wait_for_their_turn():
    before, seen, together = settings(), [], threading.Barrier(4)

    def in_force():
        backend = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 on; there the old question is an error
        return getattr(backend, "fp32_precision", None) or torch.get_float32_matmul_precision()

    def work(number):
        precision = ("fp32", "bf16")[number % 2]
        together.wait()
        for _ in range(50):
            with matmul._permission(precision):
                here = in_force()
                time.sleep(1e-4)
                seen.append((precision, here == in_force(), here))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert all(steady for _, steady, _ in seen)
    for precision in ("fp32", "bf16"):
        assert len({here for name, _, here in seen if name == precision}) == 1
    assert len({here for *_, here in seen}) == 2
    assert settings() == before


def test_auto_is_bf16_only_where_the_library_rounds_by_itself(monkeypatch):
    for has, rounds, faster in (
        (True, "all", True),
        (True, "none", False),
        (True, "some", False),
        (False, "all", False),
    ):
        monkeypatch.setattr(matmul, "cpu_has_bf16", lambda has=has: has)
        monkeypatch.setattr(matmul, "library_rounding", lambda a, b, rounds=rounds: rounds)
        assert matmul.bf16_is_faster.__wrapped__() == faster


def test_strict_fp32_is_strict_whatever_the_process_is_set_to():
    tensors = problem(n=32, rows=800, dim=64, dtype=torch.float32)
    strict = run(*tensors, "cpu")
    torch.set_float32_matmul_precision("medium")
    try:
        again = run(*tensors, "cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_same(strict, again, 0)


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_bf16_is_nearer_to_float64_than_plain_moco_under_autocast(temperature, bf16_somehow):
    q, k, queue, _ = problem(n=32, rows=2000, dim=128, seed=2)
    gold, gold_gradient = run(q, k, queue, None, "reference", 0, temperature)
    low = [t.float() for t in (q, k, queue)]
    anchor = low[0].clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.cat([(anchor * low[1]).sum(1, keepdim=True), anchor @ low[2].T], dim=1) / temperature
    F.cross_entropy(logits.float(), torch.zeros(32, dtype=torch.long)).backward()
    head, gradient = run(*low, None, "cpu", 0, temperature, precision="bf16")
    error, eager = (float((g - gold_gradient).norm() / gold_gradient.norm()) for g in (gradient, anchor.grad))
    assert 0 < error <= eager
    assert abs(float(head.loss - gold.loss)) <= 1e-3 * float(gold.loss)


def test_bf16_keeps_everything_else_in_float32(bf16_somehow):
    tensors = problem(n=16, rows=600, dim=64, hard=600, dtype=torch.float32)  # H = K: the set cannot change
    (head, gradient), (gold, gold_gradient) = (
        run(*tensors, "cpu", 600, precision=precision) for precision in ("bf16", "fp32")
    )
    assert head.loss.dtype == gradient.dtype == torch.float32
    assert float(head.loss) == pytest.approx(float(gold.loss), rel=2e-3)
    assert float(head.synthetic_mass) == pytest.approx(float(gold.synthetic_mass), rel=2e-3)
    assert float((gradient - gold_gradient).norm()) <= 0.01 * float(gold_gradient.norm())


def test_which_precision(monkeypatch):
    monkeypatch.setattr("moco.kernels.gpu_has_bf16", lambda: True)  # torch 2.8's
    for faster, auto in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(matmul, "bf16_is_faster", lambda faster=faster: faster)
        assert resolve_precision("auto", "auto", "cpu") == resolve_precision("auto", "cpu", "cpu") == auto
        assert resolve_precision("auto", "reference", "cpu") == resolve_precision("auto", "cpu", "cuda") == "fp32"
        assert describe("auto", "auto", torch.device("cpu")) == f"cpu in {auto}"
        q, k, queue, draws = problem(n=32, rows=800, dim=64, dtype=torch.float32)
        assert_same(run(q, k, queue, draws, "cpu", precision="auto"), run(q, k, queue, draws, "cpu", precision=auto), 0)
        exact = problem()
        assert_same(run(*exact, "cpu", precision="auto"), run(*exact, "cpu", precision="fp32"), 0)  # float64
    for name in ("fp32", "tf32", "bf16"):
        assert resolve_precision(name, "auto", "cuda") == resolve_precision(name, "cpu", "cuda") == name
    monkeypatch.setattr("moco.kernels.by_triton.available", lambda: True)
    assert resolve_precision("auto", "auto", "cuda") == resolve_precision("tf32x3", "triton", "cuda") == "tf32x3"
    assert resolve_precision("bf16", "cpu", "cpu") == "bf16"


def test_a_precision_that_cannot_be_had_is_an_error(monkeypatch):
    exact, low = problem(), problem(dtype=torch.float32)
    with pytest.raises(UserError, match="use one of auto, fp32, tf32, tf32x3, bf16"):
        run(*low, "cpu", precision="fp8")
    for impl in BOTH:
        with pytest.raises(UserError, match=r"use --head-precision auto|--head-precision tf32 needs a GPU .* use auto"):
            run(*low, impl, precision="tf32")
        with pytest.raises(UserError, match=r"use --head-precision auto|--head-precision tf32x3 needs a GPU"):
            run(*low, impl, precision="tf32x3")
        with pytest.raises(UserError, match="use --head-precision auto"):
            run(*exact, impl, precision="bf16")
    with pytest.raises(UserError, match="reference has no bf16"):
        run(*low, "reference", precision="bf16")
    monkeypatch.setattr("moco.kernels.gpu_has_bf16", lambda: False)
    with pytest.raises(UserError, match="needs a GPU and torch 2.8"):
        resolve_precision("bf16", "cpu", "cuda")


# Inputs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", BOTH)
def test_non_contiguous_inputs(impl):
    q, k, queue, draws = problem()
    strided = [torch.stack([t, t], dim=2)[:, :, 0] for t in (q, k)]
    turned = queue.T.contiguous().T
    slow = draws.to(dtype=torch.float64)
    slow = Draws(**{name: torch.stack([t, t], dim=-1)[..., 0] for name, t in vars(slow).items()})
    assert not any(t.is_contiguous() for t in (*strided, turned, slow.slots_a))
    assert_same(run(q, k, queue, draws, impl), run(*strided, turned, slow, impl))


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_lifted(dtype, impl):
    q, k, queue, draws = problem(n=6, rows=400, dim=32, hard=20)
    gold, gold_gradient = run(*(t.to(dtype).double() for t in (q, k, queue)), draws, "reference", 20)
    head, gradient = run(q.to(dtype), k.to(dtype), queue.to(dtype), draws, impl, 20)
    assert head.loss.dtype == torch.float32
    assert gradient.dtype == dtype
    # The same rounded numbers in float32 arithmetic: the rows are no longer unit, and the closed forms know.
    assert float(head.loss) == pytest.approx(float(gold.loss), rel=1e-5)
    torch.testing.assert_close(gradient.double(), gold_gradient, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("impl", BOTH)
def test_autocast_does_not_touch_the_loss(impl):
    q, k, queue, draws = problem(dtype=torch.float32)
    outside, gradient = run(q, k, queue, draws, impl)
    q.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive_loss(q, k, queue, temperature=T, n_hard=12, draws=draws, impl=impl)
    inside.loss.backward()
    assert torch.equal(inside.loss, outside.loss)
    assert torch.equal(q.grad, gradient)


def test_nan_in_a_query_is_nan_in_the_loss_and_no_error():
    q, k, queue, draws = problem(rows=300, hard=9)
    q[2, 1] = math.nan
    for impl in BOTH:
        assert math.isnan(run(q, k, queue, draws, impl, 9)[0].loss)


def test_what_does_not_fit_is_an_error():
    q, k, queue, draws = problem()
    with pytest.raises(ValueError, match="want"):
        contrastive_loss(q, k[:, 1:], queue, temperature=T)
    with pytest.raises(ValueError, match="want"):
        contrastive_loss(q, k, queue[:0], temperature=T)
    with pytest.raises(ValueError, match="temperature"):
        contrastive_loss(q, k, queue, temperature=0)
    with pytest.raises(ValueError, match="together"):
        contrastive_loss(q, k, queue, temperature=T, ids=torch.arange(5))
    with pytest.raises(ValueError, match="n_hard"):
        contrastive_loss(q, k, queue, temperature=T, draws=draws)
    with pytest.raises(ValueError, match="queries"):
        contrastive_loss(q[:3], k[:3], queue, temperature=T, n_hard=12, draws=draws)


def test_resolve():
    assert (
        resolve("auto", "cpu") == resolve("cpu", "cuda") == resolve("cpu", "cpu") == "cpu"
    )  # triton: test_by_triton.py
    assert resolve("reference", "cuda") == "reference"
    with pytest.raises(UserError, match="use one of auto"):
        resolve("fast", "cpu")


# Properties ---------------------------------------------------------------------------------------------------------


def test_zero_counts_are_plain_moco_bit_for_bit():
    q, k, queue, _ = problem(dtype=torch.float32)
    d = draw(synco.recipe(SynCoConfig(0, 0, 0, 0, 0, 0)), len(q), 12, 16, key=0)
    assert d is None
    one = draw(ALL_TYPES, len(q), 12, 16, key=0)
    empty = Draws(**{name: t[:, :0] for name, t in vars(one).items()})
    for impl in BOTH:
        assert_same(run(q, k, queue, None, impl), run(q, k, queue, empty, impl), 0)

    published = q.clone().requires_grad_()
    positive = torch.einsum("nc,nc->n", [published, k]).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", [published, queue.T.clone().detach()])
    logits = torch.cat([positive, negative], dim=1) / T
    F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long)).backward()
    head, gradient = run(q, k, queue, None, "reference")
    loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
    assert torch.equal(head.loss, loss.detach())
    assert torch.equal(gradient, published.grad)


@pytest.mark.parametrize("impl", BOTH)
def test_permuting_the_queue_permutes_nothing_in_the_loss(impl):
    q, k, queue, draws = problem(rows=150, hard=10)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    rows, _ = hardest_rows(q @ queue.T, 10)
    moved, _ = hardest_rows(q @ queue[order].T, 10)
    # Slots are positions in the set as listed, so the same row now has another slot.
    slot = (rows.unsqueeze(2) == order[moved].unsqueeze(1)).int().argmax(2)  # (N, H)
    remapped = {name: slot.gather(1, getattr(draws, name)) for name in ("slots_a", "slots_b")}
    same = Draws(**{**vars(draws), **remapped})
    assert_same(run(q, k, queue, draws, impl, 10), run(q, k, queue[order], same, impl, 10))


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("rows", [67, 400])
def test_left_out_rows_are_as_if_they_were_not_there(rows, impl):
    q, k, queue, draws = problem(rows=rows, hard=12)
    queue_ids = torch.arange(rows) % 7
    heads = []
    for i in range(len(q)):
        d = draws.rows(i, i + 1)
        heads.append(run(q[i : i + 1], k[i : i + 1], queue[queue_ids != i], d, impl))
    together, gradient = run(q, k, queue, draws, impl, ids=torch.arange(5), queue_ids=queue_ids)
    assert float(together.loss) == pytest.approx(sum(float(h.loss) for h, _ in heads) / 5, rel=1e-12)
    assert together.rank.tolist() == [int(h.rank) for h, _ in heads]
    torch.testing.assert_close(5 * gradient, torch.cat([g for _, g in heads]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_of_rows_that_do_not_exist_give_no_negative(dtype):
    q, k, queue, draws = problem(rows=20, hard=12, dtype=dtype)
    queue_ids = torch.zeros(20, dtype=torch.long)
    queue_ids[:4] = 9  # query 0 keeps four rows, the others all
    masks = {"ids": torch.tensor([0, 1, 2, 3, 4]), "queue_ids": queue_ids}
    reference, closed = (run(q, k, queue, draws, impl, **masks) for impl in BOTH)
    assert_same(reference, closed, 1e-5 if dtype == torch.float32 else 1e-12)
    assert torch.isfinite(closed[1]).all()
    # By hand: query 0 with its four rows and the draws whose parents are among them.
    d = draws.to(dtype=dtype).rows(0, 1)
    h = synthesize(q[:1], queue, torch.arange(12).clamp(max=3).unsqueeze(0), d)[0]
    present = d.slots_a[0] < 4
    present[ALL_TYPES[0].count + ALL_TYPES[1].count + ALL_TYPES[4].count :][: d.slots_b.shape[1]] &= d.slots_b[0] < 4
    logits = torch.cat([q[0] @ k[:1].T, queue[:4] @ q[0], h[present] @ q[0]]) / T
    alone, _ = run(q[:1], k[:1], queue, draws.rows(0, 1), "cpu", ids=masks["ids"][:1], queue_ids=queue_ids)
    assert float(alone.loss) == pytest.approx(float(torch.logsumexp(logits, 0) - logits[0]), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.02, 0.2])
@pytest.mark.parametrize("impl", BOTH)
def test_a_query_that_has_left_out_everything_costs_nothing(impl, temperature):
    q, k, queue, draws = problem(rows=20, dtype=torch.float32)
    masks = {"ids": torch.tensor([0, 1, 1, 1, 1]), "queue_ids": torch.zeros(20, dtype=torch.long)}
    head, gradient = run(q, k, queue, draws, impl, temperature=temperature, **masks)
    assert torch.isfinite(head.loss)
    assert torch.isfinite(gradient).all()
    assert float(gradient[0].abs().max()) == 0
    assert head.rank[0] == 0
    assert float(head.hardest) == pytest.approx(float((q[1:] @ queue.T).amax(1).mean()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", list(ONE_TYPE))
def test_queries_among_rows_duplicates_and_antipodes(kind, dtype):
    q, k, queue, _ = problem(n=4, rows=12, dim=8, dtype=torch.float64)
    queue = torch.cat([q, -q, queue, queue, -queue])
    q, k, queue = q.to(dtype), k.to(dtype), queue.to(dtype)
    constant = 0.5 if kind in ("mixup", "interpolation") else None  # |u| = 0 where the parents are antipodal
    draws = draw((synthetic(kind, 300, constant),), 4, len(queue), 8, key=0)
    for temperature in (0.02, 0.2):
        reference, closed = (run(q, k, queue, draws, impl, len(queue), temperature) for impl in BOTH)
        for head, gradient in (reference, closed):
            assert torch.isfinite(head.loss)
            assert torch.isfinite(gradient).all()
        # u near 0 has no direction to agree on, so even float64 is held loosely where it occurs.
        rounding = 1e-4 if dtype == torch.float32 else 1e-9
        assert float(closed[0].loss) == pytest.approx(float(reference[0].loss), rel=rounding)
        scale = float(reference[1].abs().max())
        torch.testing.assert_close(closed[1] / scale, reference[1] / scale, rtol=0, atol=rounding)


@pytest.mark.parametrize(
    ("n", "rows", "hard"), [(1, 1, 1), (3, 100, 100), (4, 803, 20), (2, 4096, 200), (5, 64, 4), (6, 4099, 100)]
)
@pytest.mark.parametrize("levels", [3, 50, 10**9])
def test_the_fast_hardest_set_is_the_defined_one(n, rows, hard, levels):
    generator = torch.Generator().manual_seed(rows)
    similarities = torch.randn(n, rows, generator=generator)
    similarities = (similarities * levels).round() / levels  # few levels: ties everywhere, at the edge too
    similarities[0, : rows // 2] = -torch.inf
    similarities[-1, hard // 2 :] = -torch.inf  # fewer rows than H remain
    expected, values = hardest_rows(similarities, hard)
    got, got_values = hardest(similarities.clone(), hard)
    real = values != -torch.inf
    assert torch.equal(got_values, values)
    assert torch.equal(got[real], expected[real])
    assert torch.equal(torch.sort(similarities, dim=1, descending=True).values[:, :hard], values.sort(1, True).values)
    elsewhere, elsewhere_values = _on_device(similarities, hard, -torch.inf)  # what a GPU runs
    assert torch.equal(elsewhere, expected)
    assert torch.equal(elsewhere_values, values)
    masses = similarities.double().exp()  # in their place, where a row left out has none
    elsewhere, elsewhere_values = _on_device(masses, hard, 0.0)
    assert torch.equal(elsewhere, hardest_rows(masses.masked_fill(masses == 0, -torch.inf), hard)[0])
    assert torch.equal(elsewhere_values, masses.gather(1, elsewhere))


def test_the_fast_hardest_set_of_rows_that_are_all_alike_or_not_numbers():
    similarities = torch.zeros(4, 1000)
    similarities[1, 500] = torch.nan
    similarities[2, ::3] = 1.0
    similarities[3] = torch.arange(1000.0)
    rows, values = hardest(similarities.clone(), 10)
    assert rows[0].tolist() == list(range(10))  # the lower rows
    assert rows[2].tolist() == list(range(0, 30, 3))
    assert rows[3].tolist() == list(range(990, 1000))
    assert torch.equal(values[[0, 2, 3]], similarities[[0, 2, 3]].gather(1, rows[[0, 2, 3]]))
    assert torch.equal(rows[1], hardest_rows(similarities[1:2], 10)[0][0])


@pytest.mark.parametrize("hard", [1, 2, 5, 40])
def test_what_a_gpu_selects_among_numbers_that_are_none(hard):
    similarities = torch.tensor([0.0, -0.0, 1.0, torch.nan, torch.inf, -torch.inf])[
        torch.randint(6, (200, 40), generator=torch.Generator().manual_seed(0))
    ]
    similarities[0], similarities[1] = torch.nan, -torch.inf
    rows, values = _on_device(similarities, hard, -torch.inf)
    expected, expected_values = hardest_rows(similarities, hard)
    assert torch.equal(rows, expected)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_draws_from_a_set_that_lacks_rows(temperature):
    q, k, queue, draws = problem(n=6, rows=40, hard=12)
    ids, queue_ids = torch.arange(6), torch.arange(40) % 6
    queue_ids[::2] = torch.arange(20) // 18  # queries 0 and 1 keep fewer than 12 and others more
    queue_ids[1:36:2] = 0
    queue[3] = queue[5]  # the same similarity twice
    tensors = (q, k, queue, draws)
    for dtype, error in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        cast = tuple(t.to(dtype) for t in tensors[:3])
        results = []
        for impl in BOTH:
            leaf = cast[0].clone().requires_grad_()
            head = contrastive_loss(
                leaf, *cast[1:], temperature=temperature, n_hard=12, draws=draws, ids=ids, queue_ids=queue_ids,
                impl=impl, precision="fp32",
            )  # fmt: skip
            head.loss.backward()
            results.append([*(value.detach().double() for value in head), leaf.grad.double()])
        for got, expected in zip(*reversed(results), strict=True):
            torch.testing.assert_close(got, expected, rtol=error, atol=error)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The closed forms on a CPU as they are on a GPU: one group, no value read, sums in a fixed order."""
    for module in (closed_form, sys.modules["moco.kernels.topk"], labelled):
        monkeypatch.setattr(module, "on_host", lambda x: False)
    monkeypatch.setattr(closed_form, "by_maxima", lambda *given: False)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [0.02, 0.2])
@pytest.mark.parametrize("shape", [*SHAPES, (6, 40, 16, 12)], ids=str)
@pytest.mark.parametrize("recipe", [(), ALL_TYPES, *ONE_TYPE.values()], ids=["none", "all", *ONE_TYPE])
def test_closed_forms_as_on_a_gpu_equal_the_reference(recipe, shape, temperature, masked, as_on_a_gpu):
    n, rows, dim, hard = shape
    q, k, queue, draws = problem(n, rows, dim, hard, recipe, seed=rows)
    k[: n // 2] = F.normalize(k + 5 * queue[:n], dim=1)[: n // 2]  # positives that rows beat, and such that none does
    masks = {"ids": torch.arange(n), "queue_ids": torch.arange(rows) % (n + 1)} if masked else {}
    reference, closed = (run(q, k, queue, draws, impl, hard, temperature, **masks) for impl in BOTH)
    assert_same(reference, closed, 1e-10 if temperature < 0.03 else 1e-12)


def test_ties_and_left_out_parents_as_on_a_gpu(as_on_a_gpu):
    q, k, queue, draws = problem(n=6, rows=40, hard=12)
    queue[20:] = queue[:20]  # every similarity twice
    for masks in ({}, {"ids": torch.arange(6), "queue_ids": torch.arange(40) // 36}):  # two of six keep few rows
        assert_same(*(run(q, k, queue, draws, impl, **masks) for impl in BOTH))


class Names(TorchDispatchMode):
    """Of the operators, inside our own too."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.moco.contrastive_loss.default:
            with self:
                return kernels._compute(*args, **(kwargs or {}))
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@dataless_gpu
@pytest.mark.parametrize("temperature", [0.02, 0.2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
def test_closed_forms_on_a_gpu_ask_for_no_value_and_add_nothing_atomically(drawn, masked, temperature):
    """On tensors of a GPU that have no data: whatever asks for a value, so that no graph could capture it, raises."""
    with FakeTensorMode():

        def of(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="cuda")

        slots = of(300, 8, dtype=torch.int64)
        draws = Draws(slots, slots[:, :2], *[of(300, 2) for _ in range(6)], of(300, 2, 16)) if drawn else None
        ids = {"ids": of(300, dtype=torch.int64), "queue_ids": of(40000, dtype=torch.int64)} if masked else {}
        with Names() as names:
            head = contrastive_loss(
                of(300, 16).requires_grad_(), of(300, 16), of(40000, 16), temperature=temperature, n_hard=9,
                draws=draws, impl="cpu", precision="fp32", **ids,
            )  # fmt: skip
    assert head.loss.device.type == "cuda"
    unordered = {"scatter_add", "scatter_add_", "index_add_", "index_put_", "_index_put_impl_", "cumsum", "nonzero"}
    assert "mm" in names.seen
    assert not names.seen & {*unordered, "_local_scalar_dense", "is_nonzero", "item"}
    assert ("topk" in names.seen) == drawn


def test_labels_as_on_a_gpu_have_the_same_gradient(monkeypatch):
    q, k, queue, draws = problem(n=6, rows=40, hard=12)
    labels, queue_labels = torch.arange(6) % 3, torch.arange(40) % 4 - 1
    found = []
    for host in (True, False):
        monkeypatch.setattr(labelled, "on_host", lambda x, host=host: host)
        leaf = q.clone().requires_grad_()
        head = labelled_loss(leaf, k, queue, labels, queue_labels, temperature=T, n_hard=12, draws=draws)
        found.append((head._replace(loss=head.loss.detach()), torch.autograd.grad(head.loss, leaf)[0]))
    assert_same(*found)


def test_hardest_rows_prefers_the_lower_row_and_lists_by_row():
    similarities = torch.tensor([[0.5, 0.9, 0.5, -torch.inf, 0.5], [-torch.inf, 0.1, -torch.inf, 0.2, -torch.inf]])
    rows, values = hardest_rows(similarities, 3)
    assert rows[0].tolist() == [0, 1, 2]
    assert rows[1, :2].tolist() == [1, 3]
    assert values[1, 2] == -torch.inf
