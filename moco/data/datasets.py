"""The datasets behind the loaders: two views for pretraining, one labelled view for probes.

An item's key is (epoch, index), and its randomness a function of (seed, epoch, index, view): what a step sees depends
neither on the number of workers nor on what was loaded before.

Legend: C channels, s side of a view in pixels, P parameters of a view, V views an image.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from moco.data.augment.by_numpy import finish
from moco.data.augment.by_pil import (
    Preset,
    ViewParams,
    apply,
    crop_shrunk,
    crop_tensor,
    draw,
    eval_view,
    probe_preset,
    shrink_for,
    split_order,
    to_tensor,
)
from moco.data.augment.by_torch import pack_params
from moco.data.sources.base import Source
from moco.data.sources.decode import BadImageError, colour_jpeg_size, decode_bytes, decode_colour_jpeg, reading
from moco.errors import UserError
from moco.seeding import library_randomness, numpy_generator

Key = tuple[int, int]  # epoch, index
MAX_TRIES = 100
TENSORS_FROM = 96  # pixels a side from which one view is finished faster by moco.data.augment.by_numpy than by PIL


def _stride(n: int) -> int:
    """A step that visits all of 0..n-1 and lands far away: bad files lie together, and so do files of one class."""
    stride = max(1, int(n * 0.618)) | 1
    while math.gcd(stride, n) != 1:
        stride += 2
    return stride


def load_or_replace(
    source: Source, index: int, tries: int = MAX_TRIES, load: Callable[[int], Any] | None = None
) -> tuple[Any, int, int]:
    """(image, its index, bad): image ``index``, or the same other one every time when it cannot be read.

    ``load`` makes something of an image's number, its BadImageErrors are answered; None: the image itself.

    bad is -1, or ``index`` when it had to be replaced. Raises UserError when ``tries`` images cannot be read.
    """
    n, first = len(source), None
    tries = min(tries, n)
    stride = _stride(n)
    for attempt in range(tries):
        other = (index + attempt * stride) % n
        try:
            return (load or source.load)(other), other, -1 if attempt == 0 else index
        except BadImageError as error:
            first = first or error
    raise UserError(f"none of {tries} images tried in {source.name} can be read, first {first}: check the files")


class _Images(Dataset):
    """Images of ``source`` as views of ``size`` pixels, the randomness keyed on ``seed``."""

    def __init__(self, source: Source, size: int, seed: int, max_tries: int) -> None:
        self.source = source
        self.size = size
        self.seed = seed
        self.max_tries = max_tries

    def __len__(self) -> int:
        return len(self.source)

    def drawn(self, size: tuple[int, int], preset: Preset, stream: str, *where: int) -> ViewParams:
        """The parameters of the random view, of an image of ``size``, that belong to a place in a stream."""
        return draw(preset, *size, numpy_generator(stream, self.seed, *where))


class TwoViews(_Images):
    """Two random views of each image of ``source``, or V of them; the image is decoded once.

    Item (epoch, index) is a dict: q, k (C, s, s) uint8; index, the image really used; bad, -1 or the index of the
    unreadable image that was replaced (its views keep the randomness of the place they fill). With V above 2 also more,
    (V - 2, C, s, s): the others change nothing about the first two.
    With ``crop_only`` views are only cropped, and q_params, k_params (P,), more_params (V - 2, P) say what is to be
    done to them; the loader goes into :class:`moco.data.Finishing`.
    ``fast``, for files of colour JPEG: decoded only as finely as the crops need, cropped by torchvision's operation on
    tensors. Where the file is not shrunk, a value of a crop differs by at most two levels from PIL's, and a view made
    here of less than ``TENSORS_FROM`` pixels is PIL's.
    """

    def __init__(
        self,
        source: Source,
        preset: Preset,
        size: int,
        seed: int,
        max_tries: int = MAX_TRIES,
        crop_only: bool = False,
        fast: bool = False,
        views: int = 2,
    ) -> None:
        super().__init__(source, size, seed, max_tries)
        self.preset = preset
        self.crop_only = crop_only
        self.views = views
        self.before, self.after = split_order(preset.order)
        self.by_pil = size < TENSORS_FROM and not crop_only  # all operations of a view
        self.fast = fast and self.before == ("crop",) and source.channels == 3

    def _cropped(self, epoch: int, index: int, other: int) -> tuple[list[ViewParams], list[torch.Tensor]]:
        """The V views' parameters and crops (C, s, s) from image ``other``, in the place of ``index``."""

        def params_for(size: tuple[int, int]) -> list[ViewParams]:
            return [
                self.drawn(size, self.preset.of_view(view), "view", epoch, index, view) for view in range(self.views)
            ]

        data = self.source.read(other) if self.fast else None
        size = colour_jpeg_size(data) if data else None
        if data is None or size is None:
            image = self.source.load(other)
            views = params_for(image.size)
            order = self.preset.order if self.by_pil else self.before
            return views, [apply(image, view._replace(order=order), self.size) for view in views]
        views, name = params_for(size), self.source.name_of(other)

        @functools.cache
        def decoded(shrink: int) -> Any:
            as_pil = shrink > 1 or self.by_pil
            return reading(name, lambda: decode_bytes(data, 3, shrink) if as_pil else decode_colour_jpeg(data))

        crops = []
        for some in filter(None, (views[:2], views[2:])):  # how finely the first two are decoded is theirs to say
            shrink = shrink_for([view.box for view in some], self.size)
            crops += [self._from_jpeg(decoded(shrink), view, shrink) for view in some]
        return views, crops

    def _from_jpeg(self, image: Any, view: ViewParams, shrink: int) -> torch.Tensor:
        """A crop, or with ``by_pil`` the whole view, from a PIL image at 1 / shrink or a tensor (3, H, W)."""
        if shrink > 1:
            crop = crop_shrunk(image, view.box, shrink, self.size)
            rest = view._replace(order=self.after)
            return apply(Image.fromarray(crop.permute(1, 2, 0).numpy()), rest, self.size) if self.by_pil else crop
        return apply(image, view, self.size) if self.by_pil else crop_tensor(image, view.box, self.size)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        load = functools.partial(self._cropped, epoch, index)
        (views, crops), used, bad = load_or_replace(self.source, index, self.max_tries, load)
        item: dict[str, Any] = {"index": used, "bad": bad}
        if self.crop_only:
            rows = [pack_params(view.jitter, view.grey, view.blur, view.flip, view.solarize) for view in views]
            return {**item, **_by_name(crops), **_by_name(rows, "_params")}
        if self.after and not self.by_pil:
            crops = [finish(crop, view, self.after) for crop, view in zip(crops, views, strict=True)]
        return {**item, **_by_name(crops)}


