"""What pretraining measures between epochs: k-NN accuracy, retrieval around the projection head, and RankMe.

The first two from one pass over the held-out images; k-NN also reads the labelled training images. RankMe needs no
labels: it takes its sample of the training images from those that k-NN has read, and else reads it itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from moco import distributed
from moco.config import ValidationConfig
from moco.data import Source, Sources
from moco.errors import UserError
from moco.eval import retrieval
from moco.eval.features import (
    EvalData,
    FeatureExtractor,
    Features,
    TooManyUnreadError,
    bad_image_notes,
    check_readable,
)
from moco.eval.knn import evaluate_knn, knn_values, left_out
from moco.eval.rankme import measure_rankme
from moco.models.encoder import build_encoder
from moco.train.pretraining import Trainer


def check(sources: Sources, config: ValidationConfig) -> None:
    """UserError where retrieval is asked for and there are no held-out images in classes, or where so many of those
    that will be measured cannot be read that nothing would be. Every process has to call."""
    if sources.val is not None and (config.knn_every or config.retrieval_every):
        try:
            check_readable(sources.val)
        except TooManyUnreadError as error:
            raise UserError(
                f"{error.what}: repair or remove them, or leave them out by --knn-every 0 (and --retrieval-every 0)."
            ) from error
    if not config.retrieval_every:
        return
    if sources.val is None or sources.val.labels is None:
        raise UserError(f"--retrieval-every measures held-out images: {sources.no_pair}; give them, or leave it out.")
    retrieval.check_labels(torch.from_numpy(sources.val.labels), sources.val.name)


def open_extractor(trainer: Trainer, view: Any, workers: int) -> FeatureExtractor:
    """How images become features: as the run's ``view`` (:class:`moco.train.setup.Views`) says, by so many loader
    ``workers`` of each process."""
    note, patience = bad_image_notes(trainer.log.line, "not measured"), trainer.saver.patience
    images = EvalData(view.size, trainer.sampler.batch, workers=workers, note=note, patience=patience)
    return FeatureExtractor(images, trainer.device, view.mean, view.std, trainer.plan.amp)


def catch_up(measure: Callable[..., None], trainer: Trainer, path: str | None) -> None:
    """Before the first step of a run that goes on: what was due where it was saved and is not in its log, as it was
    stopped or killed there. Every process has to call.

    Args:
        measure: :func:`report` with all but ``recorded``.
        path: of the checkpoint, if any; after one of another folder nothing is due.
    """
    at = trainer.progress
    inside = at.batch > 0 and not trainer.finished()
    if path and not inside and os.path.realpath(os.path.dirname(path)) == os.path.realpath(trainer.save_dir):
        measure(recorded=distributed.from_main(trainer.log.recorded))


def report(
    trainer: Trainer, encoder: nn.Module, sources: Sources, extractor: FeatureExtractor, seed: int,
    config: ValidationConfig, recorded: Sequence[str] = (),
) -> None:  # fmt: skip
    """Measure and log what is due after this epoch, unless the run is to stop; every process has to call.

    Args:
        encoder: its mode is put back.
        seed: of RankMe's sample, and of retrieval's part and clusters.
        recorded: names of what the log has of this step already.
    """
    if trainer.exit_code is not None:
        return
    ranked = trainer.due(config.rankme_every) and "rankme" not in recorded
    read = None
    with _or_warning(trainer, "k-NN and retrieval are"):
        read = _by_labels(trainer, encoder, sources, extractor, seed, config, recorded, ranked)
    if ranked:
        with _or_warning(trainer, "RankMe is"):
            trainer.report_measured(*measure_rankme(encoder, sources.pretrain, extractor, seed, read))


@contextlib.contextmanager
def _or_warning(trainer: Trainer, what: str) -> Iterator[None]:
    """No pretraining ends for images that it could not measure."""
    try:
        yield
    except TooManyUnreadError as error:
        trainer.warn([f"{what} not measured: {error.what}"])


def _by_labels(
    trainer: Trainer, encoder: nn.Module, sources: Sources, extractor: FeatureExtractor, seed: int,
    config: ValidationConfig, recorded: Sequence[str], ranked: bool,
) -> Features | None:  # fmt: skip
    """k-NN and retrieval, where they are due and there are labels. Where k-NN reads the images of the pretraining,
    returns their features, and with ``ranked`` also what leaves the head."""
    train, val = sources.train, sources.val
    by_knn = trainer.due(config.knn_every) and "knn" not in recorded
    both_ways = trainer.due(config.retrieval_every) and not any(name.startswith("features/") for name in recorded)
    if train is None or val is None or not (by_knn or both_ways):
        return None
    share, bank = extractor.shard(encoder, val, head=both_ways), None
    online = {} if "online_val_acc1" in recorded else _online(trainer, share)
    if by_knn:
        bank = extractor.shard(encoder, train, head=ranked and train is sources.pretrain)
        votes = {"k": config.k, "temperature": config.temperature}
        found = evaluate_knn(encoder, train, val, extractor, **votes, queries=share, bank=bank)
        percent = ", ".join(f"{value:.2f} %" + f" (k={k})" * (len(found) > 1) for k, value in found.items())
        percent += "".join(f", online probe {value:.2f} %" for value in online.values())
        summary = f"k-NN {percent} on held-out images (encoder features){left_out(train, val, bank, share)}"
        trainer.report_measured({**knn_values(found), **online}, summary)
        untrained = partial(untrained_knn, trainer, train, val, extractor, config)
        trainer.warn(trainer.diagnoses.validated(trainer.progress.step, found[config.k[0]], untrained))
    if both_ways:
        values, summary = retrieval.both_ways(share, seed)
        trainer.report_measured({**({} if by_knn else online), **values}, summary)
    return bank if train is sources.pretrain else None


def _online(trainer: Trainer, share: Features) -> dict[str, float]:
    """The online probe's accuracy on the held-out images, where there is one."""
    return {} if trainer.probe is None else {"online_val_acc1": trainer.probe.accuracy(share.x, share.labels)}


def untrained_knn(
    trainer: Trainer, train: Source, val: Source, extractor: FeatureExtractor, config: ValidationConfig
) -> float:  # fmt: skip
    """The k-NN accuracy of a new network of the same shape, percent, by the first k; the run's randomness stays."""
    built: Any = trainer.model.encoder_q.built
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trainer.progress.seed)
        new = build_encoder(trainer.arch, 2, stem=built["stem"], size=built["size"], in_chans=built["channels"])
    k, temperature = config.k[:1], config.temperature
    return evaluate_knn(new.to(trainer.device), train, val, extractor, k=k, temperature=temperature)[k[0]]
