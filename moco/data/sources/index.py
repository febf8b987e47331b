"""BEiT-3's index of an image folder: one JSON object a line, ``{"image_path": "train/cat/1.jpg", "label": 0}``.

Paths are relative to the folder of the index; labels are numbers of the sorted class folders.
"""

from __future__ import annotations

import json
import os

from moco import files
from moco.data.sources.files import open_folder, splits
from moco.errors import UserError

NAME = "imagenet.{}.index.jsonl"  # BEiT-3's, whatever the data set is


def write_index(folder: str, out: str | None = None) -> list[tuple[str, int]]:
    """Write the index of every split of an image folder (train, val, test); returns (path, images) of each.

    Args:
        folder: with class folders in ``train`` and the others.
        out: the folder of the index; by default ``folder`` itself, where BEiT-3 looks for it.

    Raises:
        UserError: no such splits, a split without classes or with others than ``train``, or nothing can be written.
    """
    sources = {name: open_folder(path) for name, path in splits(folder).items()}
    if not sources:
        raise UserError(f"{folder} has no folder train, val or test to index: give the one that holds them.")
    first = next(iter(sources.values()))
    for source in sources.values():
        if source.labels is None or source.classes != first.classes:
            raise UserError(f"{source.name} has no class folders, or others than {first.name}.")
    out = out or folder
    written = []
    for name, source in sources.items():
        assert source.labels is not None
        paths = (os.path.relpath(path, out).replace(os.sep, "/") for path in source.paths)
        lines = [json.dumps({"image_path": p, "label": int(n)}) for p, n in zip(paths, source.labels, strict=True)]
        path = os.path.join(out, NAME.format(name))
        files.write_text("\n".join(lines) + "\n", path, "--out")
        written.append((path, len(lines)))
    return written
