"""Features of a set of images as a file, and their picture in two dimensions.

    python -m moco.embed CHECKPOINT DIR [flags] --out FOLDER        --help lists the flags

In --out: features.npz or features.safetensors (all images), embedding.png, and embedding.html, one file that loads
nothing: the images on a map, to zoom and to filter, and the nearest of each. --beside CHECKPOINT draws a second map of
the same images. Exit codes: 0 done; 2 input that cannot be used.

Legend: n images of the set, N points of the picture, F feature width, k neighbours.
"""

from __future__ import annotations

import copy
import json
import os
from argparse import Namespace
from collections.abc import Sequence
from functools import partial, reduce
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from moco import data, distributed, files, resources
from moco.data import Source, Sources
from moco.errors import UserError, tell
from moco.eval.features import EvalData, FeatureExtractor, Features, bad_image_notes
from moco.models.encoder import build_encoder
from moco.pictures.embedding_page import Map, embedding_page, side_of
from moco.pictures.scatter import scatter
from moco.pictures.thumbnails import small
from moco.seeding import numpy_generator
from moco.train.pretraining import pick_amp
from moco.weights.read import load_backbone
from moco.weights.settings import Settled, settle_from_file

NEIGHBOURS = 8  # of each image on the page
ONE_PLACE = 1e-6  # by which float32's rounding makes equal features differ
FEWEST = 10  # images that a picture needs; the methods look at neighbourhoods


def embed_worker(args: Namespace) -> int:
    """One process of the command, from data to files; returns the exit code."""
    if args.picture in EXTRAS:
        _extra(args.picture)  # said before an hour of features, not after it
    each = [Namespace(**{**vars(args), "checkpoint": path}) for path in (args.checkpoint, args.beside) if path]
    found = [read_features(one, args.out) for one in each]  # each with the settings of its own file
    distributed.by_main(partial(write_embedding, each, found))
    return 0


def write_embedding(each: Sequence[Namespace], found: Sequence[Found]) -> None:
    """The files. A picture of many points takes minutes."""
    for one, read in zip(each, found, strict=True):
        tell(f"{one.arch} at {read.size} px: {read.summary}")
    args, share, source = each[0], found[0].share, found[0].source
    written = save_features(share, source, args.out, args.format)
    tell(f"{len(share.x)} x {share.x.shape[1]} features of {source.name}: {written}{share.left_out}")
    if args.picture != "none":
        draw_points(args, found)


class Found(NamedTuple):
    """Features and where they come from."""

    share: Features  # of all images, on every process
    source: Source
    encoder: nn.Module
    size: int  # of the views, pixels
    summary: str  # what was read from the checkpoint


def read_features(args: Namespace, folder: str | None = None) -> Found:
    """Features of the images that the flags of this command name; every process has to call. The ``folder`` for
    them, if any, is made once the checkpoint and the images are found, before any is read."""
    settled = settle_from_file(args, args.checkpoint)  # before the images: it says how they are read
    source = choose_source(open_images(args), args.split)
    reader = open_reader(args, settled, source)
    if folder is not None:
        make_folder(folder)
    return Found(reader.extractor.whole(reader.encoder, source), source, reader.encoder, reader.size, reader.summary)


def open_images(args: Namespace) -> Sources:
    """The images that the flags name."""
    own = {"channels": args.channels, "levels": args.levels}
    settings = {"download": args.download, "val_path": args.val_data, "cache": args.cache, **own}
    sources = data.open_on_nodes(args.dataset, args.data, **settings)
    if distributed.is_main() and args.checkpoint != getattr(args, "beside", None):  # once of two files
        tell(*data.describe(sources.pretrain, sources.val))
    return sources


class Reader(NamedTuple):
    """A checkpoint's encoder, and how images become its features."""

    encoder: nn.Module  # on the device
    extractor: FeatureExtractor
    size: int  # of the views, pixels
    summary: str  # what was read from the checkpoint


