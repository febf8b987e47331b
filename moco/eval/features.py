"""How labelled images reach a network that is evaluated, probed or fine-tuned, and what a frozen encoder makes of them.

With W processes a set's features take, in RAM of each process, its share of them, n / W rows of 4 F bytes (the 1.28
million features of ImageNet at F = 2048 are 10.5 GB in one process and 1.3 GB in each of eight), or where every process
needs them, all n rows.

Legend: n images of a set, N images of a batch, B images of a step in all, F feature width, D width behind the head,
W processes, r rows of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import bars, distributed
from moco.data import EpochSampler, Labelled, Loader, Preset, Source, make_loader, probe_preset, why_bad
from moco.data.sources.base import spread_indices
from moco.errors import UserError
from moco.models.encoder import around_head, features
from moco.models.inputs import normalise
from moco.train.outage import Patience
from moco.train.timers import Stopwatch

MAX_BAD_IMAGES = 100  # of a set, or MAX_BAD_SHARE where that is more, but never more than half of it
MAX_BAD_SHARE = 0.01
TRIED = 32  # images of a held-out set that are read before hours are spent
GATHERED_ROWS = 16384  # of each process, that are exchanged at a time: 134 MB at F = 2048

Made = TypeVar("Made")
Note = Callable[[dict[str, Tensor], Source], object]


# ------------------------------------------------------------------------------------- images that cannot be read


class TooManyUnreadError(UserError):
    """More images of a set cannot be read than a measure of the others may leave out; ``what``: how many of which."""

    def __init__(self, what: str, enough: int | None) -> None:
        self.what = what
        do = f"repair or remove them, or give --max-bad-images {enough} to go on with the others alone"
        super().__init__(f"{what}: {'check the files' if enough is None else do}.")


def most_unreadable(images: int, asked: int | None = None) -> int:
    """How many images of a set may be unreadable in a measure of the others: as ``asked`` by --max-bad-images, else
    half of a small set, MAX_BAD_IMAGES of a larger one and MAX_BAD_SHARE of one above 10,000."""
    return min(images // 2, max(MAX_BAD_IMAGES, int(MAX_BAD_SHARE * images))) if asked is None else asked


def check_unread(unread: int, source: Source, first: str, asked: int | None = None) -> None:
    """TooManyUnreadError for more than :func:`most_unreadable`; ``first``: the name of one."""
    limit = most_unreadable(len(source), asked)
    if unread > limit:
        of = f"{unread} of {len(source)} images of {source.name} cannot be read, the first {first}"
        raise TooManyUnreadError(f"{of}; the limit is {limit}", unread)


def check_readable(source: Source, asked: int | None = None) -> None:
    """Before hours are spent: as :func:`check_unread`, of a small set of which every image is read, or of a larger one
    where more than half of TRIED images, spread over it, cannot be read and nothing else was ``asked`` for. Every
    process has to call."""
    rows = spread_indices(len(source), TRIED)
    exact = len(rows) == len(source)
    if not exact and asked is not None:
        return
    bad = list(filter(None, (why_bad(source, row, surely=True) for row in rows))) if distributed.is_main() else []
    bad = distributed.from_main(bad)
    if bad and len(bad) == len(rows):
        none = f"none of {len(rows)} images tried in {source.name} can be read, first {bad[0]}"
        raise TooManyUnreadError(none, None)
    if exact and bad:
        check_unread(len(bad), source, bad[0], asked)
    elif len(bad) > len(rows) // 2:
        tried = f"{len(bad)} of {len(rows)} images tried in {source.name} cannot be read, the first {bad[0]}"
        raise TooManyUnreadError(tried, len(source))


def describe_unread(unread: int, images: int) -> str:
    """The end of a line about a measure; empty where every image counts."""
    return f"; {unread} of {images} images cannot be read and are not counted" * bool(unread)


def bad_image_notes(tell: Callable[[str], object], fate: str = "") -> Note:
    """A note (see :class:`EvalData`) that names each unreadable image of this process once, with the reason; ``fate``:
    what becomes of it, if there is one answer."""
    told: set[str] = set()

    def note(batch: dict[str, Tensor], source: Source) -> None:
        for number in sorted({number for number in batch["bad"].tolist() if number >= 0}):
            if (name := source.name_of(number)) not in told:
                told.add(name)
                tell(f"unreadable image{f' {fate}' * bool(fate)}: {why_bad(source, number) or name}")

    return note


# --------------------------------------------------------------------------------------------- images in batches


@dataclass(frozen=True)
class LabelledBatches:
    """A set's loader and the order in which it goes through the set. ``note`` sees every batch; ``patience`` is for
    images that are gone. ``most_bad``: of :class:`EvalData`. ``ends``: more end a pass, as of one for training, which
    nothing judges at its end. ``bad``: numbers of the images that could not be read here."""

    loader: Loader
    sampler: EpochSampler
    note: Note | None = None
    patience: Patience = field(default_factory=Patience)
    most_bad: int | None = None
    ends: bool = False
    bad: set[int] = field(default_factory=set)

    @property
    def source(self) -> Source:
        """The set."""
        return self.loader.dataset.source  # type: ignore[attr-defined]

    def batches(self, epoch: int, first: int = 0, watch: Stopwatch | None = None) -> Iterator[dict[str, Tensor]]:
        """This process's batches of an epoch from ``first`` on; time spent waiting goes to ``watch``."""
        self.sampler.set_position(epoch, first)
        source = self.source
        for batch in self.loader if watch is None else watch.waiting_for(self.loader):
            if self.note is not None:
                self.note(batch, source)
            self.bad.update(number for number in batch["bad"].tolist() if number >= 0)
            if self.bad and self.ends:
                check_unread(len(self.bad), source, source.name_of(min(self.bad)), self.most_bad)
            yield batch

    def count_bad(self) -> int:
        """How many images could not be read by some process until now; every process has to call."""
        missing = torch.zeros(self.sampler.n, dtype=torch.int32, device=distributed.device())
        missing[sorted(self.bad)] = 1
        return int(distributed.max_over_ranks(missing).sum())

    def judge(self, missing: Sequence[int]) -> int:
        """How many images cannot be read, of which the main process notes the first; every process has to call.

        Args:
            missing: their numbers, those of this process, none twice among the processes.

        Raises:
            TooManyUnreadError: on every process, above :func:`most_unreadable`.
        """
        count = int(distributed.sum_over_ranks(torch.tensor(len(missing), device=distributed.device())))
        n = len(self.source)
        first = n - distributed.largest(n - min(missing, default=n))[0]  # of all processes
        if count and self.note is not None and distributed.is_main():
            self.note({"bad": torch.tensor([first])}, self.source)
        if count:
            check_unread(count, self.source, self.source.name_of(first), self.most_bad)
        return count

    def whole(self, work: Callable[[], Made]) -> Made:
        """``work()``, a pass over these batches that changes nothing, and again where images were gone on some process
        and are back; every process has to call."""
        made = work()
        while why := distributed.any_text(self.loader.why()):
            self.patience.wait(why, self.loader.look)
            made = work()
        return made


