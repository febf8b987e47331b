"""Small crops as queries: the views stay what they are, every loss is a loop over all queries, runs repeat exactly."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SYNCO, TINY, differences, load, records
from PIL import Image
from support.networks import IN_BATCH, LABELS, MEAN, OWN, STD, Tiny, batch, batch_contrast, moco
from support.refused import one_sentence
from support.workers import noting

from moco.config import InBatchConfig, LocalCropConfig, MoCoV3Config, SynCoConfig
from moco.data import PRESETS, ArraySource, EpochSampler, TwoViews, apply, draw, open_sources, two_views
from moco.kernels.reference import synthesize
from moco.kernels.spec import hardest_rows
from moco.methods.negatives import HardNegatives
from moco.methods.registry import METHODS
from moco.models import build
from moco.models.base import by_crop
from moco.models.moco_v3 import MoCoV3
from moco.models.supcon_queue import LabelledMoCo
from moco.seeding import numpy_generator

N, L, T = 6, 3, 0.2
CROPS = LocalCropConfig(L, 8, (0.1, 0.3))


def noise(count: int = 6) -> ArraySource:
    return ArraySource("noise", np.random.default_rng(2).integers(0, 256, (count, 30, 26, 3), dtype=np.uint8))


# ------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(("size", "small"), [(24, 8), (100, 96), (100, 16)])  # made by PIL, finished as tensors
@pytest.mark.parametrize("preset", ["v2", "v3"])
def test_crops_are_views_of_their_scale_and_change_nothing_about_the_others(preset, size, small):
    source, local = noise(), LocalCropConfig(L, small, (0.1, 0.3))
    for index in range(3):
        alone = TwoViews(source, PRESETS[preset], size, 7, views=3)[(4, index)]
        item = TwoViews(source, PRESETS[preset], size, 7, views=3, local=local)[(4, index)]
        assert item["local"].shape == (L, 3, small, small)
        assert differences({**alone, "local": item["local"]}, item) == []
        own = PRESETS[preset].of_view(1)
        for number, crop in enumerate(item["local"]):
            image = source.load(index)
            params = draw(own, *image.size, numpy_generator("local", 7, 4, index, number))
            scaled = draw(own.__class__(**{**vars(own), "crop_scale": (0.1, 0.3)}), *image.size,
                          numpy_generator("local", 7, 4, index, number))  # fmt: skip
            assert scaled._replace(box=params.box) == params
            _, _, h, w = scaled.box
            assert 0.1 * 30 * 26 * 0.8 < h * w < 0.3 * 30 * 26 * 1.2
            assert torch.equal(crop, apply(image, scaled, small))
    other = TwoViews(source, PRESETS[preset], size, 7, local=LocalCropConfig(1, small, (0.1, 0.3)))[(4, 0)]["local"]
    assert torch.equal(other[0], TwoViews(source, PRESETS[preset], size, 7, local=local)[(4, 0)]["local"][0])


@pytest.mark.parametrize(("size", "small"), [(224, 96), (192, 96), (160, 64), (96, 32), (64, 24), (32, 16), (28, 16)])
def test_the_default_size_is_in_swavs_proportion(size, small):
    assert LocalCropConfig(1).beside(size).size == small
    assert LocalCropConfig(1, 40).beside(size).size == 40


def test_crops_finished_on_the_device_are_the_workers():
    source, cpu = noise(12), torch.device("cpu")
    loaders = [
        two_views(TwoViews(source, PRESETS["v2"], 16, 7, only, local=CROPS), EpochSampler(12, 4, 7), 0, cpu)
        for only in (False, True)
    ]
    for whole, finished in zip(*loaders, strict=True):
        assert whole.keys() == finished.keys() == {"q", "k", "local", "index", "bad"}
        assert whole["local"].shape == (4, L, 3, 8, 8)
        assert differences(whole, finished) == []


@pytest.mark.parametrize("crop_only", [False, True])
def test_fast_decoding_of_the_views_is_theirs_alone(tmp_path, crop_only):
    small = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(small).resize((400, 300), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg")
    source = open_sources(path=str(tmp_path)).pretrain
    local = LocalCropConfig(2, 30, (0.05, 0.14))
    for epoch in range(8):
        alone, item, exact = (
            TwoViews(source, PRESETS["crop"], 60, 3, crop_only=crop_only, fast=fast, local=crops)[(epoch, 0)]
            for fast, crops in ((True, LocalCropConfig()), (True, local), (False, local))
        )
        assert differences({k: v for k, v in item.items() if not k.startswith("local")}, alone) == []
        off = (item["local"].int() - exact["local"].int()).abs()
        assert float(off.float().mean()) < 6  # of a smooth picture, cut at the same places


# --------------------------------------------------------------------------------------------------------- a step


def local_images(seed: int = 5, side: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (N, L, 3, side, side), generator=torch.Generator().manual_seed(seed)).byte()


def features(*shape: int, seed: int) -> torch.Tensor:
    made = torch.randn(*shape, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(made, dim=-1)


def queue_model(kind: str):
    """A model whose encoders give float64 features that are there, and what they are: of both views and of crops."""
    extra = None
    if kind in ("synco", "supcon"):
        extra = HardNegatives(
            METHODS["synco"].hooks.recipe(SynCoConfig(3, 3, 3, 2, 2, 2)), 6, 4, 0, 0, torch.device("cpu")
        )
    if kind == "supcon":
        base = moco()
        torch.manual_seed(0)
        config = base.config.__class__(**{**vars(base.config), "n_hard": 6, "base_temperature": 0.1})
        model = LabelledMoCo(Tiny(), Tiny(), config, labels=LABELS, seed=1, extra=extra)
        model.queue_labels.copy_(torch.arange(20) % 4 - 1)
    else:
        model = moco(extra=extra, n_hard=6, symmetric=kind == "symmetric", mask_same_image=kind == "masked")
        model.queue_ids.copy_(torch.arange(20) % 9)
    model.queue.data = F.normalize(model.queue.double(), dim=1)  # the closed forms are of unit rows
    first, second, small = (features(*shape, seed=s) for s, shape in enumerate([(N,), (N,), (N, L)]))
    keys = [features(N, seed=s) for s in (7, 8)]
    leaves = [x.requires_grad_() for x in (first, second, small)]
    views = [torch.zeros(N, 3, 6, 6), torch.ones(N, 3, 6, 6)]

    def encode_queries(images):
        if images.shape[-1] == 5:
            return small.flatten(0, 1)
        return first if float(images.sum()) == 0 else second

    model.encode_queries = encode_queries
    model.encode_keys = lambda images, draw: keys[0] if float(images.sum()) else keys[1]
    return model, views, leaves, keys


def infonce(model, q, key, image: int, draws) -> torch.Tensor:
    """The loss of one query, every candidate written out; draws: one row, or None."""
    queue = model.queue.double()
    labelled = isinstance(model, LabelledMoCo)
    own = [bool(model.queue_labels[j] == LABELS[image]) if labelled else False for j in range(20)]
    left_out = [bool(model.config.mask_same_image) and int(model.queue_ids[j]) == image for j in range(20)]
    sims = [q @ key / T] + [q @ queue[j] / T for j in range(20) if not left_out[j]]
    positives = [q @ key / T] + [q @ queue[j] / T for j in range(20) if own[j]]
    if draws is not None:
        similar = torch.tensor([-torch.inf if own[j] else float((queue[j] @ q).detach()) for j in range(20)])
        rows, _ = hardest_rows(similar[None].double(), 6)
        sims += [q @ h / T for h in synthesize(q.detach()[None], queue, rows, draws)[0]]
    loss = torch.logsumexp(torch.stack(sims), 0) - torch.stack(positives).mean()
    return loss * model.scale


@pytest.mark.parametrize("kind", ["moco", "masked", "synco", "symmetric", "supcon"])
def test_the_loss_is_a_loop_over_all_queries_against_the_same_keys(kind):
    """In value and gradient, in float64. Draw numbers: 5 of the batch, and those that its crops have of their own."""
    model, views, (first, second, small), keys = queue_model(kind)
    ids = torch.arange(N)
    out = model(views, ids, 0, 5, 0, local_images())
    own = torch.autograd.grad(out.loss, [first, small])
    draws = {}
    for crop in range(1 + L):
        made = model.extra(N, 0, 5 + crop * (1 << 41), 0) if model.extra else None
        draws[crop] = None if made is None else made.to(dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for queries, key in ((first, keys[0]), (second, keys[1]))[: 2 if kind == "symmetric" else 1]:
        for i in range(N):
            for crop, q in enumerate([queries[i], *small[i]]):
                row = draws[crop]
                total = total + infonce(model, q, key[i], i, None if row is None else row.rows(i, i + 1))
    want = total / (N * (1 + L))
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-12)
    for mine, theirs in zip(own, torch.autograd.grad(want, [first, small]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)
    assert float(own[1].abs().sum()) > 0


def test_what_is_logged_and_enqueued_is_of_the_views():
    """Bit for bit that of a step without crops, BatchNorm's statistics aside, which have seen the crops last."""
    im_q, im_k, ids = batch()
    extra = HardNegatives(METHODS["synco"].hooks.recipe(SynCoConfig(3, 3, 3, 2, 2, 2)), 6, 4, 0, 0, torch.device("cpu"))
    models = [moco(extra=extra, n_hard=6) for _ in range(2)]
    alone, out = models[0]([im_q, im_k], ids, 0, 0), models[1]([im_q, im_k], ids, 0, 0, 0, local_images())
    assert differences(alone._replace(loss=out.loss)._asdict(), out._asdict()) == []
    assert float(out.loss.detach()) != float(alone.loss.detach())
    assert int(models[1].encoder_q.norm.num_batches_tracked) == 2  # one forward of all crops
    assert int(models[1].encoder_k.norm.num_batches_tracked) == 1  # and no key of them


