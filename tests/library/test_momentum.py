"""MoCo around one's own backbone: the program's numbers, checkpoints for its readers, two processes, any network."""

import copy
import math

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from conftest import SYNCO, TINY, differences, two_of
from support.networks import MEAN, STD, Tiny, batch
from torch import Tensor, nn

import moco
from moco import export as export_door
from moco.library import criteria
from moco.models.batchnorm import SplitBatchNorm2d
from moco.models.encoder import build_encoder, features
from moco.models.inputs import normalise
from moco.models.moco import MoCo as ProgramsMoCo
from moco.weights.read import open_backbone

SYNCO_ARGUMENTS = {"n_hard": 8, "n1": 4, "n2": 4, "n3": 4, "n4": 2, "n5": 2, "n6": 2}


def tiny(criterion: criteria.QueueLoss | None = None, **more) -> moco.MoCo:
    torch.manual_seed(0)
    return moco.MoCo(Tiny(), m=0.9, criterion=criterion or moco.MoCoLoss(4, 20, 0.2), mean=MEAN, std=STD, **more)


def views(seed: int = 0) -> tuple[Tensor, Tensor]:
    im_q, im_k, _ = batch(8, seed)
    return normalise(im_q, MEAN, STD), normalise(im_k, MEAN, STD)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    loss = model(*views(seed))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def sgd(model: nn.Module, lr: float = 0.03) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, momentum=0.9, weight_decay=1e-4)


# -------------------------------------------------------------------------------------------- equal to the program


@pytest.mark.parametrize("words", [[], ["--symmetric"], [*SYNCO, "--accum", 2]], ids=["MoCo", "symmetric", "SynCo"])
def test_an_own_loop_trains_the_programs_numbers(words, image_folder, tmp_path, in_process, monkeypatch):
    """Bit for bit: losses, both encoders, queue; with BatchNorm in parts, shuffled keys and rows left out."""
    given, original = [], ProgramsMoCo.forward
    first: dict[str, Tensor] = {}

    def forward(self, images, ids, *rest):
        if not first:
            first.update({name: value.clone() for name, value in self.state_dict().items()})
        made = original(self, images, ids, *rest)
        given.append(([image.clone() for image in images], ids.clone(), made.loss.detach()))
        forward.model = self
        return made

    monkeypatch.setattr(ProgramsMoCo, "forward", forward)
    words = [*TINY, "--mlp", "--no-channels-last", "--steps", 5, *words, "--save-dir", tmp_path, image_folder]
    assert in_process(*words) == 0

    synco = "--n1" in words
    loss = moco.SynCoLoss(16, 20, seed=3, **SYNCO_ARGUMENTS) if synco else moco.MoCoLoss(16, 20, seed=3)
    accum, backbone = 1 + synco, build_encoder("test_resnet", 16, size=16)
    model = moco.MoCo(backbone, criterion=loss, accum=accum, symmetric="--symmetric" in words)
    state = model.state_dict()
    model.load_state_dict({"calls": state["calls"], **first})
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.03, momentum=0.9, weight_decay=1e-4, fused=True)
    for number, (images, ids, expected) in enumerate(given):
        found = model(*images, ids)
        assert torch.equal(found, expected), number
        (found / accum).backward()
        if number % accum == accum - 1:
            optimizer.step()
            optimizer.zero_grad()
    assert len(given) == 5 * accum
    theirs = forward.model.state_dict()  # type: ignore[attr-defined]
    assert differences({name: model.state_dict()[name] for name in theirs}, dict(theirs)) == []


def test_the_key_encoder_follows_once_a_step_of_accumulated_batches():
    model = tiny(accum=2)
    optimizer = sgd(model, lr=1.0)
    q, k = model.encoder_q.conv.weight, model.encoder_k.conv.weight
    expected = k.clone()
    for number in range(6):
        if number % 2 == 0:
            expected = 0.9 * expected + 0.1 * q.detach()
        (model(*views(number)) / 2).backward()
        torch.testing.assert_close(k, expected)
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.equal(k, q)