@dataclass(frozen=True)
class EvalData:
    """How labelled images are read: whole and in order to evaluate, as shuffled random crops to train.

    size: side of the views in pixels. batch: B. seed: of order and crops. workers: loader processes of this process.
    flip: training views may be mirrored. note: called with every batch of this process and its source, for instance to
    count unreadable images. preset, auto, views: of training views, see :class:`moco.data.Labelled`. most_bad: images
    that a measure may leave out, None for :func:`most_unreadable` of the set.
    """

    size: int
    batch: int
    seed: int = 0
    workers: int = 0
    flip: bool = True
    note: Note | None = None
    preset: Preset | None = None
    auto: str = ""
    views: int = 1
    patience: Patience = field(default_factory=Patience)
    most_bad: int | None = None

    def sampler(self, source: Source, training: bool = False) -> EpochSampler:
        """The order of a set, in which no image is dropped; shuffled when ``training``."""
        world, rank = distributed.world_size(), distributed.rank()
        return EpochSampler(len(source), self.batch, self.seed, world, rank, drop_last=False, shuffle=training)

    def of(self, source: Source, training: bool = False) -> LabelledBatches:
        """Batches of a set: shuffled random crops when ``training``, else whole images in order."""
        sampler = self.sampler(source, training)
        preset = (self.preset or probe_preset(self.flip)) if training else None
        views = Labelled(source, self.size, self.seed, preset, self.auto, self.views)
        loader = make_loader(views, sampler, self.workers, pin_memory=True, marks=True)
        return LabelledBatches(loader, sampler, self.note, self.patience, self.most_bad, training)


# ------------------------------------------------------------------------------------------- images to features


@dataclass(frozen=True)
class Features:
    """The images of a set that were read, none twice.

    x: (r, F) fp32 on the CPU. labels: (r,) int64. ids: (r,) int64, their numbers in the set, ascending. readable: (r,)
    bool, false where the features are of the image that replaced one. z: (r, D) what leaves the head, where it was
    asked for. unread: images of the whole set, on all processes, that cannot be read.
    """

    x: Tensor
    labels: Tensor
    ids: Tensor
    readable: Tensor
    z: Tensor | None = None
    unread: int = 0

    @property
    def left_out(self) -> str:
        """The end of a line about a measure of a set that is here whole: :func:`describe_unread`."""
        return describe_unread(self.unread, self.unread + int(self.readable.sum()))


