"""The losses as modules: with a queue (MoCo, MoCHi, SynCo), and over the batch alone (SupCon, SimCLR, HCL, DCL).

Features come as networks return them, (N, C) of any length and dtype; they are normalised here. Several processes of
any ``torch.distributed`` group that is up at a call train together: keys and in-batch candidates are gathered from all
of them, which must have batches of one size. Every loss is the mean over this process's queries, so that gradients
averaged over the processes, as DistributedDataParallel does, are those of one process with the whole batch.

Legend: N images of this process, G of all processes, V views an image, C feature width, K queue rows, H hardest rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from moco import distributed, seeding
from moco.config import InBatchConfig, MoCHiConfig, MoCoConfig, NegativesConfig, SynCoConfig
from moco.errors import UserError
from moco.kernels import Draws, contrastive_loss
from moco.library.arguments import check, taken
from moco.methods import losses
from moco.methods.negatives import HardNegatives
from moco.methods.registry import METHODS
from moco.models.key_queue import EMPTY, enqueue_, new_queue, next_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from moco.library.arguments import MoCHiArguments, QueueArguments, SynCoArguments

# ------------------------------------------------------------------------------------------------- with a queue


class QueueLoss(nn.Module):
    """InfoNCE of queries against their keys, a queue of earlier keys and a method's synthetic negatives.

    The queue, the images that its rows are of, its pointer and the number of calls are buffers, so a state dict that is
    loaded goes on bit for bit. A call enqueues the keys of all processes after the loss is computed; in eval mode, or
    with ``update=False``, the queue stays as it is. A key that is not finite never enters: the oldest row stays in its
    place. On no device does the host wait.

    Attributes:
        epoch: set it in your loop where ``start_epoch`` or ``stop_epoch`` are used.
        step: the optimizer step, counted from 0, for ``start_step``; None: the number of calls in train mode.
        stats: () each, detached, of the last call: ``top1`` and ``top5``, the shares of queries whose key is the
            nearest and among the five nearest; ``hardest``, the mean largest similarity to a queue row;
            ``synthetic_mass``, the softmax mass of synthetic negatives; ``loss_ratio``, the loss / ln(1+K).

    Args:
        config: temperature, width, queue and negatives; what it says of encoders is not used.
        seed: of the queue's first rows and of the synthetic negatives' draws; the same on all processes.
    """

    queue: Tensor
    queue_ids: Tensor
    queue_ptr: Tensor
    calls: Tensor

    def __init__(self, config: MoCoConfig, seed: int = 0):
        super().__init__()
        n = config.negatives
        check(seed=seed, dim=config.C, K=config.K, T=config.T, impl=config.loss_impl, precision=config.loss_precision)
        check(start_epoch=n.start_epoch, stop_epoch=n.stop_epoch)
        if n.stop_epoch is not None and n.stop_epoch <= n.start_epoch:
            raise UserError("stop_epoch must come after start_epoch.")
        if n.method != "moco":
            check(n_hard=config.n_hard)
            if config.n_hard > config.K:
                raise UserError(f"n_hard {config.n_hard} is more than the queue's {config.K} rows; lower it.")
        self.config, self.seed, self.dim, self.K, self.T = config, seed, config.C, config.K, config.T
        self.negatives = HardNegatives.of(config, seed, 0, torch.device("cpu"))
        self.epoch: int | None = None
        self.step: int | None = None
        self.stats: dict[str, Tensor] = {}
        self.queue = nn.Buffer(new_queue(config.K, config.C, seeding.torch_generator("init", seed, 1)))
        self.queue_ids = nn.Buffer(torch.full((config.K,), EMPTY))
        self.queue_ptr = nn.Buffer(torch.zeros(1, dtype=torch.long))
        self.calls = nn.Buffer(torch.zeros((), dtype=torch.long))
        self._calls = 0  # the same where no device has to be asked
        self.register_load_state_dict_post_hook(_read_calls)

    @torch.compiler.disable  # one operator, which is compiled already; its draws are keyed on a number that changes
    def forward(self, q: Tensor, k: Tensor, ids: Tensor | None = None, *, update: bool = True) -> Tensor:
        """The loss (), which has a gradient for ``q`` alone.

        Args:
            q: (N, C) features of the queries. k: (N, C) of their keys, in the same order.
            ids: (N,) int64, 0 or more: which image each row is of. With them, queue rows of a query's own image are
                left out: they are neither negatives nor parents of one. Without them nothing is left out.
            update: whether the keys enter the queue. The first of two calls on one batch has ``update=False``.

        Raises:
            UserError: shapes or devices that do not fit, or an ``epoch`` that is needed and not set.
        """
        ids = self._checked(q, k, ids)
        q, k = losses.unit(q), losses.unit(k.detach())  # (N, C)
        draws = self.next_draws(q)
        mask = {} if ids is None else {"ids": ids, "queue_ids": self.queue_ids}
        head = contrastive_loss(
            q, k, self.queue, temperature=self.T, n_hard=self.negatives.hard if draws is not None else 0, draws=draws,
            impl=self.config.loss_impl, precision=self.config.loss_precision, **mask,
        )  # fmt: skip
        self.stats = {**head.statistics(), "loss_ratio": head.loss.detach() / math.log(1 + self.K)}
        if self.training:
            self._calls += 1
            self.calls.add_(1)
            if update:
                self._enqueue(k, ids)
        return head.loss

    def next_draws(self, q: Tensor) -> Draws | None:
        """What the next call draws for queries (N, C); None without synthetic negatives."""
        timed = self.negatives.start or self.negatives.stop or any(row.start_epoch for row in self.negatives.recipe)
        if timed and self.epoch is None:
            raise UserError(f"{type(self).__name__} begins or ends by epochs: set its epoch at the start of each one.")
        step = self._calls if self.step is None else self.step
        here = replace(self.negatives, rank=distributed.rank(), device=q.device)
        return here(len(q), self.epoch or 0, self._calls, step)

    @property
    def number(self) -> int:
        """How many calls there were in train mode, which is the number of the next one."""
        return self._calls

    def enqueue(self, k: Tensor, ids: Tensor | None = None) -> None:
        """Put the keys (N, C) of all processes into the queue, as a call does after its loss; arguments as there."""
        self._enqueue(losses.unit(k.detach()), self._checked(k, k, ids))

    @torch.no_grad()
    def _enqueue(self, keys: Tensor, ids: Tensor | None) -> None:
        """Unit rows in rank order; where they are not finite the oldest row stays."""
        ids = distributed.all_gather(torch.full((len(keys),), EMPTY, device=keys.device) if ids is None else ids)
        keys = distributed.all_gather(keys)[-self.K :]
        skipped, ids = len(ids) - len(keys), ids[-self.K :]
        rows = next_rows(self.queue, self.queue_ptr + skipped, len(keys))
        finite = keys.isfinite().all(1)
        keys = torch.where(finite[:, None], keys.to(self.queue.dtype), self.queue[rows])
        ids = torch.where(finite, ids, self.queue_ids[rows])
        self.queue_ptr.add_(skipped)
        enqueue_(self.queue, self.queue_ids, self.queue_ptr, keys, ids)

    def _checked(self, q: Tensor, k: Tensor, ids: Tensor | None) -> Tensor | None:
        name = type(self).__name__
        _check_rows(name, q, k)
        if q.shape != k.shape or q.shape[1:] != (self.dim,):
            raise UserError(f"{name} of dim {self.dim} takes q and k (N, {self.dim}), not {_sizes(q)} and {_sizes(k)}.")
        if not q.device == k.device == self.queue.device:
            raise UserError(f"q is on {q.device} and the queue on {self.queue.device}: move the loss there with .to().")
        if ids is None:
            return None
        ids = torch.as_tensor(ids)
        if ids.shape != q.shape[:1] or ids.is_floating_point():
            raise UserError(f"{name} takes ids (N,) of whole numbers, one for each query, not {_sizes(ids)}.")
        return ids.to(q.device, torch.int64)

    def extra_repr(self) -> str:
        counts = ", ".join(f"{row.kind} {row.count}" for row in self.negatives.recipe if row.count)
        synthetic = f", n_hard={self.config.n_hard}: {counts}" if counts else ""
        synthetic += f", control={self.negatives.control}" * bool(self.negatives.control)
        return f"dim={self.dim}, K={self.K}, T={self.T}{synthetic}"


def _read_calls(loss: nn.Module, _: object) -> None:
    assert isinstance(loss, QueueLoss)
    loss._calls = int(loss.calls)


class MoCoLoss(QueueLoss):
    """InfoNCE against a queue. Source: Momentum Contrast, arXiv 1911.05722, eq. 1; T .2 in v2, arXiv 2003.04297.

    Args:
        dim: C. K: queue rows. T: temperature.
        options: ``seed`` (0) as :class:`QueueLoss`'s; ``impl`` and ``precision`` ("auto") as
            :func:`moco.kernels.contrastive_loss`'s.

    Raises:
        UserError: a value out of its range, as for the losses below.
    """

    def __init__(self, dim: int = 128, K: int = 65536, T: float = 0.07, **options: Unpack[QueueArguments]):
        super().__init__(_config("moco", options, C=dim, K=K, T=T), options.get("seed", 0))


class MoCHiLoss(QueueLoss):
    """MoCo's with mixed hard negatives. Source: MoCHi, arXiv 2010.01028.

    Args:
        dim, K, T: as :class:`MoCoLoss`'s; the paper's T is .2.
        n_hard: H (the paper's N), the queue rows most similar to a query, which are mixed.
        options: ``s`` (512) negatives of type 1, mixed of two rows, and ``s2`` (256) of type 2, of a row and the query;
            ``start_epoch`` (0), ``stop_epoch`` (None) and ``start_step`` (0): they are drawn in epochs [start, stop)
            from that step on, see :class:`QueueLoss`; ``control`` (None; "random", "hardest" or "reweight"): as many
            copies of queue rows in their place, see :mod:`moco.methods.controls`; and those of :class:`MoCoLoss`.
    """

    def __init__(
        self, dim: int = 128, K: int = 65536, T: float = 0.07, n_hard: int = 1024, **options: Unpack[MoCHiArguments]
    ):
        super().__init__(_config("mochi", options, C=dim, K=K, T=T, n_hard=n_hard), options.get("seed", 0))


class SynCoLoss(QueueLoss):
    """MoCo's with six types of synthetic hard negatives, see :mod:`moco.methods.synco`. Source: arXiv 2410.02401.

    Args:
        dim, K, T: as :class:`MoCoLoss`'s; the paper's T is .2.
        n_hard: H (the paper's N), the queue rows most similar to a query, which negatives are made from.
        options: ``n1``, ``n2``, ``n3`` (256 each) and ``n4``, ``n5``, ``n6`` (64 each) negatives a query of types 1 to
            6; ``sigma``, ``delta``, ``eta`` (.01), the scales of types 4 to 6; ``extrapolation`` ("code" or "paper"),
            type 2 as released or as written; and those of :class:`MoCHiLoss` but ``s`` and ``s2``.
    """

    def __init__(
        self, dim: int = 128, K: int = 65536, T: float = 0.07, n_hard: int = 1024, **options: Unpack[SynCoArguments]
    ):
        super().__init__(_config("synco", options, C=dim, K=K, T=T, n_hard=n_hard), options.get("seed", 0))


_RECIPES = {"mochi": MoCHiConfig, "synco": SynCoConfig}  # what a method's negatives take


def _config(method: str, options: Mapping[str, Any], **sizes: Any) -> MoCoConfig:
    """The config of a method's loss from what it was given; TypeError, as Python's own, for an unknown option."""
    given = {name: value for name, value in options.items() if name != "seed"}
    recipe, times, control = None, {}, {}
    if kind := _RECIPES.get(method):
        recipe = kind(**taken(given, *(field.name for field in fields(kind))))
        times = taken(given, "start_epoch", "stop_epoch", "start_step")
        control = taken(given, "control")
        check(**vars(recipe), **times, **control)
        control = {} if control.get("control") == "none" else control
    own = {f"loss_{name}": value for name, value in taken(given, "impl", "precision").items()}
    for name in given:
        raise TypeError(f"the {method} loss got an unexpected keyword argument {name!r}")
    first = times.pop("start_step", 0)
    steps = {row.kind.removesuffix("-paper"): first for row in METHODS[method].hooks.recipe(recipe)}
    return MoCoConfig(**sizes, **own, negatives=NegativesConfig(method, recipe, kind_steps=steps, **times, **control))


def _check_rows(name: str, *tensors: Tensor) -> None:
    for x in tensors:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
            raise UserError(f"{name} takes features as a tensor of floating-point numbers, not {what}.")
        if not x.numel():
            raise UserError(f"{name} got an empty batch {_sizes(x)}: leave it out, or give the loader drop_last=True.")


def _sizes(x: Tensor) -> str:
    return str(tuple(x.shape))


# -------------------------------------------------------------------------------------------- over the batch alone


class InBatchLoss(nn.Module):
    """Contrast of all views of the batch of all processes, without a queue and without a state.

    ``loss(q, k)`` with two views (N, C), or ``loss(features)`` with V views (N, V, C); both views have a gradient.

    Attributes:
        stats: () each, detached, of the last call: ``top1`` and ``top5``, the shares of anchors with a positive nearer
            than every negative and than all but four; ``hardest``, the mean largest similarity to a negative;
            ``no_positive``, the share of anchors without one, which give a loss of 0; ``loss_ratio``, the loss relative
            to that of features that all look alike.

    Args:
        config: temperature and what the method's loss takes; what it says of encoders is not used.
    """

    def __init__(self, config: InBatchConfig):
        super().__init__()
        check(T=config.T, base_temperature=config.base_temperature, contrast_mode=config.contrast_mode)
        check(beta=config.beta, tau_plus=config.tau_plus, estimator=config.estimator)
        self.config, self.T = config, config.T
        self.loss: losses.Loss = METHODS[config.method].hooks.loss(config)
        self.stats: dict[str, Tensor] = {}

    @torch.compiler.disable  # small beside the encoders, and torch 2.6 cannot trace it
    def forward(self, features: Tensor, k: Tensor | None = None, *, ids: Tensor | None = None) -> Tensor:
        """The loss (), with a gradient for all features.

        Args:
            features: (N, C) with ``k`` (N, C), the other view of the same images; or (N, V, C), all views.
            ids: (N,) whole numbers, which image each row is of: rows of one image are positives of each other. None:
                every row is an image of its own.

        Raises:
            UserError: shapes that do not fit.
        """
        z = self._views(features, k)
        if ids is None:
            self._check_views(z)
            ids = distributed.rank() * len(z) + torch.arange(len(z), device=z.device)
        return self.compare(z, self._per_image("ids", ids, z))

    def compare(self, z: Tensor, groups: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of views (N, V, C), whose positives :func:`moco.methods.losses.compare` tells."""
        pairs = losses.compare(z, groups, contrast_mode=self.config.contrast_mode, mask=mask)
        loss = self.loss(pairs, self.T).mean()
        chance = losses.chance(replace(self.config, views=z.shape[1]), len(z) * distributed.world_size())
        self.stats = {**losses.rank_statistics(pairs), "loss_ratio": loss.detach() / chance}
        return loss

    def _views(self, features: Tensor, k: Tensor | None) -> Tensor:
        """(N, V, C)."""
        _check_rows(type(self).__name__, features, *([] if k is None else [k]))
        if features.dim() == 2 and k is not None and k.shape == features.shape:
            return torch.stack([features, k], dim=1)
        if features.dim() < 3 or k is not None:
            second = "" if k is None else f" and {_sizes(k)}"
            wanted = "q and k (N, C), or features (N, V, C)"
            raise UserError(f"{type(self).__name__} takes {wanted}, not {_sizes(features)}{second}.")
        return features.flatten(2)

    def _check_views(self, z: Tensor) -> None:
        if z.shape[1] < 2:
            raise UserError(
                f"{type(self).__name__} got one view of each of {len(z)} images, and no image has a positive: give two "
                "views (N, 2, C), or say which images belong together."
            )

    def _per_image(self, name: str, values: Tensor, z: Tensor) -> Tensor:
        """(N,) on the device of ``z``, from (N,) or (N, 1)."""
        values = torch.as_tensor(values)
        if values.numel() != len(z) or values.dim() > 2:
            raise UserError(f"{name} {_sizes(values)} does not fit {len(z)} images: give one for each.")
        return values.to(z.device).flatten()

    def extra_repr(self) -> str:
        base = self.config.base_temperature
        return f"T={self.T}" + (f", base_temperature={base}" if base else "")


class SimCLRLoss(InBatchLoss):
    """NT-Xent. Source: SimCLR, arXiv 2002.05709, eq. 1.

    Args:
        T: temperature. contrast_mode: "all": every view is an anchor; "one": the first of each image is.
        base_temperature: multiply the loss by T / base_temperature; ``--method simclr`` has .07, as SupContrast.

    Raises:
        UserError: a value out of its range, as for the losses below.
    """

    def __init__(self, T: float = 0.07, contrast_mode: str = "all", base_temperature: float | None = None):
        config = InBatchConfig(T=T, base_temperature=base_temperature, method="simclr", contrast_mode=contrast_mode)
        super().__init__(config)


class HCLLoss(InBatchLoss):
    """NT-Xent with negatives weighed by their hardness and debiased. Source: HCL, arXiv 2010.04592.

    Args:
        T, contrast_mode: as :class:`SimCLRLoss`'s.
        beta: how much more harder negatives weigh. tau_plus: share of negatives that are positives.
        estimator: "hard", or "easy": all negatives weigh alike.
    """

    def __init__(
        self,
        T: float = 0.07,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        estimator: str = "hard",
        contrast_mode: str = "all",
    ):
        super().__init__(
            InBatchConfig(
                T=T, method="hcl", contrast_mode=contrast_mode, beta=beta, tau_plus=tau_plus, estimator=estimator
            )
        )


class DCLLoss(InBatchLoss):
    """NT-Xent without the positive in its denominator. Source: DCL, arXiv 2110.06848.

    Args:
        T, contrast_mode: as :class:`SimCLRLoss`'s.
    """

    def __init__(self, T: float = 0.07, contrast_mode: str = "all"):
        super().__init__(InBatchConfig(T=T, method="dcl", contrast_mode=contrast_mode))


class SupConLoss(InBatchLoss):
    """Supervised contrast. Source: SupCon, arXiv 2004.11362, eq. 2, multiplied as in its public code, SupContrast.

    Constructed and called as SupContrast's: ``SupConLoss(temperature=.1)(features, labels)``.

    Args:
        T, contrast_mode: as :class:`SimCLRLoss`'s.
        base_temperature: multiply the loss by T / base_temperature; None for the paper's.
        temperature: SupContrast's name of T.
    """

    def __init__(
        self,
        T: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float | None = 0.07,
        *,
        temperature: float | None = None,
    ):
        T = T if temperature is None else temperature
        super().__init__(
            InBatchConfig(T=T, base_temperature=base_temperature, method="supcon", contrast_mode=contrast_mode)
        )

    @overload
    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor: ...
    @overload
    def forward(
        self, features: Tensor, k: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor: ...

    @torch.compiler.disable
    def forward(self, features: Tensor, *rest: Tensor | None, **named: Tensor | None) -> Tensor:
        """``loss(features, labels, mask)`` or ``loss(q, k, labels, mask)``: the loss ().

        Args:
            features: (N, V, C), further dimensions are flattened; or (N, C) with ``k`` (N, C).
            *rest, **named: ``labels`` (N,) or (N, 1): images of one label are positives of each other. Without labels
                and mask every image is a class of its own, which is SimCLR. ``mask``, in place of labels, (N, G), G = N
                in one process: entry (i, j) is not 0 where image j is a positive of image i; it need not be symmetric.

        Raises:
            UserError: labels and mask, or shapes that do not fit.
        """
        names = ["k", "labels", "mask"] if features.dim() == 2 else ["labels", "mask"]
        given = _called(names, rest, named)
        z, labels, mask = self._views(features, given.get("k")), given.get("labels"), given.get("mask")
        if labels is not None and mask is not None:
            raise UserError("labels and mask both say which images are positives; give SupConLoss one of them.")
        images = len(z) * distributed.world_size()
        if mask is not None and mask.shape != (len(z), images):
            raise UserError(f"mask {_sizes(mask)} does not fit {len(z)} images against {images}.")
        if labels is None and mask is None:
            self._check_views(z)
        own = distributed.rank() * len(z) + torch.arange(len(z), device=z.device)
        groups = own if labels is None else self._per_image("labels", labels, z)
        return self.compare(z, groups, None if mask is None else mask.to(z.device) != 0)


def _called(names: list[str], rest: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, as Python binds them."""
    given = dict(zip(names, rest, strict=False))
    if len(rest) > len(names) or named.keys() & given.keys() or named.keys() - set(names):
        raise TypeError(f"SupConLoss takes features, {', '.join(names)}")
    return given | named
