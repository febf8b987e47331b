"""The flags of main_pretrain.py: upstream's and SynCo's spelling, defaults and meaning, and ours beside them.

No torch here: a wrong flag is answered before a second of imports.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from moco import doors
from moco.cli import auto, common, compat, controls, crops, methods, projects, training
from moco.cli.mistakes import idle_negatives, idle_notes
from moco.cli.parser import Parser, at_least, parse, share, take_defaults, with_config
from moco.config import EncoderConfig, PretrainConfig, ScheduleConfig, ValidationConfig
from moco.data.augment.from_file import with_crop_min
from moco.data.registry import dataset_of
from moco.errors import UserError
from moco.resources import RECIPES

DEMO_CONFIG = str(RECIPES / "demo.yml")


def parse_pretrain(argv: list[str] | None = None, any_demo: bool = False) -> argparse.Namespace:
    """The flags of main_pretrain.py, checked and with every derived choice that needs no data made.

    ``any_demo``: without DIR any flag goes with the demo's images, where nothing is trained.
    """
    return parse(pretrain_parser(), argv, partial(_finish, any_demo=any_demo))


def pretrain_parser() -> Parser:
    """The parser of main_pretrain.py; without DIR, --dataset and a training's flags it runs the built-in demo."""
    p = Parser(
        doors.typed("pretrain"),
        "Pretrain an image encoder with a momentum encoder, a queue and synthetic hard negatives "
        "(MoCo, MoCHi, SynCo, SupCon with a queue), with in-batch negatives (SimCLR, SupCon, HCL, DCL) or by MoCo v3. "
        "Without images and training flags it runs the built-in demo on 4,000 digits.",
    )
    common.add_data(p)
    _add_views(p)
    crops.add_crops(p)
    auto.add_auto(p)
    common.add_folder(p, "DIR, as SupContrast spells it", "--data-folder", "--train-folder")
    methods.add_moco(p)
    methods.add_batch(p)
    methods.add_negatives(p)
    controls.add_control(p)
    training.add_training(p, epochs=200, lr=0.03, schedule=[120, 160], wd=1e-4)
    _add_steps(p)
    training.add_average(p)
    _add_arithmetic(p)
    _add_run(p)
    common.add_trial(p)
    compat.add_compat(p, "pretrain")
    common.add_launch(p)
    return p


def _add_views(p: Parser) -> None:
    add = p.group("data")
    add("--aug-plus", action=common.SWITCH, default=False, help="use MoCo v2's augmentation (the same as --aug v2)")
    common.add_aug(p, "v1; simclr, supcon, hcl, dcl: supcon; moco_v3: v3; sets of small images have "
        "their own")  # fmt: skip
    add("--crop-min", type=share(ends="(]"), metavar="X", help="smallest share of an image that a view keeps, the "
        "lower end of the augmentation's crop_scale (default: the augmentation's)")  # fmt: skip
    add("--aug-device", choices=("cpu", "gpu", "auto"), default="auto", help="where views are made after their crop: "
        "cpu, by the loader's processes, or gpu, in batches on the run's device (default: auto, which is "
        "cpu)")  # fmt: skip
    add("--decode", choices=("exact", "fast"), default="exact", help="fast: decode a JPEG only as finely as its crops "
        "need, which changes pixel values by at most two levels (default: exact)")  # fmt: skip
    add("--stats", choices=("auto",), help="auto: --mean and --std are those of the training images, computed once and "
        "kept in --cache or --save-dir")  # fmt: skip
    add("--drop-last", action=common.SWITCH, default=True, help="drop the incomplete batch at the end of an epoch "
        "(default: on)")  # fmt: skip


def _add_steps(p: Parser) -> None:
    add = p.group("schedule")
    add("--steps", type=at_least(1), metavar="N", help="train for N optimizer steps instead of --epochs")
    training.add_plateau(p, "--schedule: the learning rate drops 10x when the mean loss of an epoch has not fallen for "
        "more than E epochs")  # fmt: skip
    training.add_warm(p, "default: on for simclr, supcon, hcl, dcl at batches above 256")
    add("--warm-steps", type=at_least(1), metavar="N", help="instead of --warm: raise the learning rate from "
        "--warm-from over N steps; also with --steps")  # fmt: skip
    add("--rise-epochs", default=0.0, type=at_least(0.0), metavar="E", dest="rise", help="instead of --warm: raise the "
        "learning rate linearly from 0 over E epochs, then decay it by --cos or --plateau, both at every step "
        "(default: 0; MoCo v3's recipes use it)")  # fmt: skip
    add("--accum", default=1, type=at_least(1), metavar="A", help="number of batches per step: their gradients are "
        "averaged, keys are enqueued after each, and the key encoder is updated once (default: 1)")  # fmt: skip