def test_gradients_of_the_encoder_are_those_of_both_passes():
    """From images to weights: crops go through the query encoder in one pass of their own."""
    (im_q, im_k, ids), local, model = batch(), local_images(), moco()
    model.prepare = lambda images: images.float() / 255
    other = copy.deepcopy(model).double()
    out = model([im_q, im_k], ids, 0, 0, 0, local)
    out.loss.backward()
    q = F.normalize(other.encoder_q(im_q.double() / 255), dim=1)
    small = F.normalize(other.encoder_q(local.flatten(0, 1).double() / 255), dim=1).unflatten(0, (N, L))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        for query in (q[i], *small[i]):
            logits = torch.stack([query @ out.keys[i].double(), *(query @ row for row in other.queue)]) / T
            total = total - logits.log_softmax(0)[0]
    (total / (N * (1 + L))).backward()
    assert out.loss.item() == pytest.approx(total.item() / (N * (1 + L)), rel=1e-5)
    for (name, p), theirs in zip(model.encoder_q.named_parameters(), other.encoder_q.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(p.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=name)


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("method", IN_BATCH)
def test_without_a_queue_crops_are_anchors_and_no_candidates(method, mode):
    """Three views and three crops, every sum written out in float64, in value and gradient."""
    net = batch_contrast(method, contrast_mode=mode)
    z, small = (torch.randn(N, n, 4, dtype=torch.float64, requires_grad=True) for n in (3, L))
    net._encode = lambda views: z if len(views[0][0, 0]) == 6 else small
    views = [torch.zeros(N, 3, 6, 6)] * 3
    out = net(views, torch.arange(N), local=local_images())
    own = torch.autograd.grad(out.loss, [z, small])
    groups = LABELS if method == "supcon" else torch.arange(N)
    unit_z, unit_small = F.normalize(z, dim=2), F.normalize(small, dim=2)
    anchors = [(unit_z[i, v], i, v) for i in range(N) for v in range(3 if mode == "all" else 1)]
    anchors += [(unit_small[i, v], i, None) for i in range(N) for v in range(L)]
    losses = [one(method, unit_z, groups, *anchor) for anchor in anchors]
    want = torch.stack(losses).mean()
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-12)
    for mine, theirs in zip(own, torch.autograd.grad(want, [z, small]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-13)


def one(method: str, z, groups, anchor, image: int, view: int | None) -> torch.Tensor:
    """The loss of one anchor; ``view``: which candidate it is itself, None for a crop."""
    places = [(j, v) for j in range(N) for v in range(3) if (j, v) != (image, view)]
    e = {place: (anchor @ z[place] / T).exp() for place in places}
    positives = [e[j, v] for j, v in places if groups[j] == groups[image]]
    negatives = torch.stack([e[j, v] for j, v in places if groups[j] != groups[image]])
    found = []
    for positive in positives:
        if method == "dcl":
            found.append(-torch.log(positive / negatives.sum()))
        elif method == "hcl":  # beta 1, tau_plus .1
            n = len(negatives)
            reweighted = n * (negatives * negatives).sum() / negatives.sum()
            floor = torch.tensor(n * np.exp(-1 / T), dtype=torch.float64)
            ng = torch.maximum((reweighted - 0.1 * n * positive) / 0.9, floor)
            found.append(-torch.log(positive / (positive + ng)))
        else:
            found.append(-T / 0.07 * torch.log(positive / (sum(positives) + negatives.sum())))
    return torch.stack(found).mean()


def test_without_a_queue_the_log_is_of_the_views():
    im_q, im_k, ids = batch()
    alone, out = (batch_contrast()([im_q, im_k], ids, local=x) for x in (None, local_images()))
    for name, value in alone.statistics.items():
        torch.testing.assert_close(out.statistics[name], value, msg=name)
    assert torch.equal(alone.q, out.q)
    assert torch.equal(alone.paired, out.paired)


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize("method", [name for name in IN_BATCH if name != "supcon"])
def test_chance_is_the_loss_of_features_that_all_look_alike(method, views, mode):
    encoder = Tiny()
    torch.nn.init.zeros_(encoder.fc.weight)
    config = InBatchConfig(T=0.5, mean=MEAN, std=STD, method=method, views=views, local=L, contrast_mode=mode)
    net, _ = build.in_batch(encoder, config, build.Context(seed=0, images=6, batch=6))
    im_q, im_k, ids = batch()
    out = net([im_q, im_k, *[im_q] * (views - 2)], ids, local=local_images())
    assert float(out.loss.detach()) == pytest.approx(net.chance, rel=1e-5)


def test_moco_v3s_crops_ask_the_keys_of_both_views():
    """Algorithm 1 with more queries, written as loops in float64, in value and in every gradient."""

    def network():
        made = Tiny()
        made.head_name = "fc"
        return made

    torch.manual_seed(0)
    net = MoCoV3(network(), network(), MoCoV3Config(C=8, hidden=12, mean=MEAN, std=STD, T=0.3), batch=N).double()
    x1, x2 = torch.randn(2, N, 3, 6, 6, dtype=torch.float64)
    local = torch.randn(N, L, 3, 5, 5, dtype=torch.float64)
    other = copy.deepcopy(net)
    q1, q2 = (other.predictor(other.encoder_q(x)) for x in (x1, x2))
    k1, k2 = (other.encoder_k(x).detach() for x in (x1, x2))
    small = other.predictor(other.encoder_q(local.flatten(0, 1))).unflatten(0, (N, L))

    def ctr(queries, i, k):
        total = torch.zeros((), dtype=torch.float64)
        for q in queries:
            sims = torch.stack([F.cosine_similarity(q, key, dim=0) / 0.3 for key in k])
            total = total - 2 * 0.3 * sims.log_softmax(0)[i]
        return total / (N * (1 + L))

    want = sum(ctr([q[i], *small[i]], i, k) for q, k in ((q1, k2), (q2, k1)) for i in range(N))
    want.backward()
    out = net([x1, x2], torch.arange(N), local=local)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-12)
    for (name, p), theirs in zip(net.named_parameters(), other.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(p.grad, theirs.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_images_stay_together_so_that_parts_of_batchnorm_have_their_own():
    local = torch.arange(N * L, dtype=torch.float32).view(N, L, 1, 1, 1)
    crops = by_crop(lambda images: images.flatten(1), local)
    assert [c.flatten().tolist() for c in crops] == [[float(i * L + n) for i in range(N)] for n in range(L)]
    assert all(c.is_contiguous() for c in crops)
    assert by_crop(lambda images: images, None) == ()


# ----------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "words",
    [[*TINY, *SYNCO, "-b", 4, "--symmetric", "--accum", 2], [*OWN, "--method", "supcon"]],
    ids=["a queue, both ways", "in the batch"],
)
def test_a_run_resumes_exactly_and_finishes_crops_anywhere(words, image_folder, tmp_path, in_process, capsys):
    words = [*words, "--local-crops", 2, "--epochs", 2, image_folder]
    assert in_process(*words, "--save-dir", tmp_path / "whole") == 0
    assert "2 small crops an image of 8 px, 5 % to 14 % of it, as queries only" in capsys.readouterr().out
    assert in_process(*words, "--save-dir", tmp_path / "parts", "--max-minutes", 1e-9) == 75
    parts = load(tmp_path / "parts")["run"]
    assert parts["batch"] > 0  # inside the first epoch
    assert parts["flags"]["--local-crop-size"] == 8  # the default of 16 px
    assert parts["pretraining"]["recipe"]["--local-crops"] == 2
    assert in_process(*words, "--save-dir", tmp_path / "parts", "--resume", "auto", "--aug-device", "gpu") == 0
    assert differences(load(tmp_path / "whole"), load(tmp_path / "parts")) == [".run.flags.--aug-device"]


def test_the_online_probe_sees_the_views_alone(image_folder, tmp_path, in_process):
    """With hardly a rate the encoder stays, and so the probe's steps are those of a run without crops; its head's
    BatchNorm layers normalise by the batch while they train."""
    for name, more in (("alone", []), ("crops", ["--local-crops", 2])):
        words = [*TINY, "--lr", 1e-30, "--epochs", 1, "--online-probe", image_folder]
        assert in_process(*words, *more, "--save-dir", tmp_path / name) == 0
    alone, crops = (load(tmp_path / name) for name in ("alone", "crops"))
    assert differences(alone["online_probe"], crops["online_probe"]) == []
    assert "--local-crops" not in alone["run"]["pretraining"]["recipe"]
    assert [r["online_acc1"] for r in records(tmp_path / "alone")] == [
        r["online_acc1"] for r in records(tmp_path / "crops")
    ]


@pytest.mark.dist
@pytest.mark.parametrize(
    "words", [[*TINY, "--bn-splits", 2], [*OWN, "--method", "simclr", "--sync-bn"]], ids=["moco", "simclr"]
)
def test_two_processes_compute_what_one_does(words, image_folder, tmp_path, start):
    """In loss, gradient and updated weights, by one backward pass; parts of BatchNorm have what processes have."""
    words = [*words, "--size", 32, "--epochs", 1, "--no-shuffle-bn", "--local-crops", 2, image_folder]
    two = [word for word in words if word not in ("--bn-splits", 2)] if "--bn-splits" in words else words
    two = [*two[: two.index("--local-crops")], "--local-crops", 2, *two[-1:], "--nproc", 2]
    runs = {1: words, 2: two}
    programs = {n: start(*own, "--save-dir", tmp_path / str(n), main=noting) for n, own in runs.items()}
    for program in programs.values():
        assert program.end() == 0, program.text
    logs = [records(tmp_path / f"{n}") for n in (1, 2)]
    for name in ("loss", "top1", "hardest", "grad_norm"):
        assert logs[1][0][name] == pytest.approx(logs[0][0][name], rel=1e-4), name
    one, two, other = (
        torch.load(tmp_path / name, weights_only=True)[0] for name in ("1/rank0.pt", "2/rank0.pt", "2/rank1.pt")
    )
    for name, value in one.items():
        if not name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            assert torch.equal(two[name], other[name]), name


def test_a_vit_reads_crops_of_another_size(image_folder, tmp_path, in_process):
    words = [*TINY, "-a", "test_vit", "--size", 32, "--local-crops", 2, "--local-crop-size", 16, "--epochs", 1]
    assert in_process(*words, "--save-dir", tmp_path, image_folder) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--local-crop-size", "8"], "--local-crop-size says what small crops are like, and there are none: give "),
        (["--local-crops", "2", "--local-crop-scale", "0.5", "0.1"], "--local-crop-scale 0.5 0.1: give the smaller"),
        (["--local-crops", "2", "--local-crop-scale", "0", "1"], "--local-crop-scale is above 0 and at most 1, not 0"),
        (["--local-crops", "-1"], "--local-crops must be at least 0"),
        (["--local-crops", "2", "--local-crop-size", "24"], "--local-crop-size 24 is more than the views' 16 px"),
        (["--local-crops", "2", "-a", "vit_b_32", "--size", "32"], "-a vit_b_32 does not read small crops of 16 px"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, image_folder, tmp_path, in_process, capsys):
    assert sentence in one_sentence(in_process, capsys, *TINY, *words, "--save-dir", tmp_path, image_folder)
