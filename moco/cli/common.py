"""Flags that several programs share, by their groups in --help, and what they come to. No torch here."""

from __future__ import annotations

import argparse
import os
from typing import Any

from moco import run_folder
from moco.cli.parser import Parser, at_least, finite, positive, whole
from moco.config import FewShotConfig
from moco.data.augment.from_file import augmentation, one_augmentation
from moco.data.augment.presets import PRESETS
from moco.data.registry import DATASETS, MOST_CHANNELS
from moco.errors import STOP_EXIT, UserError, tell

SWITCH = argparse.BooleanOptionalAction

# ------------------------------------------------------------------------------------------------------ flags


def encoder_file(path: str) -> str:
    """The file of an encoder, also where the folder of a run was given, which is told."""
    found = run_folder.encoder_file(path)
    if found != path:
        tell(f"{path}: the checkpoint {os.path.basename(found)} of this run is taken", error=True)
    return found


def add_data(p: Parser, of_file: bool = False) -> None:
    """The images and the network, the same for every program that reads images; of_file: one that evaluates a file,
    whose settings hold where none is typed (moco/weights/settings.py)."""
    add, files = p.group("data"), "the file's, else " if of_file else ""
    add("data", metavar="DIR", nargs="?", help="the images: a folder (with or without train/ and val/), a text file of "
        "paths, or the root of --dataset")  # fmt: skip
    add("--config", metavar="FILE.yml", help="read defaults from this YAML file or from the recipe of this name; flags "
        "override them")  # fmt: skip
    add("--dataset", type=_dataset, choices=DATASETS, help="use a known data set instead of an image folder")
    add("--download", action="store_true", help="let --dataset download its files")
    add("--cache", metavar="DIR", help="folder in which decoded images are kept and mapped into memory, for sets of "
        "small images: each is decoded once instead of in every epoch (20 GB at most)")  # fmt: skip
    add("--val-data", "--test-folder", metavar="PATH", help="labelled validation images, where DIR does not hold them")
    add("--size", "--input-size", type=at_least(8), metavar="PX", help="side of the square views in pixels (default: "
        f"{files}224; sets of small images have their own size)")  # fmt: skip
    add("--channels", type=whole(1, MOST_CHANNELS), metavar="N", help="read the images as grey (1) or colour (3), or "
        f".npy and TIFF files by their N channels, bands or pages (default: {files}the data set's)")  # fmt: skip
    add_levels(p, "the file's, else those of" if of_file else "those of")
    add_statistics(p, f"(default: {files}the data set's)")
    add_workers(
        p, 32, "on this machine, for all processes together (default: 32, at most one per core)", "--num-workers"
    )
    add = p.group("model")
    add("-a", "--arch", "--model", default=None if of_file else "resnet50", metavar="ARCH", help="name of a "
        f"torchvision or timm network (default: {files}resnet50)")  # fmt: skip
    add("--stem", choices=("auto", "imagenet", "cifar"), default="auto", help="cifar: a 3x3 first convolution without "
        f"pooling; auto: {files}cifar up to 64 px")  # fmt: skip


def _dataset(name: str) -> str:
    return "folder" if name == "path" else name  # SupContrast's


def add_levels(p: Parser, default: str) -> None:
    p.group("data")("--levels", type=finite, nargs=2, metavar=("LOW", "HIGH"), help="values of the image files that "
        "become black and white, linear between and clipped beyond, for images that are not of 0 to 255: 0 4095 for 12 "
        f"bits in 16 (default: {default} the files' type, 0 65535 of 16 bits; of floats 0 1 or 0 255, as a few images "
        "have them)")  # fmt: skip


def add_statistics(p: Parser, default: str) -> None:
    add = p.group("data")
    add("--mean", type=finite, nargs="+", metavar="X", help=f"mean of each channel, in 0..1 {default}")
    add("--std", type=positive, nargs="+", metavar="X", help=f"standard deviation of each channel, in 0..1 {default}")


def add_aug(p: Parser, default: str, one_view: bool = False) -> None:
    kind = one_augmentation if one_view else augmentation
    p.group("data")("--aug", type=kind, metavar="PRESET", help=f"augmentation: {', '.join(PRESETS)}, or FILE.yml, a "
        f"file of your own with a preset's values (default: {default})")  # fmt: skip


