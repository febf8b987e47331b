"""Momentum contrast around a backbone of one's own: two encoders and a loss with a queue in one module.

Legend: N images of this process, F backbone feature width, C feature width, h x w pixels.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moco import distributed
from moco.config import ModelConfig
from moco.errors import UserError
from moco.library.arguments import check, taken
from moco.library.criteria import MoCoLoss, QueueLoss
from moco.models.base import Momentum
from moco.models.batchnorm import SplitBatchNorm2d, has_batchnorm, split_batchnorm
from moco.models.encoder import Headed, head_of, mlp_head
from moco.models.inputs import normalise

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from moco.library.arguments import MoCoArguments

_PARTS = 8  # that BatchNorm sees alone in one process, as in MoCo's own one-GPU code
_INSIDE = "criterion."  # whose entries a state dict has at its top, where upstream's has the queue


class MoCo(Momentum):
    """A query encoder, a key encoder that follows it, and a loss with a queue: ``loss = model(view1, view2)``.

    In train mode a call first moves the key encoder, k <- m k + (1 - m) q, then computes the keys, the loss and at last
    enqueues the keys; in eval mode it computes the loss alone. So there is one call for each step of the optimizer;
    with gradient accumulation over ``accum`` batches the key encoder moves before the first of them.

    BatchNorm is kept from telling which views belong together as by ``main_pretrain.py``: one process normalises the
    batch in 8 parts, or the most that are equal and of two images or more, several processes each their own batch, and
    keys are computed in an order shuffled over parts and processes. Without BatchNorm2d nothing of this happens.

    A state dict has upstream's names: ``encoder_q.*``, ``encoder_k.*``, ``queue``, ``queue_ptr``, beside them
    ``queue_ids`` and ``calls``. DistributedDataParallel leaves the loss's buffers alone, which are equal anyway.

    Attributes:
        criterion: the loss; its ``epoch``, ``step`` and ``stats`` are yours, see :class:`QueueLoss`.
        encoder_q, encoder_k: the two encoders with their heads.

    Args:
        backbone: becomes the query encoder. The last linear layer of a torchvision or timm network, or of a module
            whose last layer is one, is replaced by the projection head. A module that returns features (N, F) or
            (N, F, 1, 1) needs ``width`` F, as an argument or an attribute of its own.
        dim: C; None: the criterion's, 128 without one.
        mlp: MoCo v2's head, Linear(F, F) ReLU Linear(F, C), in place of one linear layer.
        m: the share of itself that the key encoder keeps at a step.
        criterion: a loss with a queue; None: ``MoCoLoss(dim)``.
        options: ``width`` (None), see above; ``symmetric`` (False): each view is query once, the two losses are added
            and both views' keys enqueued; ``accum`` (1): batches a step; ``shuffle`` (True) and ``bn_splits`` (None:
            as above; 1: BatchNorm over the whole batch); ``mean`` and ``std``, by which uint8 images are normalised
            (ImageNet's), where floats are taken as they are.

    Raises:
        UserError: no layer that a head could replace, or a value out of its range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dim: int | None = None,
        mlp: bool = True,
        m: float = 0.999,
        criterion: QueueLoss | None = None,
        **options: Unpack[MoCoArguments],
    ):
        given: dict[str, Any] = dict(options)
        statistics, width = taken(given, "mean", "std"), given.pop("width", None)
        criterion = MoCoLoss(128 if dim is None else dim) if criterion is None else criterion
        if not isinstance(criterion, QueueLoss):
            raise UserError(f"MoCo takes a loss with a queue, not {type(criterion).__name__}.")
        if dim not in (None, criterion.dim):
            raise UserError(f"dim {dim} is not the criterion's {criterion.dim}: leave it out.")
        defaults = {"symmetric": False, "accum": 1, "shuffle": True, "bn_splits": None}
        for name in given.keys() - defaults:
            raise TypeError(f"MoCo() got an unexpected keyword argument {name!r}")
        given = defaults | given
        check(m=m, accum=given["accum"], bn_splits=given["bn_splits"])
        encoder = _with_head(backbone, criterion.dim, mlp, width)
        splits = _PARTS if given["bn_splits"] is None else given["bn_splits"]
        split = has_batchnorm(encoder)
        encoder = split_batchnorm(encoder, splits)
        super().__init__(encoder, copy.deepcopy(encoder), ModelConfig(T=criterion.T, **statistics), m)
        self.criterion, self.accum, self.symmetric = criterion, given["accum"], given["symmetric"]
        self._shuffle, self._chosen, self._splits = given["shuffle"] and split, given["bn_splits"] is not None, splits
        self._processes = 1
        self._ddp_params_and_buffers_to_ignore = [_INSIDE + name for name, _ in criterion.named_buffers()]
        self.register_state_dict_post_hook(_queue_to_the_top)
        self.register_load_state_dict_pre_hook(_queue_to_its_place)

    def forward(self, view1: Tensor, view2: Tensor, ids: Tensor | None = None) -> Tensor:
        """The loss (), with a gradient for the query encoder alone.

        Args:
            view1, view2: (N, channels, h, w) of the queries and of their keys, uint8 or already normalised floats. All
                processes have as many.
            ids: (N,) which image each row is of, see :class:`QueueLoss`.

        Raises:
            UserError: outputs or ids that do not fit.
        """
        self._meet()
        number = self.criterion.number // (1 + self.symmetric)  # of this batch
        if self.training and number % self.accum == 0:
            self.update_key_encoder()
        k = self._keys(view2, number)
        if not self.symmetric:
            return self.criterion(self.forward_q(view1), k, ids)
        k2 = self._keys(view1, number)
        pairs = ((view1, k), (view2, k2))
        losses = [self.criterion(self.forward_q(view), keys, ids, update=False) for view, keys in pairs]
        if self.training:
            for keys in (k, k2):
                self.criterion.enqueue(keys, ids)
        return losses[0] + losses[1]

    def prepare(self, images: Tensor) -> Tensor:
        """Normalised floats from uint8 images; floats as they are, in a memory layout of the caller's."""
        return normalise(images, self.mean, self.std) if images.dtype == torch.uint8 else images

    def _keys(self, images: Tensor, number: int) -> Tensor:
        """(N, C) of the key encoder, in train mode computed in a shuffled order."""
        if self.training and self._shuffle and (self._processes > 1 or self._splits > 1):
            return self.in_shuffled_order(self.forward_k, images, self.criterion.seed, number)
        return self.forward_k(images)

    def _meet(self) -> None:
        """Let BatchNorm see the whole batch of each of several processes; whose group may begin after this module."""
        if (processes := distributed.world_size()) != self._processes:
            self._processes = processes
            if not self._chosen:
                self._splits = 1 if processes > 1 else _PARTS
                _set_splits(self, self._splits)

    @property
    def encoder(self) -> nn.Module:
        """A copy of the query encoder without its head, (N, channels, h, w) to (N, F): for use after the training."""
        copied = copy.deepcopy(self.encoder_q)
        _set_splits(copied, 1)
        if isinstance(copied, Headed):
            return copied.backbone
        copied.set_submodule(head_of(copied), nn.Identity())
        return copied


