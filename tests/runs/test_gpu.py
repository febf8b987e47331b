"""What only a card shows: host waits, CUDA graphs, NCCL, half precision. The rest is in the files *_interpreted.py.

    python -m pytest -m gpu         compiles the Triton programs and runs all of these

Legend: N queries, C feature width, K queue rows, H hardest rows a query.
"""

import contextlib
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
from conftest import DEVICE, SYNCO, TINY
from support.loss import problem, tensors
from support.ports import free_port

from moco import cli, data, distributed
from moco.cli.pretrain import pretrain_config
from moco.data.augment import by_torch, by_triton
from moco.distributed import collectives
from moco.kernels import contrastive_loss, gpu_has_bf16, trial
from moco.train.bench import make_trainer, noise
from moco.train.runlog import RunLog

pytestmark = pytest.mark.gpu

SIZES = [(32, 4096, 128, 256), (5, 67, 16, 12)]  # N, K, C, H
PRECISIONS = ["fp32", "tf32", "bf16"]


@contextlib.contextmanager
def no_host_waits():
    """Whatever makes the host wait for the card raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loss_and_gradient(q, k, queue, draws, hard, precision, impl="triton", **masks):
    """Everything that a step computes, [rank, hardest, mass, loss, gradient]."""
    head = contrastive_loss(
        q, k, queue, temperature=0.2, n_hard=hard, draws=draws, impl=impl, precision=precision, **masks
    )
    return tensors(head, torch.autograd.grad(head.loss, q)[0])


def inputs(size, seed=0):
    n, rows, dim, hard = size
    q, k, queue, draws = problem(n, rows, dim, hard, dtype=torch.float32, seed=seed)
    return q.requires_grad_(), k, queue, draws


def masks_of(n, rows):
    return {"ids": torch.arange(n, device=DEVICE), "queue_ids": torch.arange(rows, device=DEVICE) % (3 * n)}


def have(precision):
    if precision == "bf16" and not gpu_has_bf16():
        pytest.skip("needs a GPU with bf16 products, and torch 2.8 or later")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_host_waits_for_nothing_in_the_loss(precision, size, masked):
    have(precision)
    given, masks = inputs(size), masks_of(*size[:2]) if masked else {}
    expected = loss_and_gradient(*given, size[3], precision, **masks)  # compiles
    torch.cuda.synchronize()
    with no_host_waits():
        found = loss_and_gradient(*given, size[3], precision, **masks)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_watch_sees_a_wait():
    value = torch.ones(1, device=DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"), no_host_waits():
        value.item()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cuda_graph_replays_the_loss_on_new_numbers(precision, size):
    have(precision)
    given = inputs(size)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss_and_gradient(*given, size[3], precision)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = loss_and_gradient(*given, size[3], precision)
    for seed in (1, 2):
        put(given, inputs(size, seed))
        graph.replay()
        torch.cuda.synchronize()
        expected = loss_and_gradient(*given, size[3], precision)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def put(given, fresh):
    """Other numbers in the same memory."""
    for old, new in zip((*given[:3], *given[3].tensors()), (*fresh[:3], *fresh[3].tensors()), strict=True):
        old.copy_(new)


def test_another_stream_gives_the_same_bits():
    given = inputs(SIZES[0])
    expected = loss_and_gradient(*given, SIZES[0][3], "fp32")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        found = loss_and_gradient(*given, SIZES[0][3], "fp32")
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_reduced_precision_is_near_to_float32(precision):
    """Operands of 10 and 7 bits against 23: similarities err by 2^-11 and 2^-8, divided by T."""
    have(precision)
    given = inputs(SIZES[0])
    (*_, loss, gradient), (*_, gold, gold_gradient) = (
        loss_and_gradient(*given, SIZES[0][3], name) for name in (precision, "fp32")
    )
    bound = {"tf32": 2**-11, "bf16": 2**-8}[precision] / 0.2
    assert abs(float(loss - gold)) <= bound * abs(float(gold))
    assert 0 < float((gradient - gold_gradient).norm()) <= 2 * bound * float(gold_gradient.norm())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_devices_time_is_that_of_a_replayed_graph(precision):
    have(precision)
    size = trial.Size(32, 4096, 128, 256, (8, 8, 4, 4), True, 0.2)
    assert 0 < trial.device_time(torch.device(DEVICE), size, precision) < float("inf")


# Whole steps --------------------------------------------------------------------------------------------------------

STEPS = {
    "synco": ["--method", "synco", *SYNCO, "--head-impl", "triton"],
    "moco": ["--method", "moco"],
    "fp16, accum 2": ["--method", "synco", *SYNCO, "--head-impl", "triton", "--amp", "fp16", "--accum", "2"],
    "bf16, symmetric": ["--method", "synco", *SYNCO, "--head-impl", "triton", "--amp", "bf16", "--symmetric"],
}


@contextlib.contextmanager
def a_trainer(words, folder):
    """(trainer, batches of noise that lie on the device), the host's looks switched off."""
    args = cli.parse_pretrain([*TINY, "--dataset", "folder", "--hard-start-epoch", "0", *words])
    mean, std = data.channel_statistics("folder", 3, None, None)
    view = Namespace(size=args.size, channels=3, mean=mean, std=std)
    with RunLog(str(folder), tensorboard=False) as log:
        trainer = make_trainer(pretrain_config(args), view, log, str(folder), 1 << 20, args.batch_size)
        trainer.look_every = 10**9
        yield trainer, noise(args.batch_size, view, 0, torch.device(DEVICE), 1 << 20)


