"""The flags of main_lincls.py. No torch here."""

from __future__ import annotations

import argparse

from moco import doors
from moco.cli import common, compat, training
from moco.cli.parser import Parser, at_least, parse, share, with_config
from moco.errors import UserError


def parse_lincls(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of main_lincls.py."""
    return parse(lincls_parser(), argv, _finish)


def lincls_parser() -> Parser:
    """The parser of main_lincls.py."""
    text = "Train a linear classifier on frozen features (MoCo's protocol), or evaluate them by k-NN."
    p = Parser(doors.typed("lincls"), text)
    common.add_data(p, of_file=True)
    common.add_folder(p, "DIR, as SupContrast spells it", "--train-folder", "--data-folder")
    add = p.group("model")
    add("--pretrained", "--ckpt", default="", metavar="PATH", help="encoder to evaluate: the folder of a run, a "
        "checkpoint of this project or of many others, or torchvision:NAME for published weights")  # fmt: skip
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="precision of the frozen encoder (default: off, "
        "fp32)")  # fmt: skip
    add("--features", choices=("views", "cached"), default="views", help="views: augment the images anew in every "
        "epoch, as in the published protocol; cached: compute the features once, without augmentation, so that an "
        "epoch takes seconds (default: views)")  # fmt: skip
    training.add_training(p, epochs=100, lr=[30.0], schedule=[60, 80], wd=0.0)
    training.add_warm(p, "default: off")
    training.add_optimizer(p)
    p.group("optimizer")("--label-smoothing", default=0.0, type=share(), metavar="E", help="label smoothing of the "
        "training loss, in 0..1 (default: 0)")  # fmt: skip
    _add_run(p)
    _add_evaluation(p)
    compat.add_compat(p, "lincls")
    common.add_launch(p)
    return p


def _add_run(p: Parser) -> None:
    add = p.group("run")
    add("--save-dir", default="./", metavar="DIR", help="folder for checkpoint.pth.tar and the log (default: ./)")
    common.add_stop(p)
    add("--save-freq", type=int, metavar="E", help="SupContrast's flag, without effect: every epoch is saved")
    add("--save-ckpt-freq", default=0, type=at_least(0), metavar="E", help="keep the checkpoint of every E-th epoch "
        "too, as checkpoint_lincls_NNNN.pth.tar, for moco average (default: 0, none)")  # fmt: skip
    add("--lr-find", action="store_true", help="learning-rate range test: raise the rate step by step, write "
        "lr_find.csv and lr_find.png, suggest a --lr and stop")  # fmt: skip
    add("--lr-find-steps", type=at_least(10), metavar="N", help="number of steps of --lr-find (default: one epoch, at "
        "least 100)")  # fmt: skip


def _add_evaluation(p: Parser) -> None:
    add = p.group("evaluation")
    add("-e", "--evaluate", action="store_true", help="evaluate on the validation set and stop")
    add("--val-share", default=0.0, type=share(), metavar="X", help="hold out this share of every class's training "
        "images and evaluate on it, to select settings without the validation images (default: 0)")  # fmt: skip
    common.add_details(p)
    add("--knn", action="store_true", help="evaluate the frozen features by k-NN instead of a linear classifier")
    common.add_knn(p)
    common.add_few_shot(p)


# ------------------------------------------------------------------------------------------------- after parsing


def _finish(parser: Parser, argv: list[str]) -> argparse.Namespace:
    args = with_config(parser, compat.translated(parser, argv))
    args.pretrained = common.encoder_file(args.pretrained)
    args.data = common.one_folder(args)
    if args.data is None and args.dataset is None:
        raise UserError("give an image folder or --dataset NAME to classify.")
    args.lrs, args.lr = args.lr, args.lr[0]  # all that were asked for; upstream's one
    if len(set(args.lrs)) < len(args.lrs):
        raise UserError("--lr has the same rate twice; the two classifiers would be one.")
    common.check_images(args)
    _check_modes(args)
    training.check_min_lr(args, min(args.lrs), args.cos)
    training.check_warm(args, args.epochs)
    if args.few_shot_classes and not args.few_shot:
        raise UserError("--few-shot-classes is for --few-shot; give both.")
    return args


def _check_modes(args: argparse.Namespace) -> None:
    if args.few_shot and args.knn:
        raise UserError("--knn and --few-shot are two measures; give one of them.")
    kinds = ("--evaluate", "--knn", "--few-shot", "--lr-find")
    modes = [flag for flag in kinds if getattr(args, flag[2:].replace("-", "_"))]
    if "--lr-find" in modes and len(modes) > 1:
        raise UserError(f"{modes[0]} and --lr-find are two kinds of run; give one of them.")
    if args.lr_find and args.resume:
        raise UserError("--lr-find starts a new classifier; leave --resume out and give the encoder by --pretrained.")
    if (args.per_class or args.confusion) and modes not in ([], ["--evaluate"], ["--knn"]):
        raise UserError(f"--per-class and --confusion show the mistakes on each class, which {modes[-1]} does not "
                        "record; leave them out.")  # fmt: skip
