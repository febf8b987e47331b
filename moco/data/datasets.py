"""The datasets behind the loaders: two views for pretraining, one labelled view for probes.

An item's key is (epoch, index), and its randomness a function of (seed, epoch, index, view): what a step sees depends
neither on the number of workers nor on what was loaded before.

Legend: C channels, s side of a view in pixels, P parameters of a view, V views an image, L small crops of side l.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from moco.config import LocalCropConfig
from moco.data.augment.by_numpy import finish
from moco.data.augment.by_pil import (
    ViewParams,
    apply,
    crop_shrunk,
    crop_tensor,
    draw,
    eval_view,
    shrink_for,
    split_order,
    to_tensor,
)
from moco.data.augment.by_torch import pack_params
from moco.data.augment.presets import Preset
from moco.data.sources import away
from moco.data.sources.base import Source, without_labels
from moco.data.sources.decode import BadImageError, colour_jpeg_size, decode_bytes, decode_colour_jpeg, reading
from moco.data.sources.values import for_all
from moco.data.stack import Picture, black
from moco.errors import UserError
from moco.seeding import library_randomness, numpy_generator_for_now

Key = tuple[int, int]  # epoch, index
Drawn = list[tuple[ViewParams, int]]  # parameters and sides
MAX_TRIES = 100
TENSORS_FROM = 96  # pixels a side from which one view is finished faster by moco.data.augment.by_numpy than by PIL


def _stride(n: int) -> int:
    """A step that visits all of 0..n-1 and lands far away: bad files lie together, and so do files of one class."""
    stride = max(1, int(n * 0.618)) | 1
    while math.gcd(stride, n) != 1:
        stride += 2
    return stride


def load_or_replace(
    source: Source, index: int, load: Callable[[int], Any] | None = None, blank: Callable[[], Any] | None = None
) -> tuple[Any, int, int]:
    """(image, its index, bad): image ``index``, or the same other one every time when it cannot be read.

    ``load`` makes something of an image's number, whatever fails in it makes a bad image; None: the image itself.
    ``blank`` makes something in its place when the data is gone for now (:mod:`moco.data.sources.away`).

    bad is -1, ``index`` when it had to be replaced, or below -1 for a blank (:func:`absent`).

    Raises:
        UserError: ``MAX_TRIES`` images cannot be read.
        ImagesAwayError: the data is gone, where there is no ``blank``.
    """
    if blank is not None and away.resting():
        return blank(), index, _absent(index)
    try:
        return _load_or_replace(source, index, load or source.load)
    except away.ImagesAwayError:
        if blank is None:
            raise
        away.rest()
        return blank(), index, _absent(index)


def _load_or_replace(source: Source, index: int, load: Callable[[int], Any]) -> tuple[Any, int, int]:
    n, first, doubts = len(source), None, 0
    tries, stride = min(MAX_TRIES, n), _stride(n)
    for attempt in range(tries):
        other = (index + attempt * stride) % n
        work = functools.partial(reading, source.name_of(other), functools.partial(load, other))
        try:
            made = away.read_patiently(work, functools.partial(source.missing, other), () if attempt else away.PAUSES)
            return made, other, -1 if attempt == 0 else index
        except BadImageError as error:
            first, doubts = first or error, doubts + away.doubtful(error)
        if doubts == min(away.ENOUGH, tries):
            raise away.ImagesAwayError(f"none of {doubts} images tried in {source.name} can be read, first {first}")
    raise UserError(f"none of {tries} images tried in {source.name} can be read, first {first}: check the files")


def _absent(index: int) -> int:
    return -2 - index


def absent(batch: dict[str, Any]) -> int | None:
    """The number of an image of a loader's batch that was a blank, as the data is gone for now; None without one."""
    lowest = int(batch["bad"].min()) if "bad" in batch else -1
    return -2 - lowest if lowest < -1 else None


