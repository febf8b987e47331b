"""main_semisup.py in this process, and what it wrote."""

import json

import pytest
from conftest import ARCH

import main_semisup
from moco import files
from moco.cli import parse_semisup
from moco.errors import UserError
from moco.eval import finetune

TINY = ["-a", ARCH, "--size", "16", "-b", "8", "-j", "0", "--seed", "3", "--lr-classifier", "0.1", "--epochs", "2",
        "-p", "2"]  # fmt: skip
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tune(folder, save_dir, *words, code=0, result="result.json") -> dict:
    """Run the program in this process; returns what it wrote as its result."""
    args = parse_semisup([str(folder), *TINY, "--save-dir", str(save_dir), *map(str, words)])
    (save_dir / result).unlink(missing_ok=True)
    assert main_semisup.worker(args) == code
    path = save_dir / result
    return json.loads(path.read_text()) if path.exists() else {}


def state_of(save_dir, name=finetune.CHECKPOINT) -> dict:
    return files.read(str(save_dir / name))


def sentence(folder, save_dir, *words) -> str:
    with pytest.raises(UserError) as caught:
        tune(folder, save_dir, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)
