"""Every command of the README and of docs/ runs: flag for flag, with the network and sizes reduced and DIR a small
image folder. The README's are started as typed; a page of docs/ is one session, its commands in their order."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment, load, run_script, save_pretrained
from PIL import Image
from support.ports import free_port

import main_lincls
import main_pretrain
import main_semisup
from moco import average as average_door
from moco import bench as bench_door
from moco import cli, distributed
from moco import describe as describe_door
from moco import embed as embed_door
from moco import export as export_door
from moco import retrieval as retrieval_door
from moco.cli import commands as command_options
from moco.data import __main__ as data_work
from moco.methods.registry import METHODS
from moco.models.encoder import build_encoder
from moco.sweep import __main__ as sweep

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Appended to a command, so that later words win; the command's own flags all stay.
PRETRAIN = """-a resnet18 --size 16 --moco-k 1024 --moco-dim 16 -b 8 -j 0 --steps 2 --hard-start-epoch 0 --knn-every 0
--amp off"""
UPSTREAM = "-a test_resnet --size 32 -b 8 --moco-k 1200 --epochs 2 -p 1"
HEAD = "--sizes 4x256 --hard 16 --counts 4 4 4 2 2 2 --repeats 1 --no-memory --speed-side 64"
STEP = "-a test_resnet --size 16 -b 8 --moco-k 1100 --moco-dim 16 --amp off --rounds 2"
CIFAR = "--images 16 --batch-size 16 --queries 8 --epochs 1 --seeds 0 --methods moco synco"
PROBE = "-a resnet18 --size 16 -b 8 -j 0 --epochs 1"
PAGES = ("evaluation", "running", "methods", "data")
NO_QUEUE = {name for name, row in METHODS.items() if row.family != "queue"}  # --moco-k would give supcon one
# What a page's commands get behind their own words, by a word that is among them.
SMALL = {
    "main_pretrain.py": "-a test_resnet --size 16 -b 8 -j 0 --moco-dim 16 --amp off --knn-every 0",
    "main_lincls.py": "-a test_resnet --size 16 -b 8 -j 0 --epochs 1",
    "main_semisup.py": "-a test_resnet --size 16 -b 8 -j 0 --epochs 1",
    "moco.average": "-b 8 -j 0",
    "moco.bench": "-a test_resnet --size 16 -b 8 -j 0 --moco-k 1024 --amp off --bench-images 8 --bench-steps 1",
    "moco.embed": "-a test_resnet --size 16 -b 8 -j 0 --split train --points 12",
    "moco.retrieval": "-a test_resnet --size 16 -b 8 -j 0",
    "benchmarks.speed.probe_heads": "-a test_resnet --size 16 -b 8 --heads 2 --steps 1",
    "benchmarks.speed.knn": "--bank 300 --queries 8 --dim 16 --k 5 --only 'ours, in parts'",
    "moco_v3": "--moco-mlp-dim 16",
    "--save-ckpt-freq": "--epochs 4",
    "--val-share": "--val-share 0.25",
    "--lr-find": "--lr-find-steps 10",
    "--few-shot": "--few-shot-way 2 --few-shot-shots 1 --few-shot-queries 2 --few-shot-episodes 3",
}
# Only parsed here, because other tests run them: exports in test_export.py, sweeps in test_sweep.py (here --dry-run).
EXPORTS_PARSED = ("torchvision", "detectron2", "safetensors", "onnx")


def commands(text: str = README) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def scripts() -> list[str]:
    return [c for c in commands() if not c.startswith("make")]


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
        "speed.contrastive_loss": [*HEAD.split()],
        "speed.training_step": [*STEP.split()],
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


def started(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The command's end. Upstream's commands, torchrun's and the benchmarks' get an interpreter of their own, as they
    do from a shell; the others' processes come from one that has imported torch."""
    if words[1].startswith("main_") and "--multiprocessing-distributed" not in words:
        return run_script(folder, ROOT / words[1], *words[2:])
    return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment(), check=False)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("command", scripts(), ids=lambda c: " ".join(c.split())[:60])
def test_a_command_of_the_readme_runs(command, image_folder, checkpoint, cifar_like, tmp_path):
    words = reduced(command, tmp_path, checkpoint, image_folder, cifar_like)
    done = started(words, tmp_path)
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


