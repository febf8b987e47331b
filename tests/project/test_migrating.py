"""docs/migrating.md and the pages it leads to: their commands parse, and the flags that they say are here are."""

import importlib
import re

import pytest
import torch
from conftest import ROOT, load, records
from PIL import Image
from support.layouts import THEIRS

from moco import cli, distributed
from moco.cli import commands as command_options
from moco.cli.methods import negatives_config
from moco.cli.semisup import semisup_schedule
from moco.methods import negatives
from moco.methods.registry import METHODS

INDEX = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "migrating").glob("*.md")}
TEXT = "\n".join([INDEX, *(PAGES[name] for name in sorted(PAGES))])
PARSE = {
    "main_pretrain.py": cli.parse_pretrain, "main_lincls.py": cli.parse_lincls,
    "main_semisup.py": cli.parse_semisup,
}  # fmt: skip


def commands(text: str) -> list[list[str]]:
    return [line.split()[1:] for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]


def test_every_page_is_in_the_index_and_has_a_whole_command():
    assert sorted(re.findall(r"\(migrating/(\w+)\.md\)", INDEX)) == sorted(PAGES)
    assert [name for name, text in PAGES.items() if name != "moco" and not commands(text)] == []


def test_the_commands_parse():
    found = commands(TEXT)
    assert len(found) == 29
    for script, *words in found:
        if script != "-m":
            PARSE[script](words)


def test_supcontrasts_linear_line_means_the_same():
    line = "--batch_size 512 --learning_rate 5 --ckpt model.pth --dataset cifar10 --model resnet18 DIR"
    args = cli.parse_lincls(line.split())
    assert (args.pretrained, args.batch_size, args.lrs, args.arch) == ("model.pth", 512, [5.0], "resnet18")


def test_supcontrasts_linear_line_warms_up():
    line = "--batch_size 512 --learning_rate 5 --ckpt model.pth --cosine --warm --save_freq 50 --num_workers 8 DIR"
    args = cli.parse_lincls([*line.split(), "--lr_decay_epochs", "60,75,90", "--lr_decay_rate", "0.2"])
    assert (args.warm, args.warm_epochs, args.warm_from, args.cos, args.workers) == (True, 10, 0.01, True, 8)
    assert (args.schedule, args.lr_decay_rate) == ([60, 75, 90], 0.2)
    assert not cli.parse_lincls(["-b", "512", "DIR"]).warm  # as theirs, which warms up only when asked to


def test_supcontrasts_cross_entropy_line_means_the_same():
    line = "--batch_size 1024 --learning_rate 0.8 --cosine --syncBN --dataset cifar10 --model resnet18 --epochs 500"
    more = "--weight_decay 1e-4 --momentum 0.8 --trial 5 --size 32 --num_workers 3 --save_freq 50 --print_freq 7"
    pixels = ["--mean", "(0.4914, 0.4822, 0.4465)", "--std=(0.2675,0.2565, 0.2761)"]
    args = cli.parse_semisup([*line.split(), *more.split(), *pixels, "--data_folder", "DIR"])
    assert (args.lr_backbone, args.lr_classifier, args.sync_bn, args.warm) == (0.8, 0.8, True, True)
    assert (args.dataset, args.data, args.arch, args.size, args.workers) == ("cifar10", "DIR", "resnet18", 32, 3)
    assert (args.weight_decay, args.momentum, args.save_dir, args.print_freq) == (1e-4, 0.8, "./trial_5", 7)
    assert (args.mean, args.std) == ([0.4914, 0.4822, 0.4465], [0.2675, 0.2565, 0.2761])
    plan = semisup_schedule(args, 500)
    assert (plan.cosine, plan.warm_epochs, plan.warm_from, plan.keep_every) == (True, 10, 0.01, 50)


@pytest.mark.parametrize(
    ("words", "milestones", "warm"),
    [
        ("", None, 0),
        ("--learning_rate 0.2", None, 0),
        ("--learning_rate 0.2 --lr_decay_epochs 3,4", [3, 4], 10),
        ("--learning_rate 0.2 --lr_decay_epochs 3,4 --cosine", None, 10),
        ("--learning_rate 0.2 --cosine --batch_size 256", None, 0),
        ("--learning_rate 0.2 --cosine --batch_size 256 --warm", None, 10),
        ("--learning_rate 0.2 --cosine --no-warm", None, 0),
        ("--learning_rate 0.2 --cosine --epochs 10", None, 0),
        ("--learning_rate 0.2 --cosine --pretrained FILE", None, 0),
        ("--schedule 5 6 --batch_size 1024", [5, 6], 0),
    ],
)
def test_main_ces_schedule(words, milestones, warm):
    plan = semisup_schedule(cli.parse_semisup(["DIR", *words.split()]), 30)
    assert (plan.cosine, plan.milestones, plan.warm_epochs) == (milestones is None, tuple(milestones or ()), warm)