def add_workers(p: Parser, default: int, text: str, *more: str) -> None:
    p.group("data")("-j", "--workers", *more, default=default, type=at_least(0), metavar="N", help="number of loader "
        f"processes {text}")  # fmt: skip


def add_batch_size(p: Parser, default: int = 256, where: str = "schedule") -> None:
    p.group(where)("-b", "--batch-size", default=default, type=at_least(1), metavar="N", help="images per step, over "
        f"all processes of this node (default: {default})")  # fmt: skip


def add_resume(p: Parser, which: str, seed: str) -> None:
    """The log's step, --resume and --seed."""
    add = p.group("run")
    add("-p", "--print-freq", default=10, type=at_least(1), metavar="N", help="number of steps between log lines "
        "(default: 10)")  # fmt: skip
    add("--resume", default="", metavar="PATH", help=f"checkpoint to resume from; auto: the {which} in --save-dir")
    add("--seed", type=int, help=seed)


def add_stop(p: Parser) -> None:
    """--overwrite, --report, and when a run stops, is saved and counts as hanging."""
    add = p.group("run")
    add("--report", action=SWITCH, default=True, help="write report.html, a page with the curves of the run, into "
        "--save-dir at its end (default: on)")  # fmt: skip
    add("--overwrite", action="store_true", help="start a new run in a folder that holds another run")
    add("--max-minutes", type=at_least(0.0), metavar="M", help="save and stop after M minutes (default: no limit)")
    add("--stop-code", type=int, choices=(0, STOP_EXIT), help="exit code of a run that --max-minutes or SIGUSR1 has "
        "stopped (default: 75; under torchrun, which takes any other code for a failure, 0)")  # fmt: skip
    add("--save-minutes", type=positive, metavar="M", help="save within an epoch too, M minutes after the last save "
        "(default: only at the end of an epoch)")  # fmt: skip
    add("--save-steps", type=at_least(1), metavar="S", help="save within an epoch too, S steps after the last save "
        "(default: only at the end of an epoch)")  # fmt: skip
    add("--hang-minutes", default=10.0, type=at_least(0.0), metavar="M", help="when a step has made no progress for M "
        "minutes, name the process that holds it up and exit with code 75 (default: 10; 0: never)")  # fmt: skip
    add("--data-patience", default=10.0, type=at_least(0.0), metavar="M", help="when the images or the disk are "
        "unreachable, wait M minutes for them, then exit with code 75 (default: 10)")  # fmt: skip


def add_max_bad(p: Parser, where: str = "evaluation") -> None:
    p.group(where)("--max-bad-images", type=at_least(0), metavar="N", help="largest number of unreadable images of a "
        "set that are left out; more end the program (default: half of the set, at most 100, or 1 %% of more than "
        "10,000)")  # fmt: skip


def add_sync_bn(p: Parser) -> None:
    p.group("model")("--sync-bn", "--syncBN", action="store_true", help="BatchNorm over the batch of all processes")


def add_trial(p: Parser) -> None:
    p.group("run")("--trial", metavar="NAME", help="write the run to --save-dir/trial_NAME")


def add_folder(p: Parser, help: str, *spellings: str) -> None:
    """SupContrast's DIR and --num-classes."""
    add = p.group("data")
    add(*spellings, dest="train_folder", metavar="DIR", help=help)
    add("--num-classes", type=at_least(1), metavar="C", help="number of classes; only checked, the data decide")


def add_launch(p: Parser) -> None:
    """How many processes there are and how they meet."""
    add = p.group("processes")
    add("--world-size", default=-1, type=int, help="number of nodes (--multiprocessing-distributed) or processes")
    add("--rank", default=-1, type=int, help="number of this node or process, from 0")
    add("--dist-url", metavar="URL", help="address at which the processes of several nodes meet, tcp://HOST:PORT")
    add("--dist-backend", default="nccl", help="communication backend: nccl, or gloo, which is chosen where there are "
        "no GPUs")  # fmt: skip
    add("--gpu", type=int, help="number of the GPU to use")
    add("--multiprocessing-distributed", action="store_true", help="start one process per GPU (or --nproc processes) "
        "on each node")  # fmt: skip
    add("--nproc", type=int, metavar="N", help="number of processes on this node; gloo connects them without GPUs")


