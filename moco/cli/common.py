"""Flags that several programs share, by their groups in --help, and what they come to. No torch here."""

from __future__ import annotations

import argparse
import os

from moco import run_folder
from moco.cli.parser import Parser, at_least, finite, positive
from moco.config import FewShotConfig
from moco.data.registry import DATASETS
from moco.errors import UserError, tell

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
    add("data", metavar="DIR", nargs="?", help="image folder (with or without train/ and val/), a text file of paths, "
        "or the root of --dataset")  # fmt: skip
    add("--config", metavar="FILE.yml", help="defaults from a file or a recipe's name; flags override them")
    add("--dataset", type=_dataset, choices=DATASETS, help="a known data set instead of an image folder")
    add("--download", action="store_true", help="let --dataset fetch its files")
    add("--cache", metavar="DIR", help="keep decoded images in this folder, for sets of small images: decoded once "
        "instead of in every epoch, then mapped into memory (20 GB at most)")  # fmt: skip
    add("--val-data", "--test-folder", metavar="PATH", help="labelled validation images when DIR does not hold them")
    add("--size", "--input-size", type=at_least(8), metavar="PX",
        help=f"side of the square views (default: {files}224, small sets their own size)")  # fmt: skip
    add("--channels", type=int, choices=(1, 3), help="read images as grey (1) or colour (3; default: "
        f"{files}the data set's)")  # fmt: skip
    add_statistics(p, f"(default: {files}the data set's)")
    add_workers(p, 32, "on this machine in all (default: 32, never more than its cores)", "--num-workers")
    add = p.group("model")
    add("-a", "--arch", "--model", default=None if of_file else "resnet50", metavar="ARCH",
        help=f"torchvision or timm network (default: {files}resnet50)")  # fmt: skip
    add("--stem", choices=("auto", "imagenet", "cifar"), default="auto", help="cifar: 3x3 and no pooling; auto: "
        f"{files}cifar up to 64 px")  # fmt: skip


def _dataset(name: str) -> str:
    return "folder" if name == "path" else name  # SupContrast's


def add_statistics(p: Parser, default: str) -> None:
    add = p.group("data")
    add("--mean", type=finite, nargs="+", metavar="X", help=f"channel means in 0..1 {default}")
    add("--std", type=positive, nargs="+", metavar="X", help=f"channel deviations in 0..1 {default}")


def add_workers(p: Parser, default: int, text: str, *more: str) -> None:
    p.group("data")("-j", "--workers", *more, default=default, type=at_least(0), metavar="N",
                    help=f"loader processes {text}")  # fmt: skip


def add_batch_size(p: Parser, default: int = 256, where: str = "schedule") -> None:
    p.group(where)("-b", "--batch-size", default=default, type=at_least(1), metavar="N",
                   help=f"images a step over all processes of this node (default: {default})")  # fmt: skip


def add_resume(p: Parser, which: str, seed: str) -> None:
    """The log's step, --resume and --seed."""
    add = p.group("run")
    add("-p", "--print-freq", default=10, type=at_least(1), metavar="N", help="steps between log lines (default: 10)")
    add("--resume", default="", metavar="PATH", help=f"continue this checkpoint; auto: the {which} in --save-dir")
    add("--seed", type=int, help=seed)


def add_stop(p: Parser) -> None:
    """--overwrite, and when a run stops, is saved and counts as hanging."""
    add = p.group("run")
    add("--overwrite", action="store_true", help="start afresh in a folder that holds another run")
    add("--max-minutes", type=at_least(0.0), metavar="M", help="save and stop (exit code 0) after M minutes")
    add("--save-minutes", type=positive, metavar="M", help="also save inside an epoch, M minutes after the last save "
        "(default: only at epochs' ends)")  # fmt: skip
    add("--save-steps", type=at_least(1), metavar="S", help="the same, S steps after the last save")
    add("--hang-minutes", default=10.0, type=at_least(0.0), metavar="M", help="when a step stands still for M minutes, "
        "name the process that holds it up and end with exit code 75 (default: 10; 0: never)")  # fmt: skip
    add("--data-patience", default=10.0, type=at_least(0.0), metavar="M", help="wait M minutes for images or a disk "
        "that are gone, then stop (exit code 75; default: 10)")  # fmt: skip


