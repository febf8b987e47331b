"""Work on data sets: python -m moco.data index DIR [--out FOLDER], python -m moco.data pack DIR OUT."""

from __future__ import annotations

import argparse
import os

from moco import signals
from moco.errors import exit_code, tell


def main(argv: list[str] | None = None) -> int:
    """Write an index of an image folder, or its images as tar shards; the exit code."""
    from moco.cli import commands

    args = commands.parse_data(argv)
    return exit_code(lambda: (_index if args.command == "index" else _pack)(args))


def _index(args: argparse.Namespace) -> None:
    from moco.data.sources.files import write_index

    for path, images in write_index(args.folder, args.out):
        tell(f"wrote {path}: {images} images")


def _pack(args: argparse.Namespace) -> None:
    from moco.data.sources.files import open_path, splits
    from moco.data.sources.shards import pack_shards

    found = splits(args.source)
    for name, path in (found if "train" in found else {"": args.source}).items():
        images, out = open_path(path), os.path.join(args.out, name) if name else args.out
        tell(f"{len(images)} images in {len(pack_shards(images, out, args.seed, args.shard_mb))} shards: {out}")


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
