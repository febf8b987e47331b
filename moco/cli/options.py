"""Every flag of the three mains: upstream's and SynCo's spelling, defaults and meaning, and ours beside them.

No torch here: a wrong flag is answered before a second of imports. How words are read is in moco/cli/parser.py, the
flags of the commands ``python -m moco.NAME`` are in moco/cli/commands.py.
"""

from __future__ import annotations

import argparse
import math
import os
from functools import partial
from typing import Any

from moco.cli.parser import Parser, at_least, given, parse, positive, take_defaults, with_config
from moco.config import InBatchConfig, MoCHiConfig, MoCoConfig, MoCoV3Config, NegativesConfig, SynCoConfig
from moco.data_registry import DATASETS, dataset_of
from moco.errors import UserError
from moco.methods.registry import ALIASES, FAMILIES, METHODS
from moco.resources import RECIPES

SYNCO_COUNTS = {"n1": 256, "n2": 256, "n3": 256, "n4": 64, "n5": 64, "n6": 64}  # SynCo's defaults
DECAY = 0.1  # of a rate at a milestone
SHORTEST_TUNING = 30  # epochs of main_semisup.py without --epochs, at least
TUNING_LOSSES = ("ce", "supcon", "simclr", "schane")
KINDS = ("mixup", "interpolation", "extrapolation", "noise", "perturbation", "adversarial")
SYNCO_KINDS = ("interpolation", "extrapolation", "mixup", "noise", "perturbation", "adversarial")  # of n1 .. n6
DEMO_CONFIG = str(RECIPES / "demo.yml")


def parse_pretrain(argv: list[str] | None = None, any_demo: bool = False) -> argparse.Namespace:
    """The flags of main_pretrain.py, checked and with every derived choice that needs no data made.

    ``any_demo``: without DIR any flag goes with the demo's images, where nothing is trained.
    """
    return parse(pretrain_parser(), argv, partial(_finish_pretrain, any_demo=any_demo))


def parse_lincls(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of main_lincls.py."""
    return parse(lincls_parser(), argv, _finish_lincls)


def parse_semisup(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of main_semisup.py."""
    return parse(semisup_parser(), argv, _finish_semisup)


# --------------------------------------------------------------------------------------------------- parsers


def pretrain_parser() -> Parser:
    """The parser of main_pretrain.py; without DIR, --dataset and a training's flags it runs the built-in demo."""
    p = Parser(
        prog="main_pretrain.py",
        allow_abbrev=False,
        description="Pretrain an image encoder with a momentum encoder, a queue and synthetic hard negatives "
        "(MoCo, MoCHi, SynCo, SupCon with a queue), or by the other images of its batch (SimCLR, SupCon, HCL, DCL). "
        "Without DIR, --dataset and flags of a training: the built-in demo on 5,000 digits.",
    )
    add_data(p)
    _add_training(p, epochs=200, lr=0.03, schedule=[120, 160], wd=1e-4)
    add_launch(p)
    _add_moco(p)
    _add_batch(p)
    _add_negatives(p)
    _add_step(p)
    _add_average(p)
    _add_run(p)
    return p


def lincls_parser() -> Parser:
    """The parser of main_lincls.py."""
    p = Parser(
        prog="main_lincls.py",
        allow_abbrev=False,
        description="Train a linear classifier on frozen features (MoCo's protocol), or evaluate them by k-NN.",
    )
    add_data(p, of_file=True)
    _add_training(p, epochs=100, lr=[30.0], schedule=[60, 80], wd=0.0)
    add_launch(p)
    add = p.add_argument
    add("-e", "--evaluate", action="store_true", help="evaluate on the validation set and stop")
    add("--pretrained", "--ckpt", default="", metavar="PATH", dest="pretrained", help="checkpoint of ours or of nine "
        "other projects; torchvision:NAME for its published weights")  # fmt: skip
    add("--knn", action="store_true", help="k-NN accuracy of the frozen features instead of a linear classifier")
    _add_optimizer(p)
    add("--save-dir", default="./", metavar="DIR", help="where checkpoint.pth.tar and the log go (default ./)")
    add("--overwrite", action="store_true", help="start afresh in a folder that holds another run")
    add("--max-minutes", default=None, type=float, metavar="M", help="save and stop (exit code 0) after M minutes")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="arithmetic of the frozen encoder (default: off)")
    add("--features", choices=("views", "cached"), default="views", help="views: augmented anew every epoch, the "
        "published protocol; cached: computed once, without augmentation, then epochs cost seconds")  # fmt: skip
    add("--val-share", default=0.0, type=float, metavar="X", help="evaluate on this share of every class's training "
        "images, held out, and leave the validation images alone: to choose settings by (default: 0)")  # fmt: skip
    _add_classifier(p)
    _add_knn(p)
    _add_few_shot(p)
    return p


def semisup_parser() -> Parser:
    """The parser of main_semisup.py: the released SynCo's flags and Barlow Twins'."""
    p = Parser(
        prog="main_semisup.py",
        allow_abbrev=False,
        description="Fine-tune a pretrained encoder and a linear classifier on a share of the labels.",
    )
    add_data(p, of_file=True)
    _add_subset(p)
    _add_tuning(p)
    _add_objective(p)
    _add_recipe(p)
    _add_few_shot(p)
    add_launch(p)
    return p


def _add_subset(p: Parser) -> None:
    add = p.add_argument
    add("--train-percent", default=None, type=float, metavar="P", help="train on P percent of the labelled images "
        "(default: 100): of ImageNet at 1 and 10 SimCLR's lists, fetched once, else a class-balanced draw")  # fmt: skip
    add("--train-files", default="", metavar="PATH", help="train on the images named in this file, one a line "
        "(n01440764_18.JPEG, or FOLDER/NAME); balanced: a draw, also of ImageNet at 1 and 10 percent")  # fmt: skip
    add("--subset-seed", default=0, type=int, metavar="N", help="of the draw and of the validation part (default: 0); "
        "not --seed, so that runs with several seeds train on the same images")  # fmt: skip
    add("--val-share", default=0.0, type=float, metavar="X", help="hold this share of every class's training images "
        "out, evaluate each epoch on it, and the test images once, at the end (default: 0, each epoch on the test "
        "images)")  # fmt: skip
    add("--val-only", action="store_true", help="with --val-share: leave the test images alone")