def _add_arithmetic(p: Parser) -> None:
    add = p.group("arithmetic")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="precision of the encoders (default: "
        "auto, bf16 where the device has it; the loss is always fp32)")  # fmt: skip
    add("--channels-last", action=common.SWITCH, default=True, help="use the channels-last memory layout for "
        "convolutions (default: on)")  # fmt: skip
    add("--compile", action="store_true", help="compile the two encoders by torch.compile (default: off)")
    add("--compile-mode", choices=("default", "reduce-overhead", "max-autotune"), default="default",
        help="mode of torch.compile; the last two replay the encoders as CUDA graphs (default: default)")  # fmt: skip
    add("--recompute", action="store_true", help="save memory for larger batches: recompute part of the forward pass "
        "in the backward pass (default: off)")  # fmt: skip


def _add_run(p: Parser) -> None:
    add = p.group("run")
    add("--save-dir", metavar="DIR", help="folder for checkpoints and logs (default: ./; the demo's: runs/demo)")
    add("--save-every", "--save-freq", default=1, type=at_least(1), metavar="E", help="number of epochs between "
        "checkpoints (default: 1)")  # fmt: skip
    add("--keep", default=0, type=at_least(0), metavar="N", help="keep only the newest N checkpoints (default: 0, all)")
    common.add_stop(p)
    add("--max-restarts", default=0, type=at_least(0), metavar="N", help="with --nproc: restart from the newest good "
        "checkpoint when a process dies, at most N times (default: 0; torchrun has its own flag)")  # fmt: skip
    add("--max-bad-steps", default=5, type=at_least(1), metavar="N", help="stop after N steps in a row with a "
        "non-finite loss or gradient (default: 5)")  # fmt: skip
    add("--max-bad-images", default=100, type=at_least(0), metavar="N", help="stop when more than N images are "
        "unreadable (default: 100)")  # fmt: skip
    add("--check-every", default=1000, type=at_least(1), metavar="N", help="number of steps between checks that the "
        "queues of all processes are equal (default: 1000)")  # fmt: skip
    add("--wandb", metavar="PROJECT", help="log to this project of Weights & Biases too (needs the extra wandb)")
    add = p.group("evaluation")
    add("--knn-every", default=10, type=at_least(0), metavar="E", help="number of epochs between k-NN evaluations "
        "(default: 10; 0: never)")  # fmt: skip
    add("--retrieval-every", default=0, type=at_least(0), metavar="E", help="number of epochs between retrieval and "
        "clustering metrics of held-out images, before and after the projection head: precision@1, R-precision, mAP@R, "
        "mAP, AMI, NMI (default: 0, never)")  # fmt: skip
    add("--rankme-every", type=at_least(0), metavar="E", help="number of epochs between measurements of RankMe, the "
        "effective rank of the features of at most 25,600 training images, which needs no labels (default: as "
        "--knn-every)")  # fmt: skip
    add("--online-probe", action=common.SWITCH, help="train a linear classifier beside the encoder, on its features "
        "and without a gradient into it, so that the log has its accuracy (default: where the images have "
        "labels)")  # fmt: skip
    common.add_knn(p)


# ------------------------------------------------------------------------------------------------- after parsing