def test_flags_that_are_here_exist():
    parsers = (cli.pretrain_parser, cli.lincls_parser, cli.semisup_parser, command_options.average_parser)
    known = {word for make in parsers for action in make()._actions for word in action.option_strings}
    lines = [line for line in TEXT.splitlines() if line.startswith(("| `", "| SynCo"))]
    rows = [re.split(r"(?<!\\)\|", line)[1:3] for line in lines]
    assert len(rows) > 130
    for theirs, here in rows:
        here = re.sub(r"(--compat) .*", r"\1", here)  # behind it are the other project's words
        flags = re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", here + (theirs if here.strip().startswith("same") else ""))
        missing = [flag for flag in flags if flag not in known and flag.replace("_", "-") not in known | {"-m"}]
        assert missing == [], theirs


@pytest.mark.parametrize("name", ["barlow_twins", "lightly", "moco_v3", "solo_learn"])
def test_their_files_are_read_by_the_pages_commands(name, tmp_path, image_folder, monkeypatch, alone, restored, capsys):
    """A file in the project's layout in the place of the checkpoint: the first of its evaluations runs to its end."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.save(THEIRS[name]()[0], "checkpoint_0199.pth.tar")
    script, *words = next(c for c in commands(PAGES[name]) if c[0] != "main_pretrain.py")
    words = [str(image_folder) if word == "DIR" else word for word in words]
    args = PARSE[script]([*words, *["--size", "16", "-b", "8", "-j", "0", "--epochs", "1", "--save-dir", "here"]])
    worker = importlib.import_module(script.removesuffix(".py")).worker
    assert distributed.launch(worker, args) == 0
    assert list(tmp_path.glob("here/*.json"))
    assert "read 12" in capsys.readouterr().out  # all 120 to 122 tensors of a ResNet-18


def public_mochis_types(step: int, counts: tuple[int, int], starts: tuple[int, int]) -> list[bool]:
    """Its rule, written anew, with steps from 0: a type needs a count and a start above 0, and the step to be above."""
    return [count > 0 and start > 0 and step > start for count, start in zip(counts, starts, strict=True)]


@pytest.mark.parametrize("starts", [(10, 20), (20, 10), (1, 2), (0, 3), (3, 0), (0, 0)])
def test_the_public_mochis_starts_by_the_tables_mapping(starts):
    """At every step both draw the same types: N is (N + 1) steps, and 0 is the count 0."""
    assert "`--type-starts mixup=Msteps interpolation=Msteps` with M = N + 1, and `--hard-start-epoch 0`" in TEXT
    counts = [4 if start else 0 for start in starts]
    kinds = ("mixup", "interpolation")
    mapped = [f"{kind}={start + 1}steps" for kind, start in zip(kinds, starts, strict=True) if start]
    words = ["--mochi", "32", *map(str, counts), "--hard-start-epoch", "0", "--type-starts", *mapped]
    args = cli.parse_pretrain(["DIR", *words])
    config = negatives_config(args)
    recipe = negatives.starting_at(METHODS["mochi"].hooks.recipe(config.recipe), config.kind_epochs, config.kind_steps)
    for step in range(25):
        drawn = [row.kind for row in negatives.active(recipe, 0, args.hard_start_epoch, None, step)]
        assert [kind in drawn for kind in kinds] == public_mochis_types(step, (4, 4), starts), step


SMALL = "-a timm/test_resnet --size 16 -b 8 -j 0 --moco-k 40 --steps 6 --warm-steps 3 --warm-from 1e-5 -p 1 --amp off "
SMALL += "--knn-every 0 --seed 0"


def test_the_public_mochis_options_work_together_in_a_run(tmp_path, in_process, monkeypatch, capsys):
    """Its line on Caltech-256: timm's network, AdamW, cosine by step, clipping, a start of each type, same image."""
    folder = tmp_path / "caltech256" / "256_ObjectCategories"
    for number, category in enumerate(("001.ak47", "002.flag"), 1):
        (folder / category).mkdir(parents=True)
        for i in range(1, 11):
            Image.new("RGB", (24, 20), (20 * i, 0, 90 * number)).save(folder / category / f"{number:03d}_{i:04d}.jpg")
    (line,) = [line for line in TEXT.splitlines() if "--dataset caltech256" in line and line.startswith("python ")]
    words = [re.sub("0001steps", "steps", word) for word in line.split()[2:-1] if word != "--download"]
    drawn, original = [], negatives.draw

    def spy(rows, n, *others):
        drawn.append({row.kind: row.count for row in rows})
        return original(rows, n, *others)

    monkeypatch.setattr(negatives, "draw", spy)
    assert in_process(*words, *SMALL.split(), "--save-dir", tmp_path / "run", tmp_path) == 0
    both = {"mixup": 16, "interpolation": 16}
    assert drawn == [{}, {"mixup": 16}, both, both, both, both]
    found = records(tmp_path / "run")
    rates = [record["lr"] for record in found]
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)
    assert len(set(rates)) == 6
    assert "queue rows of the same image are left out" in capsys.readouterr().out
    state = load(tmp_path / "run")
    assert state["arch"] == "timm/test_resnet"
    assert {"exp_avg", "exp_avg_sq"} <= set(state["optimizer"]["state"][0])
    assert "module.encoder_q.fc.2.weight" in state["state_dict"]
