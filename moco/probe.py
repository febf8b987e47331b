"""The linear probe: one linear layer on frozen features, by the protocol of MoCo's main_lincls.py.

The encoder stays in eval mode and exactly two tensors are trained, the layer's weight (normal, deviation .01) and its
bias (0), by SGD with a rate that drops 10x at given epochs. That nothing else moved is checked against the file the
encoder came from. He et al., arXiv 1911.05722, section 4.1.

Legend: N images on this process, F feature width, C classes, n images of the set, B images of a step in all.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import checkpoint, distributed, seeding
from moco.data import BadImages, EpochSampler, Labelled, Loader, Source, Sources, make_loader, normalise
from moco.encoder import backbone_keys, features, head_of
from moco.errors import TrainingError, UserError
from moco.knn import Reading, extract
from moco.meters import Mean, RunLog, Stopwatch, accuracy

Batches = Iterator[tuple[Tensor, Tensor]]  # features (N, F), labels (N,)

CHECKPOINT, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
MAX_BAD_IMAGES = 100  # of each set; more end the run


# ------------------------------------------------------------------------------------------------ before a run


def labelled_pair(sources: Sources) -> tuple[Source, Source]:
    """The labelled training and held-out images; UserError when the data has none."""
    if sources.train is None or sources.val is None:
        why = sources.no_pair or f"{sources.pretrain.name} has no labels"
        raise UserError(f"{why}: a probe needs labelled training images and labelled held-out ones (--val-data).")
    return sources.train, sources.val


# ------------------------------------------------------------------------------------------------------ a probe


class Probe:
    """A frozen encoder and the one linear layer that is trained.

    Args:
        encoder: with C outputs; its head becomes the linear layer, all other tensors stay as they are.
        device: where to compute.
        mean, std: of the channels.
        seed: of the layer's first weights.
        amp: the encoder's arithmetic, None for fp32; the layer is always fp32.
    """

    def __init__(
        self, encoder: nn.Module, device: torch.device, mean: Any, std: Any, seed: int, amp: torch.dtype | None = None
    ) -> None:
        self.encoder = encoder.to(device).eval().requires_grad_(False)
        self.device, self.mean, self.std, self.amp = device, mean, std, amp
        layer = encoder.get_submodule(head_of(encoder))
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or layer.bias is None:
            raise UserError("this -a has no classifier that is one linear layer with a bias; choose another.")
        self._pixels = (1, 1) if isinstance(layer, nn.Conv2d) else ()  # some timm classifiers are 1x1 convolutions
        first = torch.empty(layer.weight.shape).normal_(0.0, 0.01, generator=seeding.torch_generator("init", seed, 2))
        layer.weight.data.copy_(first)
        layer.bias.data.zero_()
        layer.requires_grad_(True)
        self.trained = [p for p in encoder.parameters() if p.requires_grad]
        assert len(self.trained) == 2, "the protocol trains the linear layer's weight and bias alone"
        self.layer = distributed.wrap(layer)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, F) fp32 from (N, channels, h, w) uint8 on any device.

        Without gradients: none would reach a frozen tensor, so the numbers are the same and nothing is kept for a
        backward pass.
        """
        pixels = normalise(images.to(self.device, non_blocking=True), self.mean, self.std)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            return features(self.encoder, pixels).float()

    def logits(self, x: Tensor) -> Tensor:
        """(N, C) from features (N, F)."""
        return self.layer(x.view(*x.shape, *self._pixels)).flatten(1)

    def frozen(self) -> dict[str, Tensor]:
        """A copy, on the CPU, of every tensor that must not change."""
        keys = backbone_keys(self.encoder)
        return {name: value.detach().cpu().clone() for name, value in self.encoder.state_dict().items() if name in keys}

    def changed(self, reference: dict[str, Tensor]) -> list[str]:
        """Names of the tensors that differ from the ``reference``."""
        own = self.encoder.state_dict()
        return [name for name, value in reference.items() if not _same(value, own[name].cpu())]

    def check_frozen(self, reference: dict[str, Tensor], origin: str) -> None:
        """Upstream's sanity check: every tensor but the linear layer's equals the ``reference`` (the file's).

        Raises:
            TrainingError: naming the tensors that differ; such a probe measures another encoder.
        """
        changed = self.changed(reference)
        if changed:
            raise TrainingError(
                f"{len(changed)} tensors that must stay frozen differ from {origin}, the first {changed[0]}; "
                "this accuracy would not be that encoder's."
            )


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.to(b.dtype), b, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------- batches of features