def step_and_check(trainer, source, steps):
    for _ in range(steps):
        trainer.step(source)
    trainer.sync_outcomes()
    assert trainer.progress.bad_steps == 0
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


@pytest.mark.parametrize("name", STEPS)
def test_the_host_waits_for_nothing_in_a_step(name, tmp_path):
    with a_trainer(STEPS[name], tmp_path) as (trainer, source):
        step_and_check(trainer, source, 3)  # compiles, allocates
        torch.cuda.synchronize()
        with no_host_waits():
            trainer.step(source)
        step_and_check(trainer, source, 1)


def test_views_are_finished_without_a_wait():
    order = ("jitter", "grey", "blur", "flip")
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = torch.stack(
        [by_torch.pack_params([("contrast", 0.7), ("hue", 0.1)], False, 1.5, n % 2 == 0) for n in range(4)]
    )
    expected = by_torch.finish(images, rows, order)
    there = images.to(DEVICE)
    assert torch.equal(
        by_triton.finish(there, rows, order).cpu(), expected
    )  # compiles, and looks once if pixels are PIL's
    with no_host_waits():
        found = by_triton.finish(there, rows, order)
    assert torch.equal(found.cpu(), expected)


# NCCL in a group of one process -------------------------------------------------------------------------------------


class One(int):
    """A number of processes, 1, that no shortcut for one process takes for 1."""

    def __eq__(self, other):
        return False

    def __gt__(self, other):
        return other == 1 or int(self) > other

    __hash__ = int.__hash__


@pytest.fixture
def group(monkeypatch):
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    for module in (distributed, collectives):
        monkeypatch.setattr(module, "world_size", lambda: One(1))
    yield
    dist.destroy_process_group()


def test_every_exchange_over_nccl(group):
    x = torch.arange(24, dtype=torch.uint8, device=DEVICE).view(8, 3)
    turn = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for rows in (x, x.float()):
        assert torch.equal(distributed.exchange_rows(rows, turn), rows[turn.to(DEVICE)])
    for exchange in (distributed.all_gather, distributed.all_to_all_blocks):
        assert torch.equal(exchange(x), x)
    for exchange in (distributed.max_over_ranks, distributed.sum_over_ranks, distributed.mean_over_ranks):
        assert torch.equal(exchange(x.double()), x.double())
    assert distributed.largest(144, 0) == [144, 0]
    assert distributed.from_main({"a": 1}) == {"a": 1}
    assert distributed.same_on_all_ranks(x.float())
    distributed.broadcast_buffers([x])
    dist.barrier()
    z = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    distributed.all_gather_with_grad(z).square().sum().backward()
    torch.testing.assert_close(z.grad, 2 * z.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("words", [STEPS["synco"], ["--method", "moco", "--accum", "2"]], ids=["synco", "accum 2"])
def test_a_step_with_gradients_averaged_over_nccl(words, group, tmp_path):
    with a_trainer(words, tmp_path) as (trainer, source):
        assert type(trainer.wrapped).__name__ == "DistributedDataParallel"
        step_and_check(trainer, source, 3)