def _add_tuning(p: Parser) -> None:
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("pretrained_file", metavar="FILE", nargs="?", help="Barlow Twins' spelling of --pretrained FILE")
    add("--pretrained", "--finetune", default="", metavar="PATH", dest="pretrained", help="checkpoint of ours, of nine "
        "other projects or of BEiT-3; torchvision:NAME for its published weights (default: random weights, a "
        "baseline)")  # fmt: skip
    add("--weights", choices=("finetune", "freeze"), default="finetune", help="train the encoder, or keep it")
    add("--lr-backbone", default=0.01, type=float, metavar="LR", help="of the encoder (default: 0.01; SynCo's grid: "
        "0.01 0.02 0.05 0.1 0.005)")  # fmt: skip
    add("--lr-classifier", default=0.5, type=float, metavar="LR", help="of the linear layer (default: 0.5)")
    add("--lr", "--learning-rate", default=None, type=float, metavar="LR", dest="lr", help="of both, in place of the "
        "two")  # fmt: skip
    _add_milestones(p, None, "epochs at which rates drop 10x, in place of the cosine")
    add("--cos", "--cosine", action="store_true", dest="cos", help="the cosine also where --schedule is given")
    add("--momentum", default=0.9, type=float, metavar="M", help="momentum of SGD (default: 0.9)")
    add("--wd", "--weight-decay", default=1e-6, type=float, metavar="W", dest="weight_decay", help="(default: 1e-6)")
    add("--epochs", default=None, type=int, metavar="N", help="epochs to run (default: 60 below 10 percent, 30 below "
        "100, 90 for all images)")  # fmt: skip
    add("--start-epoch", default=0, type=int, metavar="N", help="number of the first epoch, for restarts by hand")
    add("-b", "--batch-size", default=1024, type=int, metavar="N",
        help="images a step over all processes of this node (default: 1024)")  # fmt: skip
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="off", help="encoder arithmetic (default: off)")
    add("--channels-last", action=switch, default=True, help="memory layout of convolutions (default: on)")
    add("-p", "--print-freq", default=10, type=int, metavar="N", help="steps between log lines (default: 10)")
    add("--save-dir", "--checkpoint-dir", "--output-dir", default="./", metavar="DIR", dest="save_dir",
        help="where checkpoint_semisup.pth.tar, result.json and the log go (default ./)")  # fmt: skip
    _add_trial(p)
    add("--resume", default="", metavar="PATH", help="continue this checkpoint; auto: the one in --save-dir")
    add("--overwrite", action="store_true", help="start afresh in a folder that holds another run")
    add("--max-minutes", default=None, type=float, metavar="M", help="save and stop (exit code 0) after M minutes")
    add("--seed", default=None, type=int, help="of all randomness but the draw (default: drawn, logged and kept)")
    add("-e", "--evaluate", action="store_true", help="evaluate --resume on the test images and stop")


def _add_objective(p: Parser) -> None:
    add = p.add_argument
    add("--loss", type=str.lower, choices=TUNING_LOSSES, default="ce", help="ce: cross-entropy; the others: (1 - "
        "alpha) cross-entropy + alpha times the contrastive loss of two views an image (default: ce)")  # fmt: skip
    add("--alpha", default=None, type=float, metavar="A", help="weight of the contrastive loss (default: 0.9)")
    add("--temp", default=None, type=float, metavar="T", help="temperature of the contrastive loss (default: 0.5)")
    add("--estimator", choices=("hard", "easy"), help="schane: weigh hard negatives, or all alike, which is supcon "
        "(default: hard)")  # fmt: skip
    add("--beta", default=None, type=float, metavar="B", help="schane: how much more hard negatives weigh (1)")
    add("--smoothing", "--label-smoothing", default=0.0, type=float, metavar="E", help="of cross-entropy (default: 0)")
    add("--mixup", default=0.0, type=float, metavar="A", help="of cross-entropy's images, timm's (default: 0, off)")
    add("--cutmix", default=0.0, type=float, metavar="A", help="the same by rectangles (default: 0, off)")
    add("--reprob", default=0.0, type=float, metavar="P", help="probability of erasing a rectangle (default: 0)")
    add("--aa", default="", metavar="POLICY", help="timm's AutoAugment or RandAugment, such as rand-m9-mstd0.5-inc1, "
        "after the random crop (default: none)")  # fmt: skip
    add("--aug", choices=("v1", "v2", "cifar", "supcon", "digits"),
        help="a pretraining's views in place of crop and flip")  # fmt: skip


def _add_optimizer(p: Parser) -> None:
    """What any training can have: timm's optimizers, clipping, a floor of the rate."""
    add = p.add_argument
    add("--opt", default="sgd", metavar="NAME", help="sgd, or an optimizer of timm: adamw, lars, lookahead_adamw .. "
        "(default: sgd)")  # fmt: skip
    add("--opt-betas", default=None, nargs="+", type=float, metavar="B", help="of optimizers that have betas (default: "
        "timm's, for adamw 0.9 0.999)")  # fmt: skip
    add("--clip-grad", default=None, type=float, metavar="X", help="largest norm of the gradient (default: no limit)")
    add("--min-lr", default=0.0, type=float, metavar="LR", help="where the cosine ends, and what no plateau goes below "
        "(0)")  # fmt: skip


def _add_average(p: Parser) -> None:
    """What the training of an encoder can have: the same and a moving average of the weights."""
    add = p.add_argument
    _add_optimizer(p)
    add("--exclude-bias-norm", action="store_true", help="no weight decay of biases and norms, and with --opt lars no "
        "adaptation of their rates (default: off; --layer-decay has it already)")  # fmt: skip
    add("--ema", default=None, type=float, metavar="D", help="evaluate and save an average of the weights that keeps a "
        "share D of itself at every step")  # fmt: skip
    add("--ema-epoch", default=None, type=float, metavar="D", help="the same, D an epoch")


def _check_optimizer(args: argparse.Namespace, lr: float, lowered: bool) -> None:
    """``lr``: the rate that --min-lr must be below; ``lowered``: something other than milestones lowers it."""
    if args.clip_grad is not None:
        positive(args, "clip_grad")
    for beta in args.opt_betas or ():
        if not 0 <= beta < 1:
            raise UserError(f"--opt-betas are shares from 0 to below 1, not {beta:g}.")
    at_least(args, 0, "min_lr")
    if args.min_lr and not lowered:
        ends = "--cos or --plateau ends; give one of them" if hasattr(args, "plateau") else "--cos ends; give it"
        raise UserError(f"--min-lr is where {ends}, or leave it out.")
    if args.min_lr >= lr:
        raise UserError(f"--min-lr {args.min_lr:g} must be below the learning rate {lr:g}.")


