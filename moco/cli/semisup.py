"""The flags of main_semisup.py: the released SynCo's, Barlow Twins' and BEiT-3's. No torch here."""

from __future__ import annotations

import argparse
from dataclasses import replace

from moco import doors
from moco.cli import common, compat, training
from moco.cli.parser import Parser, at_least, parse, positive, share, with_config
from moco.config import ClassifierConfig, ObjectiveConfig, ScheduleConfig, SubsetConfig
from moco.data.registry import DATASETS
from moco.errors import UserError

TUNING_LOSSES = ("ce", "supcon", "simclr", "schane")
SHORTEST_TUNING = 30  # epochs of main_semisup.py without --epochs, at least


def parse_semisup(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of main_semisup.py."""
    return parse(semisup_parser(), argv, _finish)


def semisup_parser() -> Parser:
    """The parser of main_semisup.py."""
    p = Parser(doors.typed("semisup"), "Fine-tune a pretrained encoder and a linear classifier on a share of labels.")
    common.add_data(p, of_file=True)
    _add_subset(p)
    _add_model(p)
    _add_schedule(p)
    _add_objective(p)
    _add_run(p)
    common.add_few_shot(p)
    p.group("evaluation")("--few-shot-data", default="", metavar="PATH", help="folder or list of images of new classes "
        "for --few-shot (default: the test images, whose classes were trained on)")  # fmt: skip
    compat.add_compat(p, "semisup")
    common.add_launch(p)
    return p


def _add_subset(p: Parser) -> None:
    add = p.group("data")
    add("--train-percent", type=share(100, "(]"), metavar="P", help="train on P percent of the labelled images "
        "(default: 100): SimCLR's published lists for 1 and 10 percent of ImageNet, downloaded once, otherwise a "
        "class-balanced draw")  # fmt: skip
    add("--train-files", default="", metavar="PATH", help="file of the names of the images to train on, one per line "
        "(n01440764_18.JPEG, or FOLDER/NAME); balanced: a class-balanced draw, also at 1 and 10 percent of "
        "ImageNet")  # fmt: skip
    add("--subset-seed", default=0, type=int, metavar="N", help="seed of the draw of training and held-out images "
        "(default: 0); apart from --seed, so that runs with several seeds train on the same images")  # fmt: skip
    add("--val-share", default=0.0, type=share(), metavar="X", help="hold out this share of every class's training "
        "images, evaluate on it after each epoch and on the test images once, at the end (default: 0, on the test "
        "images after each epoch)")  # fmt: skip
    add("--val-only", action="store_true", help="with --val-share: do not evaluate on the test images")
    add("--task", metavar="NAME", help="BEiT-3's: imagenet for an image folder, or a --dataset's name")
    add("--data-path", "--data-folder", "--train-folder", metavar="DIR", help="DIR as BEiT-3 and SupContrast spell it")


def _add_model(p: Parser) -> None:
    add = p.group("model")
    add("pretrained_file", metavar="FILE", nargs="?", help="Barlow Twins' spelling of --pretrained FILE")
    add("--pretrained", "--finetune", default="", metavar="PATH", help="encoder to fine-tune: the folder of a run, a "
        "checkpoint of this project, of many others or of BEiT-3, or torchvision:NAME for published weights (default: "
        "random weights, a baseline)")  # fmt: skip
    add("--weights", choices=("finetune", "freeze"), default="finetune", help="fine-tune the encoder, or freeze it")
    add("--drop-path", default=0.0, type=share(), metavar="P", help="stochastic depth of timm's networks (default: 0)")
    common.add_sync_bn(p)
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="off", help="precision of the encoder (default: off, "
        "fp32)")  # fmt: skip
    add("--channels-last", action=common.SWITCH, default=True, help="use the channels-last memory layout for "
        "convolutions (default: on)")  # fmt: skip


def _add_schedule(p: Parser) -> None:
    add = p.group("schedule")
    add("--lr-backbone", default=0.01, type=at_least(0.0), metavar="LR", help="learning rate of the encoder (default: "
        "0.01; SynCo's grid: 0.01 0.02 0.05 0.1 0.005)")  # fmt: skip
    add("--lr-classifier", default=0.5, type=positive, metavar="LR", help="learning rate of the classifier (default: "
        "0.5)")  # fmt: skip
    add("--lr", "--learning-rate", type=positive, metavar="LR", help="learning rate of encoder and classifier")
    training.add_milestones(p, None, "epochs at which the learning rates drop 10x (default: the cosine)")
    add("--cos", "--cosine", action="store_true", help="cosine decay even if --schedule is given")
    training.add_epochs(p, None, "60 below 10 percent of the images, 30 below 100, 90 for all", 1024)
    add("--update-freq", default=1, type=at_least(1), metavar="A", help="number of batches per step: their gradients "
        "are averaged, and each has its own contrastive loss (default: 1)")  # fmt: skip
    add("--warmup-epochs", default=0.0, type=at_least(0.0), metavar="E", help="raise the learning rates from 0 over E "
        "epochs; the cosine then acts at every step (default: 0, with the cosine once per epoch)")  # fmt: skip
    training.add_warm(p, "default: on, as in SupContrast's main_ce.py, for --lr with --cos or --schedule and without "
             "--pretrained at batches above 256")  # fmt: skip
    training.add_plateau(p, "the cosine: rates drop 10x when accuracy has not risen for more than E epochs")
    training.add_sgd(p, 1e-6)
    training.add_average(p)
    add = p.group("optimizer")
    add("--layer-decay", type=share(ends="()"), metavar="D", help="the learning rate of each layer is D times that of "
        "the layer above; biases and norm layers have no weight decay (default: off)")  # fmt: skip


def _add_objective(p: Parser) -> None:
    add = p.group("objective")
    add("--loss", type=str.lower, choices=TUNING_LOSSES, default="ce", help="ce: cross-entropy; the others: (1 - "
        "alpha) * cross-entropy + alpha * contrastive loss of two views per image (default: ce)")  # fmt: skip
    add("--alpha", type=share(ends="[]"), metavar="A", help="weight of the contrastive loss (default: 0.9)")
    add("--temp", type=positive, metavar="T", help="temperature of the contrastive loss (default: 0.5)")
    add("--estimator", choices=("hard", "easy"), help="schane: weigh hard negatives more, or weigh all alike (easy), "
        "which is supcon (default: hard)")  # fmt: skip
    add("--beta", type=at_least(0.0), metavar="B", help="schane: how much more hard negatives weigh (default: 1)")
    add("--smoothing", "--label-smoothing", default=0.0, type=share(), metavar="E", help="label smoothing of "
        "cross-entropy, in 0..1 (default: 0)")  # fmt: skip
    add("--mixup", default=0.0, type=at_least(0.0), metavar="A", help="alpha of timm's mixup, for cross-entropy "
        "(default: 0, off)")  # fmt: skip
    add("--cutmix", default=0.0, type=at_least(0.0), metavar="A", help="alpha of timm's CutMix, for cross-entropy "
        "(default: 0, off)")  # fmt: skip
    add("--reprob", default=0.0, type=share(ends="[]"), metavar="P", help="probability of erasing a random rectangle "
        "of an image (default: 0)")  # fmt: skip
    add = p.group("data")
    add("--aa", default="", metavar="POLICY", help="timm's AutoAugment or RandAugment policy, such as "
        "rand-m9-mstd0.5-inc1, applied after the random crop (default: none)")  # fmt: skip
    common.add_aug(p, "crop and flip", one_view=True)


def _add_run(p: Parser) -> None:
    add = p.group("run")
    add("--save-dir", "--checkpoint-dir", "--output-dir", default="./", metavar="DIR", help="folder for "
        "checkpoint_semisup.pth.tar, result.json and the log (default: ./)")  # fmt: skip
    common.add_trial(p)
    add("--save-ckpt-freq", "--save-freq", default=0, type=at_least(0), metavar="E", help="keep the checkpoint of "
        "every E-th epoch too, as checkpoint_semisup_NNNN.pth.tar (default: 0, none)")  # fmt: skip
    common.add_resume(p, "one", "random seed, but for the draw of images (default: drawn, logged and kept)")
    common.add_stop(p)
    add = p.group("evaluation")
    add("-e", "--evaluate", action="store_true", help="evaluate the checkpoint of --resume on the test images and stop")
    common.add_details(p)
    add("--dist-eval", action="store_true", help="BEiT-3's, without effect: processes always share the evaluation")


# ------------------------------------------------------------------------------------------------- after parsing


def _finish(parser: Parser, argv: list[str]) -> argparse.Namespace:
    args = with_config(parser, argv := compat.translated(parser, argv))
    _take_beit3_names(args)
    if args.data is None and args.dataset is None:
        raise UserError("give an image folder or --dataset NAME to fine-tune on.")
    if args.pretrained and args.pretrained_file:
        raise UserError("--pretrained and FILE after DIR are two spellings of one flag; give one of them.")
    args.pretrained = common.encoder_file(args.pretrained or args.pretrained_file or "")
    if args.train_percent is None and args.train_files in ("", "balanced"):
        args.train_percent = 100.0
    if args.lr is not None:
        args.lr_backbone = args.lr_classifier = args.lr
    args.save_dir = common.place(args)
    args.notes = []  # sentences for the log
    training.choose_plateau(args, parser.given(argv), parser.filed)
    _choose_schedule(args)
    _check_run(args)
    _choose_objective(args)
    _check_recipe(args)
    common.check_images(args)
    return args


def _choose_schedule(args: argparse.Namespace) -> None:
    """The cosine unless milestones are given alone, and whether a long warm-up belongs to it as in main_ce.py."""
    as_main_ce = args.lr is not None and not args.pretrained and (args.cos or args.schedule is not None)
    if args.warm is None:
        enough = args.epochs is None or args.epochs > args.warm_epochs
        args.warm = as_main_ce and args.batch_size > 256 and enough and not args.warmup_epochs
    if args.warm and args.warmup_epochs:
        raise UserError("--warm and --warmup-epochs are two warm-ups; give one of them.")
    training.check_warm(args, args.epochs or SHORTEST_TUNING)
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
            raise UserError(f"--task {args.task} is no image classification known here; give imagenet or one of "
                            f"{', '.join(DATASETS)}, the same as --dataset.")  # fmt: skip
        args.dataset = name


def _check_run(args: argparse.Namespace) -> None:
    if args.sync_bn and args.weights == "freeze":
        raise UserError("--syncBN acts on BatchNorm in training, and --weights freeze has none; leave one out.")
    if args.val_only and not args.val_share:
        raise UserError("--val-only needs --val-share, the share of the training images to validate on.")
    if args.evaluate and (args.val_only or not args.resume):
        raise UserError("--evaluate takes --resume with a fine-tuned checkpoint, and no --val-only.")


def _choose_objective(args: argparse.Namespace) -> None:
    """The defaults of the loss; UserError for the settings of another."""
    own = {"alpha": TUNING_LOSSES[1:], "temp": TUNING_LOSSES[1:], "estimator": ("schane",), "beta": ("schane",)}
    defaults = {"alpha": 0.9, "temp": 0.5, "estimator": "hard", "beta": 1.0}
    for name, losses in own.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
        elif args.loss not in losses:
            raise UserError(f"--{name} is for --loss {', '.join(losses)}; {args.loss} has none.")
    if args.loss != "ce" and args.weights == "freeze":
        raise UserError(f"--loss {args.loss} trains the encoder, which --weights freeze keeps; leave one of them out.")


def _check_recipe(args: argparse.Namespace) -> None:
    rates = [args.lr_classifier] + [args.lr_backbone] * (args.weights == "finetune")
    training.check_min_lr(args, max(rates), lowered=args.schedule is None)
    training.check_average(args)
    if args.warmup_epochs >= (args.epochs or SHORTEST_TUNING):
        raise UserError("--warmup-epochs must end before --epochs do; give more --epochs.")
    if (args.few_shot_data or args.few_shot_classes) and not args.few_shot:
        raise UserError("--few-shot-data and --few-shot-classes are for --few-shot (--eval-fewshot); give both.")


# ------------------------------------------------------------------------------------------------- typed settings


def subset_config(args: argparse.Namespace) -> SubsetConfig:
    """Which images are trained on."""
    return SubsetConfig(args.train_percent, args.train_files, args.val_share, args.subset_seed)


def classifier_config(args: argparse.Namespace) -> ClassifierConfig:
    """The network, once what a file says of it is in the flags."""
    return ClassifierConfig(
        args.arch, args.stem, args.drop_path, args.pretrained, args.weights == "freeze", args.amp, args.sync_bn,
        args.channels_last,
    )  # fmt: skip


def objective_config(args: argparse.Namespace) -> ObjectiveConfig:
    """What fine-tuning minimises."""
    return ObjectiveConfig(
        args.loss, args.alpha, args.temp, args.estimator, args.beta, args.smoothing, args.mixup, args.cutmix,
        args.reprob,
    )  # fmt: skip


def semisup_schedule(args: argparse.Namespace, epochs: int) -> ScheduleConfig:
    """How long and how fast to fine-tune."""
    return replace(
        training.schedule_config(args, epochs), cosine=args.schedule is None and args.plateau is None,
        rise=args.warmup_epochs, accum=args.update_freq, patience=args.plateau, keep_every=args.save_ckpt_freq,
    )  # fmt: skip