def open_reader(args: Namespace, settled: Settled, source: Source) -> Reader:
    """The checkpoint's encoder for such images."""
    size, mean, std = settled.of(source)
    # The head's width is of no account: features are what enters it.
    encoder = build_encoder(args.arch, 2, stem=args.stem, size=size, in_chans=source.channels)
    summary = load_backbone(encoder, args.checkpoint, args.arch)[1]
    device = distributed.device()
    images = EvalData(
        size, args.batch_size * distributed.nodes(), workers=distributed.share_of_cores(args.workers),
        note=bad_image_notes(tell, "left out"), most_bad=args.max_bad_images,
    )  # fmt: skip
    extractor = FeatureExtractor(images, device, mean, std, pick_amp(args.amp, device))
    return Reader(encoder.to(device), extractor, size, summary + settled.summary)


def choose_source(sources: Sources, split: str | None) -> Source:
    """The images to embed: held-out ones where there are any, else all. Unlabelled ones get the label -1."""
    if split == "val" and sources.val is None:
        raise UserError(f"--split val: {sources.no_pair or 'there are no held-out images'}; leave it out.")
    held_out = None if split == "train" else sources.val
    return with_labels(held_out or sources.train or sources.pretrain)


def with_labels(source: Source) -> Source:
    """The source, or a copy of an unlabelled one whose labels are -1."""
    if source.labels is None:
        source = copy.copy(source)
        source.labels = np.full(len(source), -1)
    return source


# -------------------------------------------------------------------------------------------------------- files