def _check_average(args: argparse.Namespace) -> None:
    for name in ("ema", "ema_epoch"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1:
            raise UserError(f"--{name.replace('_', '-')} is above 0 and below 1, not {value:g}.")
    if args.ema is not None and args.ema_epoch is not None:
        raise UserError("--ema and --ema-epoch are one decay, a step and an epoch; give one of them.")


def _add_recipe(p: Parser) -> None:
    add = p.add_argument
    add("--layer-decay", default=None, type=float, metavar="D", help="each layer's rate is D times that of the layer "
        "above; biases and norms are not decayed (default: off)")  # fmt: skip
    add("--drop-path", default=0.0, type=float, metavar="P", help="stochastic depth of timm's networks (default: 0)")
    add("--update-freq", default=1, type=int, metavar="A", help="batches a step: gradients are averaged over A, each "
        "with its own contrastive loss (default: 1)")  # fmt: skip
    add("--warmup-epochs", default=0.0, type=float, metavar="E", help="raise the rates from 0 over E epochs; then the "
        "cosine moves every step (default: 0, every epoch)")  # fmt: skip
    _add_warm(p, "default: on, as in SupContrast's main_ce.py, for --lr with --cos or --schedule and without "
              "--pretrained at batches above 256")  # fmt: skip
    _add_sync_bn(p)
    add("--plateau", default=None, type=int, metavar="E", help="in place of the cosine: rates drop 10x when the "
        "accuracy has not risen for more than E epochs")  # fmt: skip
    _add_average(p)
    add("--save-ckpt-freq", "--save-freq", default=0, type=int, metavar="E", dest="save_ckpt_freq", help="also keep "
        "the checkpoint of every E-th epoch, as checkpoint_semisup_NNNN.pth.tar (default: 0, none)")  # fmt: skip
    add("--few-shot-data", default="", metavar="PATH", help="images of new classes for --few-shot, a folder or list "
        "(default: the test images, whose classes were trained on)")  # fmt: skip
    add("--task", default=None, metavar="NAME", help="BEiT-3's: imagenet for an image folder, or a --dataset's name")
    add("--data-path", "--data-folder", "--train-folder", default=None, metavar="DIR", dest="data_path",
        help="BEiT-3's and SupContrast's DIR")  # fmt: skip
    add("--dist-eval", action="store_true", help="BEiT-3's: changes nothing, processes always share the evaluation")


def _add_classifier(p: Parser) -> None:
    add = p.add_argument
    add("--train-folder", "--data-folder", default=None, metavar="DIR", help="the labelled images to train on, as DIR")
    add("--num-classes", default=None, type=int, metavar="C", help="checked against the data, which decides by itself")
    add("--label-smoothing", default=0.0, type=float, metavar="E", help="of the training loss, in 0..1 (default: 0)")
    _add_warm(p, "default: off")
    add("--save-freq", default=None, type=int, metavar="E", help="SupContrast's: changes nothing, every epoch is saved")
    add("--save-ckpt-freq", default=0, type=int, metavar="E", help="also keep the checkpoint of every E-th epoch, as "
        "checkpoint_lincls_NNNN.pth.tar, for moco.average (default: 0, none)")  # fmt: skip
    add("--per-class", default=None, metavar="FILE.csv", help="also write top-1, top-5 and the likeliest mistake of "
        "each class")  # fmt: skip
    add("--confusion", action="store_true", help="also write confusion.csv and confusion.png into --save-dir")
    add("--lr-find", action="store_true", help="learning-rate range test: raise the rate step by step, write "
        "lr_find.csv and lr_find.png, suggest a --lr, stop")  # fmt: skip
    add("--lr-find-steps", default=None, type=int, metavar="N", help="steps of --lr-find (default: one epoch, at "
        "least 100)")  # fmt: skip


def add_data(p: Parser, of_file: bool = False) -> None:
    """The images and the network, the same for every program that reads images; of_file: one that evaluates a file,
    whose settings hold where none is typed (moco/weights/settings.py)."""
    add, files = p.add_argument, "the file's, else " if of_file else ""
    add("data", metavar="DIR", nargs="?", help="image folder (with or without train/ and val/), a text file of paths, "
        "or the root of --dataset")  # fmt: skip
    add("--config", metavar="FILE.yml", help="defaults from a file or a recipe's name; flags override them")
    add("--dataset", type=lambda name: {"path": "folder"}.get(name, name), choices=DATASETS,
        help="a known data set instead of an image folder")  # SupContrast calls a folder "path"  # fmt: skip
    add("--download", action="store_true", help="let --dataset fetch its files")
    add("--cache", metavar="DIR", help="keep decoded images in this folder, for sets of small images: decoded once "
        "instead of in every epoch, then mapped into memory (20 GB at most)")  # fmt: skip
    add("--val-data", "--test-folder", metavar="PATH", dest="val_data", help="labelled validation images when DIR does "
        "not hold them")  # fmt: skip
    add("--size", "--input-size", type=int, metavar="PX", dest="size",
        help=f"side of the square views (default: {files}224, small sets their own size)")  # fmt: skip
    add("--channels", type=int, choices=(1, 3), help="read images as grey (1) or colour (3; default: "
        f"{files}the data set's)")  # fmt: skip
    add("--mean", type=float, nargs="+", metavar="X", help=f"channel means in 0..1 (default: {files}the data set's)")
    add("--std", type=float, nargs="+", metavar="X",
        help=f"channel deviations in 0..1 (default: {files}the data set's)")  # fmt: skip
    add("-a", "--arch", "--model", default=None if of_file else "resnet50", metavar="ARCH",
        help=f"torchvision or timm network (default: {files}resnet50)")  # fmt: skip
    add("--stem", choices=("auto", "imagenet", "cifar"), default="auto", help="cifar: 3x3 and no pooling; auto: "
        f"{files}cifar up to 64 px")  # fmt: skip
    add("-j", "--workers", "--num-workers", default=32, type=int, metavar="N",
        help="loader processes on this machine in all (default: 32, never more than its cores)")  # fmt: skip


def _add_training(p: Parser, epochs: int, lr: float | list[float], schedule: list[int], wd: float) -> None:
    add = p.add_argument
    add("--epochs", default=epochs, type=int, metavar="N", help=f"epochs to run (default: {epochs})")
    add("--start-epoch", default=0, type=int, metavar="N", help="number of the first epoch, for restarts by hand")
    add("-b", "--batch-size", default=256, type=int, metavar="N",
        help="images a step over all processes of this node (default: 256)")  # fmt: skip
    several = isinstance(lr, list)
    more = "; several, such as 30 10 3: a classifier each, on the same features" if several else ""
    add("--lr", "--learning-rate", default=lr, type=float, nargs="+" if several else None,
        metavar="LR", dest="lr", help=f"learning rate ({lr}){more}")  # fmt: skip
    _add_milestones(p, schedule, f"epochs at which lr drops 10x ({schedule})")
    add("--cos", "--cosine", action=argparse.BooleanOptionalAction, dest="cos", default=False, help="cosine learning "
        "rate instead, one value an epoch (with pretraining's --steps, a step)")  # fmt: skip
    add("--momentum", default=0.9, type=float, metavar="M", help="momentum of SGD (default: 0.9)")
    add("--wd", "--weight-decay", default=wd, type=float, metavar="W", dest="weight_decay", help=f"({wd})")
    add("-p", "--print-freq", default=10, type=int, metavar="N", help="steps between log lines (default: 10)")
    add("--resume", default="", metavar="PATH", help="continue this checkpoint; auto: the newest in --save-dir")
    add("--seed", default=None, type=int, help="of all randomness (default: drawn, logged and kept in checkpoints)")


def _add_milestones(p: Parser, default: list[int] | None, text: str) -> None:
    add = p.add_argument
    add("--schedule", default=default, nargs="*", type=int, help=text)
    add("--lr-decay-epochs", type=epoch_list, default=argparse.SUPPRESS, dest="schedule", metavar="E,E",
        help="SupContrast's spelling of --schedule E E")  # fmt: skip
    add("--lr-decay-rate", default=DECAY, type=float, metavar="X", help="what lr is multiplied by at those "
        "epochs (0.1)")  # fmt: skip


def _add_warm(p: Parser, when: str) -> None:
    """SupContrast's warm-up: a line from a rate, not from 0, to what the schedule says at its end."""
    add = p.add_argument
    add("--warm", action=argparse.BooleanOptionalAction, default=None, help="raise the rate from --warm-from over "
        f"--warm-epochs ({when})")  # fmt: skip
    add("--warm-epochs", default=10, type=int, metavar="E", help="of --warm (default: 10)")
    add("--warm-from", default=0.01, type=float, metavar="LR", help="of --warm (default: 0.01)")


def _add_sync_bn(p: Parser) -> None:
    p.add_argument("--sync-bn", "--syncBN", action="store_true", dest="sync_bn", help="BatchNorm over the batch of all "
                   "processes")  # fmt: skip


def _add_trial(p: Parser) -> None:
    p.add_argument("--trial", default=None, metavar="NAME", help="put the run into --save-dir/trial_NAME")


def add_launch(p: Parser) -> None:
    """How many processes there are and how they meet."""
    add = p.add_argument
    add("--world-size", default=-1, type=int, help="nodes (with --multiprocessing-distributed) or processes")
    add("--rank", default=-1, type=int, help="this node's or process's number")
    add("--dist-url", default=None, metavar="URL", help="where processes meet (default: a free port of this machine)")
    add("--dist-backend", default="nccl", help="nccl, or gloo without GPUs (chosen by itself)")
    add("--gpu", default=None, type=int, help="use this GPU")
    add("--multiprocessing-distributed", action="store_true", help="one process a GPU (or --nproc) on each node")
    add("--nproc", default=None, type=int, metavar="N", help="processes on this node; without GPUs they use gloo")


def _add_moco(p: Parser) -> None:
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--method", type=_method_name, choices=METHODS, help="default moco; --n1..--n6 mean "
        "synco, --mochi mochi; simclr, supcon, hcl, dcl compare the images of a batch; supcon and --moco-k: with a "
        "queue of keys and labels, and synthetic negatives if --mochi or --n1..--n6 ask for them; moco_v3 compares "
        "with the keys of the batch")  # fmt: skip
    add("--moco-dim", default=128, type=int, help="feature dimension C (default: 128; moco_v3: 256)")
    add("--moco-mlp-dim", default=4096, type=int, help="moco_v3: width inside of its MLPs (default: 4096)")
    add("--moco-k", default=None, type=int, help="queue size K (default: 65536; supcon: no queue)")
    add("--moco-m", default=0.999, type=float, help="momentum of the key encoder (default: 0.999; moco_v3: "
        "0.99)")  # fmt: skip
    add("--moco-m-cos", action=switch, default=True, help="moco_v3: raise the momentum to 1 over the run by half a "
        "cosine (default: on)")  # fmt: skip
    add("--moco-t", "--temp", default=0.07, type=float, dest="moco_t", help="temperature T (default: 0.07; "
        "moco_v3: 1)")  # fmt: skip
    add("--mlp", action=switch, default=None, help="MoCo v2's head (default: on for simclr, supcon, hcl, dcl)")
    add("--aug-plus", action=switch, default=False, help="MoCo v2's augmentation (same as --aug v2)")
    add("--aug", choices=("v1", "v2", "v3", "v3-wide", "cifar", "supcon", "digits"), help="augmentation preset "
        "(default v1; small sets their own; simclr, supcon, hcl, dcl: supcon; moco_v3: v3)")  # fmt: skip
    add("--aug-device", choices=("cpu", "gpu", "auto"), default="auto", help="where views are made after their crop: "
        "by the loader's processes, or in batches on the run's device (default: auto, the loader's)")  # fmt: skip
    add("--decode", choices=("exact", "fast"), default="exact", help="fast: JPEG decoded only as finely as the crops "
        "need, crops within two levels of PIL's (default: exact)")  # fmt: skip
    add("--stop-grad-conv1", action=switch, default=True, help="moco_v3: keep a ViT's patch embedding as it was drawn "
        "(default: on)")  # fmt: skip
    add("--symmetric", action=switch, default=False, help="each view is query once; the two losses are added")
    add("--bn-splits", default=None, type=int, metavar="S", help="parts of the batch that BatchNorm sees alone "
        "(default: 8 or what the batch allows with one process, 1 with several)")  # fmt: skip
    add("--shuffle-bn", action=switch, default=True, help="shuffle keys between processes (or splits) for BatchNorm")
    add("--mask-same-image", action=switch, default=None, help="leave out queue rows of the query's own image "
        "(default: on when the queue holds more than a tenth of the data set)")  # fmt: skip


