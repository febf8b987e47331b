"""Structured mutations of real files, seeded, through what the programs read them with: taken, or one sentence.

Each file is changed in one place: an entry is removed, or is another value or type, negative, huge, NaN, nested, a
tensor of one number, of bytes, sparse. The long form, with processes, is tests/runs/chaos.
"""

import importlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from runs.chaos.mutations import mutate

from moco import archive, distributed, export, files
from moco import cli as flags
from moco.errors import UserError
from moco.weights.average import average
from moco.weights.describe import describe_file
from moco.weights.read import open_backbone

FILES = {"pretrain": "checkpoint_0000.pth.tar", "lincls": "checkpoint.pth.tar", "semisup": "checkpoint_semisup.pth.tar"}
OWN = {"pretrain": ["--moco-k", "16", "--moco-dim", "8"], "lincls": ["--lr", "0.1", "1"], "semisup": []}
WORDS = ["-a", "test_resnet", "--size", "16", "-b", "8", "-j", "0", "--epochs", "1", "--seed", "0"]


def trained(program: str, folder: Path, images: Path, *more: str) -> int:
    parse = getattr(flags, f"parse_{program}")
    worker = importlib.import_module(f"main_{program}").worker
    return distributed.launch(worker, parse([str(images), *WORDS, *OWN[program], "--save-dir", str(folder), *more]))


def read_by_all(path: str, good: str) -> list[str]:
    """The sentences with which readers refuse a file."""
    archive._checked.clear()  # a test writes faster than a file system's clock ticks
    said = []
    for reader in (describe_file, open_backbone, lambda p: average([good, p]), lambda p: average([p, good])):
        try:
            reader(path)
        except UserError as error:
            said.append(str(error))
    assert not any("\n" in sentence for sentence in said)
    return said


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("program", FILES)
def test_mutations_of_a_checkpoint(program, whose, tmp_path, image_folder, capsys):
    assert trained(program, tmp_path / "run", image_folder) == 0
    good, odd, rng = str(tmp_path / "run" / FILES[program]), tmp_path / "odd.pth.tar", random.Random(program + whose)
    if whose == "theirs":
        state = torch.load(good, weights_only=True)
        theirs = {name: value for name, value in state.items() if name not in ("run", "scaler", "heads")}
        theirs["state_dict"].pop("module.queue_ids", None)
        good = str(tmp_path / "theirs.pth.tar")
        torch.save(theirs, good)
    assert read_by_all(good, good) == []
    codes, refused = [], 0
    for number in range(15):
        shutil.copy(good, odd)
        how = mutate(odd, "checkpoint", rng)
        refused += bool(read_by_all(str(odd), good))
        if number % 5 == 0:
            codes.append(trained(program, tmp_path / f"again{number}", image_folder, "--resume", str(odd)))
            assert codes[-1] in (0, 2), how
    assert refused
    assert 2 in codes
    assert "Traceback" not in capsys.readouterr().err


def test_mutations_of_an_exported_file_and_of_a_card(tmp_path, image_folder):
    assert trained("pretrain", tmp_path / "run", image_folder) == 0
    path, rng = str(tmp_path / "run" / FILES["pretrain"]), random.Random(0)
    outs = {"safetensors": tmp_path / "good.safetensors", "features": tmp_path / "good.pth"}
    for to, out in outs.items():
        assert not export.main([path, "--to", to, "--out", str(out)])
        assert len(describe_file(str(out))) > 5
    odd, beside = tmp_path / "odd.safetensors", tmp_path / "good.json"
    card, refused = beside.read_text(), 0
    for _ in range(40):
        shutil.copy(outs["safetensors"], odd)
        mutate(odd, "safetensors", rng)
        beside.write_text(card)
        mutate(beside, "json", rng)
        refused += bool(read_by_all(str(odd), path)) + bool(read_by_all(str(outs["features"]), path))
    assert refused > 20
    assert files.read_json(path) == {} and json.loads(card)["arch"] == "test_resnet"
