"""What ``moco.data`` offers."""

# ruff: noqa: F401
from moco.data.augment.by_pil import PRESETS, Preset, ViewParams, apply, draw, eval_view, get_preset, probe_preset
from moco.data.checks import check_classes, class_labels, number_as_in, size_warning
from moco.data.datasets import Labelled, TwoViews
from moco.data.loader import BadImages, EpochSampler, Finishing, Loader, make_loader, two_views
from moco.data.open import open_on_nodes, open_sources
from moco.data.registry import DATASETS, channel_statistics, dataset_of
from moco.data.sources.base import ArraySource, FileSource, Source, Sources
from moco.data.sources.decode import BadImageError
