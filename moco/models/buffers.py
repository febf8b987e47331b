"""The hundreds of little tensors of a network, BatchNorm's statistics above all, handled in a few operators a step.

They are views of one flat tensor for each dtype, so that to remember all of them is one copy and to put them back
another: the host spends a tenth of a millisecond on it where a list of them costs one or more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moco.models.batchnorm import SplitBatchNorm2d

ALIGNMENT = 64  # bytes: a view begins where an allocation of its own could, as libraries and compilers expect
COUNTER = "num_batches_tracked"  # BatchNorm's name for the batches that it has seen


class Small:
    """The buffers of a network but those called ``leave``, remembered and put back.

    A buffer stays the object that it is, so that a module, DistributedDataParallel or a compiled graph may hold it;
    only its memory moves, at the first snapshot. Where others have been put in their places since (``to``,
    ``load_state_dict(assign=True)``, a deep copy) theirs moves at the next one, which compares addresses. Modules that
    are added later are not seen, and buffers that were views of one another are no more. A file gets tensors of their
    own size, see :func:`moco.train.checkpoint.write`.
    """

    def __init__(self, network: nn.Module, leave: tuple[str, ...] = ()) -> None:
        self._places = [
            (module._buffers, name)
            for path, module in network.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and f"{path}.{name}".removeprefix(".") not in leave
        ]
        self._flat: list[Tensor] = []
        self._addresses: list[int] = []

    def snapshot(self) -> Callable[[Tensor], None]:
        """Remember; returns ``restore(bad)``: puts all back where ``bad``, () bool, is true, which no host asks."""
        return partial(put_back, [(flat, flat.clone()) for flat in self._laid_out()])

    def _laid_out(self) -> list[Tensor]:
        """The flat tensors, in which every buffer is."""
        buffers: list[Any] = [owner[name] for owner, name in self._places if owner[name] is not None]
        if not self._flat or [b.data_ptr() for b in buffers] != self._addresses:
            kinds = {(b.device, b.dtype): None for b in buffers}
            self._flat = [_lay_out([b for b in buffers if (b.device, b.dtype) == kind]) for kind in kinds]
            self._addresses = [b.data_ptr() for b in buffers]
        return self._flat


@torch.no_grad()
def put_back(remembered: Iterable[tuple[Tensor, Tensor]], bad: Tensor) -> None:
    """Each first tensor becomes its second where ``bad``, () bool, is true, and else stays; no host asks which."""
    for value, old in remembered:
        torch.where(bad, old, value, out=value)


@torch.no_grad()
def _lay_out(buffers: list[Tensor]) -> Tensor:
    """A flat tensor whose parts the buffers become, with the values that they have."""
    distinct = list({id(b): b for b in buffers}.values())
    step = ALIGNMENT // distinct[0].element_size()
    sizes = [-(-b.numel() // step) * step for b in distinct]
    flat = distinct[0].new_zeros(sum(sizes))
    parts = [part[: b.numel()].view(b.shape) for part, b in zip(flat.split(sizes), distinct, strict=True)]
    for buffer, part in zip(distinct, parts, strict=True):
        part.copy_(buffer)
        buffer.data = part
    return flat


Places = list[tuple[dict[str, Any], str]]  # a module's buffers or parameters, and a name in them


@contextlib.contextmanager
def _exchanged(places: Places, others: Iterable[Any]) -> Iterator[list[Tensor]]:
    """With ``others`` in these places; yields what is back in them afterwards."""
    own = [owner[name] for owner, name in places]
    for (owner, name), other in zip(places, others, strict=True):
        owner[name] = other
    try:
        yield own
    finally:
        for (owner, name), tensor in zip(places, own, strict=True):
            owner[name] = tensor


class Counts:
    """Lets an encoder's BatchNorm layers count their batches by one operator on a GPU, where each would launch its own.

    Left alone are layers that count inside of an operator of ours or need the number (momentum None), and encoders that
    are compiled, whose counting the compiler fuses.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self._encoder = encoder
        self._places: Places | None = None  # found late: layers may be exchanged at first

    @contextlib.contextmanager
    def at_once(self, device: torch.device) -> Iterator[None]:
        """Around a forward pass of the encoder on ``device``."""
        if device.type == "cpu" or self._encoder._compiled_call_impl is not None:
            yield
            return
        if self._places is None:
            norms = [m for m in self._encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            own = [m for m in norms if not isinstance(m, SplitBatchNorm2d) and m.momentum is not None]
            self._places = [(m._buffers, COUNTER) for m in own if m._buffers.get(COUNTER) is not None]
        tallies = [_Tally() for _ in self._places]
        with _exchanged(self._places, tallies) as counters:
            yield
        batches = [tally.batches for tally in tallies]
        if any(batches):
            with torch.no_grad():
                torch._foreach_add_(counters, batches)  # pyright: ignore[reportPrivateImportUsage, reportCallIssue]


class _Tally:
    """In the place of a layer's counter."""

    batches = 0

    def add_(self, batches: int) -> None:
        self.batches += batches


class Rounded:
    """Lets a network without gradients meet autocast on a GPU with its weights rounded already, by one operator.

    Autocast rounds a weight without gradient at every use, a launch each; the numbers are the same. Of convolutions and
    linear layers of torch's own types with a weight, a bias and no hooks (which spectral and weight norm have): they do
    nothing else with them. Left alone is a compiled network. None may switch autocast off for such a layer.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._places: Places | None = None  # found late: layers may be exchanged at first
        self._kept: list[Tensor] = []

    @contextlib.contextmanager
    def at_once(self, device: torch.device) -> Iterator[None]:
        """Around a forward pass of the network on ``device``."""
        idle = device.type == "cpu" or not torch.is_autocast_enabled(device.type)
        if idle or self._network._compiled_call_impl is not None:
            yield
            return
        if self._places is None:
            layers = [m for m in self._network.modules() if type(m) in (nn.Conv2d, nn.Linear) and _plain(m)]
            own = [m._parameters for m in layers]
            self._places = [(ps, name) for ps in own for name, p in ps.items() if p is not None]
        weights = [owner[name] for owner, name in self._places]
        with _exchanged(self._places, self._rounded(weights, torch.get_autocast_dtype(device.type))):
            yield

    @torch.no_grad()
    def _rounded(self, weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The weights in ``dtype``, in memory that is kept."""
        like = [(x.shape, x.stride(), x.device, dtype) for x in weights]
        if like != [(x.shape, x.stride(), x.device, x.dtype) for x in self._kept]:
            self._kept = [torch.empty_like(x, dtype=dtype) for x in weights]
        if weights:
            torch._foreach_copy_(self._kept, [x.detach() for x in weights])  # pyright: ignore[reportPrivateImportUsage]
        return self._kept


def _plain(layer: nn.Module) -> bool:
    """Whether nothing but the layer's own operator reads its weight and bias."""
    return set(layer._parameters) == {"weight", "bias"} and not (layer._forward_pre_hooks or layer._forward_hooks)
