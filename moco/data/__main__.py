"""Work on data sets: python -m moco.data check DIR, show DIR [flags], index DIR [--out FOLDER], pack DIR OUT."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from moco import doors, signals
from moco.errors import USAGE_EXIT, exit_code, refuse, tell
from moco.files import write_json


def main(argv: list[str] | None = None) -> int:
    """Say what would be read, show views, write an index of an image folder, or its images as tar shards; the exit
    code."""
    from moco.cli.data import parse_data

    args = parse_data(argv)
    return exit_code(lambda: _COMMANDS[args.command](args))


def _check(args: argparse.Namespace) -> int:
    """2 where something would be refused: the rest is told all the same."""
    from moco.cli.common import check_levels
    from moco.data.check.look import default_workers
    from moco.data.check.page import lines
    from moco.data.check.whole import Asked, check

    check_levels(args.levels)
    workers = default_workers() if args.workers is None else args.workers
    asked = Asked(
        args.data, args.dataset, args.val_data, args.channels, args.levels, args.download, workers,
        args.max_bad_images, _of_auto,
    )  # fmt: skip
    report = check(asked)
    report["exit_code"] = USAGE_EXIT if report["refused"] else 0
    if args.json == "-":
        tell(json.dumps(report, indent=2))
    else:
        tell(*lines(report))
        if args.json:
            write_json(report, args.json, "--json")
    for sentence in report["refused"]:
        refuse(sentence)
    return report["exit_code"]


def _of_auto(images: int, side: float) -> dict[str, Any]:
    """What main_pretrain.py --auto takes in place of its defaults."""
    from moco.cli.pretrain import parse_pretrain
    from moco.train import fit

    usual = parse_pretrain([os.curdir, "--auto"])
    chosen, _ = fit.choose(usual, fit.Place(images, side), {})
    return {name: getattr(chosen, name) for name in fit.RULES if getattr(chosen, name) != getattr(usual, name)}


def _index(args: argparse.Namespace) -> None:
    from moco.data.sources.files import write_index

    written, notes = write_index(args.folder, args.out)
    _tell_notes(notes)
    for path, images in written:
        tell(f"wrote {path}: {images} images")


def _pack(args: argparse.Namespace) -> None:
    from moco.data.sources.files import open_path
    from moco.data.sources.pack import pack
    from moco.data.sources.splits import find_splits

    found, notes = find_splits(args.source)
    names = found if "train" in found else {"": args.source}
    sources = {name: open_path(path) for name, path in names.items()}
    _tell_notes([*notes, *(note for source in sources.values() for note in source.found.notes)])
    for name, shards in pack(sources, args.out, args.seed, args.shard_mb).items():
        count = f"{shards} shard{'s' * (shards > 1)}"
        tell(f"{len(sources[name])} images in {count}: {os.path.join(args.out, name) if name else args.out}")


def _tell_notes(notes: list[str]) -> None:
    if notes:
        tell(*notes)


def _show(args: argparse.Namespace) -> None:
    from moco.cli.common import image_options
    from moco.cli.pretrain import pretrain_config
    from moco.data.summary import describe
    from moco.train.setup import open_images, with_statistics
    from moco.train.show import go_on, show

    path, state = go_on(args)
    args, sources = open_images(args, path, state, image_options)
    elsewhere = argparse.Namespace(**{**vars(args), "save_dir": ""})  # nothing is left in the run's folder
    config = with_statistics(pretrain_config(args), elsewhere, sources.pretrain, state)
    # the flags' warnings are of the training: of its queue, its schedule
    notes = [note for note in args.notes if not note.startswith("warning: ")]
    tell(*describe(sources.pretrain, sources.val), *notes)
    show(sources.pretrain, args, config, state, doors.beside("pretrain", args.words).rstrip())


_COMMANDS = {"check": _check, "index": _index, "pack": _pack, "show": _show}


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