def test_eval_mode_changes_nothing():
    model = tiny()
    step(model, sgd(model), 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.eval()(*views(1)).isfinite()
    assert differences(dict(model.state_dict()), before) == []


def test_both_views_are_queries_and_both_are_enqueued():
    one, both = tiny(), tiny(symmetric=True)
    a, b = views()
    with torch.no_grad():
        sum_ = one(
            a,
            b,
        ) + copy.deepcopy(tiny())(b, a)
        torch.testing.assert_close(both(a, b), sum_, rtol=1e-5, atol=1e-6)
    assert int(both.criterion.queue_ptr) == 16 and int(one.criterion.queue_ptr) == 8


def test_uint8_images_are_normalised():
    im_q, im_k, _ = batch(8)
    assert torch.equal(tiny()(im_q, im_k), tiny()(*views()))


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_has_upstreams_names_and_resumes_bit_for_bit(tmp_path):
    whole, parts = (tiny(moco.SynCoLoss(4, 20, 0.2, **SYNCO_ARGUMENTS)) for _ in range(2))
    optimizers = sgd(whole), sgd(parts)
    losses = [step(whole, optimizers[0], i) for i in range(4)]
    for i in range(2):
        step(parts, optimizers[1], i)
    torch.save({"model": parts.state_dict(), "optimizer": optimizers[1].state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    names = [name for name in saved["model"] if not name.startswith(("encoder_q.", "encoder_k."))]
    assert names == ["queue", "queue_ids", "queue_ptr", "calls"]
    resumed = tiny(moco.SynCoLoss(4, 20, 0.2, **SYNCO_ARGUMENTS))
    resumed.load_state_dict(saved["model"])
    optimizer = sgd(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    assert [float(step(resumed, optimizer, i)) for i in (2, 3)] == [float(loss) for loss in losses[2:]]
    assert differences(dict(resumed.state_dict()), dict(whole.state_dict())) == []


def test_the_names_hold_inside_of_another_module(tmp_path):
    """As in a LightningModule, and after a copy."""
    outer = nn.ModuleDict({"model": tiny()})
    outer["model"](*views())
    state = outer.state_dict()
    assert "model.queue" in state and "model.criterion.queue" not in state
    twin = nn.ModuleDict({"model": copy.deepcopy(tiny())})
    twin.load_state_dict(state)
    assert differences(dict(twin.state_dict()), dict(state)) == []


@pytest.mark.parametrize("prefix", ["", "module.", "model."], ids=["alone", "DistributedDataParallel", "Lightning"])
def test_the_readers_take_the_query_encoder(prefix, tmp_path, capsys):
    torch.manual_seed(0)
    model = moco.MoCo(torchvision.models.resnet18(), criterion=moco.MoCoLoss(16, 20, 0.2))
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        model(x, x)
    path = tmp_path / "checkpoint.pth"
    entries = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"state_dict": entries, "scaler": {}}, path)
    read = open_backbone(str(path))
    assert read.arch == "resnet18"
    expected = model.eval().encoder(x)
    torch.testing.assert_close(features(read.encoder, x), expected)
    assert export_door.main([str(path), "--to", "torchvision"]) == 0
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    network.load_state_dict(torch.load(tmp_path / "checkpoint.torchvision.pth", weights_only=True), strict=False)
    torch.testing.assert_close(network.eval()(x), expected)


# ------------------------------------------------------------------------------------------------------- backbones


def headless() -> nn.Module:
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    return network


class Features(nn.Module):
    """One that says how wide its features are."""

    def __init__(self):
        super().__init__()
        self.linear, self.width = nn.Linear(3 * 16 * 16, 7), 7

    def forward(self, x):
        return self.linear(x.flatten(1)).relu()


BACKBONES = {
    "torchvision": (torchvision.models.resnet18, {}, "fc", 512),
    "torchvision vit": (lambda: torchvision.models.VisionTransformer(16, 4, 1, 2, 8, 16), {}, "heads.head", 8),
    "timm": (lambda: timm.create_model("test_resnet"), {}, "fc", 96),
    "timm without classes": (lambda: timm.create_model("test_resnet", num_classes=0), {}, "fc", 96),
    "timm with a hidden layer": (
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=0), {}, "classifier", 1024),
    "without its fc": (headless, {"width": 512}, "fc", 512),
    "maps": (lambda: nn.Sequential(*[*torchvision.models.resnet18().children()][:-1]), {"width": 512}, "fc", 512),
    "width of its own": (Features, {}, "fc", 7),
    "own network": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 9), nn.ReLU(), nn.Linear(9, 10)), {}, "3", 9),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_gets_a_head_and_is_there_afterwards(name):
    make, options, head, width = BACKBONES[name]
    torch.manual_seed(0)
    model = moco.MoCo(make(), criterion=moco.MoCoLoss(16, 20), **options)
    x = torch.randn(4, 3, 16, 16)
    loss = model(x, x)
    loss.backward()
    layers = model.encoder_q.get_submodule(head)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.ReLU, nn.Linear]  # type: ignore[arg-type]
    assert layers[0].in_features == width and layers[2].out_features == 16  # type: ignore[index]
    assert model.encoder_q.get_submodule(head)[0].weight.grad.abs().sum() > 0  # type: ignore[index]
    encoder = model.eval().encoder
    assert encoder(x).flatten(1).shape == (4, width)
    torch.testing.assert_close(encoder(x).flatten(1), features(model.encoder_q, x))
    assert not any(isinstance(m, SplitBatchNorm2d) and m.splits > 1 for m in encoder.modules())