def _add_batch(p: Parser) -> None:
    add = p.add_argument
    add("--base-temperature", default=None, type=float, metavar="T0", help="multiply the loss by T / T0 (default: 0.07 "
        "for simclr and supcon without a queue, as SupContrast does; others: not multiplied)")  # fmt: skip
    add("--contrast-mode", choices=("all", "one"), default="all", help="anchors: all views, or the first of each image")
    add("--views", default=2, type=int, metavar="V", help="random views an image, for the methods without a queue "
        "(default: 2)")  # fmt: skip
    add("--beta", default=1.0, type=float, metavar="B", help="hcl: how much harder negatives weigh more (default: 1)")
    add("--tau-plus", default=0.1, type=float, metavar="X", help="hcl: share of negatives that are positives (0.1)")
    add("--estimator", choices=("hard", "easy"), default="hard", help="hcl: easy weighs all negatives alike")
    _add_sync_bn(p)
    _add_warm(p, "default: on for simclr, supcon, hcl, dcl at batches above 256")
    add("--warm-steps", default=None, type=int, metavar="N", help="in place of --warm: raise the rate from --warm-from "
        "over N steps, also of a run that counts --steps")  # fmt: skip
    add("--rise-epochs", default=0.0, type=float, metavar="E", dest="rise", help="in place of --warm: raise the rate "
        "from 0 over E epochs, then the cosine takes the rest; both move every step (default: 0; MoCo v3's recipes "
        "have it)")  # fmt: skip
    add("--data-folder", "--train-folder", default=None, metavar="DIR", dest="train_folder", help="SupContrast's DIR")
    add("--num-classes", default=None, type=int, metavar="C", help="checked against the data, which decides by itself")
    _add_trial(p)


def _method_name(text: str) -> str:
    return ALIASES.get(text.lower(), text.lower())


def epoch_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _add_negatives(p: Parser) -> None:
    add = p.add_argument
    add("--n-hard", default=1024, type=int, help="hardest queue rows that a query mixes (default: 1024)")
    for (name, count), text in zip(SYNCO_COUNTS.items(), SYNCO_KINDS, strict=True):
        add(f"--{name}", default=None, type=int, help=f"SynCo: negatives by {text} (default: {count})")
    add("--sigma", default=0.01, type=float, help="SynCo: deviation of the noise (default: 0.01)")
    add("--delta", default=0.01, type=float, help="SynCo: step of the perturbation (default: 0.01)")
    add("--eta", default=0.01, type=float, help="SynCo: step of the adversarial sign (default: 0.01)")
    add("--mochi", default=None, nargs=3, type=int, metavar=("N", "S", "S2"),
        help="MoCHi: N hardest rows, S negatives of type 1, S2 of type 2")  # fmt: skip
    add("--hard-start-epoch", "--warmup-epochs", default=10, type=int, dest="hard_start_epoch", metavar="E",
        help="first epoch, counted from 0, with synthetic negatives (default: 10)")  # fmt: skip
    add("--hard-stop-epoch", default=None, type=int, metavar="E", help="first epoch without them again (default: none)")
    add("--type-starts", default=[], nargs="*", metavar="KIND=E", help="a later first epoch for one kind, such as "
        "interpolation=20, or optimizer step, mixup=1000steps; kinds: " + " ".join(KINDS))  # fmt: skip
    add("--extrapolation", choices=("code", "paper"), default="code", help="SynCo's released code or its paper's text")
    add("--head-impl", choices=("auto", "reference", "cpu", "triton"), default="auto",
        help="loss implementation; auto: triton (fused) on a GPU where it is right and not slower, else cpu (closed "
        "forms, any device)")  # fmt: skip
    add("--head-precision", choices=("auto", "fp32", "tf32", "tf32x3", "bf16"), default="auto",
        help="operands of the loss's two matrix products with the queue, summed in fp32; auto: tf32x3 (three products, "
        "as exact as fp32) with triton, bf16 on a CPU that is faster with it, else fp32")  # fmt: skip


