"""What the flags of a program come to. No torch here.

A checkpoint keeps the flags of its run, so that one which goes on from it can be told from another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

Flags = dict[str, Any]  # plain values by flag, such as {"--lr": 0.03, "--schedule": [120, 160]}


class Classes(NamedTuple):
    """The flags of one program; DIR is its positional argument, and names without dashes are choices that several
    flags make together.

    fixed: another value is refused: it changes what the saved state means, or what the run's result is called.
    free: another value is used from here on, and said.
    silent: the course of the training does not depend on it, or the file decides (--seed), or another entry says it
    (DIR: the data; --aug-plus and --crop-min: --aug; --cos of a tuning: --schedule).
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
        return " ".join(map(typed, cast("list[Any]", value))) or "none"
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
        control: what takes their place, one of :data:`moco.methods.registry.CONTROLS`; None: nothing does.
    """

    method: str = "moco"
    recipe: MoCHiConfig | SynCoConfig | None = None
    start_epoch: int = 0
    stop_epoch: int | None = None
    kind_epochs: Mapping[str, int] = field(default_factory=dict[str, int])
    kind_steps: Mapping[str, int] = field(default_factory=dict[str, int])
    control: str | None = None

    def changes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Epochs and steps from which a loss cannot be compared with those before: negatives begin or stop."""
        if self.method == "moco":
            return (), ()
        switched = (self.start_epoch, self.stop_epoch, *self.kind_epochs.values())
        return tuple(epoch for epoch in switched if epoch is not None), tuple(self.kind_steps.values())

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
        local: small crops an image, which are anchors and no candidates.
        sync_bn: BatchNorm over the batch of all processes.
        beta, tau_plus, estimator: of HCL's loss, see :func:`moco.methods.losses.hcl`.
    """

    method: str = "simclr"
    contrast_mode: str = "all"
    views: int = 2
    local: int = 0
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


@dataclass(frozen=True)
class EncoderConfig:
    """A network with ``dim`` outputs, see :func:`moco.models.encoder.build_encoder`."""

    arch: str = "resnet50"
    dim: int = 128
    mlp: bool = False  # MoCo v2's head
    stem: str = "auto"  # or imagenet, cifar
    compile_mode: str | None = None  # of torch.compile, None: not compiled
    begin_with: str = ""  # file of its first weights, empty for random ones


# -------------------------------------------------------------------------------------------------- the training


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and what follows its steps."""

    name: str = "sgd"  # torch's as upstream's; every other name is timm's: adamw, lars, lookahead_adamw ...
    lr: float = 0.03  # of groups without their own
    momentum: float = 0.9  # of optimizers that have one
    weight_decay: float = 0.0  # of groups without their own
    clip: float | None = None  # largest norm of the gradient; a gradient that is not finite is left as it is
    betas: tuple[float, ...] | None = None  # of optimizers that have them; None for timm's (AdamW: .9, .999)
    exclude_bias_norm: bool = False  # no weight decay of biases and norms
    ema: float | None = None  # share of itself that an average of the weights keeps at every step; None: no average
    ema_epoch: float | None = None  # the same, an epoch


@dataclass(frozen=True)
class ScheduleConfig:
    """How long and how fast to train, before the length of an epoch is known; see :mod:`moco.train.plan`."""

    epochs: int
    steps: int | None = None  # in place of epochs: the schedule moves every step
    lr: float = 1.0
    cosine: bool = False
    milestones: tuple[int, ...] = ()
    decay: float = 0.1  # of the rate at a milestone
    min_lr: float = 0.0  # that the cosine ends at, and below which a plateau brings no rate
    warm_epochs: int = 0  # of rising from warm_from, step by step
    warm_from: float = 0.01
    warm_steps: int = 0  # the same counted in steps, in place of warm_epochs
    rise: float = 0.0  # epochs of rising from 0; the cosine spans the rest; a plan that counts steps has it in steps
    patience: int | None = None  # epochs without a better score after which the rate drops
    changes: tuple[int, ...] = ()  # epochs from which the loss is another: what it was before says nothing about it
    change_steps: tuple[int, ...] = ()  # steps from which it is
    accum: int = 1  # batches a step
    print_freq: int = 10
    max_bad_steps: int = 5
    check_every: int = 1000
    keep_every: int = 0  # epochs between checkpoints that are kept, 0 for none