@dataclass(eq=False)
class TwoViews(Dataset):
    """Two random views of each image of ``source``, or V of them; the image is decoded once.

    Item (epoch, index) is a dict: q, k (C, s, s) uint8; index, the image really used; bad, -1 or the index of the
    unreadable image that was replaced (its views keep the randomness of the place they fill), or below -1 where the
    data is gone for now and the views are of a black image (:func:`absent`). With V above 2 also more,
    (V - 2, C, s, s): the others change nothing about the first two. With ``local`` crops also local, (L, C, l, l):
    views by the preset's second view but for their scale, from a stream of their own, which change nothing about the
    others.
    With ``crop_only`` views are only cropped, and q_params, k_params (P,), more_params (V - 2, P), local_params (L, P)
    say what is to be done to them; the loader goes into :class:`moco.data.Finishing`.
    ``fast``, for files of colour JPEG: decoded only as finely as the crops need, cropped by torchvision's operation on
    tensors. Where the file is not shrunk, a value of a crop differs by at most two levels from PIL's, and a view made
    here of less than ``TENSORS_FROM`` pixels is PIL's.
    """

    source: Source
    preset: Preset
    size: int
    seed: int
    crop_only: bool = False
    fast: bool = False
    views: int = 2
    local: LocalCropConfig = LocalCropConfig()

    def __post_init__(self) -> None:
        self.before, self.after = split_order(self.preset.order)
        self.local = self.local.beside(self.size)
        self.small = replace(self.preset.of_view(1), crop_scale=self.local.scale, others=None)
        plain = self.source.channels == 3 and not for_all(self.source.levels)
        self.fast = self.fast and self.before == ("crop",) and plain

    def __len__(self) -> int:
        return len(self.source)

    def drawn(self, size: tuple[int, int], epoch: int, index: int) -> list[ViewParams]:
        """The V views' parameters, of an image of ``size``, that belong to the place of ``index``."""
        return [
            draw(self.preset.of_view(view), *size, numpy_generator_for_now("view", self.seed, epoch, index, view))
            for view in range(self.views)
        ]

    def drawn_local(self, size: tuple[int, int], epoch: int, index: int) -> list[ViewParams]:
        """The same of the L small crops."""
        return [
            draw(self.small, *size, numpy_generator_for_now("local", self.seed, epoch, index, number))
            for number in range(self.local.count)
        ]

    def _all_drawn(self, size: tuple[int, int], epoch: int, index: int) -> Drawn:
        """Of the V views, then of the L crops."""
        assert self.local.size is not None
        views = [(view, self.size) for view in self.drawn(size, epoch, index)]
        return [*views, *((crop, self.local.size) for crop in self.drawn_local(size, epoch, index))]

    def _by_pil(self, side: int) -> bool:
        """Whether all operations of a view of ``side`` pixels are made here by PIL."""
        return side < TENSORS_FROM and not self.crop_only

    def _cropped(self, epoch: int, index: int, other: int | None) -> tuple[list[ViewParams], list[torch.Tensor]]:
        """The parameters and crops (C, s, s) of all views from image ``other``, None: a black one, in the place of
        ``index``."""
        data = None if other is None or not self.fast else self.source.read(other)
        if other is not None and data is not None and (size := colour_jpeg_size(data)):
            drawn = self._all_drawn(size, epoch, index)
            return [view for view, _ in drawn], self._from_jpeg(data, self.source.name_of(other), drawn)
        image = _black(self.source, self.size) if other is None else self.source.load(other)
        drawn = self._all_drawn(image.size, epoch, index)
        orders = {side: self.preset.order if self._by_pil(side) else self.before for _, side in drawn}
        return [view for view, _ in drawn], [
            apply(image, view._replace(order=orders[side]), side) for view, side in drawn
        ]

    def _from_jpeg(self, data: bytes, name: str, drawn: Drawn) -> list[torch.Tensor]:
        """Crops, or of sides ``by_pil`` the whole views, from a file of colour JPEG called ``name``."""

        @functools.cache
        def decoded(shrink: int, as_pil: bool) -> Any:
            return reading(name, lambda: decode_bytes(data, 3, shrink) if as_pil else decode_colour_jpeg(data))

        crops = []
        # how finely the first two are decoded is theirs to say, and the others change nothing about one another
        for some in filter(None, (drawn[:2], drawn[2 : self.views], drawn[self.views :])):
            shrink = shrink_for([view.box for view, _ in some], some[0][1])
            for view, side in some:
                by_pil = self._by_pil(side)
                if shrink > 1:
                    crop = crop_shrunk(decoded(shrink, True), view.box, shrink, side)
                    crops.append(apply(crop, view._replace(order=self.after if by_pil else ()), side))
                elif by_pil:
                    crops.append(apply(decoded(1, True), view, side))
                else:
                    crops.append(crop_tensor(decoded(1, False), view.box, side))
        return crops

    def __getitem__(self, key: Key) -> dict[str, Any]:
        cropped = functools.partial(self._cropped, *key)
        return self._finished(*load_or_replace(self.source, key[1], cropped, functools.partial(cropped, None)))

    def blank(self, key: Key) -> dict[str, Any]:
        """An item of a batch whose images are away."""
        return self._finished(self._cropped(*key, None), key[1], _absent(key[1]))

    def _finished(self, made: tuple[list[ViewParams], list[torch.Tensor]], used: int, bad: int) -> dict[str, Any]:
        views, crops = made
        item: dict[str, Any] = {"index": used, "bad": bad}
        if self.crop_only:
            rows = [pack_params(v.jitter, v.grey, v.blur, v.flip, v.solarize, v.vflip, v.turn) for v in views]
            return {**item, **self._by_name(crops), **self._by_name(rows, "_params")}
        crops = [
            finish(crop, view, self.after) if self.after and not self._by_pil(crop.shape[-1]) else crop
            for crop, view in zip(crops, views, strict=True)
        ]
        return {**item, **self._by_name(crops)}

    def _by_name(self, views: list[torch.Tensor], ending: str = "") -> dict[str, torch.Tensor]:
        q, k, *others = views
        more, local = others[: self.views - 2], others[self.views - 2 :]
        several = {name: torch.stack(some) for name, some in (("more", more), ("local", local)) if some}
        return {name + ending: value for name, value in {"q": q, "k": k, **several}.items()}