def _add_step(p: Parser) -> None:
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--steps", default=None, type=int, metavar="N", help="train N optimizer steps instead of --epochs")
    add("--plateau", default=None, type=int, metavar="E", help="in place of --schedule: lr drops 10x when the "
        "mean loss of an epoch has not fallen for more than E epochs")  # fmt: skip
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="encoder arithmetic (default: bf16 "
        "where the device has it; the loss is always fp32)")  # fmt: skip
    add("--channels-last", action=switch, default=True, help="memory layout of convolutions (default: on)")
    add("--compile", action="store_true", help="torch.compile the two encoders")
    add("--compile-mode", choices=("default", "reduce-overhead", "max-autotune"), default="default", help="torch's "
        "modes; the last two replay the encoders as CUDA graphs (default: default)")  # fmt: skip
    add("--recompute", action="store_true", help="keep less of the forward pass for backward, for larger batches")
    add("--accum", default=1, type=int, metavar="A", help="batches a step: gradients are averaged over A batches, keys "
        "are enqueued after each, the key encoder moves once")  # fmt: skip
    add("--drop-last", action=switch, default=True, help="drop an epoch's last short batch (default: on)")


def _add_run(p: Parser) -> None:
    add = p.add_argument
    add("--save-dir", default=None, metavar="DIR", help="checkpoints and logs (default ./; the demo: runs/demo)")
    add("--save-every", "--save-freq", default=1, type=int, metavar="E", dest="save_every",
        help="epochs between checkpoints (default: 1)")  # fmt: skip
    add("--keep", default=0, type=int, metavar="N", help="keep only the newest N checkpoints (default: 0 = all)")
    add("--overwrite", action="store_true", help="start afresh in a folder that holds another run")
    add("--max-minutes", default=None, type=float, metavar="M", help="save and stop (exit code 0) after M minutes")
    add("--max-restarts", default=0, type=int, metavar="N", help="with --nproc: start again from the newest good "
        "checkpoint when a process dies, at most N times (default: 0; torchrun has its own)")  # fmt: skip
    add("--max-bad-steps", default=5, type=int, metavar="N", help="stop after N non-finite steps in a row (default: 5)")
    add("--max-bad-images", default=100, type=int, metavar="N", help="stop when more images are unreadable (100)")
    add("--check-every", default=1000, type=int, metavar="N", help="steps between checks that all queues are equal")
    add("--knn-every", default=10, type=int, metavar="E", help="epochs between k-NN evaluations (default: 10; 0: off)")
    add("--retrieval-every", default=0, type=int, metavar="E", help="epochs between measures of held-out images "
        "before the projection head and behind it: precision@1, R-precision, mAP@R, mAP, AMI, NMI (default: 0, "
        "never)")  # fmt: skip
    add("--wandb", default=None, metavar="PROJECT", help="also log to Weights & Biases (extra: wandb)")
    _add_knn(p)


def _add_knn(p: Parser) -> None:
    p.add_argument("--knn-k", default=[200], nargs="+", type=int, metavar="k", help="neighbours; several numbers are "
        "answered in one pass, the first is reported as knn (default: 200)")  # fmt: skip
    p.add_argument("--knn-t", default=0.1, type=float, metavar="T", help="temperature of the votes (default: 0.1)")


def _add_few_shot(p: Parser) -> None:
    add = p.add_argument
    add("--few-shot", "--eval-fewshot", action="store_true", dest="few_shot",
        help="few-shot accuracy of the frozen features: logistic regression on few images a class, mean and 95 %% "
        "interval over episodes")  # fmt: skip
    add("--few-shot-classes", default="", metavar="FILE", help="the classes to draw from, one a line, or "
        "miniImageNet's CSV of filename,label (default: all, held-out images only)")  # fmt: skip
    add("--few-shot-way", default=5, type=int, metavar="N", help="classes an episode (default: 5)")
    add("--few-shot-shots", default=[1, 5], nargs="+", type=int, metavar="N", help="labelled images a class (1 5)")
    add("--few-shot-queries", default=15, type=int, metavar="N", help="images to classify a class (default: 15)")
    add("--few-shot-episodes", default=600, type=int, metavar="N", help="episodes (default: 600)")


# --------------------------------------------------------------------------------------------- after parsing


def _finish_pretrain(parser: Parser, argv: list[str], any_demo: bool = False) -> argparse.Namespace:
    args = with_config(parser, argv)
    args.data = _one_folder(args)
    typed = given(parser, argv)
    _type_starts(args.type_starts)  # which takes a DIR behind it for one of its own
    args.demo = args.data is None and args.dataset is None
    if args.demo:
        if not any_demo:
            _check_demo(typed)
        take_defaults(parser, DEMO_CONFIG)  # a layer below the user's own file and flags
        args = with_config(parser, argv)
        args.demo = True
    args.save_dir = args.save_dir or ("runs/demo" if args.demo else "./")
    args.save_dir = _place(args)
    args.notes = []  # sentences for the log
    _choose_method(args, typed)
    _choose_family(args, typed, parser.filed)
    args.type_starts, args.type_start_steps = _type_starts(args.type_starts)
    _check_common(args)
    _choose_plateau(args, typed, parser.filed)
    _check_optimizer(args, args.lr, args.cos or args.plateau is not None)
    _check_average(args)
    _check_pretrain(args)
    _check_type_starts(args, typed)
    return args


def _check_demo(typed: dict[str, Any]) -> None:
    """UserError where flags of a training, perhaps another program's, came without images. The demo takes what says
    where a run writes, how it is started, watched and stopped."""
    p = Parser()
    for add in (add_launch, _add_trial, _add_run):
        add(p)
    known = {action.dest for action in p._actions} | {"resume", "seed", "workers", "print_freq", "download", "cache"}
    if more := [name for name in typed if name not in known]:
        raise UserError(
            f"--{more[0].replace('_', '-')} is a flag of training, but no images are named: give DIR, or --dataset "
            "NAME (mnist5k: the built-in digits). Without such flags it is the demo; to change the "
            "demo's recipe, give --config configs/demo.yml."
        )


def _finish_lincls(parser: Parser, argv: list[str]) -> argparse.Namespace:
    args = with_config(parser, argv)
    args.data = _one_folder(args)
    if args.data is None and args.dataset is None:
        raise UserError("give an image folder or --dataset NAME to classify.")
    args.lrs, args.lr = args.lr, args.lr[0]  # all that were asked for; upstream's one
    _check_common(args)
    _check_classifier(args)
    _check_optimizer(args, min(args.lrs), args.cos)
    _check_warm(args, args.epochs)
    _check_few_shot(args)
    return args


def _place(args: argparse.Namespace) -> str:
    return args.save_dir if args.trial is None else os.path.join(args.save_dir, f"trial_{args.trial}")


def _one_folder(args: argparse.Namespace) -> str | None:
    if args.data is not None and args.train_folder is not None:
        raise UserError("DIR and --train-folder are the same thing; give one of them.")
    return args.train_folder if args.data is None else args.data


def _finish_semisup(parser: Parser, argv: list[str]) -> argparse.Namespace:
    args = with_config(parser, argv)
    _take_beit3_names(args)
    if args.data is None and args.dataset is None:
        raise UserError("give an image folder or --dataset NAME to fine-tune on.")
    if args.pretrained and args.pretrained_file:
        raise UserError("--pretrained and FILE after DIR are two spellings of one flag; give one of them.")
    args.pretrained = args.pretrained or args.pretrained_file or ""
    if args.train_percent is None and args.train_files in ("", "balanced"):
        args.train_percent = 100.0
    if args.lr is not None:
        positive(args, "lr")
        args.lr_backbone = args.lr_classifier = args.lr
    args.save_dir = _place(args)
    args.notes = []  # sentences for the log
    _choose_plateau(args, given(parser, argv), parser.filed)
    _choose_tuning_schedule(args)
    _check_semisup(args)
    _check_objective(args)
    _check_recipe(args)
    check_images(args)
    return args