@dataclass(frozen=True)
class SubsetConfig:
    """Which labelled images fine-tuning trains on, see :func:`moco.data.sources.subset.choose_subset`."""

    percent: float | None = 100.0
    files: str = ""
    val_share: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class ClassifierConfig:
    """A probe's or fine-tuning's network: arch, stem and drop_path as in :func:`moco.models.encoder.build_encoder`."""

    arch: str
    stem: str = "auto"
    drop_path: float = 0.0
    pretrained: str = ""  # file of the encoder, empty for none
    freeze: bool = False  # keep the encoder
    amp: str = "off"  # the encoder's arithmetic
    sync_bn: bool = False  # BatchNorm over the batch of all processes
    channels_last: bool = True  # memory layout


@dataclass(frozen=True)
class ObjectiveConfig:
    """What fine-tuning minimises, see :mod:`moco.eval.finetune_loss`."""

    loss: str = "ce"  # or supcon, simclr, schane
    alpha: float = 0.9  # weight of the contrastive loss
    T: float = 0.5  # temperature of the contrastive loss
    estimator: str = "hard"  # of schane, or easy (which is SupCon)
    beta: float = 1.0  # how strongly hard negatives weigh
    smoothing: float = 0.0  # of cross-entropy's labels
    mixup: float = 0.0  # timm's alpha, 0 for off
    cutmix: float = 0.0  # the same
    erase: float = 0.0  # probability of random erasing


# ------------------------------------------------------------------------------------------------ the evaluation


@dataclass(frozen=True)
class ValidationConfig:
    """What pretraining measures between epochs; k, temperature: as :func:`moco.eval.knn.evaluate_knn`'s."""

    knn_every: int = 10  # epochs between two measures, 0: never
    retrieval_every: int = 0  # the same
    k: tuple[int, ...] = (200,)
    temperature: float = 0.1
    rankme_every: int = 10  # the same as the first two, of training images, see :mod:`moco.eval.rankme`


@dataclass(frozen=True)
class FewShotConfig:
    """Few-shot episodes."""

    way: int = 5  # classes an episode
    shots: tuple[int, ...] = (1, 5)  # labelled images a class, one result each
    queries: int = 15  # images to classify a class
    episodes: int = 600
    seed: int = 0


# -------------------------------------------------------------------------------------------------- a pretraining


@dataclass(frozen=True)
class LocalCropConfig:
    """Small crops of each image beside its views, as queries only (multi-crop, SwAV: arXiv 2006.09882, section 3.2).

    Args:
        count: an image.
        size: side in pixels; None leaves it to :meth:`beside`.
        scale: share of the image's area, as a preset's crop_scale.
    """

    count: int = 0
    size: int | None = None
    scale: tuple[float, float] = (0.05, 0.14)

    def beside(self, size: int) -> LocalCropConfig:
        """With a size, beside views of ``size``: in proportion to SwAV's 96 beside 224, a multiple of what encoders
        divide their images by, which is 32, and 8 with the 3x3 stem of sizes up to 64."""
        step = 32 if size > 64 else 8
        return replace(self, size=self.size or max(8, step * math.floor(size * 96 / 224 / step + 0.5)))


@dataclass(frozen=True)
class ViewConfig:
    """The views of a pretraining; what is None the data set decides."""

    dataset: str | None = None  # whose statistics and preset
    size: int | None = None  # side in pixels
    mean: tuple[float, ...] | None = None  # of the channels
    std: tuple[float, ...] | None = None
    aug: str | None = None  # preset
    decode: str = "exact"  # or fast
    device: str = "auto"  # or cpu, gpu: where views are made after their crop
    count: int = 2  # views an image
    local: LocalCropConfig = LocalCropConfig()


@dataclass(frozen=True)
class PretrainConfig:
    """What the flags of a pretraining come to, without those of its files and processes."""

    method: str
    family: str  # see :mod:`moco.methods.registry`
    views: ViewConfig
    encoder: EncoderConfig
    model: MoCoConfig | InBatchConfig | MoCoV3Config
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    validation: ValidationConfig
    amp: str = "auto"  # the encoders' arithmetic
    seed: int | None = None