def add_sync_bn(p: Parser) -> None:
    p.group("model")("--sync-bn", "--syncBN", action="store_true", help="BatchNorm over the batch of all processes")


def add_trial(p: Parser) -> None:
    p.group("run")("--trial", metavar="NAME", help="put the run into --save-dir/trial_NAME")


def add_folder(p: Parser, help: str, *spellings: str) -> None:
    """SupContrast's DIR and --num-classes."""
    add = p.group("data")
    add(*spellings, dest="train_folder", metavar="DIR", help=help)
    add("--num-classes", type=at_least(1), metavar="C", help="checked against the data, which decides by itself")


def add_launch(p: Parser) -> None:
    """How many processes there are and how they meet."""
    add = p.group("processes")
    add("--world-size", default=-1, type=int, help="nodes (with --multiprocessing-distributed) or processes")
    add("--rank", default=-1, type=int, help="this node's or process's number")
    add("--dist-url", metavar="URL", help="where the processes of several nodes meet, tcp://HOST:PORT")
    add("--dist-backend", default="nccl", help="nccl, or gloo without GPUs (chosen by itself)")
    add("--gpu", type=int, help="use this GPU")
    add("--multiprocessing-distributed", action="store_true", help="one process a GPU (or --nproc) on each node")
    add("--nproc", type=int, metavar="N", help="processes on this node; without GPUs they use gloo")


def add_knn(p: Parser) -> None:
    add = p.group("evaluation")
    add("--knn-k", default=[200], nargs="+", type=at_least(1), metavar="k", help="neighbours; several numbers are "
        "answered in one pass, the first is reported as knn (default: 200)")  # fmt: skip
    add("--knn-t", default=0.1, type=positive, metavar="T", help="temperature of the votes (default: 0.1)")


def add_few_shot(p: Parser) -> None:
    """Few-shot episodes; one class is no question, one episode has no interval."""
    add = p.group("evaluation")
    add("--few-shot", "--eval-fewshot", action="store_true", help="few-shot accuracy of the frozen features: logistic "
        "regression on few images a class, mean and 95 %% interval over episodes")  # fmt: skip
    add("--few-shot-classes", default="", metavar="FILE", help="the classes to draw from, one a line, or "
        "miniImageNet's CSV of filename,label (default: all, held-out images only)")  # fmt: skip
    add("--few-shot-way", default=5, type=at_least(2), metavar="N", help="classes an episode (default: 5)")
    add("--few-shot-shots", default=[1, 5], nargs="+", type=at_least(1), metavar="N",
        help="labelled images a class (1 5)")  # fmt: skip
    add("--few-shot-queries", default=15, type=at_least(1), metavar="N", help="images to classify a class "
        "(default: 15)")  # fmt: skip
    add("--few-shot-episodes", default=600, type=at_least(2), metavar="N", help="episodes (default: 600)")


# ------------------------------------------------------------------------------- what several flags say together


def place(args: argparse.Namespace) -> str:
    """The folder of the run."""
    return args.save_dir if args.trial is None else os.path.join(args.save_dir, f"trial_{args.trial}")


def one_folder(args: argparse.Namespace) -> str | None:
    """DIR, by either spelling."""
    if args.data is not None and args.train_folder is not None:
        raise UserError("DIR and --train-folder are the same thing; give one of them.")
    return args.train_folder if args.data is None else args.data


def check_images(args: argparse.Namespace) -> None:
    """UserError where --mean and --std are not of the channels of one image."""
    lengths = {len(x) for x in (args.mean, args.std) if x is not None}
    if lengths - {1, 3} or len(lengths) > 1:
        raise UserError("--mean and --std take one value a channel: 1 or 3, the same number for both.")


# ------------------------------------------------------------------------------------------------- typed settings


def few_shot_config(args: argparse.Namespace, seed: int) -> FewShotConfig:
    """The episodes."""
    shots = tuple(args.few_shot_shots)
    return FewShotConfig(args.few_shot_way, shots, args.few_shot_queries, args.few_shot_episodes, seed)