def _choose_tuning_schedule(args: argparse.Namespace) -> None:
    """The cosine unless milestones are given alone, and whether a long warm-up belongs to it as in main_ce.py."""
    as_main_ce = args.lr is not None and not args.pretrained and (args.cos or args.schedule is not None)
    if args.warm is None:
        enough = args.epochs is None or args.epochs > args.warm_epochs
        args.warm = as_main_ce and args.batch_size > 256 and enough and not args.warmup_epochs
    if args.warm and args.warmup_epochs:
        raise UserError("--warm and --warmup-epochs are two warm-ups; give one of them.")
    _check_warm(args, args.epochs or SHORTEST_TUNING)
    if args.cos:
        args.schedule = None


def _take_beit3_names(args: argparse.Namespace) -> None:
    """--task and --data-path as --dataset and DIR. With --data-path, the one positional word is no DIR."""
    if args.data_path is not None:
        if args.data is not None:
            raise UserError("DIR and --data-path are the same thing; give one of them.")
        args.data = args.data_path
    if args.task is not None:
        name = {"imagenet": "folder", "imagenet1k": "folder"}.get(args.task.lower(), args.task.lower())
        if name not in DATASETS or args.dataset not in (None, name):
            raise UserError(f"--task {args.task} classifies no images known here; give imagenet or one of "
                            f"{', '.join(DATASETS)}, the same as --dataset.")  # fmt: skip
        args.dataset = name


def _choose_method(args: argparse.Namespace, typed: dict[str, Any]) -> None:
    # A --method on the command line also overrides what a file's counts would imply.
    def asked(name: str) -> bool:
        return getattr(args, name) is not None and ("method" not in typed or name in typed)

    given = [name for name in SYNCO_COUNTS if asked(name)]
    implied = "synco" if given else "mochi" if asked("mochi") else None
    if given and asked("mochi"):
        raise UserError("--mochi and SynCo's --n1..--n6 are two methods; give one of them.")
    if implied and args.method not in (None, "supcon", implied):
        flag = "--" + (given[0] if given else "mochi")
        raise UserError(f"--method {args.method} does not use {flag}; leave one of them out.")
    args.method = args.method or implied or "moco"
    method = METHODS[args.method]
    args.family = "queue" if asked("moco_k") and method.family == "batch" else method.family
    args.negatives = args.method if method.family == "queue" else implied or "moco"
    if args.negatives == "mochi":
        args.n_hard, args.s, args.s2 = args.mochi or (1024, 512, 256)
    for name, count in SYNCO_COUNTS.items():
        if getattr(args, name) is None:
            setattr(args, name, count)


def _choose_family(args: argparse.Namespace, typed: dict[str, Any], filed: frozenset[str]) -> None:
    """What follows from the method: whether there is a queue, and its defaults."""
    method, queue = METHODS[args.method], args.family == "queue"
    asked = set(typed) | (filed if "method" not in typed else set())
    if (queue and not (method.family == "queue" or method.queue)) or (not queue and "moco_k" in asked):
        raise UserError(f"--method {args.method} compares the images of a batch and has no queue; leave --moco-k out.")
    if args.negatives != "moco" and not queue:
        raise UserError("synthetic negatives are made from a queue; give --method supcon a --moco-k, such as 8192.")
    args.moco_k = args.moco_k if queue and args.moco_k is not None else 65536
    idle = {"aug"} if not dataset_of(args.dataset).mirrored or args.aug_plus else set()
    idle |= {"base_temperature"} if queue else set()
    for name in method.defaults.keys() - idle - typed.keys() - filed:
        setattr(args, name, method.defaults[name])
    args.mlp = bool(args.mlp)
    if args.warm_steps is not None:
        _check_warm_steps(args)
    if args.warm is None:
        args.warm = (
            method.family == "batch" and args.batch_size > 256 and args.epochs > args.warm_epochs and not args.steps
        )
    at_least(args, 0, "rise")
    if args.rise and (args.warm or args.warm_steps):
        raise UserError("--rise-epochs and --warm are two warm-ups; give one of them.")
    _check_family(args, asked)


def _check_warm_steps(args: argparse.Namespace) -> None:
    at_least(args, 1, "warm_steps")
    if args.warm:
        raise UserError("--warm counts epochs and --warm-steps steps; give one of them.")
    args.warm = False


def _check_family(args: argparse.Namespace, asked: set[str]) -> None:
    queue = args.family == "queue"
    if args.sync_bn and queue:
        raise UserError("--syncBN is for the methods without a queue; with one, --shuffle-bn keeps BatchNorm honest.")
    labelled = queue and METHODS[args.method].queue
    refused = {"mask_same_image", "head_impl"} if labelled else set(FAMILIES[args.family].refuses)
    if idle := [name for name in sorted(refused & asked) if getattr(args, name)]:
        flag = f"--{idle[0].replace('_', '-')}"
        raise UserError(f"--method {args.method} does not use {flag}; leave one of them out.")
    if args.contrast_mode == "one" and args.family != "batch":
        raise UserError("--contrast-mode one is for the methods without a queue, where a query is one view anyway.")
    _check_views(args)
    at_least(args, 0, "beta")
    _check_warm(args, 0 if args.steps else args.epochs, ", and no --steps")
    if args.num_classes is not None:
        at_least(args, 1, "num_classes")
    if not 0 <= args.tau_plus < 1:
        raise UserError(f"--tau-plus is a share from 0 to below 1, not {args.tau_plus:g}.")
    if args.base_temperature is not None:
        positive(args, "base_temperature")


def _check_warm(args: argparse.Namespace, epochs: int, more: str = "") -> None:
    at_least(args, 0, "warm_from")
    at_least(args, 1, "warm_epochs")
    if args.warm and args.warm_epochs >= epochs:
        raise UserError(f"--warm lasts --warm-epochs epochs and needs more --epochs than that{more}.")


def _check_views(args: argparse.Namespace) -> None:
    at_least(args, 2, "views")
    if args.views > 2 and args.family != "batch":
        raise UserError("--views is for the methods without a queue; with one, an image gives a query and a key.")


def negatives_settings(args: argparse.Namespace) -> NegativesConfig:
    """Which synthetic negatives and when."""
    recipe = None
    if args.negatives == "mochi":
        recipe = MoCHiConfig(args.s, args.s2)
    elif args.negatives == "synco":
        counts = (args.n1, args.n2, args.n3, args.n4, args.n5, args.n6)
        recipe = SynCoConfig(*counts, args.sigma, args.delta, args.eta, args.extrapolation)
    return NegativesConfig(
        args.negatives, recipe, args.hard_start_epoch, args.hard_stop_epoch, args.type_starts, args.type_start_steps
    )


def model_settings(args: argparse.Namespace) -> MoCoConfig | InBatchConfig | MoCoV3Config:
    """The model, all but the statistics of its channels."""
    T, base, layout, recompute = args.moco_t, args.base_temperature, args.channels_last, args.recompute
    if args.family == "momentum":
        return MoCoV3Config(
            T=T, channels_last=layout, recompute=recompute, method=args.method, C=args.moco_dim,
            hidden=args.moco_mlp_dim, m=args.moco_m, m_cosine=args.moco_m_cos, freeze_patches=args.stop_grad_conv1,
        )  # fmt: skip
    if args.family == "batch":
        return InBatchConfig(
            T=T, base_temperature=base, channels_last=layout, recompute=recompute, method=args.method,
            contrast_mode=args.contrast_mode, views=args.views, sync_bn=args.sync_bn, beta=args.beta,
            tau_plus=args.tau_plus, estimator=args.estimator,
        )  # fmt: skip
    return MoCoConfig(
        T=T, base_temperature=base, channels_last=layout, recompute=recompute, C=args.moco_dim, K=args.moco_k,
        m=args.moco_m, n_hard=args.n_hard, symmetric=args.symmetric, shuffle=args.shuffle_bn, bn_splits=args.bn_splits,
        mask_same_image=args.mask_same_image, loss_impl=args.head_impl, loss_precision=args.head_precision,
        negatives=negatives_settings(args),
    )  # fmt: skip