def make_folder(path: str) -> None:
    """The folder of --out; UserError when it cannot be made."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be made ({error.strerror}); choose another.") from error


def save_features(share: Features, source: Source, folder: str, kind: str) -> str:
    """Write features (n, F) float32, labels (n,) int64 (-1: unlabelled), names and classes; returns the path.

    As npz: arrays ``features``, ``labels``, ``names`` and ``classes``. As safetensors: tensors ``features``, ``labels``
    and ``names``, the latter the bytes of all names with a zero byte between two; and the metadata ``classes``, a JSON
    list. Names are as :meth:`moco.data.Source.name_of` has them.
    """
    names = [source.name_of(int(i)) for i in share.ids]
    classes, path = list(source.classes or ()), os.path.join(folder, f"features.{kind}")
    with files.replacing(path, "--out") as beside:
        if kind == "npz":
            with open(beside, "wb") as file:
                np.savez(file, features=share.x.numpy(), labels=share.labels.numpy(), names=names, classes=classes)
        else:
            from safetensors.torch import save_file

            text = torch.frombuffer(bytearray(b"\0".join(map(os.fsencode, names))), dtype=torch.uint8)
            tensors = {"features": share.x, "labels": share.labels, "names": text}
            save_file(tensors, beside, {"classes": json.dumps(classes)})
    return path


# ------------------------------------------------------------------------------------------------ two dimensions


def draw_points(args: Namespace, found: Sequence[Found]) -> None:
    """Write embedding.png and embedding.html with at most --points images, drawn by --seed."""
    ids = reduce(np.intersect1d, [one.share.ids.numpy() for one in found])
    if len(ids) < FEWEST:
        raise UserError(f"a picture needs {FEWEST} images, not {len(ids)}; --picture none writes features alone.")
    every = len(ids)
    if every > args.points:
        ids = ids[np.sort(numpy_generator("sample", args.seed).choice(every, args.points, replace=False))]
    names = [args.checkpoint, args.beside] if args.beside else [""]
    features = [
        (name, one.share.x.numpy()[np.searchsorted(one.share.ids.numpy(), ids)])
        for name, one in zip(names, found, strict=True)
    ]
    source = found[0].source
    title = f"{source.name}: {len(ids)} of {every} images, {args.picture}"
    written = write_maps(args.out, title, maps_of(features, args.picture, args.seed), source, ids)
    tell(f"picture of {len(ids)} of them by {args.picture}: {', '.join(written)}")


def maps_of(features: Sequence[tuple[str, np.ndarray]], method: str = "tsne", seed: int = 0) -> list[Map]:
    """A map of the same N images for each (title, (N, F) features), all turned onto the first one."""
    maps: list[Map] = []
    for title, x in features:
        points = project(x, method, seed)
        maps.append(Map(title, aligned(points, maps[0].points) if maps else points, *nearest(x)))
    return maps


def write_maps(folder: str, title: str, maps: Sequence[Map], source: Source, ids: np.ndarray) -> tuple[str, str]:
    """embedding.png and embedding.html of images ``ids`` of ``source``; returns their paths."""
    classes, paths = list(source.classes or ()), [os.path.join(folder, f"embedding.{kind}") for kind in ("png", "html")]
    labels = np.zeros(len(ids), int) if source.labels is None or not classes else source.labels[ids]
    panels = [("\n".join(wrap(one.title or title, 56)), one.points, labels) for one in maps]
    scatter(panels, classes or ["unlabelled"], paths[0])
    names = [source.name_of(int(i)) for i in ids]
    images = (small(source, int(i), side_of(len(ids))) for i in ids)
    text = embedding_page(title, maps, labels, classes, names, images)
    files.write_text(text, paths[1], "--out")
    return paths[0], paths[1]


def nearest(x: np.ndarray, k: int = NEIGHBOURS) -> tuple[np.ndarray, np.ndarray]:
    """For each of (N, F) features the rows of the k others with the largest cosine, the nearest first, and these
    cosines, (N, k) each; fewer than k where there are no more."""
    unit = F.normalize(torch.from_numpy(x), dim=1)
    rows, cosines = [], []
    for part in torch.arange(len(x)).split(1024):
        s = unit[part] @ unit.T  # (r, N)
        s[torch.arange(len(part)), part] = -torch.inf
        best = s.topk(min(k, len(x) - 1))
        rows.append(best.indices)
        cosines.append(best.values)
    return torch.cat(rows).numpy(), torch.cat(cosines).numpy()


def aligned(points: np.ndarray, onto: np.ndarray) -> np.ndarray:
    """Points of the same images, (N, 2) each, in the place, turn and size in which they lie nearest to ``onto``.

    The rotation or reflection is that of orthogonal Procrustes (Schoenemann, Psychometrika 31, 1966), the mean and the
    mean square distance from it are those of ``onto``: distances within the map keep their ratios.
    """
    one, other = points - points.mean(0), onto - onto.mean(0)
    u, _, v = np.linalg.svd(one.T @ other)
    size = np.linalg.norm(other) / max(np.linalg.norm(one), 1e-12)
    return size * one @ (u @ v) + onto.mean(0)


def project(features: np.ndarray, method: str = "tsne", seed: int = 0) -> np.ndarray:
    """(N, F) features to (N, 2), on unit rows, N of at least 4: by t-SNE (van der Maaten and Hinton, 2008), or with
    their defaults by UMAP (arXiv 1802.03426) or PaCMAP (arXiv 2012.04456). Of a collapsed encoder all lie in one place,
    which is said: the methods end in a division by zero there, t-SNE's by ending the process."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    if np.ptp(unit, axis=0).max() < ONE_PLACE:
        tell("warning: all images have the same features (a collapse): the map has all in one place")
        return np.zeros((len(unit), 2), np.float32)
    others = len(unit) - 1
    if method == "umap":  # a seed makes it run in one thread; said here, it need not warn of that
        model = _extra("umap").UMAP(n_neighbors=min(15, others), random_state=seed, n_jobs=1)
    elif method == "pacmap":
        model = _extra("pacmap").PaCMAP(n_neighbors=min(10, others // 2), random_state=seed)
    else:
        from sklearn.manifold import TSNE

        model = TSNE(init="pca", perplexity=min(30.0, others / 3), random_state=seed)
    return model.fit_transform(unit)


EXTRAS = {"umap": "umap-learn", "pacmap": "pacmap"}  # module and extra: package


def _extra(name: str) -> Any:
    return resources.package(name, name, f"--picture {name} needs the package {EXTRAS[name]}")
