"""What fine-tuning minimises: the sum of two losses against loops, mixing, erasing, views, and two processes."""

import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import rounding
from PIL import Image
from torch import nn

from moco import distributed
from moco.config import ObjectiveConfig
from moco.data import ArraySource, Labelled, probe_preset
from moco.errors import UserError
from moco.eval.finetune_loss import Objective
from moco.models.inputs import normalise

N, CLASSES, MEAN, STD = 6, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)


class Tiny(nn.Module):
    """What an objective asks of a network: pixels to features to logits, in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3 * 8 * 8, 5, dtype=torch.float64), nn.Linear(5, CLASSES, dtype=torch.float64)

    def prepare(self, images):
        return normalise(images, MEAN, STD)

    def forward(self, pixels, with_features=False):
        features = self.body(pixels.double().flatten(1))
        logits = self.head(features)
        return (logits, features) if with_features else logits


def a_batch(views: int, n: int = N) -> dict[str, torch.Tensor]:
    shape = (n, views, 3, 8, 8) if views > 1 else (n, 3, 8, 8)
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 0, 2, 2])[:n]
    return {"image": images, "label": labels, "index": torch.tensor([4, 9, 2, 7, 7, 1, 3, 5])[:n]}


def naive_contrast(z, groups, T: float, beta: float) -> torch.Tensor:
    """SCHaNe's reconstruction in loops, beta 0 for SupCon: z (N, 2, C) unit rows."""
    rows = [(z[i, v], int(groups[i])) for i in range(len(z)) for v in range(2)]
    losses = []
    for i, (anchor, group) in enumerate(rows):
        s = [anchor @ other / T for other, _ in rows]
        positives = [j for j, (_, g) in enumerate(rows) if g == group and j != i]
        negatives = [j for j, (_, g) in enumerate(rows) if g != group]
        mean = sum((beta * s[j]).exp() for j in negatives) / len(negatives)
        below = sum(s[j].exp() for j in positives)
        below = below + sum((s[j] * beta).exp() / mean * s[j].exp() for j in negatives)
        losses.append(-sum((s[j].exp() / below).log() for j in positives) / len(positives))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("loss", "estimator", "by", "beta"),
    [("supcon", "hard", "label", 0.0), ("simclr", "hard", "index", 0.0), ("schane", "easy", "label", 0.0),
     ("schane", "hard", "label", 0.7)],
)  # fmt: skip
def test_the_loss_is_the_weighted_sum_of_its_two_parts(loss, estimator, by, beta):
    network, batch = Tiny(), a_batch(2)
    found = Objective(ObjectiveConfig(loss, 0.3, 0.2, estimator, beta or 0.7), CLASSES)(
        network.prepare, network, batch, 0, 0, 0
    )
    logits, features = network(network.prepare(batch["image"].flatten(0, 1)), True)
    z = F.normalize(features, dim=1).unflatten(0, (N, 2))
    entropy = F.cross_entropy(logits, batch["label"].repeat_interleave(2))
    contrast = naive_contrast(z, batch[by], 0.2, beta)
    whole, bound = 0.7 * entropy + 0.3 * contrast, rounding(2 * N * 5)
    assert float(found.loss.detach()) == pytest.approx(float(whole.detach()), rel=bound)
    assert float(found.statistics["contrast"]) == pytest.approx(float(contrast.detach()), rel=bound)
    assert found.q.shape == (2 * N, CLASSES)
    found.loss.backward()
    gradient = network.body.weight.grad.clone()
    network.zero_grad()
    (0.7 * entropy + 0.3 * contrast).backward()
    torch.testing.assert_close(gradient, network.body.weight.grad, rtol=1e-5, atol=1e-8)


def test_an_image_that_fills_a_batch_up_is_no_negative_of_itself():
    """Rows 3 and 4 are image 7: for SimCLR they are one image with four views."""
    network, batch = Tiny(), a_batch(2)
    apart = {**batch, "index": torch.arange(N)}
    both = [
        float(Objective(ObjectiveConfig("simclr", 1.0), CLASSES)(network.prepare, network, b, 0, 0, 0).loss.detach())
        for b in (batch, apart)
    ]
    assert both[0] != both[1]


def test_alpha_ends_at_either_loss():
    network, batch = Tiny(), a_batch(2)
    found = [
        Objective(ObjectiveConfig("supcon", alpha), CLASSES)(network.prepare, network, batch, 0, 0, 0)
        for alpha in (0.0, 1.0)
    ]
    assert float(found[0].loss.detach()) == pytest.approx(float(found[0].statistics["cross_entropy"]))
    assert float(found[1].loss.detach()) == pytest.approx(float(found[1].statistics["contrast"]))


@pytest.mark.parametrize("n", [6, 5, 1])
def test_mixing_is_for_cross_entropy_alone(n):
    """Each mixed image is lam of itself and 1 - lam of its partner in reverse order, and so is its target."""
    network, batch = Tiny(), a_batch(2, n)
    plain = Objective(ObjectiveConfig("supcon"), CLASSES)(network.prepare, network, batch, 5, 6, 0)
    mixed = Objective(ObjectiveConfig("supcon", mixup=0.8, smoothing=0.1), CLASSES)(
        network.prepare, network, batch, 5, 6, 0
    )
    torch.testing.assert_close(mixed.statistics["contrast"], plain.statistics["contrast"])
    torch.testing.assert_close(mixed.q, plain.q)
    pixels, target = Objective(ObjectiveConfig("ce", mixup=0.8, smoothing=0.1), CLASSES)._mixed(
        network.prepare(batch["image"][:, 0]), batch["label"]
    )
    own = network.prepare(batch["image"][:, 0])
    assert target.shape == (n, CLASSES)
    torch.testing.assert_close(target.sum(1), torch.ones(n))
    even = n - n % 2
    if n % 2:
        assert torch.equal(pixels[even:], own[even:])
    if even:
        partner = own[:even].flip(0)
        lam = float(((pixels[:even] - partner) * (own[:even] - partner)).sum() / (own[:even] - partner).square().sum())
        torch.testing.assert_close(pixels[:even], lam * own[:even] + (1 - lam) * partner, rtol=1e-4, atol=1e-4)
        smooth = torch.full((n, CLASSES), 0.1 / CLASSES).scatter_(1, batch["label"][:, None], 0.9 + 0.1 / CLASSES)
        torch.testing.assert_close(target[:even], lam * smooth[:even] + (1 - lam) * smooth[:even].flip(0))


