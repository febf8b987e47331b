"""Features of a set of images as a file, and their picture in two dimensions.

    python -m moco.embed CHECKPOINT DIR [flags] --out FOLDER        --help lists the flags

In --out: features.npz or features.safetensors (all images), embedding.png, and embedding.html, one file that shows each
image under the pointer and loads nothing. Exit codes: 0 done; 2 input that cannot be used.

Legend: n images of the set, N points of the picture, F feature width.
"""

from __future__ import annotations

import copy
import json
import os
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from moco import data, distributed, files, resources
from moco.data import Source, Sources
from moco.errors import UserError, tell
from moco.eval.features import EvalData, FeatureExtractor, Features, bad_image_notes
from moco.models.encoder import build_encoder
from moco.pictures.colours import colour_of
from moco.pictures.page import page, text
from moco.pictures.scatter import IN_LEGEND, scatter
from moco.pictures.thumbnails import thumbnail
from moco.seeding import numpy_generator
from moco.train.pretraining import pick_amp
from moco.weights.read import load_backbone
from moco.weights.settings import Settled, settle_from_file

FEWEST = 10  # images that a picture needs; the methods look at neighbourhoods


def embed_worker(args: Namespace) -> int:
    """One process of the command, from data to files; returns the exit code."""
    if args.picture in EXTRAS:
        _extra(args.picture)  # said before an hour of features, not after it
    make_folder(args.out)
    distributed.by_main(partial(write_embedding, args, read_features(args)))
    return 0


def write_embedding(args: Namespace, found: Found) -> None:
    """The files. A picture of many points takes minutes."""
    share, source = found.share, found.source
    tell(f"{args.arch} at {found.size} px: {found.summary}")
    written = save_features(share, source, args.out, args.format)
    tell(f"{len(share.x)} x {share.x.shape[1]} features of {source.name}: {written}")
    if args.picture != "none":
        draw_points(share, source, args.out, args.picture, args.points, args.seed)


class Found(NamedTuple):
    """Features and where they come from."""

    share: Features  # of all images, on every process
    source: Source
    encoder: nn.Module
    size: int  # of the views, pixels
    summary: str  # what was read from the checkpoint


def read_features(args: Namespace) -> Found:
    """Features of the images that the flags of this command name; every process has to call."""
    settled = settle_from_file(args, args.checkpoint)  # before the images: it says how they are read
    source = choose_source(open_images(args), args.split)
    reader = open_reader(args, settled, source)
    return Found(reader.extractor.whole(reader.encoder, source), source, reader.encoder, reader.size, reader.summary)


def open_images(args: Namespace) -> Sources:
    """The images that the flags name."""
    settings = {"download": args.download, "val_path": args.val_data, "channels": args.channels, "cache": args.cache}
    return data.open_on_nodes(args.dataset, args.data, **settings)


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
        note=bad_image_notes(partial(print, flush=True), "left out"),
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


def draw_points(share: Features, source: Source, folder: str, method: str, most: int, seed: int) -> None:
    """Write embedding.png and embedding.html with at most ``most`` images, drawn by ``seed``."""
    if len(share.x) < FEWEST:
        raise UserError(f"a picture needs {FEWEST} images, not {len(share.x)}; --picture none writes features alone.")
    rows = np.arange(len(share.x))
    if len(rows) > most:
        rows = np.sort(numpy_generator("sample", seed).choice(len(rows), most, replace=False))
    points = project(share.x.numpy()[rows], method, seed)  # (N, 2)
    ids, labels = share.ids.numpy()[rows], share.labels.numpy()[rows]
    classes = list(source.classes or ())
    title = f"{source.name}: {len(rows)} of {len(share.x)} images, {method}"
    if not classes:
        labels, classes = np.zeros_like(labels), ["unlabelled"]
    image = os.path.join(folder, "embedding.png")
    scatter([(title, points, labels)], classes, image)
    names, thumbnails = zip(*((source.name_of(int(i)), thumbnail(source.load(int(i)))) for i in ids), strict=True)
    shown = os.path.join(folder, "embedding.html")
    files.write_text(embedding_page(title, points, labels, classes, names, thumbnails), shown, "--out")
    tell(f"picture of {len(rows)} of them by {method}: {image}, {shown}")


def project(features: np.ndarray, method: str = "tsne", seed: int = 0) -> np.ndarray:
    """(N, F) features to (N, 2), on unit rows, N of at least 4: by t-SNE (van der Maaten and Hinton, 2008), or with
    their defaults by UMAP (arXiv 1802.03426) or PaCMAP (arXiv 2012.04456)."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
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


# --------------------------------------------------------------------------------------------------------- the page


def embedding_page(
    title: str,
    points: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    names: Sequence[str],
    thumbnails: Sequence[str],
) -> str:
    """A web page with one circle a point, which shows its image, class and name under the pointer.

    Args:
        points: (N, 2). labels: (N,), below len(classes).
        names, thumbnails: N each, the latter data URIs.
    """
    low, high = points.min(0), points.max(0)
    places = 20 + 960 * (points - low) / np.maximum(high - low, 1e-12)  # (N, 2) in a square of 1000
    circles = [
        f'<circle cx="{x:.1f}" cy="{1000 - y:.1f}" r="5" fill="{colour_of(int(label))}" '
        f'data-text="{text(f"{classes[label]}: {name}")}" data-image="{uri}"/>'
        for (x, y), label, name, uri in zip(places, labels, names, thumbnails, strict=True)
    ]
    legend = [
        f'<span style="color: {colour_of(label)}">&#9679; {text(name)}</span>' for label, name in enumerate(classes)
    ]
    shown = "".join(legend) if len(classes) <= IN_LEGEND else ""  # colours repeat beyond
    drawn = '<svg viewBox="0 0 1000 1000">\n{}\n</svg>'.format("\n".join(circles))
    body = f'<div id="legend">{shown}</div>\n{drawn}\n<div id="tip" hidden><img alt=""><div></div></div>'
    return page(title, body=body, scripts=["embedding.js"], styles=["embedding.css"])
