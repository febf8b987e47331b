"""What pretraining measures on held-out images between epochs: k-NN accuracy, and retrieval around the projection head.

Both from one pass over the held-out images; k-NN also reads the labelled training images.
"""

from __future__ import annotations

import torch
from torch import nn

from moco.config import ValidationConfig
from moco.data import Sources
from moco.errors import UserError
from moco.eval import retrieval
from moco.eval.features import FeatureExtractor
from moco.eval.knn import evaluate_knn, knn_values
from moco.train.pretraining import Trainer


def check(sources: Sources, retrieval_every: int) -> None:
    """UserError where retrieval is asked for and there are no held-out images in classes."""
    if not retrieval_every:
        return
    if sources.val is None or sources.val.labels is None:
        raise UserError(f"--retrieval-every measures held-out images: {sources.no_pair}; give them, or leave it out.")
    retrieval.check_labels(torch.from_numpy(sources.val.labels), sources.val.name)


def report(
    trainer: Trainer, encoder: nn.Module, sources: Sources, extractor: FeatureExtractor, seed: int,
    config: ValidationConfig,
) -> None:  # fmt: skip
    """Measure and log what is due after this epoch; every process has to call.

    Args:
        encoder: its mode is put back.
        seed: of retrieval's part and clusters.
    """
    train, val = sources.train, sources.val
    by_knn, both_ways = trainer.due(config.knn_every), trainer.due(config.retrieval_every)
    if train is None or val is None or not (by_knn or both_ways):
        return
    share = extractor.shard(encoder, val, head=both_ways)
    if by_knn:
        found = evaluate_knn(encoder, train, val, extractor, k=config.k, temperature=config.temperature, queries=share)
        percent = ", ".join(f"{value:.2f} %" + f" (k={k})" * (len(found) > 1) for k, value in found.items())
        trainer.report_measured(knn_values(found), f"k-NN {percent} on held-out images (encoder features)")
    if both_ways:
        trainer.report_measured(*retrieval.both_ways(share, seed))
