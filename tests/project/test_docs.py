"""README and docs/ are true: every block runs or is read by its reader, every flag, module and file they name is there.

A page is a session: its bash and python blocks run one after another in one folder and one process, flag for flag, with
the network, the sizes and the lengths reduced and names of images and checkpoints standing for small ones. What cannot
run here is in NOT_RUN, with what is checked in its place.
"""

import argparse
import contextlib
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, save_pretrained
from support import here, pages, programs

import main_lincls
import main_pretrain
import main_semisup
import moco
from moco import average, bench, describe, distributed, embed, export, negatives, neighbours, retrieval, run_folder
from moco.cli.parser import take_defaults
from moco.data import __main__ as data_work
from moco.data.augment.from_file import read_augmentation
from moco.data.sources import named
from moco.data.sources.base import ArraySource
from moco.errors import UserError
from moco.methods.registry import METHODS
from moco.models.encoder import build_encoder
from moco.report import __main__ as report
from moco.sweep import __main__ as sweep
from moco.sweep import spec

LANGUAGES = {"bash", "python", "yaml", "json", "text", "diff", "math"}  # test_contributing.py applies the diffs
# Records of what was measured, most of them for minutes to hours: their commands are parsed.
RECORDS = ("docs/experiments.md", "moco/kernels/README.md", "benchmarks/README.md")
# What stands for something to be filled in where a command is only parsed.
FILLED_IN = {"METHOD": "synco", "BEFORE": "a", "AFTER": "b"}

# What a program gets behind its own words, and behind a flag that it has: later words win, and its own all stay.
SMALL = {
    "pretrain": "-a test_resnet --size 16 -b 8 -j 0 --moco-dim 16 --amp off --knn-every 0",
    "lincls": "-a test_resnet --size 16 -b 8 -j 0 --epochs 1",
    "semisup": "-a test_resnet --size 16 -b 8 -j 0 --epochs 1 --amp off",
    "average": "-b 8 -j 0",
    "bench": "-a test_resnet --size 16 -b 8 -j 0 --moco-k 1024 --amp off --bench-images 8 --bench-steps 1",
    "embed": "-a test_resnet --size 16 -b 8 -j 0 --split train --points 12",
    "neighbours": "-a test_resnet --size 16 -b 8 -j 0 --k 2",
    "--class": "--class red",
    "retrieval": "-a test_resnet --size 16 -b 8 -j 0",
    "benchmarks.speed.checkpoints": "-a test_resnet --size 16 -b 8 --moco-k 64 --every 1 --rounds 1",
    "benchmarks.speed.contrastive_loss": "--sizes 4x256 --hard 16 --counts 4 4 4 2 2 2 --repeats 1 --no-memory "
    "--speed-side 64 --device cpu",
    "benchmarks.speed.loss_precision": "--queries 4 --rows 64 --hard 8",
    "benchmarks.speed.training_step": "-a test_resnet --size 16 -b 8 --moco-k 1100 --moco-dim 16 --amp off --rounds 2",
    "benchmarks.speed.probe_heads": "-a test_resnet --size 16 -b 8 --heads 2 --steps 1",
    "benchmarks.speed.knn": "--bank 300 --queries 8 --dim 16 --k 5 --only 'ours, in parts'",
    "moco_v3": "--moco-mlp-dim 16",
    "--save-ckpt-freq": "--epochs 4",
    "--warm-steps": "--warm-steps 2",
    "--val-share": "--val-share 0.25",
    "--lr-find": "--lr-find-steps 10",
    "--few-shot": "--few-shot-way 2 --few-shot-shots 1 --few-shot-queries 2 --few-shot-episodes 3",
}
SMALL["--eval-fewshot"] = SMALL["--few-shot"]
NO_QUEUE = {name for name, row in METHODS.items() if row.family != "queue"}  # --moco-k would give supcon one
SEVERAL = ("--multiprocessing-distributed", "--world-size", "--rank", "--dist-url", "--nproc")  # processes: here one
IMAGES = ("data", "train_folder", "val_data", "few_shot_data", "source", "folder")  # arguments that name images
CHECKPOINTS = ("pretrained", "checkpoint", "resume")  # arguments that name a checkpoint
EXPORTS_PARSED = ("torchvision", "detectron2", "safetensors", "onnx")  # test_export.py runs them


def benchmark(name: str) -> Callable[[list[str]], int]:
    """Its main, imported when it is run."""
    return lambda words: programs.main_of(name)(words)


