"""Work on data sets: python -m moco.data index DIR [--out FOLDER], python -m moco.data pack DIR OUT."""

from __future__ import annotations

import argparse
import os

from moco import signals
from moco.errors import exit_code, tell


def main(argv: list[str] | None = None) -> int:
    """Write an index of an image folder, or its images as tar shards; the exit code."""
    from moco.cli.data import parse_data

    args = parse_data(argv)
    return exit_code(lambda: _COMMANDS[args.command](args))


def _index(args: argparse.Namespace) -> None:
    from moco.data.sources.files import write_index

    for path, images in write_index(args.folder, args.out):
        tell(f"wrote {path}: {images} images")


def _pack(args: argparse.Namespace) -> None:
    from moco.data.sources.files import open_path, splits
    from moco.data.sources.pack import pack

    found = splits(args.source)
    names = found if "train" in found else {"": args.source}
    sources = {name: open_path(path) for name, path in names.items()}
    for name, shards in pack(sources, args.out, args.seed, args.shard_mb).items():
        count = f"{shards} shard{'s' * (shards > 1)}"
        tell(f"{len(sources[name])} images in {count}: {os.path.join(args.out, name) if name else args.out}")


_COMMANDS = {"index": _index, "pack": _pack}


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
