"""Each loss of a batch against loops written from its paper, in float64, value and gradient; and hard cases."""

import math

import pytest
import torch
import torch.nn.functional as F

from moco.methods import losses

T = 0.3


def features(n=4, v=2, c=5, seed=0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(n, v, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_loops(z, groups, one_anchor, mode="all") -> torch.Tensor:
    """The mean over anchors (image i, view a) of ``one_anchor(positives, negatives)``, two lists of cosines."""
    unit = F.normalize(z, dim=2)
    n, v, _ = z.shape
    total, anchors = torch.zeros((), dtype=z.dtype), 0
    for i in range(n):
        for a in range(v if mode == "all" else 1):
            positives, negatives = [], []
            for j in range(n):
                for b in range(v):
                    if (i, a) != (j, b):
                        (positives if groups[i] == groups[j] else negatives).append(unit[i, a] @ unit[j, b])
            total = total + (one_anchor(positives, negatives) if positives else 0.0)
            anchors += 1
    return total / anchors


def supcon(positives, negatives):
    denominator = sum(torch.exp(s / T) for s in positives + negatives)
    return -sum(torch.log(torch.exp(s / T) / denominator) for s in positives) / len(positives)


def dcl(positives, negatives):
    denominator = sum(torch.exp(s / T) for s in negatives)
    return -sum(torch.log(torch.exp(s / T) / denominator) for s in positives) / len(positives)


def hcl(beta, tau):
    def one_anchor(positives, negatives):
        neg = [torch.exp(s / T) for s in negatives]
        imp = [x**beta for x in neg]
        weighed = sum(w * x for w, x in zip(imp, neg, strict=True)) / (sum(imp) / len(imp))
        loss = 0
        for s in positives:
            pos = torch.exp(s / T)
            ng = (weighed - tau * len(neg) * pos) / (1 - tau)
            ng = torch.clamp(ng, min=len(neg) * math.exp(-1 / T))
            loss = loss - torch.log(pos / (pos + ng)) / len(positives)
        return loss

    return one_anchor


def schane(beta):
    def one_anchor(positives, negatives):
        imp = [torch.exp(beta * s / T) for s in negatives]
        mean = sum(imp) / len(imp)
        weighed = sum(w / mean * torch.exp(s / T) for w, s in zip(imp, negatives, strict=True))
        denominator = sum(torch.exp(s / T) for s in positives) + weighed
        return -sum(torch.log(torch.exp(s / T) / denominator) for s in positives) / len(positives)

    return one_anchor


LOSSES = {
    "supcon": (losses.supcon, supcon, {}),
    "dcl": (losses.dcl, dcl, {}),
    "hcl": (losses.hcl, hcl(1.0, 0.1), {}),
    "hcl, beta 2, tau 0.3": (losses.hcl, hcl(2.0, 0.3), {"beta": 2.0, "tau_plus": 0.3}),
    "hcl, tau 0.9: the floor": (losses.hcl, hcl(0.5, 0.9), {"beta": 0.5, "tau_plus": 0.9}),
    "schane": (losses.schane, schane(1.0), {}),
    "schane, beta 2": (losses.schane, schane(2.0), {"beta": 2.0}),
}
GROUPS = {"instances": [0, 1, 2, 3], "labels": [1, 0, 1, 1]}


@pytest.mark.parametrize("mode", losses.CONTRAST_MODES)
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_papers_loop(name, groups, views, mode):
    loss, loop, settings = LOSSES[name]
    groups = GROUPS[groups]
    results = []
    for value in (
        lambda z: loss(losses.compare(z, torch.tensor(groups), contrast_mode=mode), T, **settings).mean(),
        lambda z: by_loops(z, groups, loop, mode),
    ):
        z = features(v=views).requires_grad_()
        out = value(z)
        gradient = torch.autograd.grad(out, z)[0] if out.requires_grad else torch.zeros_like(z)
        results.append((out.detach(), gradient))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_the_floor_of_hcl_is_reached():
    """Else the case above proves less than it says."""
    pairs = losses.compare(features(), torch.arange(4))
    at_floor = 6 * math.exp(-1 / T)
    s = torch.where(pairs.positive, pairs.cosine, 0).sum(1) / T
    expected = torch.log1p(at_floor / s.exp())
    assert torch.isclose(losses.hcl(pairs, T, 0.5, 0.9), expected).any()
    assert not torch.isclose(losses.hcl(pairs, T, 0.5, 0.1), expected).any()


# ------------------------------------------------------------------------------------------------- equivalences


@pytest.mark.parametrize("groups", [[0, 1, 0, 2, 1, 0], [0, 1, 2, 3, 4, 5], [3, 3, 3, 1, 1, 1]])
def test_supcon_is_pytorch_metric_learnings(groups):
    """But for a batch of one class, where the library gives 0 and the paper's formula does not."""
    from pytorch_metric_learning.losses import SupConLoss
    from pytorch_metric_learning.reducers import MeanReducer

    z = features(n=6, c=8).requires_grad_()
    library = SupConLoss(temperature=T, reducer=MeanReducer())
    theirs = library(z.flatten(0, 1), torch.tensor(groups).repeat_interleave(2))
    ours = losses.supcon(losses.compare(z, torch.tensor(groups)), T).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, z, retain_graph=True)[0] for x in (ours, theirs)))