RUN: dict[str, Callable] = {
    "pretrain": lambda words: distributed.launch(main_pretrain.worker, programs.MAINS["pretrain"](words)),
    "lincls": lambda words: distributed.launch(main_lincls.worker, programs.MAINS["lincls"](words)),
    "semisup": lambda words: distributed.launch(main_semisup.worker, programs.MAINS["semisup"](words)),
    "average": average.main,
    "bench": bench.main,
    "data": data_work.main,
    "describe": describe.main,
    "embed": embed.main,
    "export": lambda words: programs.parse("export", words).to not in EXPORTS_PARSED and export.main(words),
    "negatives": negatives.main,
    "neighbours": neighbours.main,
    "report": report.main,
    "retrieval": retrieval.main,
    "sweep": lambda words: sweep.main(["--dry-run", *words]),  # test_sweep.py runs trials
    **{f"benchmarks.speed.{name}": benchmark(f"benchmarks.speed.{name}") for name in (
        "checkpoints", "contrastive_loss", "knn", "loss_precision", "probe_heads", "traffic", "training_step",
    )},
    "benchmarks.speed.kernel_bytes": lambda words: programs.main_of("benchmarks.speed.kernel_bytes")(),
}  # fmt: skip


# ------------------------------------------------------------------------------------------- what cannot run here


def makes(words: list[str]) -> None:
    for target in (word for word in words[1:] if "=" not in word):
        assert f"\n{target}:" in pages.read("Makefile"), target


def installs(words: list[str]) -> None:
    """Extras, files and the version that pip is told of are the project's."""
    project = pages.project()
    for word in words:
        name, _, extras = word.removesuffix("]").partition("[")
        for extra in filter(None, extras.split(",")):
            assert extra in project["optional-dependencies"], word
        if name.endswith(".whl"):
            assert name.endswith(f"{project['name'].replace('-', '_')}-{moco.__version__}-py3-none-any.whl"), word
        if name.endswith((".txt", ".lock")):
            assert (ROOT / name).is_file(), word


def submits(words: list[str]) -> None:
    """The start file is a script of bash, and the program in it takes its flags."""
    (file,) = (word for word in words[1:] if word.endswith((".sh", ".sbatch")))
    check_script((ROOT / file).read_text(encoding="utf-8"))


