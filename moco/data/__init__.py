"""From image files to batches of two views: sources, views, datasets, loaders."""

from moco.data.augment.by_pil import PRESETS, Preset, ViewParams, apply, draw, eval_view, get_preset, probe_preset
from moco.data.checks import check_classes, class_labels, number_as_in, size_warning
from moco.data.datasets import Labelled, TwoViews
from moco.data.loader import BadImages, EpochSampler, Finishing, Loader, make_loader, two_views
from moco.data.open import DATASETS, open_sources
from moco.data.sources.base import ArraySource, FileSource, Source, Sources
from moco.data.sources.decode import BadImageError
from moco.data.sources.named import STATISTICS, UPRIGHT, channel_statistics, own_shape, statistics

__all__ = [
    "DATASETS",
    "PRESETS",
    "STATISTICS",
    "UPRIGHT",
    "ArraySource",
    "BadImageError",
    "BadImages",
    "EpochSampler",
    "FileSource",
    "Finishing",
    "Labelled",
    "Loader",
    "Preset",
    "Source",
    "Sources",
    "TwoViews",
    "ViewParams",
    "apply",
    "channel_statistics",
    "check_classes",
    "class_labels",
    "draw",
    "eval_view",
    "get_preset",
    "make_loader",
    "number_as_in",
    "open_sources",
    "own_shape",
    "probe_preset",
    "size_warning",
    "statistics",
    "two_views",
]