def test_simclr_is_cross_entropy_over_the_other_views():
    """NT-Xent as SimCLR's paper has it: 2B rows, each classifies its other view among 2B - 1."""
    z = features(n=5)
    unit = F.normalize(torch.cat([z[:, 0], z[:, 1]]), dim=1)
    logits = (unit @ unit.T / T).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(logits, torch.arange(10).roll(5))
    torch.testing.assert_close(losses.supcon(losses.compare(z, torch.arange(5)), T).mean(), expected)


def test_hcl_without_hardness_and_correction_is_simclr():
    pairs = losses.compare(features(), torch.arange(4))
    simclr = losses.supcon(pairs, T)
    torch.testing.assert_close(losses.hcl(pairs, T, beta=0.0, tau_plus=0.0), simclr)
    torch.testing.assert_close(losses.hcl(pairs, T, estimator="easy"), simclr)
    assert not torch.isclose(losses.hcl(pairs, T), simclr).any()


def test_dcl_is_simclr_without_the_positives_share():
    """-log(p / (p + N)) = -log(p / N) + log(1 + p / N)."""
    pairs = losses.compare(features(), torch.arange(4))
    dcl = losses.dcl(pairs, T)
    torch.testing.assert_close(losses.supcon(pairs, T), dcl + torch.log1p(torch.exp(-dcl)))


def test_schane_without_weights_is_supcon():
    pairs = losses.compare(features(), torch.tensor(GROUPS["labels"]))
    torch.testing.assert_close(losses.schane(pairs, T, beta=0.0), losses.supcon(pairs, T))


def test_base_temperature_multiplies():
    pairs = losses.compare(features(), torch.arange(4))
    torch.testing.assert_close(losses.supcon(pairs, T, base_temperature=0.07), losses.supcon(pairs, T) * T / 0.07)


def test_parts_against_everyone_average_to_the_whole(monkeypatch):
    """What two processes compute; the gradient is that of their mean."""
    z, groups = features(n=6).requires_grad_(), torch.tensor([0, 1, 0, 2, 1, 0])
    whole = losses.supcon(losses.compare(z, groups), T).mean()
    monkeypatch.setattr(losses.distributed, "all_gather_with_grad", lambda _: z)
    monkeypatch.setattr(losses.distributed, "all_gather", lambda _: groups)
    parts = []
    for rank, rows in enumerate((slice(3), slice(3, 6))):
        monkeypatch.setattr(losses.distributed, "rank", lambda rank=rank: rank)
        parts.append(losses.supcon(losses.compare(z[rows], groups[rows]), T).mean())
    together = (parts[0] + parts[1]) / 2
    torch.testing.assert_close(together, whole)
    torch.testing.assert_close(*(torch.autograd.grad(x, z, retain_graph=True)[0] for x in (together, whole)))


def test_the_order_of_images_and_the_length_of_rows_do_not_matter():
    z, groups = features(n=6), torch.tensor([0, 1, 0, 2, 1, 0])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    for loss in (losses.supcon, losses.hcl, losses.dcl, losses.schane):
        one = loss(losses.compare(z, groups), T).mean()
        torch.testing.assert_close(one, loss(losses.compare(7 * z[order], groups[order]), T).mean())


# -------------------------------------------------------------------------------------------------- hard cases

CASES = {
    "one class": (torch.zeros(6, dtype=torch.long), 2),
    "no positive": (torch.arange(6), 1),
    "some without": (torch.tensor([0, 0, 1, 2, 3, 0]), 1),
    "one image": (torch.zeros(1, dtype=torch.long), 2),
    "one row": (torch.zeros(1, dtype=torch.long), 1),
    "instances": (torch.arange(6), 2),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_finite(case, temperature, dtype):
    groups, views = CASES[case]
    for loss in (losses.supcon, losses.hcl, losses.dcl, losses.schane):
        for near in (0.0, 1.0):  # scattered, and collapsed onto one direction
            z = (features(len(groups), views) * (1 - near) + near).to(dtype).requires_grad_()
            pairs = losses.compare(z, groups)
            value = loss(pairs, temperature)
            (gradient,) = torch.autograd.grad(value.sum(), z, allow_unused=True)
            assert value.isfinite().all(), loss.__name__
            assert gradient is None or gradient.isfinite().all(), loss.__name__
            assert torch.equal(value[pairs.alone], torch.zeros_like(value[pairs.alone]))


def test_a_cold_temperature_is_exact():
    """At T = .01 with the anchor's own row in the maximum, e^(s - 1/T) of all others is 0 and its logarithm is lost."""
    z, groups = features(n=6), torch.tensor([0, 1, 0, 2, 1, 0])
    exact = losses.supcon(losses.compare(z, groups), 0.01)
    low = losses.supcon(losses.compare(z.float(), groups), 0.01)
    torch.testing.assert_close(low.double(), exact, rtol=1e-4, atol=1e-4)
    assert exact.max() > 10


def test_autocast_does_not_lower_the_loss():
    z, groups = features(n=6).float(), torch.arange(6)
    plain = losses.supcon(losses.compare(z, groups), 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.supcon(losses.compare(z, groups), 0.05), plain)


def test_who_is_alone():
    groups, views = CASES["some without"]
    assert losses.compare(features(6, views), groups).alone.tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize(
    ("shape", "groups", "mode"), [((4, 5), 4, "all"), ((4, 2, 5), 3, "all"), ((4, 2, 5), 4, "two")]
)
def test_shapes_that_do_not_fit(shape, groups, mode):
    with pytest.raises(ValueError, match="want"):
        losses.compare(torch.zeros(shape), torch.arange(groups), contrast_mode=mode)
