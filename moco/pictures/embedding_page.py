"""The page of an embedding: one map or two of the same images, with their pictures and their nearest neighbours.

The page itself is assets/embedding.js, and a map on it assets/point_map.js. The images travel in sheets, JPEGs of many
small copies in rows, which cost less than one file for each.

Legend: N images, k neighbours of each.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np
from PIL import Image

from moco.pictures.page import page, text

SHEET = 4096  # pixels a side at most: every browser draws from one of that size
QUALITY = 78  # of the JPEGs
# Longest side of a copy in pixels, for so many images at most: the page of 10,000 stays below some 20 MB.
SIDES = {1000: 96, 5000: 64, 20_000: 48}
LEAST_SIDE = 32
STEPS = 65535  # of the map's side in which a place is given

_BODY = """<div id="tools">
<span><button id="as-points" aria-pressed="false">points</button><button id="as-pictures" aria-pressed="false"
>images</button></span>
<span><button id="smaller" title="Smaller (-)" aria-label="Smaller">&minus;</button><button id="whole"
 title="The whole map (0)">whole map</button><button id="larger" title="Larger (+)" aria-label="Larger"
>+</button></span>
<label><input type="checkbox" id="linked" checked> zoom both maps</label>
<span class="pale">wheel or pinch: zoom &middot; drag: move &middot; click: pin, with the nearest (Shift: one more)
 &middot; arrow keys: next image &middot; Escape: unpin</span>
</div>
<main>
<div id="maps"></div>
<aside>
<div id="filter">
<h2>Classes</h2>
<div><input type="search" id="search" placeholder="search" aria-label="Search for a class"><button id="all"
 title="Show the listed classes">all</button><button id="none" title="Hide the listed classes">none</button></div>
<p id="count" class="pale" title="Shift-click on a class: only this one"></p>
<div id="classes"></div>
</div>
<div id="pinned"><h2>Pinned images</h2><p id="none-pinned" class="pale">A click on an image pins it here, with the
 images whose features are nearest by cosine: the map keeps only some of these neighbourhoods.</p>
<div id="pins"></div></div>
</aside>
</main>
<div id="tip" hidden></div>
"""


@dataclass(frozen=True)
class Map:
    """Where the images lie by one encoder.

    title: above the map, may be empty. points: (N, 2). neighbours: (N, k) numbers of the images that are nearest in
    feature space, the nearest first. similarities: (N, k) their cosines.
    """

    title: str
    points: np.ndarray
    neighbours: np.ndarray
    similarities: np.ndarray


def embedding_page(
    title: str,
    maps: Sequence[Map],
    labels: np.ndarray,
    classes: Sequence[str],
    names: Sequence[str],
    images: Iterable[Image.Image],
) -> str:
    """The page's text.

    Args:
        title: plain text.
        maps: of the same N images, on one scale: two of them lie in one box.
        labels: (N,) numbers of ``classes``; of no account without classes.
        classes, names: plain text. What all names begin with, up to a slash, is shown once.
        images: N of any size.
    """
    start = commonprefix([*names])
    start = start[: start.rfind("/") + 1]
    sheets, uris = sheets_of(images, side_of(len(names)))
    data = {
        "maps": [
            {
                "title": one.title,
                "points": places.ravel().tolist(),
                "neighbours": one.neighbours.tolist(),
                "similarities": np.round(one.similarities.astype(float), 3).tolist(),
            }
            for one, places in zip(maps, _places([one.points for one in maps]), strict=True)
        ],
        "labels": labels.tolist(),
        "classes": [*classes],
        "names": [name[len(start) :] for name in names],
        "sheets": sheets,
    }
    body = "\n".join([
        f'<div class="pale" id="start">{text(start)}</div>' * bool(start), _BODY,
        *(f'<img class="sheet" alt="" src="{uri}">' for uri in uris),
    ])  # fmt: skip
    return page(title, body=body, data=data, scripts=("point_map.js", "embedding.js"), styles=("embedding.css",))


def _places(points: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Points in whole steps of the smallest square around all of them, (N, 2) int each."""
    every = np.concatenate(points)
    low, high = every.min(0), every.max(0)
    side = max((high - low).max(), 1e-12)
    return [np.rint(STEPS * (0.5 + (one - (low + high) / 2) / side)).astype(int) for one in points]


def side_of(count: int) -> int:
    """The longest side of a small copy, for so many images."""
    return next((side for most, side in SIDES.items() if count <= most), LEAST_SIDE)


def sheets_of(images: Iterable[Image.Image], longest: int) -> tuple[dict[str, Any], list[str]]:
    """Small copies of images, row by row on sheets; each begins at the upper left corner of its square cell.

    Returns:
        ``cell``, its side in pixels; ``columns``; ``perSheet``, cells of a sheet; ``sizes``, width and height of each
        copy in turn; and the sheets as data URIs.
    """
    small = []
    for image in images:
        small.append(image.convert("RGB"))
        small[-1].thumbnail((longest, longest))
    cell = -(-max(max(image.size) for image in small) // 16) * 16  # blocks of a JPEG: no image bleeds into another
    columns = min(SHEET // cell, int(np.ceil(np.sqrt(len(small)))))
    per_sheet = columns * (SHEET // cell)
    uris = []
    for start in range(0, len(small), per_sheet):
        here = small[start : start + per_sheet]
        sheet = Image.new("RGB", (columns * cell, -(-len(here) // columns) * cell))
        for place, image in enumerate(here):
            sheet.paste(image, (place % columns * cell, place // columns * cell))
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=QUALITY)
        uris.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    sizes = [side for image in small for side in image.size]
    return {"cell": cell, "columns": columns, "perSheet": per_sheet, "sizes": sizes}, uris
