"""README: its commands of several processes, and a benchmark that starts some, run as typed, with the network and the
sizes reduced; its tree has every room. test_docs.py runs the others, as those of docs/."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, load, run_script
from PIL import Image
from support.ports import free_port

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Appended to a command, so that later words win; the command's own flags all stay.
PRETRAIN = """-a resnet18 --size 16 --moco-k 1024 --moco-dim 16 -b 8 -j 0 --steps 2 --hard-start-epoch 0 --knn-every 0
--amp off"""
UPSTREAM = "-a test_resnet --size 32 -b 8 --moco-k 1200 --epochs 2 -p 1"
CIFAR = "--images 16 --batch-size 16 --queries 8 --epochs 1 --seeds 0 --methods moco synco"
PROBE = "-a resnet18 --size 16 -b 8 -j 0 --epochs 1"


def commands(text: str = README) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def scripts() -> list[str]:
    """What test_docs.py only parses."""
    return [c for c in commands() if re.search("--dist-url|^torchrun|cifar10_methods", c)]


@pytest.fixture(scope="module")
def checkpoint(image_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    words = [*PRETRAIN.split(), "--save-dir", str(folder), str(image_folder)]
    assert run_script(folder, ROOT / "main_pretrain.py", *words).returncode == 0
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
    names["tcp://localhost:10001"] = f"tcp://localhost:{free_port()}"
    words = [names.get(word, word) for word in shlex.split(command)]
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", "--standalone", *words[1:]]
        words[words.index("--nproc-per-node") + 1] = "2"
    more = {
        "main_pretrain.py": [*PRETRAIN.split(), "--save-dir", str(folder)],
        "main_lincls.py": [*PROBE.split(), "--save-dir", str(folder)],
        "main_semisup.py": [*PROBE.split(), "--save-dir", str(folder), "--train-percent", "50"],  # 1 % is 2 images
        "accuracy.cifar10_methods": [*CIFAR.split(), "--data", str(cifar), "--out", str(folder)],
    }
    script = next(name for name in more if any(word.endswith(name) for word in words))
    if "--multiprocessing-distributed" in words:
        # A loader's processes take ten seconds to import torch: MoCo's command has some, SynCo's does without.
        more["main_pretrain.py"] = [*UPSTREAM.split(), "-j", "0" if "--n1" in words else "2", "--save-dir", str(folder)]
        more[script] += ["--nproc", "2"]  # as on a machine with two GPUs
    return [sys.executable, *words[1:], *more[script]]


def test_the_readme_shows_the_two_commands_and_the_four_of_upstream():
    assert [c for c in commands() if c.startswith("make")] == ["make demo", "make test"]
    assert "-m moco.demo" in (ROOT / "Makefile").read_text()
    assert sum("--dist-url" in c for c in commands()) == 4


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("command", scripts(), ids=lambda c: " ".join(c.split())[:60])
def test_a_command_of_the_readme_runs(command, image_folder, checkpoint, cifar_like, tmp_path):
    words = reduced(command, tmp_path, checkpoint, image_folder, cifar_like)
    options = {"capture_output": True, "text": True, "timeout": 300, "cwd": ROOT, "env": environment()}
    done = subprocess.run(words, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    if "main_pretrain.py" in command:
        assert list(tmp_path.glob("checkpoint_*.pth.tar"))
        assert "images/s" in done.stdout
        if "torchrun" in command:
            assert "2 processes (gloo) on cpu" in done.stdout
            assert done.stdout.count("images/s") == 1  # one process tells it
            assert "Warning" not in done.stdout
            run = load(tmp_path)["run"]
            assert (run["step"], run["batches"]["processes"]) == (2, 2)
        if "--multiprocessing-distributed" in command:
            assert done.stderr == ""
            assert done.stdout.startswith("synco" if "--n1" in command else "moco")
            assert "2 processes (gloo)" in done.stdout
            assert done.stdout.count("images/s") == 6
            assert "k-NN" in done.stdout
            names = sorted(path.name for path in tmp_path.glob("*.tar"))
            assert names == ["checkpoint_0000.pth.tar", "checkpoint_0001.pth.tar"]
    elif "main_semisup.py" in command:
        assert (tmp_path / "result.json").exists()
        assert "2 processes (gloo)" in done.stdout
    elif "main_lincls.py" in command:
        assert " * k-NN" in done.stdout or " * Acc@1" in done.stdout
    else:
        assert "| --- |" in done.stdout


def entries() -> list[tuple[Path, str]]:
    """The folder of each line of README's tree, and its text; a line without a name goes on with the one above."""
    found, above = [], [ROOT]
    for line in README.split("## The tree")[1].split("```")[1].removeprefix("text").strip("\n").splitlines():
        depth, text = (len(line) - len(line.lstrip())) // 2, line.strip()
        if depth < 12 and (room := re.match(r"([\w/]+)/(?=\s|$)", text)):
            above[depth + 1 :] = [above[depth] / room[1]]
        folder = above[-1] if depth >= 12 or room else above[depth]
        found.append((folder, text))
    return found


def test_files_that_the_readme_names_exist_and_no_room_or_page_is_left_out():
    for folder, text in entries():
        assert folder.is_dir(), folder
        for name in re.findall(r"[\w/]+\.(?:py|md)\b", text):
            assert (folder / name).exists(), folder / name
    rooms = {path.parent for path in (ROOT / "moco").rglob("*.py")} - {ROOT / "moco" / "mains"}
    assert rooms - {folder for folder, _ in entries()} == set()
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"(docs/{path.name})" not in README] == []
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link.partition("#")[0]).exists(), link


PLACES = {  # what a reader looks for: the words of the tree, and the definition that is in the file they name
    "losses.py: SupCon": "def supcon",
    "loop.py: the training loop": "class Loop",
    "batchnorm.py: BatchNorm split": "def split_batchnorm",
    "presets.py: published": "PRESETS",
    "checkpoint.py: writes": "def save",
    "layouts.py: recognises": "lightly",
    "knn.py: k-NN accuracy": "def knn_predict",
    "methods.py: flags of each method, such as --n1": '"n1"',
    "report.py: selection": "def selected",
}


@pytest.mark.parametrize("words", PLACES)
def test_the_tree_leads_to(words):
    (folder,) = [folder for folder, text in entries() if words in text]
    assert PLACES[words] in (folder / words.split()[0].rstrip(":")).read_text(encoding="utf-8")