def _black(source: Source, size: int) -> Picture:
    return black((size, size), source.channels)


@dataclass(eq=False)
class Labelled(Dataset):
    """Views of each image of a labelled ``source``: random ones of ``preset``, without one an ``eval_view``.

    Item (epoch, index) is a dict: image (C, s, s) uint8, or (views, C, s, s) of several; label, index, bad (as
    TwoViews). Raises UserError at once when ``source`` has no labels.

    Args:
        auto: timm's words for a policy such as ``rand-m9-mstd0.5-inc1``, applied to each random view; empty for none.
        views: random views an image.
    """

    source: Source
    size: int
    seed: int = 0
    preset: Preset | None = None
    auto: str = ""
    views: int = 1

    def __post_init__(self) -> None:
        if self.source.labels is None:
            raise UserError(f"{without_labels(self.source)}: give class folders, or a list with labels")
        self.labels = self.source.labels
        if self.auto:
            if self.source.channels != 3:
                raise UserError("--aa is for colour images: leave it out, or read them as colour by --channels 3.")
            auto_augment(self.auto, self.size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        viewed = functools.partial(self._viewed, key)
        view, used, bad = load_or_replace(self.source, key[1], viewed, functools.partial(viewed, None))
        return {"image": view, "label": int(self.labels[used]), "index": used, "bad": bad}

    def blank(self, key: Key) -> dict[str, Any]:
        """An item of a batch whose images are away."""
        index = key[1]
        view = self._viewed(key, None)
        return {"image": view, "label": int(self.labels[index]), "index": index, "bad": _absent(index)}

    def _viewed(self, key: Key, other: int | None) -> torch.Tensor:
        """The view or views of image ``other``, None: a black one, in the place of ``key``."""
        image = _black(self.source, self.size) if other is None else self.source.load(other)
        if self.preset is None:
            return eval_view(image, self.size)
        places = [key, *((*key, number) for number in range(1, self.views))]  # the first view: of a run with one
        views = [self._random_view(image, self.preset, place) for place in places]
        return views[0] if self.views == 1 else torch.stack(views)

    def _random_view(self, image: Picture, preset: Preset, place: tuple[int, ...]) -> torch.Tensor:
        view = apply(image, draw(preset, *image.size, numpy_generator_for_now("probe", self.seed, *place)), self.size)
        if not self.auto:
            return view
        with library_randomness("augment", self.seed, *place):
            changed = auto_augment(self.auto, self.size)(Image.fromarray(view.permute(1, 2, 0).numpy()))
        return to_tensor(changed)


@functools.cache  # in each loader process, which need not receive it
def auto_augment(policy: str, size: int) -> Callable[[Image.Image], Image.Image]:
    """timm's AutoAugment, RandAugment, AugMix or 3-Augment by its name for them; UserError for an unknown one.

    Moved pixels are replaced by grey and translations are relative to ``size``, as in timm's own training transforms.
    """
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    settings: dict[str, Any] = {"translate_const": int(size * 0.45), "img_mean": (124, 116, 104)}  # ImageNet's mean
    make = {"rand": rand_augment_transform, "augm": augment_and_mix_transform}.get(policy[:4], auto_augment_transform)
    try:
        made = make(policy, settings)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"--aa {policy} is no policy that timm knows ({error or 'not understood'}): write one such as "
            "rand-m9-mstd0.5-inc1, original or augmix-m5-w4-d2."
        ) from error
    several = made.policy if hasattr(made, "policy") else [made.ops]
    for operation in itertools.chain(*several):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = functools.partial(_posterize, operation.aug_fn)
    return made


def _posterize(function: Callable, image: Image.Image, bits: int, **more: Any) -> Image.Image:
    """With one bit at least: timm asks for none at high magnitudes, which Pillow refuses since its version 12."""
    return function(image, max(1, bits), **more)