def plan_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`moco.train.plan.make_plan` takes besides the data's length and the arithmetic."""
    same = ("epochs", "steps", "lr", "accum", "print_freq", "max_bad_steps", "check_every", "warm_from", "min_lr")
    same += ("rise",)
    epochs, steps = _changes_of_the_loss(args)
    followed = {"patience": args.plateau, "changes": epochs, "change_steps": steps, "decay": args.lr_decay_rate}
    warm = {"warm_epochs": args.warm_epochs if args.warm else 0, "warm_steps": args.warm_steps or 0}
    schedule = {"cosine": args.cos, "milestones": [] if args.plateau is not None else args.schedule}
    return {name: getattr(args, name) for name in same} | followed | warm | schedule


def _changes_of_the_loss(args: argparse.Namespace) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Epochs and steps from which a loss cannot be compared with those before: synthetic negatives begin or stop."""
    if args.negatives == "moco":
        return (), ()
    switched = (args.hard_start_epoch, args.hard_stop_epoch, *args.type_starts.values())
    return tuple(epoch for epoch in switched if epoch is not None), tuple(args.type_start_steps.values())


def drawn(args: argparse.Namespace) -> dict[str, int]:
    """Synthetic negatives a query by kind, none of them 0."""
    counts = {"mixup": args.s, "interpolation": args.s2} if args.negatives == "mochi" else {}
    if args.negatives == "synco":
        counts = {kind: getattr(args, name) for kind, name in zip(SYNCO_KINDS, SYNCO_COUNTS, strict=True)}
    return {kind: count for kind, count in counts.items() if count}


def probe_plan(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`moco.train.plan.count_epochs` takes for a probe besides the data's length."""
    warm = {"warm_epochs": args.warm_epochs if args.warm else 0, "warm_from": args.warm_from}
    shape = {"cosine": args.cos, "milestones": args.schedule, "decay": args.lr_decay_rate, "min_lr": args.min_lr}
    return {"epochs": args.epochs, "print_freq": args.print_freq, **warm, **shape}


def head_settings(args: argparse.Namespace) -> dict[str, Any]:
    """How a probe's classifiers are trained, see moco.eval.linear.Head."""
    same = {name: getattr(args, name) for name in ("opt", "momentum", "weight_decay")}
    return {**same, "clip": args.clip_grad, "betas": args.opt_betas, "smoothing": args.label_smoothing}


def validation_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What pretraining measures between epochs, see moco/eval/between_epochs.py."""
    same = ("knn_every", "retrieval_every")
    return {"k": args.knn_k, "temperature": args.knn_t, **{name: getattr(args, name) for name in same}}


def objective_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What fine-tuning minimises, see moco/eval/finetune_loss.py."""
    same = ("alpha", "estimator", "beta", "smoothing", "mixup", "cutmix")
    return {"T": args.temp, "erase": args.reprob, **{name: getattr(args, name) for name in same}}


