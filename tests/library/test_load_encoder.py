"""An encoder from any file: its features, its images and what it says of itself."""

import numpy as np
import pytest
import torch
import torchvision
from conftest import ARCH
from PIL import Image
from support.layouts import THEIRS, resnet

import moco
from moco.data import eval_view
from moco.models.encoder import build_encoder, features
from moco.models.inputs import normalise
from moco.weights import export as exports

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A checkpoint of ours of an encoder of grey images, and the encoder."""
    torch.manual_seed(0)
    network = build_encoder(ARCH, 16, size=24, in_chans=1)
    for _ in range(3):
        network(torch.randn(8, 1, 24, 24))
    images = {"stem": "imagenet", "size": 24, "channels": 1, "mean": [0.3], "std": [0.2]}
    path = tmp_path_factory.mktemp("ours") / "checkpoint_0000.pth.tar"
    entries = {f"module.encoder_q.{name}": value for name, value in network.state_dict().items()}
    state = {"epoch": 1, "arch": ARCH, "state_dict": entries, "optimizer": {}, "run": {"images": images}}
    torch.save(state, path)
    return path, network.eval()


@torch.no_grad()
def test_a_checkpoint_says_all(ours):
    path, network = ours
    before = torch.random.get_rng_state()
    encoder = moco.load_encoder(path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (encoder.size, encoder.mean, encoder.std, encoder.width) == (24, [0.3], [0.2], 96)
    assert (encoder.arch, encoder.channels, encoder.training) == (ARCH, 1, False)
    assert "read 90 tensors from encoder_q" in encoder.source
    assert f"-a {ARCH} --stem imagenet --size 24 --channels 1 --mean 0.3 --std 0.2 (checkpoint)" in encoder.source
    images = torch.randint(0, 256, (5, 1, 24, 24), dtype=torch.uint8)
    normal = normalise(images, [0.3], [0.2])
    expected = features(network, normal)
    assert torch.equal(encoder(images), expected)
    assert torch.equal(encoder(normal), expected)
    assert f"{ARCH}, 1 x 24 x 24 -> 96" in repr(encoder)


def test_an_option_wins_over_the_file_and_is_told(ours):
    encoder = moco.load_encoder(ours[0], size=32, mean=[0.5], std=[0.25])
    assert (encoder.size, encoder.mean, encoder.std) == (32, [0.5], [0.25])
    assert "--size 32 differs from the 24 px" in encoder.source


def test_images_of_other_shapes_are_refused(ours):
    encoder = moco.load_encoder(ours[0])
    for shape in ((1, 24, 24), (2, 3, 24, 24)):
        with pytest.raises(moco.UserError, match=r"takes images \(N, 1, 24, 24\), not"):
            encoder(torch.zeros(shape))


def test_an_image_is_seen_as_evaluations_see_it(ours, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    grey = moco.load_encoder(ours[0])
    colour = moco.load_encoder("torchvision:IMAGENET1K_V1", arch="resnet18", size=100)
    for encoder, mode in ((grey, "L"), (colour, "RGB")):
        expected = eval_view(picture.convert(mode), encoder.size)
        assert expected.shape == (encoder.channels, encoder.size, encoder.size)
        for given in (picture, tmp_path / "a.png", str(tmp_path / "a.png")):
            assert torch.equal(encoder.transform(given), expected)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(moco.UserError, match=r"b.png"):
        grey.transform(tmp_path / "b.png")
    with pytest.raises(moco.UserError, match=r"nothing.png"):
        grey.transform(tmp_path / "nothing.png")


@pytest.fixture(autouse=True)
def published(monkeypatch):
    """torchvision's weights are those of a network of this seed, and no network is asked for them."""
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: dict(state))


@torch.no_grad()
@pytest.mark.parametrize("project", THEIRS)
def test_a_file_of_another_project(project, tmp_path):
    torch.manual_seed(0)
    state, network = THEIRS[project]()
    torch.save(state, tmp_path / "theirs.pth")
    encoder = moco.load_encoder(tmp_path / "theirs.pth", arch="resnet18")
    assert (encoder.mean, encoder.std) == IMAGENET
    assert encoder.size == (32 if project == "solo_learn" else 224)
    images = torch.randn(2, 3, 64, 64)
    body = network.eval()
    if hasattr(body, "fc"):
        body.fc = torch.nn.Identity()
    expected = body(images).flatten(1)
    assert (encoder(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("to", ["torchvision", "timm", "hub", "safetensors", "features"])
def test_what_was_exported_comes_back(to, tmp_path, capsys):
    torch.manual_seed(0)
    network = resnet()
    torch.save({"arch": "resnet18", "state_dict": {f"encoder_q.{n}": v for n, v in network.state_dict().items()}},
               tmp_path / "one.pth")  # fmt: skip
    path = moco.export(tmp_path / "one.pth", to, tmp_path / f"out{exports.SUFFIXES[to]}", size=48, mean=[0.1, 0.2, 0.3])
    capsys.readouterr()
    encoder = moco.load_encoder(path)
    assert (encoder.size, encoder.mean) == (48, [0.1, 0.2, 0.3])
    assert encoder.arch.removeprefix("timm/") == "resnet18"
    network.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 48, 48)
    expected = network.eval()(images)
    assert (encoder(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_published_weights_need_an_architecture():
    assert moco.load_encoder("torchvision:IMAGENET1K_V1", arch="resnet18").width == 512
    with pytest.raises(moco.UserError, match="torchvision has no weights V9 for -a resnet50"):
        moco.load_encoder("torchvision:V9")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(moco.UserError, match="no checkpoint at"):
        moco.load_encoder(tmp_path / "nothing.pth")
    with pytest.raises(moco.UserError, match="holds no checkpoint of a run"):
        moco.load_encoder(tmp_path)
