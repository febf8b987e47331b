"""The fused head, by triton's interpreter on the CPU or compiled on a card: every value and gradient against float64.

The interpreter has to be chosen before triton is imported, so test_by_triton.py runs this file in a process of its
own, as anyone can:  TRITON_INTERPRET=1 python -m pytest tests/kernels/by_triton_interpreted.py
`pytest -m gpu` runs it compiled.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query.
"""

import math

import pytest
import torch
from conftest import DEVICE, assert_runs_there, mend_interpreter, rounding
from support.loss import (
    ALL_TYPES,
    ONE_TYPE,
    assert_near_in_float32,
    assert_same_training,
    head_rounding,
    problem,
    run,
    tensors,
    train,
)

from moco.config import MoCHiConfig
from moco.errors import UserError
from moco.kernels import Draws, by_triton, contrastive_loss, hardest_rows, resolve
from moco.methods import mochi
from moco.methods.controls import copies
from moco.methods.negatives import draw, synthetic

mend_interpreter()


@pytest.fixture(autouse=True)
def interpreter():
    assert_runs_there()
    yield
    by_triton.planned.cache_clear()  # a test may have planned with other sizes


def put(monkeypatch, **sizes):
    """Programs of other sizes, also for problems that were planned before."""
    for name, size in sizes.items():
        monkeypatch.setattr(by_triton, name, size)
    by_triton.planned.cache_clear()


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of rows and draws, the last one ragged."""
    put(monkeypatch, SCORE_K=16, BLOCK_C=16, COMPACT_K=64, PULL_K=16, PULL_C=16, PART=16, DRAWS_TILE=256)


def errors(gold, got, ranks=True):
    """Of the loss, relative; of the gradient, norm of the difference over the norm; of the statistics, absolute.

    Below 1e-6, where a positive has all the mass, loss and gradient of the float64 reference are rounding themselves.
    """
    (head, gradient), (head_got, gradient_got) = gold, got
    assert not ranks or head_got.rank.tolist() == head.rank.tolist()
    return (
        abs(float(head_got.loss) - float(head.loss)) / max(float(head.loss), 1e-6),
        float((gradient_got - gradient).norm() / gradient.norm().clamp(min=1e-6)),
        abs(float(head_got.hardest - head.hardest)),
        abs(float(head_got.synthetic_mass - head.synthetic_mass)),
    )


def products_errors(q, k, queue, temperature, gradient):
    """What this machine's library makes of the two products of a step in float32, against float64: the similarities,
    absolute; the product with the probabilities that is added to a vector, norm over that of the gradient, as in
    ``errors``. In which order a library sums is its own affair: 2,500 terms of 2 rows err by 1e-7 on one processor and,
    where each term is added to the vector itself, by 2e-6 on another."""
    exact = q.double() @ queue.double().T  # (N, K)
    of_similarities = float((q @ queue.T - exact).abs().max())
    positive = torch.linalg.vecdot(q, k).double().unsqueeze(1)
    p = (torch.cat([positive, exact], dim=1) / temperature).softmax(1).float()
    vector = (p[:, :1] - 1) * k
    summed = vector.clone().addmm_(p[:, 1:], queue).double()
    of_gradient = (summed - vector.double() - p[:, 1:].double() @ queue.double()).norm() / (temperature * len(q))
    return of_similarities, float(of_gradient / gradient.norm().clamp(min=1e-6))


def run_products(q, k, queue, draws, precision, hard, temperature, **masks):
    """``run`` of the fused head with operands in a precision that ``contrastive_loss`` keeps for a card."""
    ids, queue_ids = (None if masks.get(x) is None else masks[x].to(q.device) for x in ("ids", "queue_ids"))
    draws = None if draws is None or not draws.slots_a.shape[1] else draws.to(q.device, torch.float32)
    return by_triton.compute(q, k, queue, temperature, min(hard, len(queue)), draws, ids, queue_ids, precision, True)


def assert_near(tensors, hard=12, temperature=0.2, precisions=("fp32", "tf32x3"), **masks):
    """As near to the float64 reference as the float32 reference: twice its error, a logit's rounding, 6e-8 / T, and
    what float32 products of these shapes err by on this machine, for the two sum in different orders. Three products in
    tf32 leave out 2^-21 of each term beside that."""
    gold = run(*tensors, "reference", hard, temperature, **masks)
    low = [t.float() for t in tensors[:3]]
    eager = errors(gold, run(*low, tensors[3], "reference", hard, temperature, **masks))
    of_similarities, of_gradient = products_errors(*low, temperature, gold[1])
    names = ("loss", "gradient", "hardest", "mass")
    for precision in precisions:
        more = of_similarities + (2**-21 if precision == "tf32x3" else 0)
        library = (more / temperature, 2 * of_gradient + more / temperature, more, more / temperature)
        if precision == "fp32":
            library = (more, 2 * of_gradient + more, more, more)
            got = run(*low, tensors[3], "triton", hard, temperature, **masks)
        else:
            got = run_products(*low, tensors[3], precision, hard, temperature, **masks)
        for name, ours, theirs, added in zip(names, errors(gold, got), eager, library, strict=True):
            assert ours <= 2 * theirs + 6e-8 / temperature + added, (precision, name)


# Values and gradients -----------------------------------------------------------------------------------------------

SHAPES = [  # n, rows, dim, hard
    (1, 1, 3, 1),
    (1, 64, 16, 4),
    (5, 67, 16, 12),
    (4, 33, 5, 33),
    (3, 300, 32, 9),
    (2, 256, 100, 16),
    (66, 40, 17, 6),
]


@pytest.mark.parametrize("temperature", [0.02, 0.2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("recipe", [(), ALL_TYPES], ids=["none", "all"])
def test_any_shape(recipe, shape, temperature, small_blocks):
    n, rows, dim, hard = shape
    assert_near(problem(n, rows, dim, hard, recipe, seed=rows), hard, temperature)


@pytest.mark.parametrize("kind", list(ONE_TYPE))
def test_each_type_alone(kind, small_blocks):
    assert_near(problem(n=3, rows=150, recipe=ONE_TYPE[kind], seed=1), 12, 0.07)


@pytest.mark.parametrize("dim", [32, 48, 128, 300, 512])
def test_the_blocks_that_a_gpu_gets(dim):
    assert_near(problem(2, 2500, dim, 30, seed=dim), 30)


def test_the_hardest_set_is_exact_with_the_blocks_that_a_gpu_gets(monkeypatch):
    similarities = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert by_triton.GridPlan(1, 20_000, 16, 1024, 1).bucket == 4
    assert_selected(similarities, 1024, monkeypatch)
    assert_selected(similarities.sort(dim=1).values, 1024, monkeypatch)


def test_blocks_do_not_show(monkeypatch):
    q, k, queue, draws = problem(n=2, rows=100, dtype=torch.float32)
    head, gradient = run(q, k, queue, draws, "triton")
    put(monkeypatch, SCORE_K=32, COMPACT_K=32, PULL_K=16, DRAWS_TILE=64, FILL=2)
    other, other_gradient = run(q, k, queue, draws, "triton")
    assert_near_in_float32((head, gradient), (other, other_gradient), head_rounding(q, queue, draws))


def test_the_same_bits_every_time():
    tensors = problem(dtype=torch.float32)
    (head, gradient), (again, gradient_again) = (run(*tensors, "triton") for _ in range(2))
    for a, b in zip((*head, gradient), (*again, gradient_again), strict=True):
        assert torch.equal(a, b)


def test_more_synthetic_negatives_than_hard_rows(small_blocks):
    assert_near(problem(hard=4, recipe=mochi.recipe(MoCHiConfig(40, 24))), 4)


@pytest.mark.parametrize(("rows", "dealt"), [(67, 0), (12, 0), (7, 7)], ids=["random", "hardest", "reweight"])
def test_copies_of_rows_in_place_of_synthetic_negatives(rows, dealt, small_blocks):
    *tensors, draws = problem(hard=rows)
    copied = copies(draws, dealt)
    assert copied.counts == (sum(draws.counts), 0, 0, 0)
    assert_near((*tensors, copied), rows)


def test_n_hard_above_the_queue_is_the_queue():
    assert_near(problem(rows=9, hard=9), hard=1000)


@pytest.mark.parametrize("kind", [None, *ONE_TYPE])
def test_closed_forms_and_fused_head_differ_by_rounding(kind):
    tensors = problem(n=2, rows=90, recipe=ALL_TYPES if kind is None else ONE_TYPE[kind], dtype=torch.float32)
    closed, fused_ = (run(*tensors, impl) for impl in ("cpu", "triton"))
    assert_near_in_float32(closed, fused_, head_rounding(tensors[0], *tensors[2:]))


def test_one_step_and_fifty_train_the_same_encoder():
    assert_same_training(train("triton", n=2), train("reference", n=2))


# Odd geometry and masks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(ONE_TYPE))
def test_queries_among_rows_duplicates_and_antipodes(kind):
    q, k, queue, _ = problem(n=4, rows=12, dim=8, dtype=torch.float32)
    queue = torch.cat([q, -q, queue, queue, -queue])
    constant = 0.5 if kind in ("mixup", "interpolation") else None  # |u| = 0 where the parents are antipodal
    draws = draw((synthetic(kind, 140, constant),), 4, len(queue), 8, key=0, device=DEVICE)
    for temperature in (0.02, 0.2):
        (head, gradient), (gold, gold_gradient) = (
            run(q, k, queue, draws, impl, len(queue), temperature) for impl in ("triton", "cpu")
        )
        assert torch.isfinite(head.loss)
        assert float(head.loss) == pytest.approx(float(gold.loss), rel=1e-4)
        scale = float(gold_gradient.abs().max())
        torch.testing.assert_close(gradient / scale, gold_gradient / scale, rtol=0, atol=1e-4)


def test_left_out_rows(small_blocks):
    tensors = problem(rows=150, seed=4)
    assert_near(tensors, 12, 0.1, ids=torch.arange(5, device=DEVICE), queue_ids=torch.arange(150, device=DEVICE) % 7)


def test_draws_of_rows_that_do_not_exist_give_no_negative(small_blocks):
    queue_ids = torch.zeros(70, dtype=torch.long, device=DEVICE)
    queue_ids[[1, 40, 41, 69]] = 9  # query 0 keeps four rows
    assert_near(problem(rows=70, seed=5), 12, ids=torch.arange(5, device=DEVICE), queue_ids=queue_ids)


@pytest.mark.parametrize("temperature", [0.02, 0.2])
def test_a_query_that_has_left_out_everything_costs_nothing(temperature):
    q, k, queue, draws = problem(rows=20, dtype=torch.float32)
    ids = torch.tensor([0, 1, 1, 1, 1], device=DEVICE)
    masks = {"ids": ids, "queue_ids": torch.zeros(20, dtype=torch.long, device=DEVICE)}
    head, gradient = run(q, k, queue, draws, "triton", temperature=temperature, **masks)
    assert torch.isfinite(head.loss)
    assert torch.isfinite(gradient).all()
    assert float(gradient[0].abs().max()) == 0
    assert head.rank[0] == 0
    assert float(head.hardest) == pytest.approx(float((q[1:] @ queue.T).amax(1).mean()), rel=1e-5)
    for d in (None, draws):
        alone, _ = run(q[:1], k[:1], queue, None if d is None else d.rows(0, 1), "triton",
                       ids=torch.zeros(1, dtype=torch.long, device=DEVICE), queue_ids=masks["queue_ids"])  # fmt: skip
        assert float(alone.loss) == float(alone.hardest) == float(alone.synthetic_mass) == 0


def selected(similarities, hard, monkeypatch):
    """The hardest set (rows, similarities) that the programs find in similarities (N, K)."""
    n, rows = similarities.shape
    monkeypatch.setattr(by_triton, "product", lambda *_, out: out.copy_(similarities))
    q, queue = similarities.new_zeros(n, 16), similarities.new_zeros(rows, 16)
    slots, empty = torch.zeros(n, 1, dtype=torch.long, device=q.device), q.new_empty(n, 0)
    draws = Draws(slots, slots[:, :0], q[:, :1], q[:, :1], *[empty] * 4, q.new_empty(n, 0, 16))
    step = by_triton._Step(q, q, queue, 0.2, hard, draws, "fp32", True, False)
    sim, maxima, _ = step.score(queue, None, None)
    found, values = step.hardest(sim, maxima)
    return found.long(), values


def assert_selected(similarities, hard, monkeypatch):
    expected, expected_values = hardest_rows(similarities, hard)
    got, values = selected(similarities, hard, monkeypatch)
    assert torch.equal(values, expected_values)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("n", "rows", "hard"), [(1, 1, 1), (3, 100, 100), (4, 303, 20), (2, 1024, 200), (5, 64, 4), (2, 1000, 20)]
)
@pytest.mark.parametrize("levels", [3, 50, 10**9])
def test_the_selected_set_is_the_defined_one(n, rows, hard, levels, small_blocks, monkeypatch):
    generator = torch.Generator().manual_seed(rows)
    similarities = torch.randn(n, rows, generator=generator).to(DEVICE)
    similarities = (similarities * levels).round() / levels  # few levels: ties everywhere, at the edge too, and -0
    similarities[0, : rows // 2] = -torch.inf
    similarities[-1, hard // 2 :] = -torch.inf  # fewer rows than H remain
    assert_selected(similarities, hard, monkeypatch)


ORDERS = {
    "ascending: all candidates in the last chunk": lambda s: s.sort(dim=1).values,
    "descending: all candidates in the first chunk": lambda s: s.sort(dim=1, descending=True).values,
    "blocks: the hardest rows share their buckets": lambda s: s.sort(dim=1).values.view(2, 32, 16).mT.reshape(2, -1),
    "one value: every place is a tie": torch.zeros_like,
    "two values, ties across chunks": lambda s: (s > 1.2).float(),
    "one row above the rest, which are equal": lambda s: (s == s.amax(1, keepdim=True)).float(),
}


@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize("hard", [24, 128])
def test_the_selected_set_in_an_order_that_defeats_the_buckets(order, hard, small_blocks, monkeypatch):
    similarities = torch.randn(2, 512, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert_selected(ORDERS[order](similarities), hard, monkeypatch)


def test_a_chunk_without_a_candidate_and_one_with_more_than_its_room(small_blocks, monkeypatch):
    similarities = torch.randn(1, 1024, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    similarities[:, 128:256] += 10  # the whole set of 16, and 112 rows more than it
    plan = by_triton.GridPlan(1, 1024, 16, 16, 1)
    assert plan.bucket
    assert (plan.chunks, plan.chunk, plan.room) == (16, 64, 16)
    assert_selected(similarities, 16, monkeypatch)
    assert_selected(similarities, 100, monkeypatch)


def test_the_selected_set_without_buckets(small_blocks, monkeypatch):
    put(monkeypatch, MOST_MAXIMA=64)
    assert by_triton.GridPlan(2, 900, 16, 300, 1).bucket == 0
    similarities = torch.randn(2, 900, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    similarities[1, 100:] = -torch.inf
    assert_selected(similarities, 300, monkeypatch)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's numpy
def test_nan_is_selected_and_nothing_is_written_outside(small_blocks, monkeypatch):
    similarities = torch.randn(3, 600, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    similarities[1] = math.nan
    similarities[2, 300] = math.nan
    rows, _ = selected(similarities, 20, monkeypatch)
    assert torch.equal(rows[0], hardest_rows(similarities[:1], 20)[0][0])
    assert rows[1].tolist() == list(range(20))
    assert 300 in rows[2]
    assert bool((rows.diff() > 0).all())


# Inputs and the operator's manners ----------------------------------------------------------------------------------


def test_non_contiguous_inputs():
    q, k, queue, draws = problem(dtype=torch.float32)
    strided = [torch.stack([t, t], dim=2)[:, :, 0] for t in (q, k)]
    wide = [torch.cat([t, t], dim=1)[:, :16] for t in (q, k)]
    turned = queue.T.contiguous().T
    slow = Draws(**{name: torch.stack([t, t], dim=-1)[..., 0] for name, t in vars(draws).items()})
    head, gradient = run(q, k, queue, draws, "triton")
    for q_k in (strided, wide):
        assert not any(t.is_contiguous() for t in (*q_k, turned, slow.slots_a))
        other, other_gradient = run(*q_k, turned, slow, "triton")
        assert_near_in_float32((other, other_gradient), (head, gradient), head_rounding(q, queue, draws))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_lifted(dtype):
    q, k, queue, draws = problem(n=4, rows=200, dim=32, hard=20)
    gold, gold_gradient = run(*(t.to(dtype).double() for t in (q, k, queue)), draws, "reference", 20)
    head, gradient = run(q.to(dtype), k.to(dtype), queue.to(dtype), draws, "triton", 20)
    assert head.loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert float(head.loss) == pytest.approx(float(gold.loss), rel=1e-5)
    torch.testing.assert_close(gradient.double(), gold_gradient, rtol=2**-7, atol=1e-5)


def test_autocast_does_not_touch_the_loss():
    q, k, queue, draws = problem(dtype=torch.float32)
    outside, _ = run(q, k, queue, draws, "triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside, _ = run(q, k, queue, draws, "triton")
    assert torch.equal(inside.loss, outside.loss)


def test_a_half_precision_query_against_a_float32_queue():
    q, k, queue, draws = problem(rows=100, dtype=torch.float32)
    q, k = q.bfloat16(), k.bfloat16()  # what an encoder gives that was not told to normalise in float32
    head, gradient = run(q, k, queue, draws, "triton")
    gold, gold_gradient = run(q, k, queue, draws, "cpu")
    torch.testing.assert_close(head.loss, gold.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, gold_gradient, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("recipe", [(), ALL_TYPES], ids=["none", "all"])
def test_bf16_products_are_as_near_as_those_of_the_closed_forms(recipe):
    problems = problem(n=6, rows=300, dim=32, hard=300, recipe=recipe, dtype=torch.float32)
    gold = run(*problems, "cpu", 300, precision="fp32")
    ours = errors(gold, run(*problems, "triton", 300, precision="bf16"), ranks=False)
    assert ours[0] <= 2e-4
    assert 0 < ours[1] <= 2e-3
    assert max(ours[2:]) <= 2e-4


def test_torch_compile_traces_it_whole():
    q, k, queue, draws = problem(dtype=torch.float32)

    def step(q):
        return contrastive_loss(q, k, queue, temperature=0.2, n_hard=12, draws=draws, impl="triton")

    q.requires_grad_()
    found = []
    for f in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        head = f(q)
        found.append(tensors(head, torch.autograd.grad(head.loss, q)[0]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_zero_counts_are_plain_moco_bit_for_bit():
    q, k, queue, draws = problem(dtype=torch.float32)
    empty = Draws(**{name: t[:, :0] for name, t in vars(draws).items()})
    (none, gradient), (zero, zero_gradient) = (run(q, k, queue, d, "triton") for d in (None, empty))
    assert torch.equal(none.loss, zero.loss)
    assert torch.equal(gradient, zero_gradient)


def test_evaluation_gives_the_same_numbers_without_a_gradient():
    q, k, queue, draws = problem(dtype=torch.float32)
    trained, _ = run(q, k, queue, draws, "triton")
    seen = contrastive_loss(q, k, queue, temperature=0.2, n_hard=12, draws=draws, impl="triton")
    assert not seen.loss.requires_grad
    for a, b in zip(trained, seen, strict=True):
        assert torch.equal(a, b)


def test_backward_multiplies_by_what_comes_in_and_only_the_loss_has_one():
    q, k, queue, draws = problem(dtype=torch.float32)
    _, gradient = run(q, k, queue, draws, "triton")
    q.requires_grad_()
    how = {"impl": "triton", "precision": "fp32"}  # auto is tf32x3 on a card
    head = contrastive_loss(q, k, queue, temperature=0.2, n_hard=12, draws=draws, **how)
    (3 * head.loss).backward()
    torch.testing.assert_close(q.grad, 3 * gradient, rtol=rounding(2), atol=0)
    assert not any(t.requires_grad for t in head[1:])
    assert head.rank.dtype == torch.int64


def test_second_derivative_is_refused():
    q, k, queue, draws = problem(dtype=torch.float32)
    q.requires_grad_()
    loss = contrastive_loss(q, k, queue, temperature=0.2, n_hard=12, draws=draws, impl="triton").loss
    with pytest.raises(RuntimeError, match="use impl='reference'"):
        torch.autograd.grad(loss, q, create_graph=True)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_in_a_query_is_nan_in_the_loss_and_no_error():
    q, k, queue, draws = problem(rows=300, hard=9, dtype=torch.float32)
    q[2, 1] = math.nan
    for d in (None, draws):
        assert math.isnan(run(q, k, queue, d, "triton", 9)[0].loss)


def test_float64_is_refused_by_name_and_auto_stays_exact():
    q, k, queue, draws = problem()
    with pytest.raises(UserError, match="float32"):
        run(q, k, queue, draws, "triton")
    assert run(q, k, queue, draws, "auto")[0].loss.dtype == torch.float64
    assert resolve("triton", DEVICE) == "triton"
    assert resolve("auto", "cpu") == "cpu"
