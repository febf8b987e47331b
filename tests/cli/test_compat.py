"""--compat: every row of projects.txt against the parsers, what a line comes to, and what is said without it."""

import re
import shlex

import pytest
from support import compat_pages

from moco import cli
from moco.cli import compat
from moco.cli.parser import end_lists, spelled, take_defaults, with_numbers_split
from moco.cli.projects import Option, Program, programs
from moco.errors import UserError

PARSE = {"pretrain": cli.parse_pretrain, "lincls": cli.parse_lincls, "semisup": cli.parse_semisup}
ALL = [pytest.param(program, id=compat_pages.title(program)) for program in programs()]


def read(program: Program, *words: str):
    """The parser with the project's defaults, and the words in our flags."""
    parser = compat_pages.PARSERS[program.main]()
    line = end_lists(parser, spelled(["--compat", program.project, *words]))
    return parser, compat.translated(parser, line)


def one(program: Program, words: list[str]):
    """The settings that words of ours name."""
    parser = compat_pages.PARSERS[program.main]()
    return parser.given(with_numbers_split(parser, words))


@pytest.mark.parametrize("program", ALL)
def test_every_default_of_a_row_is_the_setting_of_a_line_without_flags(program):
    parser, words = read(program)
    args, checked = vars(parser.parse_intermixed_args(words)), 0
    for row in program.options:
        for name, value in one(program, row.words).items():
            assert args[name] == value, row
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("program", ALL)
def test_every_spelling_sets_what_ours_sets(program):
    checked = 0
    for row in (row for row in program.options if row.spellings and row.here and not row.special):
        value = [] if row.switch else ["1" if row.default == "none" else word(row)]
        wanted = one(program, [row.here, *value])
        for spelling in row.theirs.split():
            more = ["--data_folder", "a"] * (row.here == "--val-data")
            parser, words = read(program, *more, spelling, *value)
            found = parser.given(words)
            assert {name: found[name] for name in wanted} == wanted, spelling
            assert set(found) - ({"train_folder"} if more else set()) == {"compat", *wanted}, spelling
            checked += 1
    assert checked >= 10 or program.project == "supcon-framework"


def word(row: Option) -> str:
    """A value that the option takes; of several numbers the first is enough."""
    return shlex.split(row.default)[0]


