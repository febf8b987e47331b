"""BatchNorm over parts by the Triton programs, by triton's interpreter on the CPU or compiled on a card, against
float64.

The interpreter has to be chosen before triton is imported, so test_norm.py runs this file in a process of its
own, as anyone can:  TRITON_INTERPRET=1 python -m pytest tests/kernels/norm_interpreted.py
`pytest -m gpu` runs it compiled.
"""

import pytest
import torch
from conftest import DEVICE, assert_runs_there, mend_interpreter, rounding
from torch import nn

from moco.kernels import by_triton as fused
from moco.kernels import norm
from moco.models.batchnorm import SplitBatchNorm2d
from moco.models.encoder import recompute_blocks

mend_interpreter()


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    assert_runs_there()
    monkeypatch.setattr(norm, "TILE", 256)  # several units, splits and blocks of channels in small batches
    monkeypatch.setattr(norm, "CHANNELS", 16)
    monkeypatch.setattr(norm, "ENOUGH", 12)  # each takes the interpreter milliseconds
    norm.plan.cache_clear()
    norm.agrees.cache_clear()


NAMES = ("out", "x", "weight", "bias", "mean", "variance")


def layer(channels, parts, momentum=0.1):
    made = SplitBatchNorm2d(nn.BatchNorm2d(channels, 1e-5, momentum), parts)
    noise = torch.Generator().manual_seed(1)
    for tensor in (made.weight.data, made.bias.data, made.running_mean):
        tensor.normal_(generator=noise)
    made.running_var.uniform_(0.5, 2.0, generator=noise)
    return made.to(DEVICE)


def by_torch(x, towards, parts, momentum=0.1, dtype=torch.float64):
    """Output, gradients and running statistics of the definition, one call of torch's a part."""
    made = layer(x.shape[1], parts, momentum).to(dtype)
    x = x.detach().to(dtype, copy=True).requires_grad_()
    out = made(x)
    out.backward(towards.to(dtype))
    return [out.detach(), x.grad, made.weight.grad, made.bias.grad, made.running_mean, made.running_var]


def by_triton(x, towards, parts, momentum=0.1):
    made = layer(x.shape[1], parts, momentum)
    x = x.detach().requires_grad_()  # the same memory
    x.grad = None
    running = (made.running_mean, made.running_var, made.num_batches_tracked)
    out = norm.split_batch_norm(x, made.weight, made.bias, running, parts, momentum, 1e-5)
    out.backward(towards)
    assert made.num_batches_tracked == 1
    assert out.dtype == x.grad.dtype == x.dtype
    return [out.detach(), x.grad, made.weight.grad, made.bias.grad, made.running_mean, made.running_var]


def batch(shape, last=False, dtype=torch.float32, seed=0):
    noise = torch.Generator().manual_seed(seed)
    memory = torch.channels_last if last else torch.contiguous_format
    x, towards = (torch.randn(shape, generator=noise) for _ in range(2))
    x = x * 2 + 3 * torch.randn(shape[1], generator=noise).view(-1, *[1] * (len(shape) - 2))
    return tuple(t.to(DEVICE, dtype).contiguous(memory_format=memory) for t in (x, towards))


def sizes(x, towards, parts):
    """What the terms of each result amount to, however they cancel."""
    made, x, towards = layer(x.shape[1], parts).double(), x.double(), towards.double().abs()
    out = made(x)
    weight, bias = (t.detach().view(-1, *[1] * (x.dim() - 2)) for t in (made.weight, made.bias))
    deviations = x.unflatten(0, (parts, -1)).transpose(1, 2).flatten(2).var(2, correction=0)
    summed = [d for d in range(x.dim()) if d != 1]
    hat = ((out.detach() - bias) / weight).abs()
    return (
        out.abs().max(), (towards.max() * weight.abs().max() * (deviations + 1e-5).rsqrt().max()),
        (towards * hat).sum(summed).max(), towards.sum(summed).max(), x.abs().max(), 2 + deviations.max(),
    )  # fmt: skip


def assert_near(found, x, towards, parts, momentum=0.1, names=NAMES):
    """Near float64 by a few roundings of the terms."""
    wanted = by_torch(x, towards, parts, momentum)
    for name, a, b, size in zip(NAMES, found, wanted, sizes(x, towards, parts), strict=True):
        if name in names:
            error = (a - b).abs().max() / size
            assert error <= rounding(16), f"{name}: {error:.1e}"


SHAPES = [(8, 5, 3, 3), (6, 24, 7, 5), (4, 36, 5, 6), (6, 3, 20, 16), (10, 17, 1, 1), (4, 48, 2, 3)]


MEMORY = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])


@MEMORY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_gradients_and_running_statistics(shape, last):
    x, towards = batch(shape, last)
    for parts in (2, shape[0] // 2):
        found = by_triton(x, towards, parts)
        assert found[0].stride() == x.stride()
        assert_near(found, x, towards, parts)


@MEMORY
def test_every_size_of_a_merge(last, monkeypatch):
    """A few, some and many splits of a part, and of several parts together for the running statistics."""
    x, towards = batch((6, 3, 24, 24), last)
    blocks = set()
    for programs in (6, 30, 60):
        monkeypatch.setattr(norm, "ENOUGH", programs)
        norm.plan.cache_clear()
        blocks.add(norm.plan(tuple(x.shape), last, 3).merged)
        assert_near(by_triton(x, towards, 3), x, towards, 3)
    assert blocks == {4, 16, 64}


@MEMORY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, last):
    """Statistics and gradients of the parameters stay float32; the interpreter may round towards zero."""
    x, towards = batch((8, 18, 6, 5), last, dtype)
    found = by_triton(x, towards, 4)
    assert_near(found, x, towards, 4, names=NAMES[2:])
    for a, b in zip(found[:2], by_torch(x, towards, 4), strict=False):
        assert ((a - b).abs() <= torch.finfo(dtype).eps * b.abs() + rounding(64) * b.abs().max()).all()


