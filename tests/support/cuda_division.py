"""The one arithmetic in which torch's operators on a GPU differ from those on a CPU by design, imitated on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class DividesAsCuda(TorchDispatchMode):
    """Floats divided by a number are multiplied by its reciprocal, as torch's CUDA kernels do; ``seen`` counts them."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.div.Tensor, aten.div_.Tensor) and isinstance(args[1], int | float):
            x, number = args
            if x.is_floating_point():
                self.seen += 1
                inverse = (1 / torch.tensor(number, dtype=x.dtype)).item()
                return x.mul_(inverse) if func is aten.div_.Tensor else x * inverse
        return func(*args, **(kwargs or {}))
