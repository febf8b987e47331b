"""Images beside the images whose features are nearest: what an encoder takes for alike.

    python -m moco.neighbours CHECKPOINT DIR [IMAGE ...] [flags]        --help lists the flags

Queries are held-out images and their neighbours training images, where there are both; else, and with --split, one set
is both. In --out: neighbours.png, neighbours.html, one file that loads nothing, and neighbours.json for programs. Exit
codes: 0 done; 2 input that cannot be used.

Legend: q queries that are shown, k neighbours of each.
"""

from __future__ import annotations

import os
from argparse import Namespace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from moco import distributed, files
from moco.data import Source
from moco.data.sources.subset import Subset
from moco.errors import UserError, tell
from moco.eval import embed
from moco.eval.features import Features
from moco.eval.nearest import SPARE, Nearest, choose_queries, choose_sets, open_pictures, rows_of, search
from moco.pictures import grid
from moco.pictures.page import page, text
from moco.pictures.thumbnails import small
from moco.weights.settings import settle_from_file

CLASSES = 20  # rows of the page's table


def neighbours_worker(args: Namespace) -> int:
    """One process of the command, from data to files; returns the exit code."""
    if missing := [path for path in args.images if not os.path.exists(path)]:  # said before a checkpoint is read
        raise UserError(f"{missing[0]} cannot be a query (No such file or directory); give a picture.")
    settled = settle_from_file(args, args.checkpoint)  # before the images: it says how they are read
    bank, asked = choose_sets(embed.open_images(args), args.split)
    reader = embed.open_reader(args, settled, bank)
    embed.make_folder(args.out)
    if args.images:
        asked = open_pictures(args.images, bank, reader.size)
        order, drawn_from = np.arange(len(asked)), len(asked)
    else:
        order, drawn_from = choose_queries(asked, args.class_name, args.worst, args.seed)
    rows, shard = np.sort(order), partial(reader.extractor.shard, reader.encoder)
    share = shard(bank)
    if asked is bank:
        queries = rows_of(share, rows)
    else:
        queries = shard(Subset(asked, rows, asked.name))
        queries = Features(queries.x, queries.labels, torch.from_numpy(rows)[queries.ids], queries.readable)
    found = search(share, queries, args.k + SPARE)
    images = torch.bincount(share.labels.clamp_min(0), minlength=max(1, len(bank.classes or ())))
    images = distributed.sum_over_ranks(images.to(reader.extractor.device)).cpu().numpy()

    def write() -> None:
        tell(f"{args.arch} at {reader.size} px: {reader.summary}")
        write_neighbours(args, Nearest(bank, asked, int(images.sum()), *found, images), order, drawn_from)

    distributed.by_main(write)
    return 0


def write_neighbours(args: Namespace, found: Nearest, order: np.ndarray, drawn_from: int) -> None:
    """The files, and what there is to say. order, drawn_from: see :func:`moco.eval.nearest.choose_queries`."""
    if not len(found.rows):
        raise UserError(f"none of the queries in {found.asked.name} can be read; choose others.")
    copies = found.leave_out(args.k)
    shown = found.worst(args.queries) if args.worst else found.drawn(order, args.queries)
    told = summary(args, found, len(order), drawn_from, copies)
    tell(*told)
    image, web, plain = (os.path.join(args.out, f"neighbours.{kind}") for kind in ("png", "html", "json"))
    files.write_json(as_json(args, found, shown), plain, "--out")
    rows, title = cells(found, shown), title_of(args, found, len(shown))
    grid.grid_png(rows, image, title, "; ".join(told[1:]))
    body = "".join(f"<p>{text(line)}</p>\n" for line in told) + grid.grid_html(rows) + class_table(found)
    files.write_text(page(title, body=body, scripts=grid.SCRIPTS, styles=grid.STYLES), web, "--out")
    tell(title, f"written: {web}, {image}, {plain}")


# ------------------------------------------------------------------------------------------------------- in words


def title_of(args: Namespace, found: Nearest, shown: int) -> str:
    """One line above the pictures."""
    pair = found.asked is not found.bank and not args.images
    of = f"of {found.asked.name}" + (f", class {args.class_name}" if args.class_name is not None else "")
    kind, other = ("held-out images", "training images") if pair else ("images", "images")
    which = f"Pictures of your own ({shown})" if args.images else f"{shown} {kind} {of}"
    if args.worst:
        which = f"Of {len(found.rows):,} {kind} {of}, the {shown} with the most neighbours of another class"
    there = f"all {found.read:,}" if found.asked is found.bank else f"the {found.read:,} {other} of {found.bank.name}"
    return f"{which}: each with its {found.s.shape[1]} nearest among {there}"