def test_mixing_and_erasing_belong_to_a_step_and_leave_other_randomness_alone():
    network, batch = Tiny(), a_batch(1)
    objective = Objective(ObjectiveConfig("ce", mixup=0.8, cutmix=1.0, erase=0.5), CLASSES)

    def loss(*where):
        torch.manual_seed(0)  # as a training step does: erased rectangles are filled from torch's generator
        return float(objective(network.prepare, network, batch, *where).loss.detach())

    random.seed(3)
    np.random.seed(3)
    states = random.getstate(), np.random.get_state()[1].copy()
    first = loss(1, 2, 0)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    random.seed(4)
    assert loss(1, 2, 0) == first
    assert len({loss(1, 2, 0), loss(1, 3, 0), loss(1, 2, 1), loss(2, 2, 0)}) == 4


def test_cross_entropy_alone_is_smoothed_as_torchs():
    network, batch = Tiny(), a_batch(1)
    found = Objective(ObjectiveConfig("ce", smoothing=0.2), CLASSES)(network.prepare, network, batch, 0, 0, 0)
    wanted = F.cross_entropy(network(network.prepare(batch["image"])), batch["label"], label_smoothing=0.2)
    assert float(found.loss.detach()) == pytest.approx(float(wanted.detach()))
    assert set(found.statistics) == {"train_acc1"}


# ----------------------------------------------------------------------------------------------------- the views


@pytest.fixture
def source():
    images = np.random.default_rng(0).integers(0, 256, (4, 20, 24, 3), dtype=np.uint8)
    return ArraySource("four", images, classes=["a", "b"], labels=np.array([0, 1, 0, 1]))


def test_the_first_of_two_views_is_that_of_a_run_with_one(source):
    one, two = (Labelled(source, 16, 5, probe_preset(True), views=v)[(3, 2)]["image"] for v in (1, 2))
    assert two.shape == (2, 3, 16, 16)
    assert torch.equal(two[0], one)
    assert not torch.equal(two[1], one)


def test_a_policy_is_a_function_of_seed_epoch_image_and_view(source):
    def view(epoch, index, seed=5, number=0):
        data = Labelled(source, 16, seed, probe_preset(True), auto="rand-m9-mstd0.5-inc1", views=2)
        return data[(epoch, index)]["image"][number]

    plain = Labelled(source, 16, 5, probe_preset(True), views=2)
    first = [view(e, 1) for e in range(6)]
    assert all(torch.equal(a, view(e, 1)) for e, a in reversed(list(enumerate(first))))
    assert (
        sum(torch.equal(a, plain[(e, 1)]["image"][0]) for e, a in enumerate(first)) <= 2
    )  # some operations do nothing
    assert not torch.equal(view(0, 1), view(0, 1, number=1))
    assert torch.equal(Labelled(source, 16, auto="original")[(0, 1)]["image"],
                       Labelled(source, 16)[(0, 1)]["image"])  # fmt: skip


def test_a_strong_policy_reaches_the_end_of_every_operation(source):
    """timm's posterize with no bits left, which Pillow refuses."""
    for policy in ("rand-m10-n4-inc1", "original", "augmix-m10-w2-d2"):
        data = Labelled(source, 16, preset=probe_preset(True), auto=policy)
        assert len({data[(epoch, 0)]["image"].sum() for epoch in range(40)}) > 1


def test_a_policy_that_does_not_exist_is_one_sentence(source):
    for policy in ("rand-q9", "nonsense"):
        with pytest.raises(UserError, match=f"--aa {policy} is no policy"):
            Labelled(source, 16, preset=probe_preset(True), auto=policy)
    grey = ArraySource("grey", np.zeros((2, 9, 9), np.uint8), classes=["a"], labels=np.zeros(2, int))
    with pytest.raises(UserError, match="--aa is for colour images"):
        Labelled(grey, 8, preset=probe_preset(True), auto="original")
    assert isinstance(source.load(0), Image.Image)


# ---------------------------------------------------------------------------------------------- several processes


def gradients(args, path) -> int:
    """A step on this process's half of eight images; the main process saves the loss's mean and the gradient."""
    network = Tiny()
    wrapped = distributed.wrap(network)
    share = 8 // distributed.world_size()
    own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    batch = {name: value[own] for name, value in a_batch(2, 8).items()}
    found = Objective(ObjectiveConfig("schane", 0.9, 0.3), CLASSES)(
        network.prepare, wrapped, batch, 0, 0, distributed.rank()
    )
    found.loss.backward()
    loss = distributed.mean_over_ranks(found.loss.detach())
    if distributed.is_main():
        torch.save({"loss": loss, "gradient": network.body.weight.grad}, path)
    return 0


@pytest.mark.dist
def test_two_processes_have_the_loss_and_the_gradient_of_one(start, tmp_path):
    program = start("--nproc", 2, "DIR", main=partial(gradients, path=tmp_path / "two"))
    gradients(None, tmp_path / "one")
    assert program.end() == 0, program.text
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-8)