MISTAKES = [
    (lambda: moco.MoCo(headless()), "ResNet does not end in a linear layer that a head could replace"),
    (lambda: moco.MoCo(nn.Conv2d(3, 4, 3)), "give MoCo the width=F"),
    (lambda: moco.MoCo(Tiny(), 64, criterion=moco.MoCoLoss(4, 20)), "dim 64 is not the criterion's 4"),
    (lambda: moco.MoCo(Tiny(), criterion=moco.SimCLRLoss()), "takes a loss with a queue, not SimCLRLoss"),
    (lambda: moco.MoCo(Tiny(), m=1.5), "m is a share from 0 to 1, not 1.5."),
    (lambda: moco.MoCo(Tiny(), accum=0), "accum must be at least 1, not 0."),
    (lambda: moco.MoCo(nn.Sequential(Tiny(), nn.Identity()), width=4, criterion=moco.MoCoLoss(4, 20))(
        torch.ones(4, 3, 6, 6), torch.ones(2, 3, 6, 6)), "takes q and k (N, 4), not (4, 4) and (2, 4)"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "sentence"), MISTAKES, ids=[sentence[:30] for _, sentence in MISTAKES])
def test_a_mistake_is_one_sentence(make, sentence):
    with pytest.raises(moco.UserError) as caught:
        make()
    assert sentence in str(caught.value)


# --------------------------------------------------------------------------------------------------- two processes