@MEMORY
def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(last):
    x, _ = batch((8, 6, 9, 7), last)
    x = (x + 4096).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    x[0, :, 0, 0] = 4196  # nor does a first value that is far from all others
    parts = x.double().unflatten(0, (2, 4))
    wanted = parts.var((1, 3, 4)).mean(0)
    naive = (x.unflatten(0, (2, 4)).square().mean((1, 3, 4)) - x.unflatten(0, (2, 4)).mean((1, 3, 4)).square()).mean(0)
    assert ((naive / wanted - 1).abs() > 1e-3).any()  # E[x^2] - E[x]^2 in float32 has lost it
    found = by_triton(x, torch.ones_like(x), 2, momentum=1.0)[-1]
    assert ((found / wanted - 1).abs() < rounding(256)).all()


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.75, 1.0])
def test_running_statistics_move_as_lerp_does(momentum):
    x, towards = batch((4, 5, 3, 3))
    assert_near(by_triton(x, towards, 2, momentum), x, towards, 2, momentum)


def test_other_memory_is_walked_after_a_copy():
    x, towards = batch((4, 6, 5, 7))
    assert_near(by_triton(x.mT.contiguous().mT, towards, 2), x, towards, 2)
    assert_near(by_triton(x, towards.contiguous(memory_format=torch.channels_last), 2), x, towards, 2)
    last = x.contiguous(memory_format=torch.channels_last)
    for given in (x, last):
        pooled = towards[:, :, :1, :1].expand(x.shape)  # what a mean over pixels gives back
        assert_near(by_triton(given, pooled, 2), x, pooled, 2)
        odd = torch.cat([given[:1], given])[1:]  # begins somewhere in its memory
        assert_near(by_triton(odd, towards, 2), x, towards, 2)


def test_rows_instead_of_images():
    x, towards = batch((9, 5))
    assert_near(by_triton(x, towards, 3), x, towards, 3)


def test_the_same_bits_every_time():
    x, towards = batch((8, 20, 6, 6))
    first, again = by_triton(x, towards, 2), by_triton(x, towards, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_without_a_gradient_nothing_is_kept_and_the_statistics_move():
    x, towards = batch((8, 20, 6, 6))
    made, wanted = layer(20, 2), by_triton(x, towards, 2)
    running = (made.running_mean, made.running_var, made.num_batches_tracked)
    with torch.no_grad():
        out = norm.split_batch_norm(x, made.weight, made.bias, running, 2, 0.1, 1e-5)
    assert out.grad_fn is None
    assert torch.equal(out, wanted[0])
    assert torch.equal(made.running_mean, wanted[4])


def test_it_has_one_derivative():
    x, _ = batch((4, 5, 3, 3))
    made, x = layer(5, 2), x.requires_grad_()
    running = (made.running_mean, made.running_var, made.num_batches_tracked)
    out = norm.split_batch_norm(x, made.weight, made.bias, running, 2, 0.1, 1e-5)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The layer takes a CPU's tensors for a GPU's, whose programs the interpreter runs."""
    monkeypatch.setattr(fused, "on_gpu", lambda x: True)
    monkeypatch.setattr(norm, "agrees", lambda *case: True)


def test_the_layer_uses_it_and_recomputation_and_autocast_change_nothing(on_a_gpu, monkeypatch):
    called = []
    monkeypatch.setattr(
        fused, "run_program", lambda *a, run=fused.run_program, **k: called.append(a[0]) or run(*a, **k)
    )
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = [nn.Sequential(nn.Conv2d(a, b, 3), layer(b, 2)) for a, b in ((3, 6), (6, 4))]
        net = nn.Sequential(*net).to(DEVICE)
        if recompute:
            recompute_blocks(nn.Sequential(net))
        called.clear()
        with torch.autocast(DEVICE, torch.bfloat16):
            out = net(batch((4, 3, 8, 8))[0])
        out.float().square().sum().backward()
        assert out.dtype == torch.bfloat16
        assert len(called) == 2 * (6 if recompute else 4)
        found.append([out, *(p.grad for p in net.parameters()), *net.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("case", [(torch.float32, (5, 3, 4), False), (torch.bfloat16, (20, 4, 3), True)])
def test_a_device_is_trusted_once_its_numbers_are_torchs(case, monkeypatch):
    dtype, shape, last = case
    device = torch.device(DEVICE)
    assert norm.agrees(device, dtype, shape, last, 4)
    backward = norm.backward
    monkeypatch.setattr(norm, "backward", lambda *given: (1.1 * backward(*given)[0], *backward(*given)[1:]))
    assert norm.agrees(device, dtype, shape, last, 4)  # remembered
    with pytest.warns(RuntimeWarning, match="part by part, not by triton: its gradient is not torch's"):
        assert not norm.agrees(device, dtype, shape, last, 16)
