"""Which images a step gets on which rank, the loader, normalisation, and the count of bad images.

Legend: N images of a batch, C channels, h x w pixels, B images of a step over all ranks, n images of the data set.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from moco import signals
from moco.data.augment.by_pil import split_order
from moco.data.augment.by_triton import finish
from moco.data.datasets import Key, TwoViews, absent, load_or_replace
from moco.data.sources.away import ImagesAwayError
from moco.data.sources.base import Source
from moco.errors import OutageError, UserError, tell
from moco.seeding import torch_generator

_TELLS_THE_SENDER = hasattr(signal, "sigtimedwait")  # not on macOS, where workers keep torch's handling
AWAY_MARK = "away"  # an entry that a batch has only where its images could not be had
CUT = (ConnectionError, EOFError)  # of a connection whose other end is closed
PARTING_SECONDS = 5.0  # that a process which is killed may take to be gone once its connections are closed
WINDOW = 8192  # images, of shards read in order, that are shuffled together: four or five shards of photographs


@dataclass(eq=False)
class EpochSampler(Sampler[list[Key]]):
    """Batches of (epoch, index) keys for one rank, a function of (n, batch, seed, epoch, world, rank) alone.

    ``batch`` is B, the images of a step over all ranks. Step t takes places tB..(t+1)B of one permutation of the n
    images, and rank r the r-th of ``world`` equal runs of them: the ranks together see what one process sees.
    With ``drop_last`` the n mod B images at the end are left out; without, the last step is short, filled from the
    start of the permutation to a multiple of ``world``.
    Raises UserError when B is not a multiple of ``world`` or no batch would be left.
    """

    n: int
    batch: int
    seed: int
    world: int = 1
    rank: int = 0
    drop_last: bool = True
    shuffle: bool = True
    epoch: int = field(default=0, init=False)
    first_batch: int = field(default=0, init=False)
    starts: np.ndarray | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        n, batch, world = self.n, self.batch, self.world
        if batch < 1 or batch % world:
            raise UserError(f"--batch-size {batch} cannot be divided among {world} processes: choose a multiple of it")
        if n < 1 or (self.drop_last and n < batch):
            do = f"give a --batch-size of at most {n // world * world}, or leave it to --auto"
            do = do if n >= world else "add images"
            raise UserError(f"the data set has {n} images, fewer than one batch of {batch}; {do}.")

    def in_shards(self, starts: np.ndarray | None) -> EpochSampler:
        """Read in the order of files of several images, ``starts`` (shards,) their first images; None: any order.

        The shards are put in random order, and images shuffled inside windows of ``WINDOW``. Each rank gets its own
        run of whole shards (but for the first and the last), so the ranks see other images than one process would;
        together they still see every image once.
        """
        self.starts = starts
        return self

    def share(self, step: int) -> int:
        """Images of a step on this rank."""
        return -(-min(self.batch, self.n - step * self.batch) // self.world)

    def __len__(self) -> int:
        """Steps of a whole epoch, wherever the next one starts."""
        return self.n // self.batch if self.drop_last else -(-self.n // self.batch)

    @property
    def fewest(self) -> int:
        """Images of the smallest step of an epoch, on each rank."""
        sizes = [self.batch] if self.drop_last else [min(self.n, self.batch), self.n % self.batch or self.batch]
        return -(-min(sizes) // self.world)

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """The next pass is ``epoch``, from its step ``first_batch`` on; what comes before is not loaded."""
        self.epoch = epoch
        self.first_batch = first_batch

    def _order(self, epoch: int) -> torch.Tensor:
        """(n,) int64: the order of the images in ``epoch``."""
        if not self.shuffle:
            return torch.arange(self.n)
        generator = torch_generator("order", self.seed, epoch)
        if self.starts is None:
            return torch.randperm(self.n, generator=generator)
        firsts, ends = self.starts.tolist(), [*self.starts[1:].tolist(), self.n]
        shards = torch.randperm(len(firsts), generator=generator).tolist()
        order = torch.cat([torch.arange(firsts[shard], ends[shard]) for shard in shards])
        windows = torch.arange(self.n) // WINDOW + torch.rand(self.n, generator=generator, dtype=torch.float64)
        order = order[windows.argsort()]
        # A step takes the ranks' shares one after another: deal each rank's run out to the steps.
        steps = self.n // self.batch
        whole = order[: steps * self.batch].view(self.world, steps, self.batch // self.world)
        return torch.cat([whole.transpose(0, 1).reshape(-1), order[steps * self.batch :]])

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self._order(self.epoch)
        for step in range(self.first_batch, len(self)):
            share = self.share(step)
            first = step * self.batch + self.rank * share
            places = torch.arange(first, first + share) % self.n  # wraps to the start of the permutation
            yield [(epoch, index) for index in order[places].tolist()]


def _end_with_the_parent(parent: int) -> None:
    """Schedulers and Ctrl-C signal every process of a job. A worker that died of it would raise in the main process in
    the middle of the step that it wants to finish. So a worker is born with the signals blocked, and ends of SIGTERM
    from its parent, with which torch ends a worker that does not end by itself, and without its parent."""
    while os.getppid() == parent:
        found = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if found and found.si_pid == parent:
            break
    os._exit(0)


def _ends(lives: Callable[[], bool]) -> bool:
    """Whether a process that has broken a connection is gone, which can be a moment later than its connection."""
    until = time.monotonic() + PARTING_SECONDS
    while (still := lives()) and time.monotonic() < until:
        time.sleep(0.01)
    return not still


def _prepare_worker(_: int) -> None:
    """One torch thread a worker, an ear for the parent's SIGTERM, and no trace of a connection that it has cut off."""
    torch.set_num_threads(1)
    # not getppid(), which is another process's already where the parent was killed before this line
    parent = born.pid if (born := multiprocessing.parent_process()) else os.getppid()

    def lives() -> bool:
        return os.getppid() == parent

    def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        # of multiprocessing's thread that hands tensors over, when the parent was killed
        if lives() and not (isinstance(error, CUT) and _ends(lives)):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report
    if _TELLS_THE_SENDER:
        threading.Thread(target=_end_with_the_parent, args=(parent,), daemon=True).start()


