"""`make demo`: pretrain SynCo on 4,000 real digits, and show on 1,000 others that it learned.

Runs the commands a user would type, each printed before it runs: k-NN and linear probe of the untrained network, the
pretraining, the same two of the pretrained network; then a picture and a page of both embeddings.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from moco import data, distributed, resources, signals
from moco.errors import tell
from moco.eval.embed import maps_of, write_maps
from moco.eval.features import EvalData, FeatureExtractor
from moco.models.encoder import build_encoder
from moco.pictures.embedding_page import Map
from moco.weights.read import load_backbone

# Percent after all epochs. Processors round differently, which a run makes grow like another seed: 93.9 and 95.7 on an
# EPYC, 94.6 and 96.1 on a Xeon, and three seeds' k-NN spread by one point.
BAND = {"knn": (92.0, 96.5), "acc1": (94.0, 97.5)}


def run_demo(asked: argparse.Namespace, settings: argparse.Namespace) -> int:
    """The demo from start to the last line; the exit code of the first command that failed, or 0.

    Args:
        asked: the folder, how many epochs if not the configuration's, and the configuration.
        settings: those of the pretraining.
    """
    began, folder = time.monotonic(), asked.save_dir
    pretraining = ["main_pretrain.py", "--save-dir", folder]
    if asked.epochs:
        pretraining += ["--config", asked.config, "--epochs", str(asked.epochs)]
    weights = os.path.join(folder, f"checkpoint_{(asked.epochs or settings.epochs) - 1:04d}.pth.tar")
    before = probes(settings, os.path.join(folder, "untrained"))
    after = probes(settings, os.path.join(folder, "pretrained"), "--pretrained", weights)
    for command in (*before, pretraining, *after):
        script = os.path.relpath(resources.script(command[0]))
        tell(f"\n$ {resources.shown(script, *command[1:])}")
        code = signals.call([sys.executable, script, *command[1:]])
        if code or signals.noted():
            return code or signals.code() or 0
    image, shown = draw_embeddings(settings, weights, folder)
    tell(f"\n{results_table(folder, whole=asked.epochs is None)}")
    tell(f"\nThe embedding of the held-out digits, before and after: {image}, and to look into: {shown}")
    tell(f"Log {folder}/log.jsonl, curves: tensorboard --logdir {folder}, weights: {weights}")
    tell(f"{time.monotonic() - began:.0f} s in all, on {distributed.processes()}.")
    return 0


def probes(settings: argparse.Namespace, folder: str, *argv: str) -> list[list[str]]:
    """The commands for k-NN and the linear probe, on features that are computed once."""
    common = ["main_lincls.py", "--dataset", settings.dataset, "-a", settings.arch, "--size", str(settings.size)]
    common += ["-j", "0", "--seed", str(settings.seed), "--save-dir", folder, *argv]
    linear = ["--features", "cached", "--lr", "3", "--epochs", "20", "--schedule", "10", "15", "-p", "1000"]
    return [[*common, "--knn"], [*common, *linear]]


def results_table(folder: str, whole: bool = True) -> str:
    """A table of the four accuracies, read from what the commands wrote; of a ``whole`` demo also what to expect."""
    rows = ["                        k-NN   linear   (top-1 on 1,000 held-out digits)"]
    for name in ("untrained", "pretrained"):
        results = {}
        for file in ("knn.json", "result.json"):
            results.update(json.loads(Path(folder, name, file).read_text(encoding="utf-8")))
        rows.append(f"{name:20s} {results['knn']:6.1f} % {results['acc1']:6.1f} %")
    return "\n".join([*rows, expected(results)] if whole else rows)


def expected(results: dict[str, float]) -> str:
    """What a whole demo gives on any processor, and whether the pretrained network's ``results`` do."""
    (low, high), (lowest, highest) = BAND.values()
    summary = f"expected             {low:g} to {high:g} %, {lowest:g} to {highest:g} %, by processor"
    if all(low <= results[name] <= high for name, (low, high) in BAND.items()):
        return summary
    return f"{summary}\nwarning: this run is outside of it; please report it with the processor's name"


def draw_embeddings(settings: argparse.Namespace, weights: str, folder: str) -> tuple[str, str]:
    """Write the held-out digits' maps, untrained beside pretrained, as a picture and a page; returns their paths."""
    source, maps = embeddings(settings, weights)
    title = f"{len(source)} held-out digits before and after pretraining"
    return write_maps(folder, title, maps, source, np.arange(len(source)))


def embeddings(settings: argparse.Namespace, weights: str) -> tuple[data.Source, list[Map]]:
    """The held-out digits, and maps of them by the untrained network and by ``weights``."""
    source = data.open_sources(settings.dataset).val
    assert source is not None  # the built-in set always has one
    mean, std = data.channel_statistics(settings.dataset, source.channels)
    extractor = FeatureExtractor(EvalData(settings.size, 256), torch.device("cpu"), mean, std)
    features = []
    for title in ("untrained", "pretrained"):
        torch.manual_seed(settings.seed)
        encoder = build_encoder(settings.arch, 10, size=settings.size, in_chans=source.channels)
        if title == "pretrained":
            load_backbone(encoder, weights)
        features.append((title, extractor.whole(encoder, source).x.numpy()))
    return source, maps_of(features)
