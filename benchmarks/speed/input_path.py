"""Images a second through one loader process, each decoded once for two 224 px views: ours against torchvision's.

    python -m benchmarks.speed.input_path [DATA] [--rounds 7] [--aug v2] [--size 224] [--batch-size 50] [--cache DIR]

DATA is a folder, list or tar shard of photographs; default: ../shared/data/imagenet-sample-250.tar. "torchvision" is
the published pipeline on PIL images (RandomResizedCrop, ColorJitter, RandomGrayscale, GaussianBlur,
RandomHorizontalFlip, ToTensor, Normalize), in the same loader. The others are main_pretrain.py's: "cpu" finishes views
in the loader's process, "device" leaves all after the crop to the device, whose time is not in the figure; exact and
fast are --decode's, and with --cache the rows "cached" read decoded images from there. In every round each path passes
over all images once, in a new order; ratios are taken within rounds, and their median is printed with its quartiles.
The loader has one process with one thread; run with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter
from torch.utils.data import Dataset
from torchvision import transforms as T

from benchmarks.timing import rounds
from moco.data import EpochSampler, Source, TwoViews, channel_statistics, get_preset, make_loader, open_sources

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet-sample-250.tar"
BASE = "torchvision"
GOALS = {"cpu, fast": 2.0, "device, fast": 4.0}


def blurred(image: Image.Image) -> Image.Image:
    """MoCo v2's GaussianBlur([.1, 2.])."""
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class Published(Dataset):
    """Two views by torchvision: MoCo v2's recipe (or v1's), float32 and normalised."""

    def __init__(self, source: Source, aug: str, size: int) -> None:
        mean, std = channel_statistics(None, 3)
        jitter = T.ColorJitter(0.4, 0.4, 0.4, 0.1 if aug == "v2" else 0.4)
        crop, grey = T.RandomResizedCrop(size, scale=(0.2, 1.0)), T.RandomGrayscale(p=0.2)
        middle = [grey, jitter]
        if aug == "v2":
            middle = [T.RandomApply([jitter], p=0.8), grey, T.RandomApply([T.Lambda(blurred)], p=0.5)]
        ending = [T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(mean, std)]
        self.source, self.transform = source, T.Compose([crop, *middle, *ending])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        data = self.source.read(key[1])
        assert data is not None  # images come from files
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return {"q": self.transform(image), "k": self.transform(image)}


def one_pass(dataset: Dataset, images: int, batch: int) -> Callable[[], None]:
    """A call that takes every batch of an epoch; the loader's process lives on between calls."""
    sampler = EpochSampler(images, batch, seed=0)
    loader = make_loader(dataset, sampler, workers=1)

    def run() -> None:
        for _ in loader:
            pass
        sampler.set_position(sampler.epoch + 1)

    return run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=str(SAMPLE))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--aug", choices=("v1", "v2"), default="v2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--cache", metavar="DIR", help="folder for decoded images, as in main_pretrain.py")
    args = parser.parse_args(argv)
    source = open_sources(None, args.data).pretrain
    views = partial(TwoViews, source, get_preset(args.aug), args.size, 0)
    datasets = {
        BASE: Published(source, args.aug, args.size),
        "cpu, exact": views(),
        "cpu, fast": views(fast=True),
        "device, exact": views(crop_only=True),
        "device, fast": views(crop_only=True, fast=True),
    }
    if args.cache:
        kept = open_sources(None, args.data, cache=args.cache).pretrain
        for name, only in (("cpu, cached", False), ("device, cached", True)):
            datasets[name] = TwoViews(kept, get_preset(args.aug), args.size, 0, crop_only=only)
    calls = {name: one_pass(dataset, len(source), args.batch_size) for name, dataset in datasets.items()}
    images = len(source) // args.batch_size * args.batch_size
    found = rounds(calls, args.rounds, "cpu")
    print(f"{images} images of {args.data}, {args.aug}, two views of {args.size} px, one process, {args.rounds} rounds")
    print(f"{'':16}images/s  speed-up over {BASE}, median (quartiles)")
    for name, taken in found.items():
        ratios = [base / own for base, own in zip(found[BASE], taken, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        goal = f"  goal {GOALS[name]:.1f}" if name in GOALS else ""
        print(f"{name:16}{1e3 * images / statistics.median(taken):8.0f}  {middle:.2f} ({low:.2f} to {high:.2f}){goal}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