def add_knn(p: Parser) -> None:
    add = p.group("evaluation")
    add("--knn-k", default=[200], nargs="+", type=at_least(1), metavar="k", help="number of neighbours; several "
        "numbers are evaluated in one pass, and the first is reported as knn (default: 200)")  # fmt: skip
    add("--knn-t", default=0.1, type=positive, metavar="T", help="temperature of the neighbours' votes (default: 0.1)")


def add_details(p: Parser) -> None:
    """Accuracy per class and confusions, and how many images may be missing."""
    add = p.group("evaluation")
    add("--per-class", metavar="FILE.csv", help="write top-1, top-5 and the most frequent mistake of each class to "
        "this file")  # fmt: skip
    add("--confusion", action="store_true", help="write the confusion matrix to confusion.csv and confusion.png in "
        "--save-dir (of --knn: knn_confusion)")  # fmt: skip
    add_max_bad(p)


def add_few_shot(p: Parser) -> None:
    """Few-shot episodes; one class is no question, one episode has no interval."""
    add = p.group("evaluation")
    add("--few-shot", "--eval-fewshot", action="store_true", help="evaluate frozen features on few-shot episodes: "
        "logistic regression on a few images per class, mean accuracy with its 95 %% interval")  # fmt: skip
    add("--few-shot-classes", default="", metavar="FILE", help="file with the classes to draw from, one per line, or "
        "miniImageNet's CSV with the columns filename,label (default: all classes, held-out images only)")  # fmt: skip
    add("--few-shot-way", default=5, type=at_least(2), metavar="N", help="number of classes per episode (default: 5)")
    add("--few-shot-shots", default=[1, 5], nargs="+", type=at_least(1), metavar="N", help="number of labelled images "
        "per class, one result for each number (default: 1 5)")  # fmt: skip
    add("--few-shot-queries", default=15, type=at_least(1), metavar="N", help="number of images to classify per class "
        "(default: 15)")  # fmt: skip
    add("--few-shot-episodes", default=600, type=at_least(2), metavar="N", help="number of episodes (default: 600)")


# ------------------------------------------------------------------------------- what several flags say together


def place(args: argparse.Namespace) -> str:
    """The folder of the run."""
    return args.save_dir if args.trial is None else os.path.join(args.save_dir, f"trial_{args.trial}")


def one_folder(args: argparse.Namespace) -> str | None:
    """DIR, by either spelling."""
    if args.data is not None and args.train_folder is not None:
        raise UserError("DIR and --train-folder are the same thing; give one of them.")
    return args.train_folder if args.data is None else args.data


def check_levels(levels: list[float] | None) -> None:
    """UserError where they are no range."""
    if levels and not levels[0] < levels[1]:
        raise UserError("--levels LOW HIGH: LOW becomes black and HIGH white, so give the lower value first.")


def check_images(args: argparse.Namespace) -> None:
    """UserError where --mean and --std are not of the channels of one image, or --levels are no range."""
    check_levels(getattr(args, "levels", None))
    if getattr(args, "stats", None) and not args.mean is args.std is None:
        raise UserError("--stats auto computes what --mean and --std say; give one of them.")
    lengths = {len(x) for x in (args.mean, args.std) if x is not None}
    wanted = {args.channels} if getattr(args, "channels", None) else set(range(1, MOST_CHANNELS + 1))
    if lengths - wanted or len(lengths) > 1:
        number = str(args.channels) if len(wanted) == 1 else f"1 for grey, 3 for colour, at most {MOST_CHANNELS}"
        raise UserError(f"--mean and --std take one value a channel: {number}, the same number for both.")


# ------------------------------------------------------------------------------------------------- typed settings


def image_options(args: argparse.Namespace) -> dict[str, Any]:
    """How images are opened: the options of :func:`moco.data.open_on_nodes`."""
    own = {"channels": args.channels, "levels": args.levels}
    return {"download": args.download, "val_path": args.val_data, "cache": args.cache, **own}


def few_shot_config(args: argparse.Namespace, seed: int) -> FewShotConfig:
    """The episodes."""
    shots = tuple(args.few_shot_shots)
    return FewShotConfig(args.few_shot_way, shots, args.few_shot_queries, args.few_shot_episodes, seed)
