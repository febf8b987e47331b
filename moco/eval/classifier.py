"""What the linear probe and fine-tuning have in common: the network, a score, the images that count in it, a backbone
that must not change, and where a run begins or goes on.

Legend: N images on this process, F feature width, C classes, n images of the set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed
from moco.config import ClassifierConfig
from moco.data import Source
from moco.errors import TrainingError, UserError, one_line
from moco.eval.features import EvalData, FeatureExtractor, describe_unread
from moco.files import run_of
from moco.models.batchnorm import sync_batchnorm
from moco.models.encoder import around_head, backbone_keys, build_encoder, new_classifier, strided_point
from moco.models.inputs import normalise
from moco.train.metrics import TOP5_FROM, accuracy
from moco.train.optimizers import layer_groups
from moco.train.plan import Progress
from moco.train.pretraining import pick_amp
from moco.train.resume import describe_resume
from moco.weights.changes import restore_changes
from moco.weights.read import fill_network, load_backbone

Batch = tuple[Tensor, Tensor, Tensor]  # images or their features (N, ..), labels (N,), on the CPU which were read (N,)

# --------------------------------------------------------------------------------------------------- the network


class Classifier(nn.Module):
    """An encoder whose head is a new linear layer: weight normal with deviation .01, bias 0.

    Args:
        encoder: with C outputs.
        mean, std: of the channels.
        seed: of the layer's first weights.
        freeze: only the layer's weight and bias are trained and the encoder stays in eval mode.
        amp: the encoder's arithmetic, None for fp32; the loss is always fp32.
        sync_bn: BatchNorm over the batch of all processes; the encoder's layers are replaced.

    Raises:
        UserError: the encoder's head is not one linear layer with a bias.
    """

    def __init__(
        self,
        encoder: nn.Module,
        mean: Any,
        std: Any,
        seed: int,
        freeze: bool,
        amp: torch.dtype | None = None,
        sync_bn: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = sync_batchnorm(encoder) if sync_bn else encoder
        self.mean, self.std, self.freeze, self.amp = mean, std, freeze, amp
        self._mean = nn.Buffer(torch.as_tensor(mean, dtype=torch.float32), persistent=False)
        self._std = nn.Buffer(torch.as_tensor(std, dtype=torch.float32), persistent=False)
        layer = new_classifier(self.encoder, seed)
        self.encoder.requires_grad_(not freeze)
        layer.requires_grad_(True)
        self.head, self.classes = [layer.weight, layer.bias], len(layer.weight)  # C
        self.train(not freeze)

    def train(self, mode: bool = True) -> Classifier:
        """As of any module, but a frozen encoder stays in eval mode: its BatchNorm statistics are the file's."""
        return super().train(mode and not self.freeze)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._mean.device

    def prepare(self, images: Tensor) -> Tensor:
        """Normalised fp32 pixels of uint8 images, both (N, channels, h, w)."""
        return normalise(images, self._mean, self._std)

    def forward(self, images: Tensor, with_features: bool = False) -> Any:
        """(N, C) fp32 logits of (N, channels, h, w) images, uint8 or prepared, on the model's device; with_features:
        also what enters the layer, (N, F)."""
        pixels = self.prepare(images) if images.dtype == torch.uint8 else images
        with torch.autocast(pixels.device.type, self.amp, enabled=self.amp is not None):
            x, logits = around_head(self.encoder, pixels)
        return (logits.float(), x.float()) if with_features else logits.float()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, F) fp32 from (N, channels, h, w) uint8 on any device.

        Without gradients: none would reach a frozen tensor, so the numbers are the same and nothing is kept for a
        backward pass.
        """
        return self(images.to(self.device, non_blocking=True), with_features=True)[1]

    def extractor(self, images: EvalData) -> FeatureExtractor:
        """Of features from whole images."""
        return FeatureExtractor(images, self.device, self.mean, self.std, self.amp)

    def groups(
        self, lr_classifier: float, lr_backbone: float, weight_decay: float = 0.0, layer_decay: float | None = None
    ) -> list[dict[str, Any]]:
        """Parameter groups in the released code's order: the layer, then the rest if it is trained; with
        ``layer_decay`` those of :func:`moco.train.optimizers.layer_groups`, whose weight decay is per group."""
        if layer_decay is not None:
            return layer_groups(self.encoder, self.head, lr_classifier, lr_backbone, weight_decay, layer_decay)
        head = {id(p) for p in self.head}
        rest = [p for p in self.encoder.parameters() if id(p) not in head]
        groups = [{"params": self.head, "lr": lr_classifier}]
        return groups if self.freeze else [*groups, {"params": rest, "lr": lr_backbone}]


def build_classifier(
    config: ClassifierConfig, images: Source, size: int, mean: Any, std: Any, seed: int, resumed: bool
) -> tuple[Classifier, dict[str, Tensor], str]:
    """The network on its device, with an output for each class of the ``images`` and the weights of --pretrained, if
    any; these; and what is in it, in words, empty where a checkpoint of the run fills it.

    Args:
        size: side of the views in pixels.
        mean, std: of the channels.
        seed: of the layer's first weights.

    Raises:
        UserError: what cannot be built, read or trained in this arithmetic.
    """
    shape = {"stem": config.stem, "size": size, "in_chans": images.channels, "drop_path": config.drop_path}
    encoder = build_encoder(config.arch, len(images.classes or ()), **shape)
    weights, read = {}, "" if resumed else f"no --pretrained: random initialisation by seed {seed}, a baseline"
    if config.pretrained:
        weights, read = load_backbone(encoder, config.pretrained, config.arch)
    device = distributed.device()
    broken = "" if device.type != "cpu" or config.freeze else strided_point(encoder, images.channels, size)
    amp = pick_amp(config.amp, device, broken)
    model = Classifier(encoder, mean, std, seed, config.freeze, amp, config.sync_bn)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(device).to(memory_format=layout), weights, read  # type: ignore[call-overload]


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


def predictions_of(logits: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """(N, 3) int64 of :class:`Score`; the label is -1 outside the rows ``kept`` (r,)."""
    first = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (N, 5), best first
    among5 = (first == labels[:, None]).any(1).long()
    own = torch.full_like(labels, -1)
    own[kept] = labels[kept]
    return torch.stack([own, first[:, 0], among5], 1)


def counted_once(batches: Iterable[Batch], n: int, missing: list[int]) -> Iterator[Batch]:
    """The batches of a set of n images in order, with the rows that count, (r,) int64, in the place of those that were
    read: the last step's repeats, which make the shares of all processes equal, do not. The numbers of the images that
    were not read go to ``missing``."""
    seen, world, rank = 0, distributed.world_size(), distributed.rank()
    for x, labels, readable in batches:
        first = seen + rank * len(labels)
        seen += world * len(labels)
        own = readable[: max(0, n - first)]
        missing += (first + (~own).nonzero()[:, 0]).tolist()
        yield x, labels, own.nonzero()[:, 0]


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


def check_state(state: dict, path: str, arch: str, *needed: str) -> None:
    """UserError where the file is none of a classifier (``needed``: entries besides), or of another architecture."""
    if not isinstance(state.get("state_dict"), dict) or not {"best_acc1", *needed} <= set(state):
        raise UserError(f"{path} is no checkpoint of this program: give a pretrained encoder by --pretrained.")
    if state.get("arch") not in (None, arch):
        raise UserError(f"{path} was trained with -a {state['arch']}; this run has -a {arch}: give both the same.")


def fill(encoder: nn.Module, state: dict, path: str, entry: str = "state_dict") -> None:
    """Put a checkpoint's network, classifier included, into the encoder; UserError where it does not fit."""
    restore_changes(encoder, state, path)
    if made := run_of(state).get("pretraining"):  # of the file that --pretrained named when the run began
        encoder.pretraining = made
    fill_network(encoder, state[entry], path)


@contextlib.contextmanager
def filling_optimizer(path: str) -> Iterator[None]:
    """UserError where an optimizer's state does not fit in here."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this optimizer: {one_line(error)}.") from error


def begin_at(state: dict, path: str | None, seed: int, epoch: int) -> tuple[Progress, str]:
    """Where a run goes on from its checkpoint, and a sentence that says so; without one, where it begins."""
    if path is None:
        return Progress(seed, epoch), ""
    run, epoch = run_of(state), int(state.get("epoch", 0))
    best = {"best_acc1": float(state["best_acc1"]), "best_epoch": int(run.get("best_epoch", epoch))}
    at = Progress(seed, epoch, int(run.get("batch", 0)), plateau=run.get("plateau", {}), **best)
    return at, describe_resume(path, at.epoch, at.batch)