def plain(seed: int) -> nn.Module:
    """Without BatchNorm: two processes compute what one does."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.ReLU(), nn.Linear(8, 4))


def train(rank: int, size: int, backbone: nn.Module) -> tuple[moco.MoCo, list[Tensor]]:
    """Three steps on this process's share of the batches."""
    model = moco.MoCo(backbone, m=0.9, criterion=moco.MoCoLoss(4, 20, 0.2))
    wrapped = nn.parallel.DistributedDataParallel(model) if size > 1 else model
    optimizer, losses = sgd(model), []
    for i in range(3):
        share = slice(rank * 8 // size, (rank + 1) * 8 // size)
        loss = wrapped(*(view[share] for view in views(i)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return model, losses


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, losses = train(rank, 2, plain(rank))  # DistributedDataParallel makes the weights equal
    torch.save({"losses": losses, "state": model.state_dict()}, f"{folder}/{rank}.pt")
    model.criterion.queue.fill_(rank)  # what is sent would be seen
    normed = tiny()
    wrapped = nn.parallel.DistributedDataParallel(normed)
    normed.criterion.queue[10:].fill_(rank)
    wrapped(*(view[rank * 4 : rank * 4 + 4] for view in views()))
    splits = [m.splits for m in normed.modules() if isinstance(m, SplitBatchNorm2d)]
    torch.save({"queue": normed.criterion.queue.clone(), "splits": splits}, f"{folder}/normed{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_processes_train_as_one_does_and_send_no_queue(tmp_path):
    two_of(one_of_two, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone, losses = train(0, 1, plain(0))
    assert differences(first["state"], second["state"]) == []
    torch.testing.assert_close((torch.stack(first["losses"]) + torch.stack(second["losses"])) / 2, torch.stack(losses))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-5)
    normed = [torch.load(tmp_path / f"normed{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(normed[0]["queue"][:8], normed[1]["queue"][:8])  # the keys of both
    assert [float(found["queue"][10:].mean()) for found in normed] == [0, 1]  # each its own: nothing was sent
    assert all(splits == 1 for found in normed for splits in found["splits"]) and len(normed[0]["splits"]) == 2


# ---------------------------------------------------------------------------------------------- the negatives


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "own rows left out"])
@pytest.mark.parametrize("kind", ["mochi", "synco"])
def test_the_negatives_are_those_of_the_loss(kind, masked):
    """The loss written out with them is the loss of the same call."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(6, 16, generator=generator) for _ in range(2))
    few = {"n_hard": 20, "seed": 5, "impl": "reference"}
    counts = {"s": 3, "s2": 4} if kind == "mochi" else {"n1": 3, "n2": 4, "n3": 5, "n4": 2, "n5": 1, "n6": 2}
    recipe = moco.MoCHiConfig(**counts) if kind == "mochi" else moco.SynCoConfig(**counts)
    loss = (moco.MoCHiLoss if kind == "mochi" else moco.SynCoLoss)(16, 20, 0.2, **few, **counts)
    ids = torch.arange(6) if masked else None
    for _ in range(2):
        loss(q, k, ids)
    mask = {"ids": ids, "queue_ids": loss.queue_ids} if masked else {}
    made = moco.hard_negatives(q, loss.queue, recipe, 20, seed=5, call=loss.number, **mask)
    assert {name: rows.shape for name, rows in made.items()} == {
        row.kind: (6, row.count, 16) for row in loss.negatives.recipe
    }
    unit_q, unit_k = nn.functional.normalize(q), nn.functional.normalize(k)
    h = torch.cat([*made.values()], dim=1)  # (N, S, C)
    rows = (unit_q @ loss.queue.T).masked_fill((loss.queue_ids == ids[:, None]) if masked else torch.tensor(False),
                                               -math.inf)  # fmt: skip
    synthetic = torch.einsum("nc,nsc->ns", unit_q, h)
    assert synthetic.isnan().any() == masked
    cosines = torch.cat([(unit_q * unit_k).sum(1, keepdim=True), rows, synthetic.nan_to_num(-math.inf)], dim=1)
    expected = nn.functional.cross_entropy(cosines / 0.2, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(loss(q, k, ids), expected)
    torch.testing.assert_close(h[~h.isnan().any(2)].norm(dim=1), torch.ones(int((~synthetic.isnan()).sum())))


def test_names_stand_for_the_published_counts():
    q, queue = torch.randn(2, 8), nn.functional.normalize(torch.randn(1024, 8))
    counts = {name: rows.shape[1] for name, rows in moco.hard_negatives(q, queue, "mochi").items()}
    assert counts == {"mixup": 512, "interpolation": 256}
    assert sum(rows.shape[1] for rows in moco.hard_negatives(q, queue, "synco").values()) == 960
    with pytest.raises(moco.UserError, match="recipe must be mochi or synco, or a config of one, not 'simclr'"):
        moco.hard_negatives(q, queue, "simclr")
    with pytest.raises(moco.UserError, match="n_hard 2000"):
        moco.hard_negatives(q, queue, n_hard=2000)