def _finish(parser: Parser, argv: list[str], any_demo: bool = False) -> argparse.Namespace:
    argv = compat.translated(parser, argv)
    args = with_config(parser, argv)
    args.data = common.one_folder(args)
    typed = parser.given(argv)
    methods.read_type_starts(args.type_starts)  # which takes a DIR behind it for one of its own
    args.demo = args.data is None and args.dataset is None
    if args.demo:
        if not any_demo:
            _check_demo(typed, parser.words)
        take_defaults(parser, DEMO_CONFIG)  # a layer below the user's own file and flags
        args = with_config(parser, argv)
        args.demo = True
    args.save_dir = args.save_dir or ("runs/demo" if args.demo else "./")
    args.save_dir = common.place(args)
    args.notes = list[str]()  # sentences for the log
    auto.note_open(args, typed, parser.filed)
    methods.choose_method(args, typed)
    methods.choose_family(args, typed, parser.filed)
    if args.crop_min is not None:
        args.aug = with_crop_min(_aug(args) or dataset_of(args.dataset).preset, args.crop_min)
    crops.check_crops(args, typed)
    args.notes += [*idle_notes(args, typed), *idle_negatives(args, typed, parser.filed)]
    args.type_starts, args.type_start_steps = methods.read_type_starts(args.type_starts)
    common.check_images(args)
    training.choose_plateau(args, typed, parser.filed)
    training.check_min_lr(args, args.lr, args.cos or args.plateau is not None)
    if args.rise and not args.cos and args.plateau is None:
        raise UserError("--rise-epochs goes with --cos or --plateau, not with --schedule; give one of them.")
    training.check_average(args)
    auto.check_negatives(args)
    if args.compile_mode != "default" and not args.compile:
        raise UserError(f"--compile-mode {args.compile_mode} says how to --compile; give both.")
    methods.check_type_starts(args, typed)
    controls.check_control(args, typed)
    return args


def _check_demo(typed: dict[str, Any], words: Sequence[str]) -> None:
    """UserError where flags of a training, perhaps another program's, came without images. The demo takes what says
    where a run writes, how it is started, watched and stopped."""
    p = Parser()
    for add in (common.add_launch, common.add_trial, _add_run):
        add(p)
    known = {action.dest for action in p.actions()}
    known |= {"resume", "seed", "workers", "print_freq", "download", "cache"}
    if more := [name for name in typed if name not in known]:
        raise UserError(
            f"--{more[0].replace('_', '-')} is a flag of training, but no images are named: give DIR, or --dataset "
            "NAME (mnist5k: the built-in digits). Without such flags it is the demo; to change the "
            f"demo's recipe, give --config configs/demo.yml.{projects.whole('pretrain', words)}"
        )


# ------------------------------------------------------------------------------------------------- typed settings


def pretrain_config(args: argparse.Namespace) -> PretrainConfig:
    """The model and its training."""
    compiled = args.compile_mode if args.compile else None
    return PretrainConfig(
        method=args.method,
        family=args.family,
        views=crops.view_config(args, _aug(args)),
        encoder=EncoderConfig(args.arch, args.moco_dim, args.mlp, args.stem, compiled, args.begin_with),
        model=methods.model_config(args),
        optimizer=training.encoder_optimizer(args, args.lr),
        schedule=pretrain_schedule(args),
        validation=validation_config(args),
        amp=args.amp,
        seed=args.seed,
    )


def _aug(args: argparse.Namespace) -> str | None:
    return args.aug or ("v2" if args.aug_plus else None)


def validation_config(args: argparse.Namespace) -> ValidationConfig:
    """What is measured between epochs."""
    ranked = args.knn_every if args.rankme_every is None else args.rankme_every
    return ValidationConfig(args.knn_every, args.retrieval_every, tuple(args.knn_k), args.knn_t, ranked)


def pretrain_schedule(args: argparse.Namespace) -> ScheduleConfig:
    """How long and how fast."""
    epochs, steps = methods.negatives_config(args).changes()
    milestones = () if args.plateau is not None else tuple(args.schedule)
    return replace(
        training.schedule_config(args, args.epochs), steps=args.steps, lr=args.lr, milestones=milestones,
        patience=args.plateau, warm_steps=args.warm_steps or 0, changes=epochs, change_steps=steps, accum=args.accum,
        max_bad_steps=args.max_bad_steps, check_every=args.check_every, rise=args.rise,
    )  # fmt: skip


def what_next(args: argparse.Namespace, labelled: Any) -> str:
    """The command to type once the run is finished: the probe of its encoder, or without ``labelled`` images (None)
    the map of its features."""
    folder = os.path.normpath(args.save_dir)
    images = [*(["--dataset", args.dataset] if args.dataset else []), *([args.data] if args.data else [])]
    if labelled is None:
        return doors.beside("embed", ["--out", os.path.join(folder, "features"), folder, *images])
    own = {"--val-data": args.val_data, "--channels": args.channels}
    more = [word for flag, value in own.items() if value is not None for word in (flag, str(value))]
    probe = "lincls" if folder == os.curdir else f"{folder}_lincls"
    return doors.beside("lincls", ["--pretrained", folder, "--save-dir", probe, *more, *images])