@dataclass(frozen=True)
class FeatureExtractor:
    """How images become features of a frozen encoder, without augmentation.

    images: see :class:`EvalData`; its batch need not be a multiple of W. mean, std: a number a channel each. amp: the
    encoder's arithmetic, None for fp32.
    """

    images: EvalData
    device: torch.device
    mean: Sequence[float] | Tensor
    std: Sequence[float] | Tensor
    amp: torch.dtype | None = None

    def shard(self, encoder: nn.Module, source: Source, *, head: bool = False, unread: bool = False) -> Features:
        """Features of this process's part of a set; every process has to call. The encoder's mode is put back.

        Args:
            head: also what leaves the head, from the same pass.
            unread: keep images that cannot be read, as what replaced them.

        Raises:
            TooManyUnreadError: on every process, above :func:`most_unreadable`.
        """
        world = distributed.world_size()
        images = replace(self.images, batch=-(-self.images.batch // world) * world)  # only speed depends on it
        batches = images.of(source)
        share, missing = batches.whole(lambda: self._share(encoder, batches, head, unread))
        return replace(share, unread=batches.judge(missing))

    def _share(
        self, encoder: nn.Module, batches: LabelledBatches, head: bool, unread: bool
    ) -> tuple[Features, list[int]]:
        """Features, and the numbers of the images that cannot be read."""
        rank, n, size = distributed.rank(), batches.sampler.n, batches.sampler.batch
        sizes = [len(keys) for keys in batches.sampler]
        found: list[Tensor] = []
        labels, ids = torch.empty(2, sum(sizes), dtype=torch.int64)
        readable = torch.empty(sum(sizes), dtype=torch.bool)
        at, missing = 0, list[int]()
        for step, (made, batch) in enumerate(self._passes(encoder, batches, head)):
            if not step:  # a list of parts and its cat would hold everything twice
                found = [torch.empty(sum(sizes), rows.shape[1]) for rows in made]
            place = step * size + rank * sizes[step] + torch.arange(sizes[step])
            own = place < n  # the last step repeats images to be divisible
            kept = own & (unread | (batch["bad"] < 0))
            missing += place[own & (batch["bad"] >= 0)].tolist()
            rows = slice(at, at := at + int(kept.sum()))
            labels[rows], ids[rows], readable[rows] = batch["label"][kept], place[kept], batch["bad"][kept] < 0
            for x, one in zip(found, made, strict=True):
                x[rows] = one.cpu()[kept]
        x, *z = (x[:at] for x in found)
        return Features(x, labels[:at], ids[:at], readable[:at], z[0] if z else None), missing

    def whole(self, encoder: nn.Module, source: Source, *, head: bool = False, unread: bool = False) -> Features:
        """Features of a whole set on every process, for sets that fit; see :meth:`shard`."""
        return gathered(self.shard(encoder, source, head=head, unread=unread), self.device)

    @torch.no_grad()
    def _passes(
        self, encoder: nn.Module, batches: LabelledBatches, head: bool
    ) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Tensor]]]:
        """What the encoder makes of each batch of this process, (N, F) fp32 and with ``head`` (N, D), and the batch."""
        # Running statistics are each process's own; all embed with the main one's, which is what a checkpoint holds.
        distributed.broadcast_buffers(list(encoder.buffers()))
        training = encoder.training
        encoder.eval()
        try:
            for batch in bars.counted(batches.batches(0), len(batches.sampler), "features"):
                pixels = normalise(batch["image"].to(self.device, non_blocking=True), self.mean, self.std)
                with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                    made = around_head(encoder, pixels) if head else (features(encoder, pixels),)
                yield tuple(x.float() for x in made), batch
        finally:
            encoder.train(training)


def gathered(share: Features, device: torch.device) -> Features:
    """The shares of all processes in the set's order, on every process, for sets that fit; all have to call."""
    world = distributed.world_size()
    if world == 1:
        return share
    most = int(distributed.max_over_ranks(torch.tensor(len(share.ids), device=device)))
    ids = distributed.all_gather(padded(share.ids, most, -1).to(device)).cpu()  # (W * most,)
    real = ids >= 0
    place = torch.full_like(ids, -1)
    place[real] = ids[real].argsort().argsort()
    place = place.view(world, most)

    def gather(x: Tensor) -> Tensor:
        out = x.new_empty(int(real.sum()), *x.shape[1:])
        for start in range(0, most, GATHERED_ROWS):
            part = padded(x[start : start + GATHERED_ROWS], min(GATHERED_ROWS, most - start))
            rows, where = distributed.all_gather(part.to(device)).cpu(), place[:, start : start + len(part)].flatten()
            out[where[where >= 0]] = rows[where >= 0]
        return out

    z = None if share.z is None else gather(share.z)
    x, labels, readable = gather(share.x), gather(share.labels), gather(share.readable)
    return Features(x, labels, ids[real].sort().values, readable, z, share.unread)


def padded(x: Tensor, rows: int, value: int = 0) -> Tensor:
    """``x`` with rows of ``value`` behind its own, ``rows`` in all: what processes exchange has one size on all."""
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - len(x)), value=value)
