"""What the linear probe and fine-tuning have in common: a score, the images that count in it, a backbone that must not
change, and where a run begins or goes on.

Legend: N images on this process, C classes, n images of the set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed
from moco.config import ClassifierConfig
from moco.data import Source
from moco.errors import TrainingError, UserError
from moco.eval.features import describe_unread
from moco.models.encoder import backbone_keys, build_encoder
from moco.train.metrics import TOP5_FROM, accuracy
from moco.train.plan import Progress
from moco.train.resume import describe_resume
from moco.weights.changes import restore_changes
from moco.weights.read import fill_network, load_backbone

Batch = tuple[Tensor, Tensor, Tensor]  # images or their features (N, ..), labels (N,), on the CPU which were read (N,)

# ------------------------------------------------------------------------------------------------------- a score


@dataclass(frozen=True)
class Score:
    """What a validation pass found; the same on every process. As a text: its accuracies."""

    acc1: float  # percent
    acc5: float | None  # None of fewer classes than TOP5_FROM
    loss: float  # never smoothed
    images: int  # that were counted
    unread: int = 0  # that could not be read
    predictions: Tensor | None = None  # (images, 3) int64, CPU: label, predicted class, label among the first five

    @classmethod
    def of(cls, sums: Tensor, n: int, classes: int, predictions: Tensor | None = None) -> Score:
        """From this process's :func:`score_sums` of n images and C ``classes``; every process has to call."""
        hits1, hits5, loss, count = distributed.sum_over_ranks(sums).tolist()
        acc5 = 100 * hits5 / count if classes >= TOP5_FROM else None
        return cls(100 * hits1 / count, acc5, loss / count, int(count), n - int(count), predictions)

    def values(self, which: str) -> dict[str, float]:
        """The numbers of a record, of the images called ``which``."""
        five = {} if self.acc5 is None else {f"{which}_acc5": self.acc5}
        return {f"{which}_acc1": self.acc1, f"{which}_loss": self.loss, **five}

    def __str__(self) -> str:
        return f"Acc@1 {self.acc1:.3f}" + ("" if self.acc5 is None else f" Acc@5 {self.acc5:.3f}")

    @property
    def left_out(self) -> str:
        """The end of a line: how many images could not be read; empty where every one counts."""
        return describe_unread(self.unread, self.images + self.unread)


def score_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """(4,) float64: hits among the first and the first five, summed loss, images; zeros of no image."""
    loss = F.cross_entropy(logits, labels, reduction="sum")
    hits = accuracy(logits, labels, (1, 5))
    return torch.stack([*hits, loss, loss.new_tensor(len(labels))]).double()


def counted_once(batches: Iterable[Batch], n: int) -> Iterator[Batch]:
    """The batches of a set of n images in order, with the rows that count, (r,) int64, in the place of those that were
    read: the last step's repeats, which make the shares of all processes equal, do not."""
    seen, world, rank = 0, distributed.world_size(), distributed.rank()
    for x, labels, readable in batches:
        left = n - seen - rank * len(labels)
        seen += world * len(labels)
        yield x, labels, readable[: max(0, left)].nonzero()[:, 0]


# ------------------------------------------------------------------------------------- a backbone that must not change


def backbone_of(encoder: nn.Module) -> dict[str, Tensor]:
    """A copy, on the CPU, of every tensor but the head's."""
    keys = backbone_keys(encoder)
    return {name: value.detach().cpu().clone() for name, value in encoder.state_dict().items() if name in keys}


def changed(encoder: nn.Module, reference: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that differ from the ``reference``."""
    own = {name: value.cpu() for name, value in encoder.state_dict().items() if name in reference}
    same = partial(torch.allclose, rtol=0, atol=0, equal_nan=True)
    return [name for name, value in reference.items() if not same(value.to(own[name].dtype), own[name])]


def check_frozen(encoder: nn.Module, reference: dict[str, Tensor], which: str, origin: str) -> None:
    """Upstream's sanity check: every tensor but the linear layer's equals the ``reference``, which is from ``origin``.

    Raises:
        TrainingError: naming the tensors ``which`` differ; such an accuracy is of another encoder.
    """
    if names := changed(encoder, reference):
        raise TrainingError(
            f"{len(names)} tensors that {which} differ from {origin}, the first {names[0]}; this accuracy would not be "
            "that encoder's."
        )


# --------------------------------------------------------------------------------------------- where a run begins


def begin_encoder(
    config: ClassifierConfig, images: Source, size: int, seed: int, resumed: bool
) -> tuple[nn.Module, dict[str, Tensor], str]:
    """An encoder with an output for each class of the ``images``, and with the weights of --pretrained, if any; these;
    and what is in it, in words, empty where a checkpoint of the run fills it.

    size: side of the views in pixels.
    """
    shape = {"stem": config.stem, "size": size, "in_chans": images.channels, "drop_path": config.drop_path}
    encoder = build_encoder(config.arch, len(images.classes or ()), **shape)
    if config.pretrained:
        return encoder, *load_backbone(encoder, config.pretrained, config.arch)
    return encoder, {}, "" if resumed else f"no --pretrained: random initialisation by seed {seed}, a baseline"


def check_state(state: dict, path: str, arch: str, *needed: str) -> None:
    """UserError where the file is none of a classifier (``needed``: entries besides), or of another architecture."""
    if not isinstance(state.get("state_dict"), dict) or not {"best_acc1", *needed} <= set(state):
        raise UserError(f"{path} is no checkpoint of this program: give a pretrained encoder by --pretrained.")
    if state.get("arch", arch) != arch:
        raise UserError(f"{path} was trained with -a {state['arch']}; this run has -a {arch}.")


def fill(encoder: nn.Module, state: dict, path: str, entry: str = "state_dict") -> None:
    """Put a checkpoint's network, classifier included, into the encoder; UserError where it does not fit."""
    restore_changes(encoder, state, path)
    fill_network(encoder, state[entry], path)


@contextlib.contextmanager
def filling_optimizer(path: str) -> Iterator[None]:
    """UserError where an optimizer's state does not fit in here."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this optimizer: {' '.join(str(error).split())}.") from error


def begin_at(state: dict, path: str | None, seed: int, epoch: int) -> tuple[Progress, str]:
    """Where a run goes on from its checkpoint, and a sentence that says so; without one, where it begins."""
    if path is None:
        return Progress(seed, epoch), ""
    run, epoch = state.get("run") or {}, int(state.get("epoch", 0))
    best = {"best_acc1": float(state["best_acc1"]), "best_epoch": int(run.get("best_epoch", epoch))}
    at = Progress(seed, epoch, int(run.get("batch", 0)), plateau=run.get("plateau", {}), **best)
    return at, describe_resume(path, at.epoch, at.batch)
