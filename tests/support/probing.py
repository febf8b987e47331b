"""main_lincls.py in this process, and what it wrote."""

import json

import torch
from conftest import ARCH

import main_lincls
from moco.cli import parse_lincls

TINY = ["-a", ARCH, "--size", "16", "-b", "8", "-j", "0", "--seed", "3", "--lr", "0.3", "-p", "2"]


def probe_once(folder, save_dir, *words) -> dict:
    """Run the program in this process; returns result.json (knn.json with --knn, evaluate.json with -e)."""
    args = parse_lincls([str(folder), *TINY, "--save-dir", str(save_dir), *map(str, words)])
    assert main_lincls.worker(args) == 0
    name = "knn.json" if args.knn else "evaluate.json" if args.evaluate else "result.json"
    return json.loads((save_dir / name).read_text())


def state_of(save_dir, name="checkpoint.pth.tar") -> dict:
    return torch.load(save_dir / name, weights_only=True)
