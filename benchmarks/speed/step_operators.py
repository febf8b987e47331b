"""Operators of one whole training step on a GPU, by part, counted on a machine without one.

    python -m benchmarks.speed.step_operators [--bn-splits 1 8] [flags of main_pretrain.py]

The step is :meth:`moco.train.pretraining.Trainer.step` with its real model, optimizer and batch. Its tensors are on
torch's "meta" device, which has shapes and no values, and say of themselves that they are on a GPU: every path that
asks ``x.device.type`` or ``x.is_cuda`` takes the GPU's side. Nothing is computed and nothing of this is a time.

Counted is what a GPU would be asked to do: each call of an operator of torch, forward, backward and optimizer, that
writes memory (no views, no allocations), each launch of a Triton program and each copy from the host. A call over a
list of tensors (``_foreach_*``, ``_fused_*``) counts once, and so does the gradient of a convolution, which is two or
three kernels of the library. Operators of this project are opened and what is inside is counted. Under autocast the
casts of weights and inputs count, as autocast makes them: once for a weight with a gradient, at every use for others.

``host reads`` is how often the host asked for a value, for which it would wait. Without flags: SynCo with a ResNet-50
at 224 px, batch 32, K 65,536, bf16. With --config FILE the file's recipe takes the place of all that.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moco import cli, data, distributed
from moco.cli.pretrain import pretrain_config
from moco.kernels import draws, images, norm, trial
from moco.models import build
from moco.train import pretraining
from moco.train.bench import make_trainer, noise
from moco.train.runlog import RunLog

SETTING = ["-a", "resnet50", "--dataset", "folder", "--size", "224", "-b", "32", "--moco-t", "0.2", "--mlp",
           "--method", "synco", "--hard-start-epoch", "0", "--no-mask-same-image", "--seed", "0"]  # fmt: skip
GPU, META = torch.device("cuda", 0), torch.device("meta")
IMAGES = 1 << 20
H100 = Namespace(L2_cache_size=50 << 20, multi_processor_count=132, major=9, minor=0, name="NVIDIA H100")
OTHER, ROLLBACK = "other", "rollback"
# The programs' checks of themselves on a device, which this one would not pass.
CHECKED = (
    (build, "_worst", list),
    (trial, "objection", lambda *_: ""),
    (trial, "objection_at", lambda *_: ""),
    (trial, "relative_time", lambda *_: 0.5),
    (draws, "agrees", lambda *_: True),
    (norm, "agrees", lambda *_: True),
    (images, "agrees", lambda *_: True),
)
CAST_FIRST = {torch.conv2d, torch.nn.functional.linear, torch.matmul, torch.mm, torch.addmm, torch.bmm}  # of autocast
READS = ("item", "is_nonzero", "_local_scalar_dense")
FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "set_", "resize_")


_Host = torch.Generator


class _Generator(torch.Generator):
    """A generator of the host that says it is the GPU's."""

    device = GPU


def _generator(device: torch.device | str = "cpu") -> torch.Generator:
    return _Generator() if torch.device(device).type == "cuda" else _Host(device=device)


class _OnGpu(TorchFunctionMode):
    """Python sees tensors of the meta device on a GPU, and what it puts on the GPU is put there."""

    def __init__(self) -> None:
        super().__init__()
        self.cached: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is Tensor.backward:  # inside of a function that it handles this mode is off
            with self:
                return torch.autograd.backward(args[0])
        args, kwargs = [_placed(x) for x in args], {name: _placed(x) for name, x in (kwargs or {}).items()}
        if func is Tensor.pin_memory:
            return args[0]
        if func in CAST_FIRST and torch.is_autocast_enabled("cuda"):
            args = [self._cast(x) for x in args]
        result = func(*args, **kwargs)
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if result == META else result
        return args[0].is_meta if func == Tensor.is_cuda.__get__ else result  # type: ignore[attr-defined]

    def _cast(self, x: Any) -> Any:
        """As autocast: to 16 bits, and a weight that will get a gradient once."""
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad and torch.is_grad_enabled()):
            return x.to(torch.bfloat16)
        if id(x) not in self.cached:
            self.cached[id(x)] = x.to(torch.bfloat16)
        return self.cached[id(x)]


def _placed(x: Any) -> Any:
    if isinstance(x, _Generator):
        return None
    named = str(x) if isinstance(x, (str, torch.device)) else ""
    return META if named.partition(":")[0] == "cuda" else x