def summary(args: Namespace, found: Nearest, searched: int, drawn_from: int, copies: int) -> list[str]:
    """Lines for the console and the page."""
    drawn = f" drawn from {drawn_from:,}" * (drawn_from > searched)
    queries = "1 query" if len(found.rows) == 1 else f"{len(found.rows):,} queries"
    counts = f"{queries}{drawn}, {found.read:,} images searched"
    lines = [f"{args.checkpoint}: {counts}, by the cosine of the features of {args.arch}"]
    if found.labelled and found.there.any():
        lines.append(f"{found.share():.2f} % of the {found.s.shape[1]} nearest images are of the query's class "
                     f"({found.by_chance():.2f} % by chance)")  # fmt: skip
    if unread := len(found.bank) - found.read:
        lines.append(
            f"{unread:,} of {len(found.bank):,} images of {found.bank.name} cannot be read and are not searched"
        )
    if copies:
        which = "1 copy of a query is" if copies == 1 else f"{copies:,} copies of queries are"
        lines.append(f"{which} left out: the same file or pixels")
    return lines


def class_of(source: Source, number: int) -> str | None:
    """The name of an image's class."""
    return source.classes[int(source.labels[number])] if source.classes and source.labels is not None else None


def class_table(found: Nearest) -> str:
    """HTML: the classes whose queries have the fewest neighbours of their own."""
    if not found.labelled:
        return ""
    assert found.asked.labels is not None and found.asked.classes is not None
    labels = found.asked.labels[found.rows]  # (m,)
    shares = sorted((found.share(labels == label), int(label), int((labels == label).sum())) for label in set(labels))
    lines = "".join(
        f'<tr><td>{text(found.asked.classes[label])}</td><td class="number">{count:,}</td>'
        f'<td class="number">{share:.1f} %</td></tr>\n'
        for share, label, count in shares[:CLASSES]
    )
    less = f", the lowest {CLASSES} of {len(shares)}" * (len(shares) > CLASSES)
    head = '<tr><th>class</th><th class="number">queries</th><th class="number">neighbours of the class</th></tr>'
    return f"<h2>Neighbours by class of the query{less}</h2>\n<table>{head}\n{lines}</table>\n"


# ------------------------------------------------------------------------------------------- for programs, as cells


def as_json(args: Namespace, found: Nearest, shown: np.ndarray) -> dict[str, Any]:
    """What neighbours.json holds: names as :meth:`moco.data.Source.name_of` has them; null where there is no class.

    shown: (q,) rows.
    """

    def named(source: Source, number: int, **more: float) -> dict[str, Any]:
        return {"name": source.name_of(number), "class": class_of(source, number), **more}

    queries = [
        named(found.asked, int(found.rows[row]))
        | {"neighbours": [named(found.bank, number, similarity=s) for number, s in _neighbours(found, row)]}
        for row in shown
    ]
    settings = {"checkpoint": args.checkpoint, "arch": args.arch, "k": args.k, "seed": args.seed}
    counts = {"searched_queries": len(found.rows), "searched_images": found.read,
              "unreadable": len(found.bank) - found.read}  # fmt: skip
    return (
        settings
        | counts
        | {"same_class": found.share() if found.labelled and found.there.any() else None, "queries": queries}
    )


def _neighbours(found: Nearest, row: int) -> list[tuple[int, float]]:
    """Numbers and similarities, the nearest first."""
    there = found.there[row]
    return list(zip(found.near[row][there].tolist(), found.s[row][there].tolist(), strict=True))


def cells(found: Nearest, shown: np.ndarray) -> list[list[grid.Cell]]:
    """A row of images for each query, (q,) rows of ``shown``, with the query first."""
    seen: dict[tuple[bool, int], Image.Image] = {}

    def cell(source: Source, number: int, line: str, mark: str, before: str = "") -> grid.Cell:
        key = source is found.bank, number
        seen[key] = image = seen.get(key) or small(source, number, grid.ENLARGED)
        name, known = source.name_of(number), class_of(source, number)
        detail = before + (name if known is None else f"{known}: {name}")
        return grid.Cell(image, (line,) if known is None else (known, line), mark, detail)

    rows = []
    for row in shown:
        number = int(found.rows[row])
        rows.append([cell(found.asked, number, os.path.basename(found.asked.name_of(number)), "query")])
        marks = np.where(found.right[row], "right", "wrong") if found.labelled else np.full(found.s.shape[1], "")
        for (near, s), mark in zip(_neighbours(found, row), marks, strict=False):
            rows[-1].append(cell(found.bank, near, f"{s:.3f}", str(mark), f"similarity {s:.4f}, "))
    return rows