def _set_splits(network: nn.Module, splits: int) -> None:
    for module in network.modules():
        if isinstance(module, SplitBatchNorm2d):
            module.splits = splits


def _with_head(backbone: nn.Module, dim: int, mlp: bool, width: int | None) -> nn.Module:
    """The backbone with a projection head, whose name it remembers as ``head_name``."""
    encoder, name = _place(backbone, getattr(backbone, "width", None) if width is None else width, dim)
    if mlp:
        encoder.set_submodule(name, mlp_head(encoder.get_submodule(name)))
    encoder.head_name = name  # type: ignore[assignment]
    return encoder


def _place(backbone: nn.Module, width: Any, dim: int) -> tuple[nn.Module, str]:
    """The backbone with a linear layer of ``dim`` outputs, and that layer's name."""
    timms = getattr(backbone, "pretrained_cfg", {}).get("classifier")
    if isinstance(timms, str):
        name, width = timms, getattr(backbone, "head_hidden_size", None) or backbone.num_features
    else:
        name = next((path for path, module in reversed([*backbone.named_modules()]) if not [*module.children()]), "")
    last = backbone.get_submodule(name)
    if name and width and isinstance(last, nn.Identity):  # timm's without classes, or fc = nn.Identity()
        new: nn.Module = nn.Linear(width, dim)
    elif width and name != timms:
        return Headed(backbone, width, dim), "fc"
    elif name and isinstance(last, nn.Linear):
        new = nn.Linear(last.in_features, dim)
    elif name and isinstance(last, nn.Conv2d) and name == timms:
        new = nn.Conv2d(last.in_channels, dim, 1)
    else:
        raise UserError(
            f"{type(backbone).__name__} does not end in a linear layer that a head could replace: "
            "give MoCo the width=F of the features (N, F) that it returns."
        )
    backbone.set_submodule(name, new)
    return backbone, name


def _queue_to_the_top(model: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """Upstream's names for what the loss keeps."""
    for name in [name for name in state if name.startswith(prefix + _INSIDE)]:
        state[prefix + name.removeprefix(prefix + _INSIDE)] = state.pop(name)


def _queue_to_its_place(model: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Undoes :func:`_queue_to_the_top`."""
    assert isinstance(model, MoCo)
    for name, _buffer in model.criterion.named_buffers():
        if prefix + name in state:
            state[prefix + _INSIDE + name] = state.pop(prefix + name)