def _by_name(views: list[torch.Tensor], ending: str = "") -> dict[str, torch.Tensor]:
    q, k, *more = views
    named = {"q": q, "k": k, **({"more": torch.stack(more)} if more else {})}
    return {name + ending: value for name, value in named.items()}


class Labelled(_Images):
    """Views of each image of a labelled ``source``: random ones with ``train``, else one ``eval_view``.

    Item (epoch, index) is a dict: image (C, s, s) uint8, or (views, C, s, s) of several; label, index, bad (as
    TwoViews). Raises UserError at once when ``source`` has no labels.

    Args:
        flip: the probe's random crops are mirrored half of the time.
        preset: of random views, in place of the probe's crop and flip.
        auto: timm's words for a policy such as ``rand-m9-mstd0.5-inc1``, applied to each random view; empty for none.
        views: random views an image.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        train: bool,
        seed: int = 0,
        flip: bool = True,
        max_tries: int = MAX_TRIES,
        *,
        preset: Preset | None = None,
        auto: str = "",
        views: int = 1,
    ) -> None:
        super().__init__(source, size, seed, max_tries)
        if source.labels is None:
            raise UserError(f"{source.name} has no labels: give class folders, or a list with a label a line")
        self.labels = source.labels
        self.preset = (preset or probe_preset(flip)) if train else None
        self.auto, self.views = auto, views
        if auto:
            if source.channels != 3:
                raise UserError("--aa is for colour images: leave it out, or read them as colour by --channels 3.")
            auto_augment(auto, size)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        image, used, bad = load_or_replace(self.source, index, self.max_tries)
        if self.preset is None:
            view = eval_view(image, self.size)
        elif self.views == 1:
            view = self._random_view(image, self.preset, epoch, index)
        else:  # the first view is that of a run with one
            more = [() if number == 0 else (number,) for number in range(self.views)]
            view = torch.stack([self._random_view(image, self.preset, epoch, index, *which) for which in more])
        return {"image": view, "label": int(self.labels[used]), "index": used, "bad": bad}

    def _random_view(self, image: Image.Image, preset: Preset, *where: int) -> torch.Tensor:
        view = apply(image, self.drawn(image.size, preset, "probe", *where), self.size)
        if not self.auto:
            return view
        with library_randomness("augment", self.seed, *where):
            changed = auto_augment(self.auto, self.size)(Image.fromarray(view.permute(1, 2, 0).numpy()))
        return to_tensor(changed)


@functools.cache  # in each loader process, which need not receive it
def auto_augment(policy: str, size: int) -> Callable[[Image.Image], Image.Image]:
    """timm's AutoAugment, RandAugment, AugMix or 3-Augment by its name for them; UserError for an unknown one.

    Moved pixels are replaced by grey and translations are relative to ``size``, as in timm's own training transforms.
    """
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    grey = (124, 116, 104)  # ImageNet's mean
    settings: dict[str, Any] = {"translate_const": int(size * 0.45), "img_mean": grey}
    kind = policy[:4]
    make = {"rand": rand_augment_transform, "augm": augment_and_mix_transform}.get(kind, auto_augment_transform)
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