def _plain_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """Takes a worker's UserError out of the stack trace that the loader wraps it in."""
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).strip().rsplit("UserError: ", 1)[-1]) from None


@contextlib.contextmanager
def _without_torchs_handler() -> Iterator[None]:
    """torch has the death of a worker raise an error in the main thread, wherever that is: in the middle of a step, or
    of a file that is written. Where the worker's next batch is waited for is soon enough."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # else torch has set none
            signal.signal(signal.SIGCHLD, before)


class Loader(DataLoader):
    """A DataLoader over an EpochSampler's keys; ``set_position`` on the sampler holds for the next pass.

    When the data is gone, or a worker, a pass ends with an OutageError. With ``marks`` it goes on with batches of black
    images instead, each of its right size and with the entry ``AWAY_MARK``: whoever takes them can do so in step with
    other processes, and then begin another pass from the first of them, once :meth:`look` finds nothing amiss.
    """

    marks = False
    trouble = ""  # what became of a worker
    deaths = (-1, 0)  # the step at which the last one died, and how often in a row at that one
    away: int | None = None  # the number of an image

    def __iter__(self) -> Any:
        # The loader's own iterator is made here, not at the first batch, so that workers start to load at once.
        with signals.blocked() if _TELLS_THE_SENDER else signals.open_to_children(), _without_torchs_handler():
            try:
                batches = super().__iter__()
            except (RuntimeError, *CUT) as error:  # which died between two passes
                self._note_death(error, self._sampler.first_batch)
                tell(f"warning: {self.trouble}; others take its place", error=True)
                batches = super().__iter__()
        self.trouble, self.away = "", None
        return self._until_gone(_plain_errors(batches), self._sampler.first_batch)

    @property
    def _sampler(self) -> EpochSampler:
        assert isinstance(self.batch_sampler, EpochSampler)
        return self.batch_sampler

    def _until_gone(self, batches: Iterator[Any], step: int) -> Iterator[Any]:
        blank = None
        try:
            for batch in batches:
                self.away = absent(batch)
                if self.away is not None:
                    blank = batch
                    break
                yield batch
                step += 1
        except (RuntimeError, *CUT) as error:
            self._note_death(error, step)
            dataset: Any = self.dataset
            blank = default_collate([dataset.blank((self._sampler.epoch, 0))] * self._sampler.share(step))
        if blank is not None:  # nothing more is asked of what is gone
            if not self.marks:
                raise OutageError(self.why())
            for later in range(step, len(self._sampler)):
                yield {**{name: value[: self._sampler.share(later)] for name, value in blank.items()}, AWAY_MARK: True}

    def _note_death(self, error: Exception, step: int) -> None:
        """Forget the workers, of which one is dead. Raises ``error`` if it says something else, and OutageError at the
        third death in a row at one step."""
        workers, self._iterator = getattr(self._iterator, "_workers", ()), None
        # such an error names no worker; what pins memory is a thread that ends of one
        broken = isinstance(error, CUT) or "Pin memory thread exited unexpectedly" in str(error)
        dead = broken and bool(workers) and _ends(lambda: all(process.is_alive() for process in workers))
        self.trouble = _death(str(error), [process.exitcode for process in workers], dead)
        if not self.trouble:
            raise error
        at, count = self.deaths
        self.deaths = (step, count + 1 if at == step else 1)
        if self.deaths[1] > 2:
            raise OutageError(f"{self.trouble}; three times at one step")

    def look(self) -> str:
        """What keeps the images of the last pass from being read now; empty where nothing does any more."""
        if self.away is None:
            return ""
        try:
            load_or_replace(self.dataset.source, self.away)  # type: ignore[attr-defined]
        except ImagesAwayError as error:
            return str(error)
        return ""

    @property
    def gone(self) -> bool:
        """Whether something ended the last pass."""
        return bool(self.trouble) or self.away is not None

    def why(self) -> str:
        """What ended the last pass; empty where nothing did."""
        return self.trouble or self.look() or "images could not be read for a moment" * self.gone


def _death(text: str, codes: list[int | None], dead: bool) -> str:
    """What an error of torch's loader says of workers with these exit codes; empty where it does not tell of a ``dead``
    one."""
    memory = "shared memory" in text or "No space left on device" in text
    if not memory and not dead and not re.search(r"DataLoader worker .*(exited unexpectedly|killed by signal)", text):
        return ""
    number = -min((code for code in codes if code), default=0)
    if memory or number == signal.SIGBUS:
        size = f", {shutil.disk_usage('/dev/shm').total / 1e6:.0f} MB" if os.path.isdir("/dev/shm") else ""
        return (
            f"the loader's processes need more shared memory than there is (/dev/shm{size}): raise it, as by docker "
            "run --shm-size 8g, or lower --workers"
        )
    how = f"was ended by signal {number}" if number > 0 else f"ended with exit code {-number}"
    return f"a loader's process {how}" + ", perhaps for want of memory" * (number == signal.SIGKILL)


def make_loader(
    dataset: Dataset, sampler: EpochSampler, workers: int = 0, pin_memory: bool = False, marks: bool = False
) -> Loader:
    """Batches of ``dataset``, a dict of tensors with first dimension N; the global random state is left alone.

    Workers live as long as the loader. ``pin_memory`` needs CUDA and is ignored without. ``marks``: as of
    :class:`Loader`.
    """
    loader = Loader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        # what the launcher starts would spawn its workers, each of which imports torch, for every pass over the images
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=_prepare_worker,
        pin_memory=pin_memory and torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    loader.marks = marks
    return loader


@dataclass(eq=False)
class Finishing:
    """Batches of a loader over ``TwoViews(crop_only=True)``, their views, also more than two and small crops, finished
    on ``device``.

    order: the preset's operations. The numbers are those that the workers would have computed.
    """

    loader: Loader
    order: tuple[str, ...]
    device: torch.device

    def look(self) -> str:
        """:meth:`Loader.look`."""
        return self.loader.look()

    def why(self) -> str:
        """:meth:`Loader.why`."""
        return self.loader.why()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        after = split_order(self.order)[1]
        for batch in self.loader:
            for name in (n for n in ("q", "k", "more", "local") if n in batch):
                views = batch[name].to(self.device, non_blocking=True)  # (N, C, h, w); more: (N, V - 2, C, h, w)
                table = batch.pop(f"{name}_params")
                finished = finish(views.flatten(0, -4), table.flatten(0, -2), after)
                batch[name] = finished.view(views.shape)
            yield batch


def two_views(
    dataset: TwoViews, sampler: EpochSampler, workers: int, device: torch.device, marks: bool = False
) -> Loader | Finishing:
    """Batches of ``dataset``, shards in their order; what it leaves to be done to its crops is done on ``device``.
    ``marks``: as of :class:`Loader`."""
    loader = make_loader(dataset, sampler.in_shards(dataset.source.starts), workers, pin_memory=True, marks=marks)
    return Finishing(loader, dataset.preset.order, device) if dataset.crop_only else loader


class BadImages:
    """Counts the distinct images that could not be read and were replaced; more than ``limit`` end the run."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seen: set[int] = set()

    def note(self, batch: dict[str, torch.Tensor], source: Source) -> list[str]:
        """Names of the images in ``batch["bad"]`` (N,) not seen before; UserError above the limit."""
        new = {index for index in batch["bad"].tolist() if index >= 0} - self.seen
        self.seen |= new
        names = [source.name_of(index) for index in sorted(new)]
        if len(self.seen) > self.limit:
            raise UserError(
                f"{len(self.seen)} images of {source.name} cannot be read, the limit is {self.limit} "
                f"(last: {names[-1] if names else 'counted before'}): repair them or raise the limit"
            )
        return names

    def state_dict(self) -> dict[str, list[int]]:
        return {"seen": sorted(self.seen)}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        self.seen = set(state["seen"])