class Images:
    """Features computed from images as they come: under new random crops in every epoch, or for a held-out set.

    ``note`` sees each batch of images, see :func:`bad_image_notes`.
    """

    def __init__(self, probe: Probe, loader: Loader, sampler: EpochSampler, note: Callable) -> None:
        self.probe, self.loader, self.sampler, self.note = probe, loader, sampler, note

    def batches(self, epoch: int, watch: Stopwatch) -> Batches:
        """This process's batches of an epoch; time spent waiting for images goes to ``watch``."""
        self.sampler.set_position(epoch)
        source = self.loader.dataset.source  # type: ignore[attr-defined]
        images = iter(self.loader)
        while True:
            with watch.waiting():
                batch = next(images, None)
            if batch is None:
                return
            self.note(batch, source)
            yield self.probe.features(batch["image"]), batch["label"].to(self.probe.device)


class Cached:
    """Features computed once and without augmentation: x (n, F), labels (n,), both on the CPU."""

    def __init__(self, x: Tensor, labels: Tensor, sampler: EpochSampler, device: torch.device) -> None:
        self.x, self.labels, self.sampler, self.device = x, labels, sampler, device

    def batches(self, epoch: int, watch: Stopwatch) -> Batches:
        """This process's batches of an epoch, the same images that :class:`Images` would take."""
        self.sampler.set_position(epoch)
        for keys in self.sampler:
            rows = [index for _, index in keys]
            yield self.x[rows].to(self.device), self.labels[rows].to(self.device)


@dataclass(frozen=True)
class Feed:
    """How images reach a probe.

    size: side of the views in pixels. batch: B. seed: of order and crops. workers: loader processes of this process.
    flip: training views may be mirrored. cached: features are computed once, without augmentation.
    """

    size: int
    batch: int
    seed: int
    workers: int
    flip: bool = True
    cached: bool = False

    def of(self, probe: Probe, source: Source, note: Callable, training: bool = False) -> Images | Cached:
        """Batches of a set, no image dropped: shuffled random crops when ``training``, else whole images in order."""
        sampler, ordered = (
            EpochSampler(
                len(source), self.batch, self.seed, distributed.world_size(), distributed.rank(), drop_last=False,
                shuffle=shuffle,
            )
            for shuffle in (training, False)
        )  # fmt: skip
        views = Labelled(source, self.size, train=training and not self.cached, seed=self.seed, flip=self.flip)
        pin = probe.device.type == "cuda"
        if not self.cached:
            return Images(probe, make_loader(views, sampler, self.workers, pin), sampler, note)
        loader = make_loader(views, ordered, self.workers, pin)
        x, labels = extract(probe.encoder, loader, probe.device, probe.mean, probe.std, amp=probe.amp, note=note)
        return Cached(x, labels, sampler, probe.device)


def bad_image_notes(log: RunLog) -> Callable[[dict[str, Tensor], Source], None]:
    """A function of (batch, source) that names each unreadable image once and ends the run when there are too many."""
    counters: dict[int, BadImages] = {}

    def note(batch: dict[str, Tensor], source: Source) -> None:
        for name in counters.setdefault(id(source), BadImages(MAX_BAD_IMAGES)).note(batch, source):
            log.line(f"unreadable image replaced by another: {name}")

    return note


# ------------------------------------------------------------------------------------------------- train, validate


def train_epoch(
    probe: Probe, data: Images | Cached, optimizer: torch.optim.Optimizer, epoch: int, log: RunLog, every: int
) -> None:
    """One pass over the training images; a line and a record each ``every`` steps and at the end.

    Raises:
        TrainingError: the loss is not finite.
    """
    steps, world = len(data.sampler), distributed.world_size()
    watch, meters = Stopwatch(), [Mean(), Mean(), Mean()]
    with log.bar(steps, desc=f"epoch {epoch}") as bar:
        for step, (x, labels) in enumerate(data.batches(epoch, watch), 1):
            logits = probe.logits(x)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            parts = torch.stack([loss.detach(), *(100.0 * c / len(labels) for c in accuracy(logits, labels, (1, 5)))])
            for meter, part in zip(meters, parts, strict=True):
                meter.add(part)
            watch.count(len(labels) * world)
            bar.update()
            if step % every == 0 or step == steps:
                lr = optimizer.param_groups[0]["lr"]
                _report(log, watch, meters, epoch * steps + step, f"Epoch: [{epoch}][{step:4d}/{steps}]", lr)
                watch, meters = Stopwatch(), [Mean(), Mean(), Mean()]


def _report(log: RunLog, watch: Stopwatch, meters: list[Mean], step: int, where: str, lr: float) -> None:
    here = torch.tensor([m.value for m in meters], device=distributed.device())
    loss, acc1, acc5 = distributed.mean_over_ranks(here).tolist()
    if not math.isfinite(loss):
        raise TrainingError(f"{where} the loss is {loss}; lower --lr (30 is for ImageNet features at batch 256).")
    speed, wait = watch.rates()
    values = {"loss": loss, "acc1": acc1, "acc5": acc5, "lr": lr, "images_per_second": speed, "wait_share": wait}
    text = f"{where} loss {loss:.4f} Acc@1 {acc1:.2f} Acc@5 {acc5:.2f} lr {lr:g} {speed:.0f} images/s wait {wait:.0%}"
    log.scalars(step, values, text=text)