def check_script(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    found = [words for words in pages.commands(text) if "python" in words or words[0] == "torchrun"]
    assert found, text
    for words in found:
        parsed(words)


def launches(words: list[str]) -> None:
    """The program behind a launcher takes its flags, and the launcher its own."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words[1:])
        module = ["-m"] * args.module
        parsed(["python", *module, args.training_script, *args.training_script_args])
    else:
        parsed(words[words.index("python") :])


def finds(words: list[str]) -> None:
    """`python -m pytest FILES`: they are there."""
    for word in words[3:]:
        assert word.startswith("-") or "/" not in word or (ROOT / word.partition("::")[0]).exists(), word


def nothing(words: list[str]) -> None:
    """There is nothing to check."""


PARSED = "minutes to hours of work, whose parts tests/benchmarks and tests/detection run: parsed"
NOT_RUN: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "make": ("it runs the whole suite, or what other tests run: the target is in the Makefile", makes),
    "pip": ("no network: extras, files and version are the project's", installs),
    "python -m pip": ("no network: extras, files and version are the project's", installs),
    "python -m venv": ("an environment that nothing can be installed into", nothing),
    "git": ("no network", nothing),
    "sbatch": ("no scheduler: the file is read by bash, its program's words by its parser", submits),
    "qsub": ("no scheduler: the file is read by bash, its program's words by its parser", submits),
    "bash": ("several nodes: the file is read by bash, its program's words by its parser", submits),
    "srun": ("no scheduler: the program's words are parsed", launches),
    "mpirun": ("no MPI: the program's words are parsed", launches),
    "torchrun": ("several processes, which test_readme.py and tests/distributed start: parsed", launches),
    "python -m pytest": ("tests inside a test: the files are there", finds),
    "rm": ("a clone's build folder", nothing),
    "cd": ("a session stays in its folder", nothing),
    "source": ("an environment of a shell", nothing),
    "demo": ("test_demo.py runs it: parsed", nothing),
    "detection": (PARSED, nothing),
    "detection.train_net": ("detectron2's own flags, on GPUs", nothing),
    "detection.convert-pretrain-to-detectron2": ("test_detection_convert.py runs it", nothing),
    **{f"benchmarks.{name}": (PARSED, nothing) for name in (
        "gpu", "accuracy.cifar10_gpu", "accuracy.cifar10_methods", "accuracy.fast_paths",
        "accuracy.supervised_methods", "accuracy.time_to_accuracy", "accuracy.trajectories", "speed.input_path",
        "speed.kernel_resources", "speed.step_operators", "speed.whole_step",
    )},
}  # fmt: skip


def not_run(words: list[str]) -> str:
    """The row of NOT_RUN that a command is of; empty where it has none."""
    program = programs.started(words)
    names = ([program[0]] if program else []) + [" ".join(words[:3]), words[0]]
    return next((name for name in names if name in NOT_RUN), "")


def parsed(words: list[str]) -> argparse.Namespace | None:
    """What a command's own parser makes of it; that of a row of NOT_RUN is checked as it says there."""
    if row := not_run(words):
        NOT_RUN[row][1](words)
    program = programs.started([FILLED_IN.get(word, word) for word in words])
    if program is None or program[0].startswith("detection."):
        assert row, f"test_docs.py does not know how to run or check {words[0]}"
        return None
    try:
        return programs.parse(*program)
    except SystemExit as end:
        raise AssertionError(f"{' '.join(words)} is refused, see standard error") from end


# --------------------------------------------------------------------------------------------------------- sessions


def check_yaml(text: str) -> None:
    """A sweep's file, one of --config that a main takes, or one of --aug, which is there for the page's commands."""
    Path("block.yml").write_text(text)
    if "preset" in yaml.safe_load(text):
        read_augmentation("block.yml")
        Path("block.yml").rename("mine.yml")
        return
    if "main" in yaml.safe_load(text):
        spec.read_spec("block.yml", ["DIR", "--val-share", "0.1"])
        return
    refusals = []
    for name in programs.MAINS:
        try:
            return take_defaults(programs.parser_of(name), "block.yml")
        except (UserError, SystemExit) as refusal:
            refusals.append(f"{name}: {refusal}")
    raise AssertionError("\n".join(refusals))


class Session:
    """A folder in which a page's blocks run one after another."""

    def __init__(self, folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch):
        self.images, self.monkeypatch = images, monkeypatch
        self.names: dict[str, object] = {"__name__": "__main__"}
        here.run_here(monkeypatch, here.SMALL)  # moco.pretrain and its like
        monkeypatch.chdir(folder)
        Path("my_images").symlink_to(images)
        for name in ("configs", "docs", "detection"):
            Path(name).symlink_to(ROOT / name)
        encoder = build_encoder("test_resnet", 16, size=16)
        encoder(torch.rand(4, 3, 16, 16))  # BatchNorm statistics that never moved are a sign of damage
        self.checkpoint = save_pretrained(folder / "checkpoint_0199.pth.tar", encoder, epoch=200)

    def run(self, block: pages.Block) -> None:
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), self.names)
        elif block.language == "bash":
            for words in pages.commands(block.text):
                self.command(words)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            check_yaml(block.text)

    def command(self, words: list[str]) -> None:
        """Run one, or check it as NOT_RUN says."""
        while re.match("[A-Z_]+=", words[0]):
            name, _, value = words[0].partition("=")
            self.monkeypatch.setenv(name, value)
            words = words[1:]
        if not_run(words):
            parsed(words)
            return
        program = programs.started(words)
        assert program, f"test_docs.py does not know how to run or check {words[0]}"
        name, words = self.at_hand(*program)
        assert not RUN[name]([*words, *small(name, words)]), words

    def record(self, words: list[str]) -> None:
        """Parse what was typed for a measurement; run it where it is a benchmark that has small sizes."""
        program = programs.started(words)
        parsed(words)
        if program and program[0].startswith("benchmarks") and program[0] in RUN:
            self.command(words)

    def at_hand(self, name: str, words: list[str]) -> tuple[str, list[str]]:
        """The command with its images and checkpoints there: links to small ones, and an image folder in the place of
        a data set that would be fetched."""
        words = without(
            words, "--download", "--multiprocessing-distributed", "--world-size", "--rank", "--dist-url", "--nproc"
        )
        args = programs.parse(name, words)
        if getattr(args, "dataset", None) not in (None, "folder", "mnist5k"):
            words += ["--dataset", "folder", *([args.data] if "--compat" in words and args.data not in words else [])]
        for dest in IMAGES:
            self.link(getattr(args, dest, None), self.split)
        for dest in CHECKPOINTS:
            self.link(getattr(args, dest, None), self.newest)
        for picture in getattr(args, "images", []):
            self.link(picture, lambda path: next(self.images.rglob("*.png")))
        return name, words

    def link(self, name: object, target: Callable[[Path], Path]) -> None:
        if isinstance(name, str) and name not in ("", "auto") and ":" not in name and not (path := Path(name)).exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target(path).resolve())

    def split(self, path: Path) -> Path:
        """What stands for a folder of images of this name."""
        parts = {"train": "train", "val": "val", "test": "val", "novel": "val"}
        return self.images / parts.get(path.name, "")

    def newest(self, path: Path) -> Path:
        """What stands for a checkpoint of this name: the newest that a shorter run left there."""
        found = run_folder.newest(str(path.parent)) if path.parent != Path() and path.parent.is_dir() else None
        return Path(found) if found else self.checkpoint