# Typed from the argument parsers of the projects: epochs, batch, rate, weight decay and milestones or their like.
PUBLISHED = {
    "supcontrast main_supcon.py pretrain": {
        "dataset": "cifar10", "epochs": 1000, "batch_size": 256, "lr": 0.05, "weight_decay": 1e-4, "workers": 16,
        "schedule": [700, 800, 900], "lr_decay_rate": 0.1, "save_every": 50, "moco_t": 0.07, "size": 32,
        "method": "supcon", "arch": "resnet50", "data": "./datasets/", "download": True, "amp": "off",
        "drop_last": False,
    },
    "supcontrast main_ce.py semisup": {
        "dataset": "cifar10", "epochs": 500, "batch_size": 256, "lr": 0.2, "weight_decay": 1e-4, "momentum": 0.9,
        "schedule": [350, 400, 450], "lr_decay_rate": 0.1, "data": "./datasets/", "arch": "resnet50",
    },
    "supcontrast main_linear.py lincls": {
        "dataset": "cifar10", "epochs": 100, "batch_size": 256, "lr": [0.1], "weight_decay": 0.0, "warm": None,
        "schedule": [60, 75, 90], "lr_decay_rate": 0.2, "data": "./datasets/",
    },
    "synco main_synco.py pretrain": {
        "epochs": 200, "batch_size": 256, "lr": 0.03, "moco_k": 65536, "moco_t": 0.07, "n1": 256, "n6": 64,
        "n_hard": 1024, "hard_start_epoch": 10, "method": "synco", "mask_same_image": False, "amp": "off",
    },
    "synco main_lincls.py lincls": {"epochs": 100, "batch_size": 256, "lr": [0.03], "schedule": [60, 80]},
    "synco main_semisup.py semisup": {
        "weights": "freeze", "epochs": 100, "batch_size": 256, "lr_backbone": 0.0, "lr_classifier": 0.3,
        "weight_decay": 1e-6, "train_percent": 100.0,
    },
    "mochi train_contrastive.py pretrain": {
        "steps": 25000, "warm_steps": 2500, "batch_size": 64, "lr": 2e-4, "warm_from": 2.5e-7, "min_lr": 2.5e-6,
        "clip_grad": 5.0, "arch": "timm/efficientnet_b2", "moco_k": 8192, "mochi": [32, 16, 16], "seed": 69420,
        "type_starts": ["mixup=5001steps", "interpolation=10001steps"], "data": "dataset", "save_dir": "out",
        "opt": "adamw", "weight_decay": 0.01, "save_steps": 1000, "print_freq": 500, "hard_start_epoch": 0,
    },
    "supcon-framework train.py pretrain": {
        "epochs": 100, "batch_size": 200, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "min_lr": 0.01, "cos": True,
        "moco_t": 0.1, "ema_epoch": 0.3, "amp": "fp16", "arch": "resnet18", "pretrained": "torchvision:IMAGENET1K_V1",
        "save_dir": "weights/supcon_first_stage_cifar10", "data": "data/cifar10", "dataset": "cifar10", "size": 224,
    },
    "supcon-framework train.py lincls": {
        "epochs": 20, "batch_size": 20, "lr": [0.01], "min_lr": 0.001, "label_smoothing": 0.01, "features": "cached",
        "pretrained": "weights/supcon_first_stage_cifar10/swa", "save_dir": "weights/supcon_second_stage_cifar10",
    },
    "supcon-framework train.py semisup": {
        "epochs": 20, "batch_size": 20, "lr": 0.01, "min_lr": 0.001, "smoothing": 0.01, "weights": "freeze",
        "ema_epoch": 0.3, "pretrained": "weights/supcon_first_stage_cifar10/swa",
    },
    "schane run_beit3_finetuning.py semisup": {
        "opt": "adamw", "opt_betas": [0.9, 0.999], "weight_decay": 0.05, "lr": 5e-4, "layer_decay": 0.9, "epochs": 20,
        "warmup_epochs": 5.0, "batch_size": 64, "drop_path": 0.1, "smoothing": 0.1, "reprob": 0.25,
    },
}  # fmt: skip


@pytest.mark.parametrize("program", ALL)
def test_the_published_defaults(program):
    wanted = PUBLISHED[compat_pages.title(program)]
    parser, words = read(program)
    args = vars(parser.parse_intermixed_args(words))
    assert {name: args[name] for name in wanted} == wanted


LINES = [
    ("pretrain", "--compat supcontrast --batch_size 1024 --learning_rate 0.5 --temp 0.1 --cosine"),
    ("pretrain", "--compat supcontrast --batch_size 512 --cosine --method SimCLR --dataset cifar100 --trial 5"),
    ("semisup", "--compat supcontrast --batch_size 1024 --learning_rate 0.8 --cosine --syncBN"),
    ("lincls", "--compat supcontrast --batch_size 512 --learning_rate 5 --ckpt model.pth"),
    (
        "lincls",
        "--batch_size_val 26 --ckpt m.pth --train_folder a --test_folder b --num_classes 10 --compat=supcontrast",
    ),
    ("pretrain", "--compat synco --mlp --moco-t 0.2 --aug-plus --cos --n1 8 DIR"),
    ("semisup", "DIR --compat synco --pretrained x.pth.tar"),
    ("pretrain", "--compat mochi -dd here -s 100 -bs 8 -st1h 0 -st2h 20 -a resnet18"),
    ("pretrain", "--compat supcon_framework --epochs 3"),
    ("lincls", "--compat supcon-framework --config_name=configs/train/train_supcon_resnet18_cifar100_stage2.yml"),
    ("semisup", "--compat SCHaNe --model beit3_base_patch16_224 --task imagenet --data_path d --log_dir x"),
]


@pytest.mark.parametrize(("main", "line"), LINES)
def test_the_line_that_is_told_means_the_same(main, line, capsys):
    """Typed without --compat, it gives the same settings; but for notes, and for what --auto may choose."""
    theirs = vars(PARSE[main](line.split()))
    told = re.search(rf"reads this as [^ ]+: moco {main} (.*)", capsys.readouterr().err)
    assert told is not None
    ours = vars(PARSE[main](shlex.split(told[1])))
    for settings in (theirs, ours):
        for name in ("compat", "notes", "left_open"):
            settings.pop(name, None)
    assert ours == theirs


