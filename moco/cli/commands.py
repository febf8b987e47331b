"""The flags of the commands ``moco NAME`` but the three mains and sweep; no torch here."""

from __future__ import annotations

import argparse
import os

from moco import doors
from moco.cli.common import (
    add_aug,
    add_batch_size,
    add_data,
    add_launch,
    add_levels,
    add_max_bad,
    add_statistics,
    add_workers,
    check_images,
    encoder_file,
)
from moco.cli.flag_classes import command_of
from moco.cli.parser import Parser, at_least, parse, positive, with_config
from moco.cli.pretrain import DEMO_CONFIG, parse_pretrain, pretrain_config
from moco.data.registry import DATASETS
from moco.errors import UserError

EXPORTS = ("torchvision", "timm", "hub", "detectron2", "safetensors", "onnx", "features")


def export_parser() -> Parser:
    p = Parser(doors.typed("export"), "Write a checkpoint's backbone for other tools.")
    add = p.add_argument
    add("checkpoint", type=encoder_file, metavar="CKPT", help="the folder of a run, or a checkpoint of this "
        "project, MoCo v1 to v3, SynCo, SupContrast, Barlow Twins, lightly, solo-learn, torchvision or "
        "timm")  # fmt: skip
    add("--to", required=True, choices=EXPORTS, help="format to write; hub: a folder for timm in the layout of "
        "the Hugging Face Hub")  # fmt: skip
    add("--out", metavar="FILE", help="file or folder to write (default: beside CKPT, named after it)")
    p.set_defaults(spelled=command_of)
    add("--head", choices=("drop", "keep"), default="drop", help="keep: export the linear classifier of the file too, "
        "for logits instead of features (torchvision, timm, hub, onnx; default: drop)")  # fmt: skip
    add("-a", "--arch", default="", metavar="ARCH", help="name of a torchvision or timm network (default: the file's)")
    add(
        "--stem",
        choices=("auto", "imagenet", "cifar"),
        default="auto",
        help="first layers of a ResNet (default: the file's)",
    )
    add("--size", type=at_least(8), metavar="PX", help="side of the images in pixels (default: the file's)")
    add("--dataset", choices=DATASETS, help="data set whose channel statistics go into the card (default: the run's)")
    add_statistics(p, "(default: the run's), for the card")
    return p


def describe_parser() -> Parser:
    text = "Say what a checkpoint is and whether it is intact: exit code 0 if so, 1 if not, 2 if it cannot be read."
    p = Parser(doors.typed("describe"), text)
    text = "any checkpoint that moco export reads, or the folder of a run"
    p.add_argument("checkpoint", type=encoder_file, metavar="CKPT", help=text)
    return p


def average_parser() -> Parser:
    p = Parser(doors.typed("average"), "Average the weights of several checkpoints.")
    add = p.add_argument
    add("checkpoints", metavar="CKPT", nargs="+", help="checkpoints of one network, or the folder of a run")
    add("--last", type=at_least(2), metavar="N", help="average the newest N epochs of the folder")
    add("--best", type=at_least(2), metavar="N", help="average the N epochs of the folder with the highest "
        "accuracy (fine-tuning, probe) or k-NN accuracy (pretraining)")  # fmt: skip
    add("--out", metavar="FILE", help="file to write (default: averaged.pth.tar beside the checkpoints)")
    add("--refresh", action=argparse.BooleanOptionalAction, default=True, help="recompute BatchNorm's running "
        "statistics on --data (default: on)")  # fmt: skip
    add("--data", metavar="DIR", help="training images: a folder, a list of paths, or the root of --dataset")
    add("--dataset", choices=DATASETS, help="use a known data set instead of a folder")
    add("--download", action="store_true", help="let --dataset download its files")
    add_aug(p, "the run's, else crop and flip; for --data")
    add("-a", "--arch", default="", metavar="ARCH", help="name of a torchvision or timm network (default: the file's)")
    add("--size", type=at_least(8), metavar="PX", help="side of the images in pixels (default: the run's)")
    add_levels(p, "the run's, else those of")
    add_statistics(p, "(default: the run's)")
    add("-b", "--batch-size", default=256, type=at_least(1), metavar="N", help="images per batch (default: 256)")
    add_workers(p, 4, "(default: 4)")
    return p