def without(words: list[str], *flags: str) -> list[str]:
    """The words without these flags and their values, each at most one."""
    alone = ("--download", "--multiprocessing-distributed")
    gone = {i + j for i, word in enumerate(words) if word in flags for j in range(1 + (word not in alone))}
    return [word for i, word in enumerate(words) if i not in gone]


def small(name: str, words: list[str]) -> list[str]:
    """What a command gets behind its own words."""
    more = " ".join(flags for of, flags in SMALL.items() if of in (name, *words))
    if name in programs.MAINS:
        args = programs.parse(name, words)
        more += " -a resnet18" * (args.stem == "cifar")  # test_resnet has no stem to make small
        more += " --overwrite" * (name != "pretrain" and args.save_dir == "./")
        more += " --warm-epochs 1 --epochs 2" * bool(args.warm)
        more += " --warmup-epochs 0.5" * (name == "semisup" and bool(args.warmup_epochs))
    if name == "pretrain":
        more += " --rise-epochs 1" * bool(args.rise)
        more += " --bn-splits 4" * bool(args.bn_splits)
        more += " --save-dir runs/unnamed --overwrite" * (args.save_dir == "./")  # beside which its checkpoint lies
        no_queue = "--compat" in words and args.method in NO_QUEUE
        more += " --moco-k 1024" * (not no_queue and not NO_QUEUE & {word.lower() for word in words})
        more += " --hard-start-epoch 0" * (args.method not in NO_QUEUE and args.hard_start_epoch > 1)
        more += " --epochs 2" * (not args.steps and args.epochs > 5) + " --steps 4" * ((args.steps or 0) > 4)
    return shlex.split(more)


def few_digits(directory: str | None, download: bool, channels: int | None):
    """In the place of the 5,000 built-in digits: 80 to train on and 20 held out."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 28, 28), dtype=np.uint8)
    labels = np.arange(100) % 10
    train, test = (
        ArraySource("mnist5k", pixels[rows], channels, [*"0123456789"], labels[rows], rows)
        for rows in (np.arange(80), np.arange(80, 100))
    )
    return train, train, test


@pytest.fixture
def session(image_folder, tmp_path, monkeypatch, alone, restored) -> Session:
    torch.set_num_threads(1)
    monkeypatch.setattr(named, "mnist5k", few_digits)
    return Session(tmp_path, image_folder, monkeypatch)


# What a page says that its commands write.
WRITTEN = {
    "docs/evaluation.md": """lr_find.csv lr_find.png lr_find.json result.json classes.csv knn.json few_shot.json
        runs/lincls/checkpoint.pth.tar runs/lincls/model_best.pth.tar runs/lincls/result.json runs/lincls/lincls.jsonl
        runs/choose/result.json runs/classes/confusion.csv runs/classes/confusion.png runs/semisup1/result.json
        runs/semisup1/checkpoint_semisup.pth.tar runs/semisup10/result.json
        runs/digits_scratch/model_best_semisup.pth.tar embedding/features.npz embedding/embedding.png
        embedding/embedding.html retrieval.json checkpoint_0199.timm.pth checkpoint_0199.features.pt
        checkpoint_0199.features.json"""
}


@pytest.mark.parametrize("page", pages.PAGES)
def test_a_page_is_a_session_that_runs(page, session, capsys):
    before = output = ""
    for block in pages.blocks(page):
        with told(block, capsys):
            if block.language == "text" and before == "python":
                assert block.text in output  # is what the block above printed
            before = block.language
            if page in RECORDS and block.language == "bash":
                for words in pages.commands(block.text):
                    session.record([word for word in words if not re.match("[A-Z_]+=", word)])
            else:
                session.run(block)
                output = capsys.readouterr().out
    assert [path for path in WRITTEN.get(page, "").split() if not Path(path).exists()] == []


@contextlib.contextmanager
def told(block: pages.Block, capsys) -> Iterator[None]:
    """What goes wrong is said with its place."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{block}: {error}\n{capsys.readouterr().err[-2000:]}") from error