@pytest.mark.parametrize(
    ("path", "name", "lines"), compat_pages.blocks(), ids=lambda value: str(value).partition("\n")[0]
)
def test_the_pages_have_these_tables(path, name, lines):
    """python tests/support/compat_pages.py writes them."""
    assert compat_pages.marked(name, lines) in path.read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------- several words at once


@pytest.mark.parametrize(
    ("line", "folder", "min_lr"),
    [
        ("--learning_rate 0.5 --cosine",
         "SupCon_cifar10_resnet50_lr_0.5_decay_0.0001_bsz_256_temp_0.07_trial_0_cosine", 5e-4),
        ("--batch_size 1024 --trial 7",
         "SupCon_cifar10_resnet50_lr_0.05_decay_0.0001_bsz_1024_temp_0.07_trial_7_warm", 0),
        ("--method SimCLR --cosine --lr_decay_rate 0.2 --temp 0.5",
         "SimCLR_cifar10_resnet50_lr_0.05_decay_0.0001_bsz_256_temp_0.5_trial_0_cosine", 4e-4),
    ],
)  # fmt: skip
def test_supcontrasts_folder_and_the_end_of_its_cosine(line, folder, min_lr):
    args = cli.parse_pretrain(["--compat", "supcontrast", *line.split()])
    assert args.save_dir == f"./save/SupCon/cifar10_models/{folder}"
    assert args.min_lr == pytest.approx(min_lr)


@pytest.mark.parametrize(
    ("line", "mochi", "starts"),
    [
        ("-nh 64", [64, 16, 16], ["mixup=5001steps", "interpolation=10001steps"]),
        ("-s1h 4 --start1_hard=7", [32, 4, 16], ["mixup=8steps", "interpolation=10001steps"]),
        ("-st1h 0", [32, 0, 16], ["interpolation=10001steps"]),
        ("--s2_hard 0 -st1h 1", [32, 16, 0], ["mixup=2steps"]),
        ("-st1h 0 -st2h 0", [32, 0, 0], []),
    ],
)
def test_mochis_three_numbers_and_two_starts(line, mochi, starts):
    program = next(row for row in programs() if row.project == "mochi")
    parser, words = read(program, *line.split())
    args = parser.parse_intermixed_args(words)
    assert (args.mochi, args.type_starts) == (mochi, starts)


@pytest.mark.parametrize(
    ("line", "steps", "warm_steps", "clip_grad"),
    [
        ("", 25000, 2500, 5.0),
        ("-s 5", 5, None, 5.0),
        ("--epochs 3", None, None, 5.0),
        ("-cg 0 --steps 30", 30, 3, None),
    ],
)
def test_mochis_length_and_clipping(line, steps, warm_steps, clip_grad):
    args = cli.parse_pretrain(["--compat", "mochi", *line.split()])
    assert (args.steps, args.warm_steps, args.clip_grad) == (steps, warm_steps, clip_grad)


def test_a_file_of_supcon_framework_is_read_and_what_is_typed_wins(tmp_path, capsys):
    path = tmp_path / "mine.yml"
    path.write_text(
        "model: {backbone: timm_resnet18, ckpt_pretrained: , num_classes: }\n"
        "train: {n_epochs: 7, amp: False, ema: False, logging_name: mine, stage: first, early: 3}\n"
        f"dataset: {tmp_path}\n"
        "dataloaders: {train_batch_size: 12, valid_batch_size: 3, num_workers: 2}\n"
        "optimizer: {name: AdamW, params: {lr: 0.003, weight_decay: 0.1}}\n"
        "scheduler: {name: ReduceLROnPlateau, params: {patience: 4}}\n"
        "criterion: {name: SupCon}\n"
    )
    line = ["--compat", "supcon-framework", "--config_name", str(path), "--epochs", "9"]
    args = cli.parse_pretrain(line)
    wanted = {"arch": "timm/resnet18", "epochs": 9, "amp": "off", "ema_epoch": None, "save_dir": "weights/mine",
              "lr": 0.003,
              "data": str(tmp_path), "dataset": None, "batch_size": 12, "workers": 2, "opt": "adamw", "cos": False,
              "weight_decay": 0.1, "plateau": 4, "moco_t": 0.07, "method": "supcon", "pretrained": ""}  # fmt: skip
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert f"{path}: train.early is passed over" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ what cannot be read