def parse_average(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of python -m moco.average."""
    return parse(average_parser(), argv, _finish_average)


def _finish_average(parser: Parser, argv: list[str]) -> argparse.Namespace:
    args = parser.parse_intermixed_args(argv)
    if args.last is not None and args.best is not None:
        raise UserError("--last and --best are two choices of checkpoints; give one of them.")
    counts = [name for name in ("last", "best") if getattr(args, name) is not None]
    if counts and (len(args.checkpoints) > 1 or not os.path.isdir(args.checkpoints[0])):
        raise UserError(f"--{counts[0]} chooses from the folder of a run; give that alone.")
    check_images(args)
    return args


def embed_parser() -> Parser:
    """The parser of moco.embed."""
    text = "Write the features of images to a file, and a map of them as a picture and a page."
    p = Parser(doors.typed("embed"), text)
    add = p.add_argument
    add_read(p)
    add("--out", default="embedding", metavar="DIR", help="folder to write to (default: embedding)")
    add("--format", choices=("npz", "safetensors"), default="npz", help="format of the features (default: npz)")
    add("--picture", choices=("tsne", "umap", "pacmap", "none"), default="tsne", help="projection of the "
        "features to two dimensions (default: tsne; the extras umap and pacmap install the others)")  # fmt: skip
    add(
        "--points",
        default=2000,
        type=at_least(10),
        metavar="N",
        help="largest number of images in the picture (default: 2000)",
    )
    add("--beside", metavar="CKPT", help="second checkpoint, whose map of the same images is drawn beside the first")
    add("--seed", default=0, type=int, help="seed of the choice of images and of the picture (default: 0)")
    add_launch(p)
    return p


def parse_embed(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of moco.embed."""
    return parse(embed_parser(), argv, _finish_embed)


def _finish_embed(parser: Parser, argv: list[str]) -> argparse.Namespace:
    args = finish_read(parser, argv)
    if args.beside is not None:
        if args.picture == "none":
            raise UserError("--beside draws a second map and --picture none draws none; leave one of them out.")
        args.beside = encoder_file(args.beside)
    return args


def retrieval_parser() -> Parser:
    """The parser of moco.retrieval."""
    text = "Retrieval and clustering metrics of frozen features, before and after the projection head."
    p = Parser(doors.typed("retrieval"), text)
    add_read(p)
    p.add_argument("--out", default="./", metavar="DIR", help="folder for retrieval.json (default: ./)")
    p.add_argument("--seed", default=0, type=int, help="seed of k-means (default: 0)")
    add_launch(p)
    return p


def parse_retrieval(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of moco.retrieval."""
    return parse(retrieval_parser(), argv, finish_read)


def add_read(p: Parser) -> None:
    """A checkpoint and the images whose features it makes."""
    add = p.add_argument
    add("checkpoint", metavar="CHECKPOINT", nargs="?", help="the folder of a run, a checkpoint of this "
        "project or of many others, or torchvision:NAME for published weights")  # fmt: skip
    add_data(p, of_file=True)
    add_batch_size(p, where="data")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="precision of the encoder (default: off, fp32)")
    add("--split", choices=("val", "train"), help="images to use (default: the validation images, where there are any)")
    add_max_bad(p, "data")


def finish_read(parser: Parser, argv: list[str]) -> argparse.Namespace:
    args = with_config(parser, argv)
    if args.checkpoint is None or (args.data is None and args.dataset is None):
        given = "" if args.checkpoint is None else f" behind the checkpoint {args.checkpoint}"
        raise UserError(f"give a checkpoint, and an image folder or --dataset NAME{given}.")
    args.checkpoint = encoder_file(args.checkpoint)
    check_images(args)
    return args


def bench_parser() -> Parser:
    """The parser of moco.bench; what it does not know is main_pretrain.py's."""
    text = (
        "Measure where the time of a training step goes on this machine. Takes DIR and the flags of main_pretrain.py."
    )
    p = Parser(doors.typed("bench"), text)
    add = p.add_argument
    add("what", choices=("data", "step", "head", "all"), help="what to measure")
    add(
        "--bench-steps",
        default=10,
        type=at_least(1),
        metavar="N",
        help="number of timed steps, after two to warm up (default: 10)",
    )
    add("--bench-images", default=64, type=at_least(1), metavar="N", help="number of images to decode, crop and "
        "augment (default: 64)")  # fmt: skip
    add(
        "--bench-seconds",
        default=5.0,
        type=positive,
        metavar="S",
        help="seconds for which the loader is timed (default: 5)",
    )
    return p


def parse_bench(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of moco.bench: its own, and every flag of main_pretrain.py with what they come to."""
    asked, rest = bench_parser().parse_known_args(argv)
    args = parse_pretrain(rest, any_demo=True)
    return argparse.Namespace(**vars(args), **vars(asked), settings=pretrain_config(args))


def parse_demo(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of python -m moco.demo, and the configuration that it follows."""
    text = "Pretrain SynCo on 4,000 handwritten digits and evaluate its features on 1,000 others."
    p = Parser(doors.typed("demo"), text, allow_abbrev=True)
    p.add_argument("--save-dir", default="runs/demo", help="folder for all files of the demo (default: runs/demo)")
    p.add_argument("--epochs", type=at_least(1), help="number of epochs (default: that of configs/demo.yml)")
    p.set_defaults(config=DEMO_CONFIG)
    return p.parse_args(argv)
