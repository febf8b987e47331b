"""examples/ run as a user starts them, and moco.export and load_encoder read what they save."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script, write_images

import moco
from moco import export as export_door

EXAMPLES = ("own_loop.py", "lightning_module.py")
SMALL = ["--epochs", 2, "--batch-size", 4, "--size", 32, "--workers", 0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Class folders, 8 images."""
    root = tmp_path_factory.mktemp("photos")
    write_images(root, {"train": 4}, ["a", "b"], lambda rng, label: rng.integers(0, 256, (40, 36, 3)))
    return root / "train"


def read_back(path: Path, calls: int) -> None:
    """The two readers take the checkpoint, which has trained so many steps."""
    state = torch.load(path, weights_only=True)["state_dict"]
    (count,) = (value for name, value in state.items() if name.endswith("calls"))
    assert int(count) == calls
    encoder = moco.load_encoder(str(path), size=32)
    assert (encoder.arch, encoder.width, encoder.size) == ("resnet18", 512, 32)
    assert export_door.main([str(path), "--to", "torchvision", "--size", "32"]) == 0
    out = path.with_name(f"{path.stem}.torchvision.pth")
    exported = torch.load(out, weights_only=True)
    (weight,) = (value for name, value in state.items() if name.endswith("encoder_q.layer4.1.conv2.weight"))
    assert torch.equal(exported["layer4.1.conv2.weight"], weight)


def test_a_plain_loop(photos, tmp_path):
    ended = run_script(tmp_path, ROOT / "examples" / "own_loop.py", photos, *SMALL, "--out", tmp_path / "own.pth")
    assert ended.returncode == 0, ended.stderr
    assert "epoch 1, step 0: loss " in ended.stdout
    read_back(tmp_path / "own.pth", 4)


def test_lightning(photos, tmp_path):
    ended = run_script(
        tmp_path, ROOT / "examples" / "lightning_module.py", photos, *SMALL, "--steps", 2, "--out", tmp_path / "run"
    )
    assert ended.returncode == 0, ended.stderr
    read_back(tmp_path / "run" / "last.ckpt", 2)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_imports_moco_alone(name):
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert "import moco\n" in text and "from moco" not in text and "import moco." not in text