def export_or_parse(words: list[str]) -> int:
    return int(command_options.export_parser().parse_args(words).to not in EXPORTS_PARSED and export_door.main(words))


@pytest.fixture
def session(image_folder, tmp_path, monkeypatch, alone, restored, script):
    """A folder with DIR and a checkpoint in it, and a function that runs a page's command there, in this process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR").symlink_to(image_folder)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    encoder = build_encoder("test_resnet", 16, size=16)
    encoder(torch.rand(4, 3, 16, 16))  # BatchNorm statistics that never moved are a sign of damage
    save_pretrained(tmp_path / "checkpoint_0199.pth.tar", encoder, epoch=200)
    torch.set_num_threads(1)
    programs = {
        "main_pretrain.py": lambda words: distributed.launch(main_pretrain.worker, cli.parse_pretrain(words)),
        "main_lincls.py": lambda words: distributed.launch(main_lincls.worker, cli.parse_lincls(words)),
        "main_semisup.py": lambda words: distributed.launch(main_semisup.worker, cli.parse_semisup(words)),
        "moco.average": average_door.main,
        "moco.bench": bench_door.main,
        "moco.data": data_work.main,
        "moco.embed": embed_door.main,
        "moco.retrieval": retrieval_door.main,
        "benchmarks.speed.probe_heads": script("speed.probe_heads").main,
        "benchmarks.speed.knn": script("speed.knn").main,
        "moco.export": export_or_parse,
        "moco.describe": describe_door.main,
        "moco.sweep": lambda words: sweep.main(["--dry-run", *words]),
    }

    def run(command: str) -> int:
        _, *words = shlex.split(command)
        program, *words = words[1:] if words[0] == "-m" else words
        more = [word for name, small in SMALL.items() if name in (program, *words) for word in shlex.split(small)]
        queue = program == "main_pretrain.py" and not NO_QUEUE & {word.lower() for word in words}
        more += ["--moco-k", "1024"] if queue else []
        return programs[program]([*words, *more])

    return run


# What the evaluation page says that its commands write.
WRITTEN = """lr_find.csv lr_find.png lr_find.json result.json classes.csv knn.json few_shot.json
runs/lincls/checkpoint.pth.tar runs/lincls/model_best.pth.tar runs/lincls/result.json runs/lincls/lincls.jsonl
runs/choose/result.json runs/classes/confusion.csv runs/classes/confusion.png runs/semisup1/result.json
runs/semisup1/checkpoint_semisup.pth.tar runs/semisup10/result.json runs/digits_scratch/model_best_semisup.pth.tar
embedding/features.npz embedding/embedding.png embedding/embedding.html retrieval.json checkpoint_0199.timm.pth
checkpoint_0199.features.pt checkpoint_0199.features.json"""


@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_the_docs_is_a_session_that_runs(name, session, capsys):
    for command in commands(page(name)):
        assert session(command) == 0, f"{command}\n{capsys.readouterr().err[-2000:]}"
    if name == "evaluation":
        assert [path for path in WRITTEN.split() if not Path(path).exists()] == []


@pytest.mark.parametrize("name", [*PAGES, "experiments", "migrating", "published", "scaling"])
def test_links_of_the_docs_lead_somewhere(name):
    for file, _, part in re.findall(r"\]\((?!http)([^)#]*)(#([^)]+))?\)", page(name)):
        assert (ROOT / "docs" / file).exists(), file
        if part:
            text = (ROOT / "docs" / (file or f"{name}.md")).read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
            assert part in [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles], part


def entries() -> list[tuple[Path, str]]:
    """The folder of each line of README's tree, and its text; a line without a name goes on with the one above."""
    found, above = [], [ROOT]
    for line in README.split("## The tree")[1].split("```")[1].strip("\n").splitlines():
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
        assert (ROOT / link).exists(), link


PLACES = {  # what a reader looks for: the words of the tree, and the definition that is in the file they name
    "losses.py: SupCon": "def supcon",
    "loop.py: the training loop": "class Loop",
    "batchnorm.py: BatchNorm split": "def split_batchnorm",
    "by_pil.py: presets": "PRESETS",
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