# ------------------------------------------------------------------------------------------------ what pages name


@pytest.mark.parametrize("page", pages.PAGES)
def test_blocks_are_fenced_and_say_their_language(page):
    assert [str(block) for block in pages.blocks(page) if block.language not in LANGUAGES] == []
    lines = ["", *pages.prose(page).splitlines()]
    assert [line for line in lines if line.startswith(("```", "~~~"))] == []
    indented = [(i, lines[i]) for i in range(1, len(lines)) if re.match(r" {4}|\t", lines[i]) and not lines[i - 1]]
    assert indented == [], "an indented block is not tested: fence it and say ```bash, ```python, ```yaml or ```text"


# Flags of other programs than ours that a page names.
OF_OTHERS = {
    "--extra-index-url", "--index-url", "--no-build-isolation", "--no-deps", "--upgrade",  # pip
    "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--standalone",  # torchrun
    "--durations",  # pytest
    "--start1_hard", "--start2_hard",  # the public MoCHi's, in a sentence
    "--config_name",  # SupCon-Framework's, which --compat reads
    "--loader", "--n7",  # which data.md says is not there, and which CONTRIBUTING.md's diff adds
    "--config-file", "--eval-only", "--num-gpus", "--no-scaling", "--dist-url",  # detection/train_net.py: detectron2's
}  # fmt: skip
FILES_OF_OTHERS = {
    "benchmarks/imagenet/resnet50/mocov2.py", "docs/source/getting_started/benchmarks.rst",  # lightly's
    *(f"configs/train/train_supcon_resnet18_cifar10_stage{stage}.yml" for stage in (1, 2)),  # SupCon-Framework's
}  # fmt: skip
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every long flag of every program, as it is spelled with hyphens."""
    found: set[str] = set()
    modules = {f"benchmarks.{path.parent.name}.{path.stem}" for path in (ROOT / "benchmarks").glob("*/[a-z]*.py")}
    for name in [*programs.NAMES, "benchmarks.gpu", *sorted(modules & set(NOT_RUN) | modules & set(RUN))]:
        found |= set() if name in programs.NO_FLAGS else programs.long_flags(programs.parser_of(name))
    return found | OF_OTHERS


@pytest.mark.parametrize("page", pages.PAGES)
def test_flags_that_a_page_names_are_there(page, flags):
    """In `code`, outside blocks; of a table with the head "theirs" its first column is another project's."""
    missing, foreign = [], False
    for number, line in enumerate(pages.prose(page).splitlines(), 1):
        foreign = line.startswith("|") and (foreign or line.startswith("| theirs"))
        if foreign:
            line = line.split("|", 2)[2]
        for flag in FLAG.findall(" ".join(pages.spans(line))):
            if flag not in flags and flag.replace("_", "-") not in flags:
                missing.append((number, flag))
    assert missing == []


@pytest.mark.parametrize("page", pages.PAGES)
def test_modules_targets_and_files_that_a_page_names_are_there(page):
    prose = pages.prose(page)
    missing = []
    for span in pages.spans(prose):
        for module in re.findall(r"python -m ((?:moco|benchmarks|detection|tests)[\w.]*)", span):
            module = re.sub("^moco_detection", "detection", module.removeprefix("moco.mains."))  # as a wheel has them
            place = ROOT / module.removesuffix(".NAME").removesuffix(".").replace(".", "/")
            if not (place.with_suffix(".py").is_file() or place.is_dir()):
                missing.append(span)
        if span.startswith("moco ") and span.split()[1] not in {*programs.NAMES, "NAME", "COMMAND"}:
            missing.append(span)
        if re.match(r"make [a-z-]+", span) and f"\n{span.split()[1]}:" not in pages.read("Makefile"):
            missing.append(span)
    for path in re.findall(r"(?<![\w/.-])((?:moco|tests|docs|configs|benchmarks|detection)/[\w/.-]*\.\w+)", prose):
        if not (ROOT / path.rstrip(".")).exists() and path not in FILES_OF_OTHERS:
            missing.append(path)
    assert missing == []


@pytest.mark.parametrize("page", pages.PAGES)
def test_links_of_a_page_lead_somewhere(page):
    """Here, as in the repository; test_site.py follows them in the site, with their anchors."""
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", pages.prose(page))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
