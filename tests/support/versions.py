"""What tests ask of the installed torch; requirements/oldest.txt has the oldest versions that are supported."""

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

# Before, an index into such a tensor is an error of the driver, and a gradient of one ends the process.
dataless_gpu = pytest.mark.skipif(
    TORCH < (2, 8), reason="needs torch 2.8, which takes tensors of a GPU without data where there is no driver"
)

bf16_sgd = pytest.mark.skipif(
    TORCH < (2, 8), reason="needs torch 2.8: before, fused SGD on a CPU moves not every element of a bf16 tensor"
)

counted = pytest.mark.skipif(
    TORCH < (2, 14),
    reason="needs torch 2.14, whose operators are counted: a ResNet-50's step has 21 more with torch 2.6",
)
