"""Published presets of random views, by name. No torch here, for the flags; the operations: by_pil.py beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace

Range = tuple[float, float]
# In the order in which one that a preset lacks is put among its own (moco/data/augment/from_file.py).
OPERATIONS = ("affine", "crop", "jitter", "grey", "blur", "solarize", "flip", "vflip", "turn")


@dataclass(frozen=True)
class Preset:
    """The parameters of a family of views; a probability of 0 or a range of 0 leaves an operation out.

    order: the operations, first to last, out of OPERATIONS; a turn comes after the crop.
    crop_scale: share of the image's area. crop_ratio: width / height, drawn log-uniformly.
    brightness, contrast, saturation: factors are drawn from [max(0, 1 - x), 1 + x]; hue: a turn from [-x, x], 1 a full
    circle. blur_sigma: pixels of the finished view. degrees, shear: rotation and shear from [-x, x], in degrees.
    flip_p: left and right are exchanged. vflip_p: top and bottom are. turn_p: a turn by 90, 180 or 270 degrees, each
    as often. others: of the views after an image's first, in the same order; None: the same.
    """

    order: tuple[str, ...]
    crop_scale: Range = (0.08, 1.0)
    crop_ratio: Range = (3 / 4, 4 / 3)
    jitter_p: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: Range = (0.1, 2.0)
    flip_p: float = 0.0
    vflip_p: float = 0.0
    turn_p: float = 0.0
    degrees: float = 0.0
    shear: float = 0.0
    solarize_p: float = 0.0
    others: Preset | None = None

    def __post_init__(self) -> None:
        if wrong := wrong_order(self.order):
            raise ValueError(f"order {self.order}: {wrong}")
        if self.others is not None and self.others.order != self.order:
            raise ValueError(f"order {self.order} and of other views {self.others.order}: must be the same")

    def of_view(self, view: int) -> Preset:
        """The parameters of an image's view of this number."""
        return self if view == 0 or self.others is None else self.others


def wrong_order(order: tuple[str, ...]) -> str:
    """What is wrong with the order of operations, in words; empty where nothing is."""
    if set(order) - set(OPERATIONS) or order.count("crop") != 1:
        return f"operations are {sorted(OPERATIONS)}, with one crop"
    if "turn" in order[: order.index("crop")]:
        return "turn must come after crop, which is drawn for the image as it lies"
    return ""


_MOCO_V2 = Preset(
    order=("crop", "jitter", "grey", "blur", "flip"),
    crop_scale=(0.2, 1.0),
    jitter_p=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grey_p=0.2,
    blur_p=0.5,
    flip_p=0.5,
)

# MoCo v3's main_moco.py with its --crop-min, which is BYOL's (arXiv 2006.07733): the first view is always blurred.
_MOCO_V3 = replace(
    _MOCO_V2, order=("crop", "jitter", "grey", "blur", "solarize", "flip"), saturation=0.2, blur_p=0.1, solarize_p=0.2
)


def _pair(crop_min: float) -> Preset:
    others = replace(_MOCO_V3, crop_scale=(crop_min, 1.0))
    return replace(others, blur_p=1.0, solarize_p=0.0, others=others)


PRESETS: dict[str, Preset] = {
    # MoCo's main_moco.py without and with --aug-plus.
    "v1": replace(_MOCO_V2, order=("crop", "grey", "jitter", "flip"), jitter_p=1.0, hue=0.4, blur_p=0.0),
    "v2": _MOCO_V2,
    "v3": _pair(0.2),  # for ResNets
    "v3-wide": _pair(0.08),  # for ViTs
    # MoCo's CIFAR-10 notebook: torchvision's default crop scale, no blur.
    "cifar": replace(_MOCO_V2, order=("crop", "flip", "jitter", "grey"), crop_scale=(0.08, 1.0), blur_p=0.0),
    # SupContrast's, for SupCon and SimCLR alike.
    "supcon": replace(_MOCO_V2, order=("crop", "flip", "jitter", "grey"), blur_p=0.0),
    # Ours, for grey symbols of about 28 pixels: a mirrored digit is another symbol, so nothing is flipped.
    "digits": Preset(
        order=("affine", "crop", "jitter"),
        crop_scale=(0.5, 1.0),
        jitter_p=0.8,
        brightness=0.4,
        contrast=0.4,
        degrees=15.0,
        shear=10.0,
    ),
    # SimCLR's on ImageNet (arXiv 2002.05709, appendix A, and data_util.py of its code): colours at strength 1.
    "simclr": replace(
        _MOCO_V2,
        order=("crop", "flip", "jitter", "grey", "blur"),
        crop_scale=(0.08, 1.0),
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
    ),
    # Ours, for ablations and to begin a file of one's own with: a crop alone.
    "crop": Preset(order=("crop",)),
}


def probe_preset(flip: bool) -> Preset:
    """Views that the linear probe trains on: RandomResizedCrop with torchvision's defaults, then a flip."""
    return Preset(order=("crop", "flip"), flip_p=0.5 if flip else 0.0)