def tuning_plan(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`moco.train.plan.count_epochs` takes for fine-tuning besides the data's length and the epochs."""
    return {
        "print_freq": args.print_freq, "rise": args.warmup_epochs, "accum": args.update_freq,
        "patience": args.plateau, "keep_every": args.save_ckpt_freq, "min_lr": args.min_lr,
        "cosine": args.schedule is None and args.plateau is None, "milestones": args.schedule or (),
        "decay": args.lr_decay_rate, "warm_epochs": args.warm_epochs if args.warm else 0, "warm_from": args.warm_from,
    }  # fmt: skip


def few_shot_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The episodes, see moco.eval.fewshot.Setting."""
    named = {name: getattr(args, f"few_shot_{name}") for name in ("way", "queries", "episodes")}
    return {**named, "shots": tuple(args.few_shot_shots)}


def _type_starts(entries: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """First epochs and first steps by kind."""
    epochs: dict[str, int] = {}
    steps: dict[str, int] = {}
    for entry in entries:
        kind, _, start = entry.partition("=")
        number = start.removesuffix("steps")
        if kind not in KINDS or not number.isdecimal():
            raise UserError(f"--type-starts {entry}: write KIND=EPOCH or KIND=Nsteps, KIND one of {', '.join(KINDS)}.")
        if kind in epochs or kind in steps:
            raise UserError(f"--type-starts {entry}: {kind} has one start, in epochs or in steps; give it once.")
        (epochs if number == start else steps)[kind] = int(number)
    return epochs, steps


def _check_type_starts(args: argparse.Namespace, typed: dict[str, Any]) -> None:
    """UserError for the start of a kind that is not drawn; a file's is dropped where the command line has chosen what
    is drawn."""
    kinds = drawn(args)
    odd = [kind for kind in (*args.type_starts, *args.type_start_steps) if kind not in kinds]
    if odd and "type_starts" not in typed and typed.keys() & {"method", "mochi", *SYNCO_COUNTS}:
        for kind in odd:
            args.type_starts.pop(kind, None)
            args.type_start_steps.pop(kind, None)
        args.notes.append(f"the file's --type-starts of {', '.join(odd)} is dropped: none is drawn")
    elif odd:
        raise UserError(f"--type-starts {odd[0]}: this run draws {', '.join(kinds) or 'no synthetic negatives'} and no "
                        f"{odd[0]}; leave it out.")  # fmt: skip


def _check_common(args: argparse.Namespace) -> None:
    at_least(args, 1, "epochs", "batch_size", "print_freq")
    if min(args.knn_k) < 1:
        raise UserError(f"--knn-k counts neighbours and must be at least 1, not {min(args.knn_k)}.")
    at_least(args, 0, "workers", "start_epoch", "weight_decay", "momentum")
    positive(args, "lr", "knn_t")
    _check_decay(args)
    check_images(args)


def _given(args: argparse.Namespace, *names: str) -> list[str]:
    return [name for name in names if getattr(args, name) is not None]


def _check_decay(args: argparse.Namespace) -> None:
    if not 0 < args.lr_decay_rate <= 1:
        raise UserError(f"--lr-decay-rate is above 0 and at most 1, not {args.lr_decay_rate:g}.")


def _choose_plateau(args: argparse.Namespace, typed: dict[str, Any], filed: frozenset[str]) -> None:
    """One schedule: of --plateau and the flags of another, what is typed wins over what is the file's.

    Raises:
        UserError: both are typed, or both are the file's.
    """
    if args.plateau is None:
        return
    at_least(args, 0, "plateau")
    unused = {"schedule": None, "cos": False, "lr_decay_rate": DECAY}
    others = [name for name in unused if name in {*typed, *filed} and getattr(args, name) != unused[name]]
    own = "plateau" in typed
    for name in others:
        if (name in typed) == own:
            _refuse_beside_plateau(name)
    if not others:
        return
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
    winner, loser, dropped = ("--plateau", flags, others) if own else (flags, "--plateau", ["plateau"])
    args.notes.append(f"{winner} of the command line, in the place of the file's {loser}")
    for name in dropped:
        setattr(args, name, unused.get(name))


def _refuse_beside_plateau(name: str) -> None:
    if name == "lr_decay_rate":
        raise UserError("--lr-decay-rate is of the epochs of --schedule, and --plateau drops rates 10x; leave it out.")
    raise UserError(f"--plateau and --{name} are two schedules; give one of them.")


def check_images(args: argparse.Namespace) -> None:
    """UserError where --size, --mean or --std cannot be of images."""
    if args.size is not None:
        at_least(args, 8, "size")
    if not all(math.isfinite(x) for x in (*(args.mean or ()), *(args.std or ()))):
        raise UserError("--mean and --std must be finite numbers.")
    if args.std is not None and min(args.std) <= 0:
        raise UserError("--std divides: every value must be above 0.")
    lengths = {len(x) for x in (args.mean, args.std) if x is not None}
    if lengths - {1, 3} or len(lengths) > 1:
        raise UserError("--mean and --std take one value a channel: 1 or 3, the same number for both.")


def _check_val_share(args: argparse.Namespace) -> None:
    if not 0 <= args.val_share < 1:
        raise UserError(f"--val-share is a share from 0 to below 1, not {args.val_share:g}.")


def _check_semisup(args: argparse.Namespace) -> None:
    at_least(args, 1, "batch_size", "print_freq", *_given(args, "epochs"))
    at_least(args, 0, "workers", "start_epoch", "weight_decay", "momentum", "lr_backbone", *_given(args, "max_minutes"))
    positive(args, "lr_classifier")
    if args.train_percent is not None and not 0 < args.train_percent <= 100:
        raise UserError(f"--train-percent is above 0 and at most 100, not {args.train_percent:g}.")
    _check_decay(args)
    _check_val_share(args)
    if args.sync_bn and args.weights == "freeze":
        raise UserError("--syncBN is of a BatchNorm in training, and --weights freeze keeps it; leave one of them out.")
    if args.val_only and not args.val_share:
        raise UserError("--val-only needs --val-share, the share of the training images to validate on.")
    if args.evaluate and (args.val_only or not args.resume):
        raise UserError("--evaluate takes --resume with a fine-tuned checkpoint, and no --val-only.")


def _check_objective(args: argparse.Namespace) -> None:
    own = {"alpha": TUNING_LOSSES[1:], "temp": TUNING_LOSSES[1:], "estimator": ("schane",), "beta": ("schane",)}
    defaults = {"alpha": 0.9, "temp": 0.5, "estimator": "hard", "beta": 1.0}
    for name, losses in own.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
        elif args.loss not in losses:
            raise UserError(f"--{name} is for --loss {', '.join(losses)}; {args.loss} has none.")
    if args.loss != "ce" and args.weights == "freeze":
        raise UserError(f"--loss {args.loss} trains the encoder, which --weights freeze keeps; leave one of them out.")
    _check_shares(args)


def _check_shares(args: argparse.Namespace) -> None:
    positive(args, "temp")
    at_least(args, 0, "beta", "mixup", "cutmix")
    for name in ("alpha", "reprob"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} is a share from 0 to 1, not {getattr(args, name):g}.")
    for name in ("smoothing", "drop_path"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is from 0 to below 1, not {getattr(args, name):g}.")


def _check_recipe(args: argparse.Namespace) -> None:
    at_least(args, 1, "update_freq")
    at_least(args, 0, "warmup_epochs", "save_ckpt_freq")
    rates = [args.lr_classifier] + [args.lr_backbone] * (args.weights == "finetune")
    _check_optimizer(args, max(rates), lowered=args.schedule is None)
    _check_average(args)
    if args.layer_decay is not None and not 0 < args.layer_decay < 1:
        raise UserError(f"--layer-decay is above 0 and below 1, not {args.layer_decay:g}.")
    if args.warmup_epochs >= (args.epochs or SHORTEST_TUNING):
        raise UserError("--warmup-epochs must end before --epochs do; give more --epochs.")
    _check_few_shot_numbers(args)
    if (args.few_shot_data or args.few_shot_classes) and not args.few_shot:
        raise UserError("--few-shot-data and --few-shot-classes are for --few-shot (--eval-fewshot); give both.")


def _check_classifier(args: argparse.Namespace) -> None:
    _check_val_share(args)
    at_least(args, 0, "save_ckpt_freq", *_given(args, "max_minutes"))
    for lr in args.lrs:
        positive(argparse.Namespace(lr=lr), "lr")
    if len(set(args.lrs)) < len(args.lrs):
        raise UserError("--lr has the same rate twice; the two classifiers would be one.")
    if not 0 <= args.label_smoothing < 1:
        raise UserError(f"--label-smoothing must be at least 0 and below 1, not {args.label_smoothing}.")
    if args.num_classes is not None:
        at_least(args, 1, "num_classes")
    _check_modes(args)


def _check_modes(args: argparse.Namespace) -> None:
    if args.lr_find_steps is not None:
        at_least(args, 10, "lr_find_steps")
    kinds = ("--evaluate", "--knn", "--few-shot", "--lr-find")
    modes = [flag for flag in kinds if getattr(args, flag[2:].replace("-", "_"))]
    if "--lr-find" in modes and len(modes) > 1:
        raise UserError(f"{modes[0]} and --lr-find are two kinds of run; give one of them.")
    if args.lr_find and args.resume:
        raise UserError("--lr-find starts a new classifier; leave --resume out and give the encoder by --pretrained.")
    if (args.per_class or args.confusion) and modes not in ([], ["--evaluate"]):
        raise UserError(f"--per-class and --confusion show a trained classifier; {modes[-1]} has none.")


def _check_few_shot_numbers(args: argparse.Namespace) -> None:
    at_least(args, 1, "few_shot_queries")
    at_least(args, 2, "few_shot_way", "few_shot_episodes")  # one class is no question, one episode has no interval
    if min(args.few_shot_shots) < 1:
        raise UserError("--few-shot-shots counts labelled images a class and must be at least 1.")


def _check_few_shot(args: argparse.Namespace) -> None:
    _check_few_shot_numbers(args)
    if args.few_shot and args.knn:
        raise UserError("--knn and --few-shot are two measures; give one of them.")
    if args.few_shot_classes and not args.few_shot:
        raise UserError("--few-shot-classes is for --few-shot; give both.")


def _check_pretrain(args: argparse.Namespace) -> None:
    at_least(args, 1, "moco_dim", "moco_k", "accum", "max_bad_steps", "save_every", "check_every", "n_hard")
    at_least(args, 0, "keep", "max_bad_images", "max_restarts", "knn_every", "retrieval_every", "hard_start_epoch")
    at_least(args, 0, "sigma", *SYNCO_COUNTS, *_given(args, "max_minutes"))
    positive(args, "moco_t")
    for name in ("delta", "eta"):
        if not math.isfinite(getattr(args, name)):
            raise UserError(f"--{name} must be a finite number, not {getattr(args, name)}.")
    if args.compile_mode != "default" and not args.compile:
        raise UserError(f"--compile-mode {args.compile_mode} says how to --compile; give both.")
    at_least(args, 1, *_given(args, "steps", "bn_splits"))
    if not 0 <= args.moco_m <= 1:
        raise UserError(f"--moco-m is a share and must lie in 0..1, not {args.moco_m}.")
    if args.negatives != "moco" and args.n_hard > args.moco_k:
        raise UserError(f"--n-hard {args.n_hard} is more than the queue's {args.moco_k} rows; lower it.")
    if args.hard_stop_epoch is not None and args.hard_stop_epoch <= args.hard_start_epoch:
        raise UserError("--hard-stop-epoch must come after --hard-start-epoch.")