@pytest.mark.parametrize(
    ("main", "line", "told"),
    [
        ("semisup", "--compat mochi DIR", "its train_contrastive.py is `moco pretrain --compat mochi`."),
        ("pretrain", "--compat solo DIR", "argument --compat: invalid choice: 'solo'"),
        ("pretrain", "--compat supcontrast --dataset path",
         "main_supcon.py with images of a folder needs --data_folder"),
        ("pretrain", "--compat mochi -s", "-s needs a value behind it."),
        ("pretrain", "--compat mochi --start1_hard soon", "--start1_hard takes a whole number, not soon."),
        ("pretrain", "--compat supcon-framework --config_name none.yml", "--config_name none.yml: no such file"),
        ("pretrain", "--compat supcon-framework --config_name configs/train/train_supcon_resnet18_cifar10_stage2.yml",
         "is of the second stage: type `moco lincls --compat supcon-framework --config_name configs/train/train_"),
        ("lincls", "--compat supcon-framework --config_name configs/train/train_supcon_resnet18_cifar10_stage1.yml",
         "is of the first stage: type `moco pretrain --compat supcon-framework --config_name configs/train/train_"),
        ("pretrain", "--compat supcon-framework --config_name configs/train/swa_supcon_resnet18_cifar100_stage1.yml",
         "`moco average weights/supcon_first_stage_cifar100 --best 3 --out weights/supcon_first_stage_cifar100/swa`"),
        # without --compat: the line to type
        ("pretrain", "--dir_data here -b 8", "--dir-data is an option of train_contrastive.py (mochi): type `moco "
         "pretrain --compat mochi --dir-data here -b 8`"),
        ("pretrain", "-dd here -bs 8", "type `moco pretrain --compat mochi -dd here -bs 8`"),
        ("pretrain", "--config_name c.yml", "type `moco pretrain --compat supcon-framework --config-name c.yml`"),
        ("lincls", "--ckpt m.pth --batch_size_val 26 DIR",
         "type `moco lincls --compat supcontrast --ckpt m.pth --batch-size-val 26 DIR`"),
        ("pretrain", "--ckpt m.pth DIR",
         "--ckpt is an option of main_linear.py (supcontrast): type `moco lincls --compat supcontrast --ckpt m.pth D"),
        ("semisup", "--sentencepiece_model b.spm DIR",
         "type `moco semisup --compat schane --sentencepiece-model b.spm DIR`"),
        # the demo does not begin with flags of a training
        ("pretrain", "--batch_size 1024 --learning_rate 0.5 --temp 0.1 --cosine", "With the images of main_supcon.py "
         "(supcontrast): `moco pretrain --compat supcontrast "
         "--batch-size 1024 --learning-rate 0.5 --temp 0.1 --cosine`."),
    ],
)  # fmt: skip
def test_what_is_answered(main, line, told, capsys):
    with pytest.raises(SystemExit) as caught:
        PARSE[main](line.split())
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("line", ["--epochs 3", "--batch_size 1024", "--method SimCLR", "--cos", "-a resnet18 --mlp"])
def test_the_demo_begins_only_without_flags_of_a_training(line, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse_pretrain(line.split())
    told = capsys.readouterr().err
    assert (caught.value.code, told.count("\n")) == (2, 1)
    assert "is a flag of training, but no images are named: give DIR, or --dataset NAME" in told
    assert "--compat" not in told  # a line of no project


def test_a_file_of_defaults_cannot_ask_for_it(tmp_path):
    path = tmp_path / "c.yml"
    path.write_text("compat: synco\n")
    parser = cli.pretrain_parser()
    with pytest.raises(UserError, match=r"c\.yml: compat is typed and not written into a file; give --compat synco\."):
        take_defaults(parser, str(path))
