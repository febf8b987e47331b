"""Runs on images of five channels: pretraining, probe, k-NN, fine-tuning, features, pictures and exported weights."""

import numpy as np
import pytest
import torch
from conftest import ARCH, TINY, rounding
from PIL import Image
from support.here import run_here
from support.many_channels import write_bands, write_pages

import moco
from moco import files
from moco.data import stack
from moco.models.encoder import build_encoder
from moco.weights.layouts import open_file
from moco.weights.settings import settings_of

CHANNELS = 5


def image(label, number):
    """(40, 36, 5): the classes differ in the fifth channel alone, which no picture shows."""
    array = np.random.default_rng([label, number]).integers(0, 256, (40, 36, CHANNELS), dtype=np.uint8)
    array[..., 4] = array[..., 4] // 4 + 180 * label
    return array


@pytest.fixture(scope="module", params=["npy", "pages", "bands"])
def five(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    for split, count in (("train", 24), ("val", 12)):
        for number in range(count):
            path = place / split / "ab"[number % 2] / f"{number}.{'npy' if request.param == 'npy' else 'tif'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            array = image(number % 2, number if split == "train" else 100 + number)
            if request.param == "npy":
                np.save(path, array)
            elif request.param == "pages":
                write_pages(path, array)
            else:
                write_bands(path, array.astype(np.uint16) * 257, deflate=True)
    return place


def test_a_run_and_what_is_made_of_it(in_process, capsys, five, tmp_path, monkeypatch):
    run_here(monkeypatch)
    stack._say.cache_clear()  # told once a process
    run = tmp_path / "run"
    assert in_process(*TINY, "--epochs", 1, "--save-dir", run, five) == 0
    assert "0.5 and deviation 0.25 are taken for each of 5 channels" in "".join(capsys.readouterr())
    checkpoint = str(run / "checkpoint_0000.pth.tar")
    state = files.read(checkpoint)
    assert state["run"]["images"] == {
        "stem": "imagenet", "size": 16, "channels": 5, "mean": [0.5] * 5, "std": [0.25] * 5
    }  # fmt: skip
    first = {name: x.shape[1] for name, x in state["state_dict"].items() if name.endswith("conv1.0.weight")}
    assert set(first.values()) == {CHANNELS}

    encoder = moco.load_encoder(str(run))
    path = next((five / "val" / "b").glob("1.*"))
    array = image(1, 101)
    bands = [Image.fromarray(array[..., c]).resize((16, 17), Image.Resampling.BILINEAR) for c in range(CHANNELS)]
    wanted = np.stack([np.asarray(band)[:16] for band in bands])  # short side to 16, the centre
    assert np.array_equal(encoder.transform(path).numpy(), wanted)

    found = moco.embed(str(run), str(five), out=str(tmp_path / "features"), picture="none", workers=0)
    view = (torch.from_numpy(wanted)[None].float() / 255 - 0.5) / 0.25
    index = [name.endswith(f"b/{path.name}") for name in found.paths].index(True)
    with torch.no_grad():
        alone = encoder(view)[0]
    # sums in another order than in a batch, through four stages of at most 9 x 96 terms a sum
    assert (torch.as_tensor(found.features[index]) - alone).norm() < rounding(4 * 9 * 96) * alone.norm()

    more = {"workers": 0, "batch_size": 8}
    for protocol, own in (("knn", {"knn_k": [3]}), ("linear", {"epochs": 1}), ("finetune", {"epochs": 1})):
        moco.evaluate(str(run), str(five), protocol, out=str(tmp_path / protocol), **more, **own)
        assert "--channels 5" in "".join(capsys.readouterr())
    moco.neighbours(str(run), str(five), out=str(tmp_path / "near"), k=2, **more)
    assert "show the first three as red, green and blue" in "".join(capsys.readouterr())
    moco.export(str(run), to="timm", out=str(tmp_path / "timm.pth"))
    assert files.read(str(tmp_path / "timm.pth"))["conv1.0.weight"].shape[1] == CHANNELS


def test_weights_and_images_of_other_channels_are_refused_in_a_sentence(
    five, in_process, image_folder, tmp_path, monkeypatch
):
    run_here(monkeypatch)
    assert in_process(*TINY, "--steps", 1, "--save-dir", tmp_path / "colour", image_folder) == 0
    cases = [({"channels": 5}, "does not fit")]
    if "pages" not in five.name:  # of which the first is a grey image
        cases.append(({}, "has 5 .*, but --channels or the checkpoint is of 3"))
    for options, said in cases:
        with pytest.raises(moco.UserError, match=said):
            moco.evaluate(str(tmp_path / "colour"), str(five), workers=0, batch_size=8, **options)


def test_tensors_tell_the_channels(tmp_path):
    for arch, channels in ((ARCH, 5), ("resnet18", 16), ("vit_tiny_patch16_224", 2), ("resnet18", 1), ("resnet18", 3)):
        network = build_encoder(arch, 2, stem="imagenet", size=32, in_chans=channels)
        torch.save({"state_dict": network.state_dict()}, tmp_path / "a.pth")
        found = settings_of(open_file(str(tmp_path / "a.pth")), arch, 32)
        assert found["channels"].value == channels
