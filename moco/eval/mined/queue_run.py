"""A pretraining with a queue as its checkpoint holds it: what a batch of it would compare, and of which view of which
image each row of the queue is.

Legend: N queries, C feature width, K queue rows, n images of the data set, G images that BatchNorm sees together,
s side of a view in pixels.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import data, schema, seeding
from moco.config import Flags, MoCHiConfig, SynCoConfig
from moco.data import EpochSampler, Source, TwoViews, channel_statistics
from moco.errors import UserError
from moco.files import run_of
from moco.methods.negatives import Recipe, Synthetic, active, starting_at
from moco.methods.registry import METHODS
from moco.models.batchnorm import choose_splits, has_batchnorm
from moco.models.encoder import build_encoder
from moco.models.inputs import normalise
from moco.models.key_queue import EMPTY
from moco.weights.layouts import File, open_file
from moco.weights.origin import pretraining_of
from moco.weights.read import fill_network
from moco.weights.settings import settings_of

QUERY_VIEW, KEY_VIEW = 0, 1  # of an image's two
AT_LEAST = 0.9  # share of the rows whose image the order of the run names too: below, no view of a row is known
_START = re.compile(r"^[\w-]+=\d{1,15}(steps)?$")  # of --type-starts
_COUNTS = ("--n1", "--n2", "--n3", "--n4", "--n5", "--n6")
_UNKNOWN = {"--moco-t": 0.07, "--batch-size": 256, "--n-hard": 1024}  # of files that do not say it: MoCo v1's, SynCo's


@dataclass(frozen=True)
class QueueRun:
    """What a checkpoint says of its queue and of the run."""

    file: File
    queue: Tensor  # (K, C) float32
    ids: Tensor  # (K,) int64, which image each row is of, EMPTY for none
    method: str  # of the pretraining, "" where the file does not say it
    recipe: Flags  # its flags, see moco/weights/origin.py

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def run(self) -> dict[str, Any]:
        return run_of(self.file.state)

    @property
    def epoch(self) -> int:
        """Finished epochs; the one that runs next, counted from 0."""
        return int(self.file.state.get("epoch", 0))

    @property
    def seed(self) -> int:
        return int(self.run.get("seed", 0))

    @property
    def draw(self) -> int:
        """The number of the batch that comes next; it keys the draws."""
        return int(self.run.get("draw", 0))

    @property
    def T(self) -> float:
        return float(self._given("--moco-t"))

    @property
    def supervised(self) -> bool:
        """Whether rows of a query's class are its positives (SupCon with a queue)."""
        return "queue_labels" in self.file.tensors

    def _given(self, name: str) -> Any:
        return self.recipe.get(name, _UNKNOWN[name])

    # --------------------------------------------------------------------------------------- synthetic negatives

    def negatives(self, name: str | None, n_hard: int | None) -> tuple[str, Recipe, int]:
        """The method whose synthetic negatives are shown, "" for none, their recipe, and H.

        Args:
            name: "synco" or "mochi" for one that the run does not have, with the published counts; None: its own.
            n_hard: another H.

        Raises:
            UserError: H is more than the queue has rows.
        """
        own = self._own_negatives()
        name = name or ("" if self.recipe.get("--control") else own)  # a control copies rows in their place
        config, hard = None, self._given("--n-hard")
        if name == "mochi" == own:
            hard, *counts = self.recipe["--mochi"]
            config = MoCHiConfig(*counts)
        elif name == "synco" == own:
            extrapolation = self.recipe.get("--extrapolation", "code")
            scales = {flag[2:]: self.recipe[flag] for flag in ("--sigma", "--delta", "--eta") if flag in self.recipe}
            config = SynCoConfig(*(self.recipe[flag] for flag in _COUNTS), extrapolation=extrapolation, **scales)
        K = len(self.queue)
        if n_hard is not None and n_hard > K:
            raise UserError(f"--n-hard {n_hard} is more than the queue's {K} rows; lower it.")
        rows = METHODS[name].hooks.recipe(config) if name else ()
        return name, tuple(row for row in rows if row.count), n_hard or min(int(hard), K)

    def _own_negatives(self) -> str:
        if "--mochi" in self.recipe:
            return "mochi"
        return "synco" if set(_COUNTS) <= self.recipe.keys() else ""

    def in_use(self, row: Synthetic) -> bool:
        """Whether the batch that comes next has this kind."""
        entries = (entry.partition("=") for entry in self.recipe.get("--type-starts", ()) if _START.search(entry))
        starts = {kind: start for kind, _, start in entries}
        steps = {kind: int(start[: -len("steps")]) for kind, start in starts.items() if start.endswith("steps")}
        epochs = {kind: int(start) for kind, start in starts.items() if kind not in steps}
        first, stop = self.recipe.get("--hard-start-epoch", 0), self.recipe.get("--hard-stop-epoch")
        return bool(active(starting_at((row,), epochs, steps), self.epoch, first, stop, int(self.run.get("step", 0))))

    def masks(self, images: int) -> bool:
        """Whether training leaves out queue rows of the query's own image; ``images``: n."""
        asked = self.recipe.get("--mask-same-image")
        return images / 10 < len(self.queue) if asked is None else bool(asked)

    # ------------------------------------------------------------------------------------------------ the images

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Architecture, stem, size, channels, mean and deviation; what the file does not say is missing."""
        return {name: setting.value for name, setting in settings_of(self.file).items()}

    def other_images(self, source: Source) -> str:
        """How images differ from those of the run, as the beginning of a sentence; empty where they are the same."""
        known = self.run.get("data")
        if not known:
            return f"{self.path} does not say which images it was pretrained on"
        if known["fingerprint"] == source.fingerprint():
            return ""
        was, now = f"{known['images']} images of {known['name']}", f"{len(source)} of {source.name}"
        return f"{self.path} was pretrained on other images, {was} (here {now}; names, labels or sizes differ)"

    def views(self, source: Source) -> tuple[TwoViews, str]:
        """The two views of each image as the run makes them, and words on their augmentation."""
        aug = self.recipe.get("--aug")
        words = f"{aug}, the run's own" if aug else "v1, as the file does not say the run's own"
        size = int(self.settings.get("size") or source.native_size or 224)
        fast = self.recipe.get("--decode") == "fast"
        return TwoViews(source, data.get_preset(aug or "v1"), size, self.seed, fast=fast), words

    def views_of_rows(self, source: Source) -> dict[int, tuple[int, int]]:
        """Of each queue row whose view is known, the epoch, counted from 0, and QUERY_VIEW or KEY_VIEW; empty where
        hardly any is.

        A view is a function of (seed, epoch, image, view), and the order of the images one of (seed, epoch). Counted
        back from the newest row, the order has to name the image that ``queue_ids`` names; it does not where the run
        was resumed with another batch or on other images, or had steps that were not finite.
        """
        pointer, K = int(self.file.tensors["queue_ptr"]), len(self.queue)
        rows = ((pointer - 1 - age) % K for age in range(K))  # the newest first
        ids = self.ids.tolist()
        found = {
            row: (epoch, view)
            for row, (epoch, view, index) in zip(rows, self._enqueued(source), strict=False)
            if ids[row] == index
        }
        return found if len(found) >= AT_LEAST * sum(index != EMPTY for index in ids) else {}

    def _enqueued(self, source: Source) -> Iterator[tuple[int, int, int]]:
        """Epoch, view and image of each key of the run, the newest first, by the order of the images alone."""
        shape = self.run.get("batches") or {}
        if shape.get("images") != len(source):
            return
        drop_last = bool(self.recipe.get("--drop-last", True))
        sampler = EpochSampler(len(source), shape["images a batch"], self.seed, drop_last=drop_last)
        sampler.in_shards(source.starts)
        views = [QUERY_VIEW, KEY_VIEW] if self.recipe.get("--symmetric") else [KEY_VIEW]
        whole = len(sampler) // shape["batches a step"] * shape["batches a step"]
        for epoch in range(self.epoch, -1, -1):
            sampler.set_position(epoch)
            done = int(self.run.get("batch", 0)) if epoch == self.epoch else whole
            for batch in reversed([*itertools.islice(sampler, done)]):
                yield from ((epoch, view, index) for view in views for _, index in reversed(batch))

    # ---------------------------------------------------------------------------------------------- the encoders

    def encoders(self, device: torch.device) -> tuple[nn.Module, nn.Module]:
        """The query and the key encoder, which normalise as in training: BatchNorm by the batch, no dropout.

        Raises:
            UserError: the file does not have them whole.
        """
        made = []
        for name in ("encoder_q.", "encoder_k."):
            entries = {n.removeprefix(name): value for n, value in self.file.tensors.items() if n.startswith(name)}
            own, mlp = self.settings, bool(self.recipe.get("--mlp"))
            shape = {"stem": own["stem"], "size": own.get("size", 224), "in_chans": own["channels"]}
            encoder = build_encoder(own["arch"], self.queue.shape[1], mlp=mlp, **shape)
            fill_network(encoder, entries, self.path)
            encoder.to(device).eval()
            for module in encoder.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    module.train()
            made.append(encoder)
        return made[0], made[1]

    @torch.no_grad()
    def encode(self, queries: Tensor, keys: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Unit features (N, C) each, in float32, of the views of queries and of their keys, (N, channels, s, s) uint8.

        BatchNorm sees the G images of a part of the run's batch at once, and keys in other parts than their queries
        where the run shuffles them, which it does if a batch has several parts.
        """
        encoders = self.encoders(device)
        norm, N = has_batchnorm(encoders[0]), len(queries)
        if norm and N < 2:
            raise UserError("BatchNorm needs two images at least, and only one of the sample can be read; give more.")
        seen = self.seen_together if norm else 64
        order = torch.arange(N)
        if norm and self.recipe.get("--shuffle-bn", True) and seen < int(self._given("--batch-size")):
            order = torch.randperm(N, generator=seeding.torch_generator("shuffle", self.seed, self.draw))
        q = self._encoded(encoders[0], queries, seen, device)
        return q, self._encoded(encoders[1], keys[order], seen, device)[order.argsort()]

    @property
    def seen_together(self) -> int:
        """G."""
        processes = int(self.run.get("processes", 1))
        batch = max(1, int(self._given("--batch-size")) // processes)
        return batch // choose_splits(self.recipe.get("--bn-splits"), batch, processes)

    def _encoded(self, encoder: nn.Module, images: Tensor, seen: int, device: torch.device) -> Tensor:
        channels, file = images.shape[1], self.settings
        mean, std = channel_statistics(None, channels, file.get("mean"), file.get("std"))
        # of nearly equal size, and of two at least, without which BatchNorm has no statistics
        parts = images.tensor_split(max(1, min(round(len(images) / seen), len(images) // 2)))
        made = (encoder(normalise(part.to(device), mean, std)) for part in parts)
        return F.normalize(torch.cat([z.float() for z in made]), dim=1)


def open_queue(path: str) -> QueueRun:
    """The queue of a checkpoint.

    Raises:
        UserError: it cannot be read, has no queue or a damaged one, or does not say of which image each row is or
            which architecture it is of.
    """
    file = open_file(path)
    found = pretraining_of(file, {}).value
    if not {"queue", "queue_ptr"} <= file.tensors.keys():
        method = f" ({found['method']} compares the images of a batch)" if "method" in found else ""
        raise UserError(
            f"{path} holds no queue{method}; give the checkpoint of a pretraining with one: moco, mochi, synco, or "
            "supcon with --moco-k."
        )
    if "queue_ids" not in file.tensors:
        raise UserError(
            f"the queue in {path} does not say which image each row is of, as upstream's files do not; resume the run "
            "with main_pretrain.py and give a checkpoint of this project."
        )
    queue, ids, pointer = (file.tensors[name] for name in ("queue", "queue_ids", "queue_ptr"))
    whole = queue.dim() == 2 and queue.numel() and queue.is_floating_point() and queue.isfinite().all()
    plain = not any(x.is_floating_point() or x.is_complex() for x in (ids, pointer)) and pointer.numel() == 1
    if not (whole and plain and ids.shape == queue.shape[:1]):
        raise UserError(
            f"{path} is damaged: its queue is not rows of numbers with an image each; give another checkpoint."
        )
    if wrong := schema.wrong_entry(schema.QUEUE_RECIPE, found.get("recipe", {}), "recipe"):
        raise UserError(f"{path} {wrong}.")
    run = QueueRun(file, queue.float(), ids.long(), found.get("method", ""), found.get("recipe", {}))
    if "arch" not in run.settings:
        raise UserError(
            f"{path} does not name its architecture and its tensors are of no known one; give another checkpoint."
        )
    return run
