"""From image files to batches of two views: sources, views, datasets, loaders."""

from moco.data.checks import check_classes, class_labels, number_as_in, size_warning
from moco.data.decode import BadImageError
from moco.data.loading import BadImages, EpochSampler, Finishing, Loader, make_loader, normalise, two_views
from moco.data.named import STATISTICS, channel_statistics, own_shape, statistics
from moco.data.opening import DATASETS, open_sources
from moco.data.pairs import Labelled, TwoViews
from moco.data.sources import ArraySource, FileSource, Source, Sources
from moco.data.views import PRESETS, Preset, ViewParams, apply, draw, eval_view, get_preset, probe_preset

__all__ = [
    "DATASETS",
    "PRESETS",
    "STATISTICS",
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
    "normalise",
    "number_as_in",
    "open_sources",
    "own_shape",
    "probe_preset",
    "size_warning",
    "statistics",
    "two_views",
]
