"""CONTRIBUTING.md: its diffs apply to this version and what they add works, its glossary names what is there."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, environment

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n(.*?)```", TEXT, flags=re.S)
TERMS = re.findall(r"^\| (.+?) \| .+? \| `(\S+)` \|$", TEXT.split("## Glossary")[1], flags=re.M)
# What somebody who followed the page would try first.
ADDED = """
import torch
from moco.cli.methods import drawn as counted
from moco.cli.pretrain import parse_pretrain
from moco.config import InBatchConfig, SynCoConfig
from moco.data import open_sources
from moco.methods import losses, synco
from moco.methods.registry import METHODS
from moco.methods.negatives import draw
from moco.models.encoder import build_encoder

z = torch.nn.functional.normalize(torch.randn(5, 2, 8, dtype=torch.float64), dim=2)
pairs, config = losses.compare(z, torch.arange(5)), InBatchConfig(beta=0.0, tau_plus=0.1)
args = parse_pretrain(["--method", "debiased", "DIR"])
value, wanted = (METHODS[name].hooks.loss(config)(pairs, 0.2) for name in (args.method, "hcl"))
assert torch.equal(value, wanted)

assert counted(parse_pretrain(["--n7", "5", "DIR"]))["repulsion"] == 5
drawn = draw([row for row in synco.recipe(SynCoConfig(n7=5)) if row.kind == "repulsion"], 3, 9, 8, key=0)
assert drawn.counts == (5, 0, 0, 0) and torch.equal(drawn.query_x, torch.full((3, 5), -0.01))

sources = open_sources(parse_pretrain(["--dataset", "digits8"]).dataset)
assert len(sources.train) + len(sources.val) == 1797 and sources.train.load(3).size == (8, 8)

assert build_encoder("four_layers", 16, size=32, mlp=True)(torch.randn(2, 3, 32, 32)).shape == (2, 16)
"""


def test_the_diffs_apply_and_what_they_add_works(tmp_path):
    assert len(DIFFS) == 4
    shutil.copytree(ROOT / "moco", tmp_path / "moco", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for diff in DIFFS:
        done = subprocess.run(["git", "apply", "-"], input=diff, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    child = subprocess.run(
        [sys.executable, "-c", ADDED], env=environment(PYTHONPATH=str(tmp_path)), cwd=tmp_path, capture_output=True,
        text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize(("terms", "file"), TERMS)
def test_a_term_of_the_glossary_is_used_where_it_says(terms, file):
    text = (ROOT / file).read_text(encoding="utf-8").lower()
    for term in terms.split(", "):
        assert term.lower().removeprefix("split ").rstrip("s") in text


def test_the_commands_are_those_of_the_makefile_and_the_tree_says_where_the_page_is():
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{name}:" in makefile for name in re.findall(r"^\| `make (\S+)` \|", TEXT, flags=re.M))
    for path in re.findall(r"`((?:tests|moco)/[\w/.]*)`", TEXT):
        assert (ROOT / path).exists(), path