@dataclass(frozen=True)
class Score:
    """What a validation pass found; the same on every process."""

    acc1: float  # percent
    acc5: float
    loss: float

    def words(self, best: float) -> str:
        """Upstream's line."""
        return f" * Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} (best Acc@1 {best:.3f})"


@torch.no_grad()
def validate(probe: Probe, data: Images | Cached) -> Score:
    """Accuracy on the held-out images, each counted once: the last step's repeats, which make the shares of all
    processes equal, are left out."""
    n, world, rank = data.sampler.n, distributed.world_size(), distributed.rank()
    sums = torch.zeros(3, dtype=torch.float64, device=probe.device)
    seen = 0
    for x, labels in data.batches(0, Stopwatch()):
        first = seen + rank * len(labels)
        seen += world * len(labels)
        x, labels = x[: max(0, n - first)], labels[: max(0, n - first)]
        if len(labels):
            logits = probe.logits(x)
            sums += torch.stack([*accuracy(logits, labels, (1, 5)), F.cross_entropy(logits, labels, reduction="sum")])
    hits1, hits5, loss = distributed.sum_over_ranks(sums).tolist()
    return Score(100 * hits1 / n, 100 * hits5 / n, loss / n)


def reading(probe: Probe, feed: Feed, note: Callable) -> Reading:
    """How the measures without training (k-NN, few-shot) get the frozen features."""
    return Reading(feed.size, feed.batch, probe.device, probe.mean, probe.std, feed.workers, probe.amp, note)


# ----------------------------------------------------------------------------------------------------- checkpoints


def resume_path(resume: str, save_dir: str, needed: bool) -> str | None:
    """The file that ``--resume`` means; ``auto`` is the one in ``save_dir``, if there is one.

    Raises:
        UserError: none, though ``needed``: a classifier that nobody trained must not be evaluated by mistake.
    """
    path = os.path.join(save_dir, CHECKPOINT) if resume == "auto" else resume
    if path and (resume != "auto" or os.path.isfile(path)):
        return path
    if needed:
        raise UserError("--evaluate needs --resume with a classifier's checkpoint (--knn needs no classifier).")
    return None


def save(
    probe: Probe, optimizer: torch.optim.Optimizer, save_dir: str, *, epoch: int, arch: str, best: float, is_best: bool,
    seed: int,
) -> None:  # fmt: skip
    """Write upstream's dictionary as ``checkpoint.pth.tar``, and as ``model_best.pth.tar`` when it is the best."""
    if distributed.is_main():
        state = {
            "epoch": epoch,
            "arch": arch,
            "state_dict": {"module." + name: value for name, value in probe.encoder.state_dict().items()},
            "best_acc1": best,
            "optimizer": optimizer.state_dict(),
            "run": {"seed": seed},
        }
        for name in (CHECKPOINT, BEST) if is_best else (CHECKPOINT,):
            checkpoint.write(state, os.path.join(save_dir, name))
    distributed.barrier()


def load(
    probe: Probe, optimizer: torch.optim.Optimizer, state: dict, path: str, arch: str, weights: dict[str, Tensor]
) -> tuple[int, float]:
    """Put a classifier's checkpoint, ours or upstream's, back; returns (finished epochs, best top-1).

    Args:
        weights: of ``--pretrained``, which the checkpoint's encoder must have; empty for any.

    Raises:
        UserError: another kind of file, another architecture or encoder, or entries that do not fit.
    """
    if not isinstance(state.get("state_dict"), dict) or "best_acc1" not in state or "optimizer" not in state:
        raise UserError(f"{path} is no checkpoint of this program: give a pretrained encoder by --pretrained.")
    if state.get("arch", arch) != arch:
        raise UserError(f"{path} was trained with -a {state['arch']}; this run has -a {arch}.")
    found = {name.removeprefix("module."): value for name, value in state["state_dict"].items()}
    own = probe.encoder.state_dict()
    odd = [name for name in {**own, **found} if name not in own or name not in found]
    odd += [name for name in own if name in found and own[name].shape != found[name].shape]
    if odd:
        raise UserError(
            f"{path} does not fit: {odd[0]} differs ({len(odd)} entries do); check --stem, --size and that the data "
            "has the classes it was trained on."
        )
    probe.encoder.load_state_dict(found)
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} does not fit this optimizer: {' '.join(str(error).split())}.") from error
    if probe.changed(weights):
        raise UserError(f"{path} was trained on another encoder than --pretrained; leave one of the two out.")
    return int(state.get("epoch", 0)), float(state["best_acc1"])


def write_result(result: dict[str, Any], save_dir: str, name: str) -> None:
    """A small JSON file for programs, complete whenever it exists."""
    if distributed.is_main():
        checkpoint.write_text(json.dumps(result, indent=2) + "\n", os.path.join(save_dir, name))
