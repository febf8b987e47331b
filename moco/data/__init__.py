"""From image files to batches of two views: sources, views, datasets, loaders."""

from moco.data.augment.by_pil import PRESETS, Preset, ViewParams, apply, draw, eval_view, get_preset, probe_preset
from moco.data.checks import check_classes, class_labels, number_as_in, size_warning
from moco.data.datasets import Labelled, TwoViews
from moco.data.loader import BadImages, EpochSampler, Finishing, Loader, make_loader, two_views
from moco.data.open import open_on_nodes, open_sources
from moco.data.sources.base import ArraySource, FileSource, Source, Sources
from moco.data.sources.decode import BadImageError
from moco.data_registry import DATASETS, channel_statistics, dataset_of, statistics

__all__ = [
    "DATASETS",
    "PRESETS",
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
    "dataset_of",
    "draw",
    "eval_view",
    "get_preset",
    "make_loader",
    "number_as_in",
    "open_on_nodes",
    "open_sources",
    "probe_preset",
    "size_warning",
    "statistics",
    "two_views",
]
