"""A trainer of main_pretrain.py on noise that lies on the device."""

from __future__ import annotations

import contextlib
import tempfile
from argparse import Namespace
from collections.abc import Iterator

import torch

from moco import cli, data, distributed
from moco.cli.pretrain import pretrain_config
from moco.train import pretraining
from moco.train.bench import make_trainer, noise
from moco.train.runlog import RunLog

USUAL = [
    "--dataset",
    "folder",
    "--mlp",
    "--moco-t",
    "0.2",
    "--hard-start-epoch",
    "0",
    "--no-mask-same-image",
    "--seed",
    "0",
]
FULL = ["-a", "resnet50", "--size", "224", "--moco-k", "65536"]
TINY = ["-a", "resnet18", "--size", "32", "-b", "8", "--moco-k", "64", "--amp", "off"]
TINY_SYNCO = ["--n-hard", "8", *(word for i in range(1, 7) for word in (f"--n{i}", "2"))]
IMAGES = 1 << 20  # of the data set that is not there


def parsed(argv: list[str], dry: bool) -> Namespace:
    """Flags of a ResNet-50 at 224 px, of a tiny network in a dry run."""
    few = TINY_SYNCO if "synco" in argv else []
    return cli.parse_pretrain([*FULL, *USUAL, *argv, *([*TINY, *few] if dry else [])])


@contextlib.contextmanager
def a_trainer(argv: list[str], dry: bool) -> Iterator[tuple[pretraining.Trainer, Iterator[dict]]]:
    """The trainer and its batches; the host looks at no step."""
    torch.backends.cudnn.benchmark = True  # as main_pretrain.py without --seed
    args = parsed(argv, dry)
    mean, std = data.channel_statistics("folder", 3, None, None)
    view = Namespace(size=args.size, channels=3, mean=mean, std=std)
    with tempfile.TemporaryDirectory() as folder, RunLog(folder, tensorboard=False) as log:
        trainer = make_trainer(pretrain_config(args), view, log, folder, IMAGES, args.batch_size)
        trainer.look_every = 10**9
        yield trainer, noise(args.batch_size, view, 0, distributed.device(), IMAGES)
