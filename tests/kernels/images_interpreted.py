"""Images normalised by the Triton program, by triton's interpreter on the CPU or compiled on a card: the numbers of
torch on a CPU, bit for bit.

The interpreter has to be chosen before triton is imported, so test_images.py runs this file in a process of its
own, as anyone can:  TRITON_INTERPRET=1 python -m pytest tests/kernels/images_interpreted.py
`pytest -m gpu` runs it compiled.
"""

import pytest
import torch
from conftest import DEVICE, assert_runs_there, mend_interpreter

from moco.kernels import by_triton, images
from moco.models.inputs import normalise

mend_interpreter()
MEAN, STD = [0.485, 0.456, 0.40821, 0.1], [0.229, 0.224, 0.2675, 0.7]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    assert_runs_there()
    monkeypatch.setattr(images, "BLOCK", 256)
    monkeypatch.setattr(by_triton, "on_gpu", lambda x: x.device.type == DEVICE)
    monkeypatch.setattr(images, "agrees", lambda *case: True)


def noise(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("layout", [None, torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", by_triton.DTYPES)
@pytest.mark.parametrize("shape", [(3, 3, 16, 16), (2, 1, 13, 11), (2, 4, 7, 9), (1, 3, 20, 17), (0, 3, 4, 4)], ids=str)
def test_the_numbers_are_the_cpus(shape, dtype, layout):
    given, mean, std = noise(*shape), MEAN[: shape[1]], STD[: shape[1]]
    wanted = images.by_torch(given, torch.tensor(mean), torch.tensor(std))
    found = normalise(given.to(DEVICE), mean, std, dtype, layout).cpu()
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=layout or torch.contiguous_format)
    assert torch.equal(found, wanted.to(dtype))


def test_every_byte():
    given = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    for seed in range(20):
        mean, std = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed)).add_(0.01).unbind()
        found = normalise(given.to(DEVICE), mean, std, layout=torch.channels_last)
        assert torch.equal(found.cpu(), images.by_torch(given, mean, std))


def test_images_in_other_memory():
    given = noise(2, 3, 6, 10)
    wanted = images.by_torch(given, torch.tensor(MEAN[:3]), torch.tensor(STD[:3]))
    for strided in (given.contiguous(memory_format=torch.channels_last), given.mT.contiguous().mT):
        for layout in (None, torch.contiguous_format, torch.channels_last):
            found = normalise(strided.to(DEVICE), MEAN[:3], STD[:3], layout=layout)
            assert torch.equal(found.cpu(), wanted)


def test_a_device_is_trusted_once_its_numbers_are_the_cpus(monkeypatch):
    monkeypatch.undo()
    images.agrees.cache_clear()
    device = torch.device(DEVICE)
    assert images.agrees(device, (3, 5, 7), torch.float32, True)
    right = images.to_floats
    monkeypatch.setattr(images, "to_floats", lambda *given: right(*given) + 1e-6)
    assert images.agrees(device, (3, 5, 7), torch.float32, True)  # remembered
    with pytest.warns(RuntimeWarning, match="by torch's operators, not by triton: its numbers are not the CPU's"):
        assert not images.agrees(device, (3, 5, 7), torch.float32, False)
    images.agrees.cache_clear()
