"""What the flags of a program come to. No torch here.

A checkpoint keeps the flags of its run, so that one which goes on from it can be told from another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Flags = dict[str, Any]  # plain values by flag, such as {"--lr": 0.03, "--schedule": [120, 160]}


class Classes(NamedTuple):
    """The flags of one program; DIR is its positional argument, and names without dashes are choices that several
    flags make together.

    fixed: another value is refused: it changes what the saved state means, or what the run's result is called.
    free: another value is used from here on, and said.
    silent: the course of the training does not depend on it, or the file decides (--seed), or another entry says it
    (DIR: the data; --aug-plus: --aug; --cos of a tuning: --schedule).
    data: whether other images may be gone on with at an epoch's end.
    """

    fixed: frozenset[str]
    free: frozenset[str]
    silent: frozenset[str]
    data: bool


def typed(value: Any) -> str:
    """A setting as it is typed."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(typed, value)) or "none"
    return "none" if value is None or value == "" else f"{value:.12g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------- the models


@dataclass(frozen=True)
class MoCHiConfig:
    """MoCHi's counts: ``s`` negatives of type 1 (mixup) and ``s2`` of type 2 (interpolation) a query."""

    s: int = 512
    s2: int = 256


@dataclass(frozen=True)
class SynCoConfig:
    """SynCo's counts and scales: ``n1`` .. ``n6`` negatives of types 1 .. 6 a query, see :mod:`moco.methods.synco`."""

    n1: int = 256
    n2: int = 256
    n3: int = 256
    n4: int = 64
    n5: int = 64
    n6: int = 64
    sigma: float = 0.01
    delta: float = 0.01
    eta: float = 0.01
    extrapolation: str = "code"  # or paper


@dataclass(frozen=True)
class NegativesConfig:
    """Which synthetic negatives a query gets beside the queue, and when.

    Args:
        method: whose recipe, see :mod:`moco.methods.registry`; moco has none.
        recipe: what it takes; None: its defaults.
        start_epoch, stop_epoch: active in epochs [start, stop), counted from 0.
        kind_epochs, kind_steps: a later first epoch or optimizer step, by kind.
    """

    method: str = "moco"
    recipe: MoCHiConfig | SynCoConfig | None = None
    start_epoch: int = 0
    stop_epoch: int | None = None
    kind_epochs: Mapping[str, int] = field(default_factory=dict)
    kind_steps: Mapping[str, int] = field(default_factory=dict)

    @property
    def last_start(self) -> tuple[int, int]:
        """The first epoch and step that have all kinds."""
        return max((self.start_epoch, *self.kind_epochs.values())), max((0, *self.kind_steps.values()))


@dataclass(frozen=True)
class ModelConfig:
    """What the models of both families take.

    Args:
        T: temperature.
        base_temperature: multiply the loss by T / base_temperature; None leaves it.
        mean, std: of the channels; uint8 images are normalised in the model.
        channels_last: memory layout in which the encoders get their images.
        recompute: keep less of the query encoder's forward pass, see :func:`moco.models.encoder.recompute_blocks`.
    """

    T: float = 0.07
    base_temperature: float | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channels_last: bool = False
    recompute: bool = False


@dataclass(frozen=True)
class MoCoConfig(ModelConfig):
    """Momentum contrast with a queue; the defaults are MoCo v1's.

    Args:
        C, K, m: feature width, queue rows and momentum (the paper's symbols).
        n_hard: rows that a query's synthetic negatives are made from.
        symmetric: each view is query once and the two losses are added.
        shuffle: exchange keys' images between processes (or between BatchNorm's splits) so that a key is not
            normalised together with its query's neighbours.
        bn_splits: parts of the batch that BatchNorm sees alone; None lets :mod:`moco.models.build` choose.
        mask_same_image: leave out queue rows that come from the query's own image; None lets it choose as well.
        loss_impl, loss_precision: implementation of the loss and operands of its products, see :mod:`moco.kernels`.
    """

    C: int = 128
    K: int = 65536
    m: float = 0.999
    n_hard: int = 0
    symmetric: bool = False
    shuffle: bool = True
    bn_splits: int | None = None
    mask_same_image: bool | None = None
    loss_impl: str = "auto"
    loss_precision: str = "auto"
    negatives: NegativesConfig = NegativesConfig()


@dataclass(frozen=True)
class InBatchConfig(ModelConfig):
    """Contrast of the views of a batch, without a queue.

    Args:
        method: whose loss, see :mod:`moco.methods.registry`.
        contrast_mode: see :func:`moco.methods.losses.compare`.
        views: random views an image.
        sync_bn: BatchNorm over the batch of all processes.
        beta, tau_plus, estimator: of HCL's loss, see :func:`moco.methods.losses.hcl`.
    """

    method: str = "simclr"
    contrast_mode: str = "all"
    views: int = 2
    sync_bn: bool = False
    beta: float = 1.0
    tau_plus: float = 0.1
    estimator: str = "hard"


@dataclass(frozen=True)
class MoCoV3Config(ModelConfig):
    """Momentum contrast over the batch, without a queue; the defaults are MoCo v3's with a ResNet.

    Args:
        method: whose loss, see :mod:`moco.methods.registry`.
        C, m: feature width and momentum (the paper's symbols).
        hidden: width inside of the projection and prediction MLPs.
        m_cosine: the momentum rises to 1 over the run.
        freeze_patches: a ViT keeps the patch embedding that it begins with.
    """

    T: float = 1.0
    method: str = "moco_v3"
    C: int = 256
    hidden: int = 4096
    m: float = 0.99
    m_cosine: bool = True
    freeze_patches: bool = True
