"""Every command of the README runs: flag for flag, with the network and sizes reduced and DIR a small image folder."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment
from PIL import Image

from moco import distributed

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Appended to a command, so that later words win; the command's own flags all stay.
PRETRAIN = """-a resnet18 --size 16 --moco-k 1024 --moco-dim 16 -b 8 -j 0 --steps 2 --hard-start-epoch 0 --knn-every 0
--amp off"""
UPSTREAM = "-a test_resnet --size 32 -b 8 --moco-k 1200 -j 2 --epochs 2 -p 1"
HEAD = "--sizes 4x256 --hard 16 --counts 4 4 4 2 2 2 --repeats 1 --no-memory --speed-side 64"
STEP = "-a test_resnet --size 16 -b 8 --moco-k 1100 --moco-dim 16 --amp off --rounds 2"
CIFAR = "--images 16 --batch-size 16 --queries 8 --epochs 1 --seeds 0 --methods moco synco"
PROBE = "-a resnet18 --size 16 -b 8 -j 0 --epochs 1"


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def scripts() -> list[str]:
    return [c for c in commands() if not c.startswith("make")]


@pytest.fixture(scope="module")
def checkpoint(image_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    words = [*PRETRAIN.split(), "--save-dir", str(folder), str(image_folder)]
    subprocess.run([sys.executable, str(ROOT / "main_pretrain.py"), *words], check=True, env=environment())
    return next(folder.glob("checkpoint_*.pth.tar"))


@pytest.fixture(scope="module")
def cifar_like(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cifar")
    for split, count in (("train", 8), ("test", 4)):
        for label, colour in (("dark", 40), ("light", 200)):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (colour, i, 0)).save(root / split / label / f"{i:04d}.jpg")
    return root


def reduced(command: str, folder: Path, checkpoint: Path, images: Path, cifar: Path) -> list[str]:
    """The command with small settings behind its own words and real paths in the place of names."""
    names = {"DIR": str(images), "checkpoint_0199.pth.tar": str(checkpoint)}
    names["tcp://localhost:10001"] = f"tcp://localhost:{distributed.free_port()}"
    words = [names.get(word, word) for word in shlex.split(command)]
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", "--standalone", *words[1:]]
        words[words.index("--nproc-per-node") + 1] = "2"
    more = {
        "main_pretrain.py": [*PRETRAIN.split(), "--save-dir", str(folder)],
        "main_lincls.py": [*PROBE.split(), "--save-dir", str(folder)],
        "contrastive_head.py": [*HEAD.split()],
        "training_step.py": [*STEP.split()],
        "cifar10_methods.py": [*CIFAR.split(), "--data", str(cifar), "--out", str(folder)],
    }
    script = next(name for name in more if any(word.endswith(name) for word in words))
    if "--multiprocessing-distributed" in words:
        more["main_pretrain.py"] = [*UPSTREAM.split(), "--save-dir", str(folder)]
        more[script] += ["--nproc", "2"]  # as on a machine with two GPUs
    return [sys.executable, *words[1:], *more[script]]


def test_the_readme_shows_the_two_commands_and_the_three_of_upstream():
    assert [c for c in commands() if c.startswith("make")] == ["make demo", "make test"]
    assert "-m moco.demo" in (ROOT / "Makefile").read_text()
    assert sum("--dist-url" in c for c in commands()) == 3


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("command", scripts(), ids=lambda c: " ".join(c.split())[:60])
def test_a_command_of_the_readme_runs(command, image_folder, checkpoint, cifar_like, tmp_path):
    words = reduced(command, tmp_path, checkpoint, image_folder, cifar_like)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    if "main_pretrain.py" in command:
        assert list(tmp_path.glob("checkpoint_*.pth.tar"))
        assert "images/s" in done.stdout
        if "--multiprocessing-distributed" in command:
            assert done.stderr == ""
            assert done.stdout.startswith("synco" if "--n1" in command else "moco")
            assert "2 processes (gloo)" in done.stdout
            assert done.stdout.count("images/s") == 6
            assert "k-NN" in done.stdout
            names = sorted(path.name for path in tmp_path.glob("*.tar"))
            assert names == ["checkpoint_0000.pth.tar", "checkpoint_0001.pth.tar"]
    elif "main_lincls.py" in command:
        assert " * k-NN" in done.stdout or " * Acc@1" in done.stdout
    else:
        assert "| --- |" in done.stdout


def test_files_that_the_readme_names_exist():
    tree = README.split("## The tree")[1].split("```")[1]
    for line in tree.strip().splitlines():
        for name in re.findall(r"^\s*([\w/]+(?:\.py|/))", line) + re.findall(r"(?<=  )(\w+\.py)", line):
            assert any((base / name).exists() for base in (ROOT, ROOT / "moco")), name
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