class _Counting(TorchDispatchMode):
    """Counts what arrives below autograd, by part of the step and by name."""

    def __init__(self, where: _Parts, gpu: _OnGpu) -> None:
        super().__init__()
        self.found: dict[str, Counter[str]] = {}
        self.reads, self.where, self.gpu = 0, where, gpu

    def note(self, name: str) -> None:
        self.found.setdefault(self.where.name, Counter())[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        own = OPDEFS.get(func._schema.name)
        if own is not None:
            with self, self.gpu:
                return own._init_fn(*args, **kwargs)
        if name in READS and args[0].is_meta:
            self.reads += 1
            good = self.where.name != "optimizer"  # which asks if the step was bad; all else if there is nothing odd
            return {torch.bool: good, torch.int64: 1}.get(args[0].dtype, 1.0)
        if name.startswith("_fused_"):
            self.note(name)
            return None
        with self:  # below autograd an operator of several arrives whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if _writes(func, name, args, result):
            self.note(name)
        return result


def _writes(func: Any, name: str, args: Any, result: Any) -> bool:
    if name in FREE or not any(x.is_meta for x in _tensors([args, result])):
        return False  # memory alone, or the host's work
    return not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _tensors(y)


class _Parts:
    """In the place of :class:`moco.train.timers.StepTimer`: says which part of the step it is."""

    name = OTHER

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before, self.name = self.name, name
        yield
        self.name = before

    def of_a_step(self, measured: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def read(self) -> None:
        pass


@contextlib.contextmanager
def a_gpu(counting: _Counting) -> Iterator[None]:
    """What runs in here runs on a GPU that computes nothing."""

    def launched(program: Any, *_: Any, **__: Any) -> None:
        counting.note(f"triton {program.fn.__name__}")

    with contextlib.ExitStack() as stack:
        for target, name, new in (
            (distributed, "device", lambda: GPU),
            (torch, "clear_autocast_cache", counting.gpu.cached.clear),
            (torch.cuda, "device", contextlib.nullcontext),
            (torch.cuda, "device_of", contextlib.nullcontext),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "manual_seed_all", lambda seed: None),
            (torch.cuda, "is_bf16_supported", lambda **_: True),
            (torch.cuda, "get_device_properties", lambda *_: H100),
            (torch, "Generator", _generator),
            (clip_grad, "_has_foreach_support", lambda *_: True),
            *CHECKED,
        ):
            stack.enter_context(mock.patch.object(target, name, new))
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # by version
            if hasattr(torch.optim.Optimizer, name):
                stack.enter_context(mock.patch.object(torch.optim.Optimizer, name))
        with contextlib.suppress(ImportError):
            jit = importlib.import_module("triton.runtime.jit")
            stack.enter_context(mock.patch.object(jit.JITFunction, "run", launched))
        stack.enter_context(counting.gpu)
        yield


def count(argv: list[str]) -> tuple[dict[str, Counter[str]], int]:
    """Operators of one step of main_pretrain.py with these flags, by part and name, and how often the host waits."""
    args = cli.parse_pretrain(argv)
    mean, std = data.channel_statistics(None, 3, None, None)
    view = Namespace(size=args.size, channels=3, mean=mean, std=std)
    parts = _Parts()
    counting = _Counting(parts, _OnGpu())
    with tempfile.TemporaryDirectory() as folder, RunLog(folder, tensorboard=False) as log, a_gpu(counting):
        trainer = make_trainer(pretrain_config(args), view, log, folder, IMAGES, args.batch_size)
        _divide(trainer, parts)
        source = noise(args.batch_size, view, 0, GPU, IMAGES)
        batches = [next(source) for _ in range(2 * args.accum)]
        trainer.look_every = 1 << 30  # the look of every tenth step is none of a step
        for which in (batches[: args.accum], batches[args.accum :]):  # the first makes gradients' memory and the like
            counting.found.clear()
            counting.reads = 0
            with counting:
                trainer.step(iter(which))
    return counting.found, counting.reads


def _divide(trainer: pretraining.Trainer, parts: _Parts) -> None:
    """Have the trainer and its model say which part begins, the rollback too."""
    trainer.timer = trainer.model.timer = parts  # type: ignore[assignment]
    snapshot = trainer.model.snapshot

    def divided(keys: int) -> Any:
        with parts(ROLLBACK):
            restore = snapshot(keys)

        def restored(bad: Tensor) -> None:
            with parts(ROLLBACK):
                restore(bad)

        return restored

    trainer.model.snapshot = divided  # type: ignore[method-assign]


def table(found: dict[str, dict[str, Counter[str]]], reads: dict[str, int]) -> str:
    """A line a part, a column a setting."""
    names = list(dict.fromkeys(part for parts in found.values() for part in parts))
    lines = ["| part | " + " | ".join(found) + " |", "| --- |" + " ---: |" * len(found)]
    rows = {name: [parts.get(name, Counter()).total() for parts in found.values()] for name in names}
    rows |= {"all": [sum(x.total() for x in parts.values()) for parts in found.values()]}
    rows |= {"host reads": [reads[name] for name in found]}
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in rows.items())])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--bn-splits", nargs="+", type=int, default=[1, 8], help="one column for each (default: 1 8)")
    parser.add_argument("--names", action="store_true", help="list the operators of each part by name too")
    args, argv = parser.parse_known_args(argv)
    found, reads = {}, {}
    setting = [] if any(word.partition("=")[0] == "--config" for word in argv) else SETTING
    for splits in args.bn_splits:
        name = f"--bn-splits {splits}"
        found[name], reads[name] = count([*setting, *argv, "--bn-splits", str(splits)])
        if args.names:
            for part, names in found[name].items():
                print(f"{name}, {part}: " + ", ".join(f"{n} {x}" for x, n in names.most_common()))
    print(table(found, reads))
    return 0


if __name__ == "__main__":
    sys.exit(main())
