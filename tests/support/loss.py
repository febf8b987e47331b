"""Problems for the contrastive loss, and what two evaluations of it may differ by.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, rounding
from torch import nn

from moco.config import MoCoConfig, SynCoConfig
from moco.kernels import contrastive_loss
from moco.methods import synco
from moco.methods.negatives import HardNegatives, draw, synthetic
from moco.models.moco import MoCo

T = 0.2
ALL_TYPES = synco.recipe(SynCoConfig(9, 8, 7, 5, 6, 4))
ONE_TYPE = {row.kind: (row,) for row in (*ALL_TYPES, synthetic("extrapolation-paper", 8))}


def unit(*shape, generator, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def problem(n=5, rows=67, dim=16, hard=12, recipe=ALL_TYPES, dtype=torch.float64, seed=0):
    """q (N, C), k (N, C), queue (K, C) and the draws, the keys near their queries; the same numbers on any device."""
    generator = torch.Generator().manual_seed(seed)
    q = unit(n, dim, generator=generator)
    k = F.normalize(q + 0.1 * unit(n, dim, generator=generator), dim=1)
    queue = unit(rows, dim, generator=generator)
    draws = draw(recipe, n, min(hard, rows), dim, key=seed)
    return *(t.to(DEVICE, dtype) for t in (q, k, queue)), draws and draws.to(DEVICE)


def run(q, k, queue, draws, impl, hard=12, temperature=T, precision="fp32", **masks):
    """LossOutput and dloss/dq."""
    q = q.detach().requires_grad_()
    head = contrastive_loss(
        q, k, queue, temperature=temperature, n_hard=hard, draws=draws, impl=impl, precision=precision, **masks
    )
    (gradient,) = torch.autograd.grad(head.loss, q)
    return head._replace(loss=head.loss.detach()), gradient


def head_rounding(q, queue, draws=None, temperature=T):
    """What two float32 evaluations of the head that sum in different orders may differ by, relative to the loss or to
    the norm of the gradient: similarities sum C terms and are divided by T in an exponent, masses sum K + S."""
    synthetic = 0 if draws is None else draws.slots_a.shape[1]
    return rounding(2 * q.shape[1] / temperature + len(queue) + synthetic)


def assert_near_in_float32(a, b, bound):
    """Two outcomes of ``run``, all but the rank within the bound."""
    (head_a, gradient_a), (head_b, gradient_b) = a, b
    for name in ("loss", "hardest", "synthetic_mass"):
        assert float(getattr(head_a, name)) == pytest.approx(float(getattr(head_b, name)), rel=bound, abs=bound), name
    assert torch.equal(head_a.rank, head_b.rank)
    assert float((gradient_a - gradient_b).norm()) <= bound * float(gradient_b.norm())


RUN_RECIPE = synco.recipe(SynCoConfig(3, 3, 2, 2, 1, 1))


def train(impl, precision="fp32", steps=50, n=4, rows=48, dim=16):
    """Losses of ``steps`` steps of MoCo with SynCo's negatives, and the encoder after the first and after the last."""
    torch.manual_seed(0)
    encoders = [nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, dim)) for _ in range(2)]
    config = MoCoConfig(
        C=dim, K=rows, m=0.9, T=0.2, mean=(0.0,) * 3, std=(1.0,) * 3, shuffle=False, n_hard=rows // 4, loss_impl=impl,
        loss_precision=precision,
    )  # fmt: skip
    extra = HardNegatives(RUN_RECIPE, rows // 4, dim, 5, 0, torch.device(DEVICE))
    model = MoCo(encoders[0], encoders[1], config, seed=5, extra=extra).to(DEVICE)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(n, device=DEVICE)
    losses, encoders = [], []
    for step in range(steps):
        images = torch.rand(n, 3, 4, 4, generator=generator)
        im_q, im_k = ((images + 0.2 * torch.randn(n, 3, 4, 4, generator=generator)).to(DEVICE) for _ in range(2))
        model.update_key_encoder()
        out = model([im_q, im_k], ids, 0, step)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.enqueue(out.keys, ids)
        losses.append(out.loss.detach())
        if step in (0, steps - 1):
            encoders.append(torch.cat([t.detach().flatten() for t in model.encoder_q.parameters()]))
    return torch.stack(losses), *encoders


def assert_same_training(ours, reference):
    """One step to the rounding of sums over at most 48 rows and 48 pixels, an exponent of 16 / T and, for the weights,
    of a step; the curve of 50 within 1e-4, for a rounding error grows along a run."""
    (losses, first, last), (gold, gold_first, gold_last) = ours, reference
    assert float(gold.max() - gold.min()) > 0.1  # it is a curve
    one = rounding(48 + 48 + 2 * 16 / 0.2)
    torch.testing.assert_close(losses[0], gold[0], rtol=one, atol=0)
    assert float((first - gold_first).norm()) <= one * float(gold_first.norm())
    torch.testing.assert_close(losses, gold, rtol=1e-4, atol=0)
    torch.testing.assert_close(last, gold_last, rtol=1e-3, atol=1e-5)


def tensors(head, gradient):
    return [*head[1:], head.loss.detach(), gradient]
