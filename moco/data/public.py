"""What ``moco.data`` offers."""

# ruff: noqa: F401
from moco.data.augment.by_pil import ViewParams, apply, draw, eval_view
from moco.data.augment.from_file import get_preset
from moco.data.augment.presets import PRESETS, Preset, probe_preset
from moco.data.checks import check_classes, class_labels, number_as_in, short_side, size_warning
from moco.data.datasets import Labelled, TwoViews
from moco.data.levels import pixel_range, range_notes
from moco.data.loader import BadImages, EpochSampler, Finishing, Loader, make_loader, two_views
from moco.data.open import open_on_nodes, open_sources
from moco.data.pixel_statistics import channel_statistics_of, measured_once
from moco.data.registry import DATASETS, channel_statistics, dataset_of
from moco.data.sources.base import ArraySource, FileSource, Source, Sources, why_bad
from moco.data.sources.decode import BadImageError
from moco.data.summary import describe, look
