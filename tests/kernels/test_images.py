"""Images normalised by Triton, without a GPU: numbers by triton's interpreter, machine code by its compilers."""

import contextlib

import numpy as np
import pytest
import torch
from conftest import interpreted, launched_by
from support.cuda_division import DividesAsCuda
from support.machine_code import judges_code, machine_code
from support.networks import batch_contrast as simclr
from support.networks import moco
from support.versions import dataless_gpu
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moco.kernels import by_triton, images
from moco.models.encoder import build_encoder, input_dtype
from moco.models.inputs import normalise

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def test_the_interpreted_program_gives_the_cpus_numbers():
    assert interpreted("kernels/images_interpreted.py") >= 48


def test_a_gpus_way_to_divide_gives_the_cpus_numbers_too():
    given = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    expected = images.by_torch(given, mean, std)
    with DividesAsCuda():
        assert torch.equal(images.by_torch(given, mean, std), expected)
        assert not torch.equal(given.float().div_(255), given.float() / torch.full((), 255.0))  # which is why


def test_255ths_are_exact_however_a_compiler_adds_them():
    x, high, low = np.arange(256, dtype=np.float32), np.float32(images.HIGH), np.float32(images.LOW)
    assert float(high) == images.HIGH
    apart = x * high + x * low
    fused_low = (x.astype(np.float64) * float(low) + (x * high)).astype(np.float32)
    fused_high = (x.astype(np.float64) * float(high) + (x * low)).astype(np.float32)
    for found in (apart, fused_low, fused_high):
        assert np.array_equal(found, x / np.float32(255))


@judges_code
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(("precision", "align"), [("bf16", 16), ("fp32", 16), ("bf16", 1)])
def test_it_compiles_without_spills(precision, align, target, resources, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, variant in resources.of_images(precision, align).items():
        used = resources.usage(target, *variant)
        assert 0 < used.registers <= 80, name
        assert used.spilled == 0, name
        assert used.shared <= 8 * 1024, name


@judges_code
def test_memory_is_used_in_wide_pieces_and_halves_are_rounded_to_nearest(resources, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, variant in resources.of_images().items():
        code = machine_code(resources, variant, tmp_path)
        assert "STG.E.128" in code, name
        assert "STG.E.U16" not in code, name
        assert ("LDG.E.128" in code) or ("LDG.E.64" in code) or name == "images: channels_last"
        assert "F2FP.BF16" in code, name
        assert ".RZ" not in code.split("F2FP.BF16", 1)[1].split(";", 1)[0], name


@pytest.fixture
def launched(monkeypatch):
    """What is launched on tensors of a GPU that have no data: whatever asks for a value raises."""
    return launched_by(images, monkeypatch)


@contextlib.contextmanager
def autocast(dtype):
    """``torch.autocast("cuda", dtype)``, which does nothing on a machine without a GPU."""
    enabled, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", before)


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("family", [moco, simclr])
def test_a_step_prepares_its_images_in_one_launch(family, memory, amp, launched):
    net = family()
    net.encoder_q, net.layout = build_encoder("resnet18", 4, size=32), memory
    with FakeTensorMode(allow_non_fake_inputs=True), autocast(amp):
        given = torch.empty(4, 3, 8, 8, dtype=torch.uint8, device="cuda")
        net.mean, net.std = (torch.empty(3, device="cuda") for _ in range(2))
        made = net.prepare(given)
    assert launched == ["to_floats"]
    assert (made.shape, made.dtype) == (given.shape, amp or torch.float32)
    assert made.is_contiguous(memory_format=memory)


@dataless_gpu
def test_what_it_cannot_do_is_left_to_torch(launched):
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = torch.empty(4, 3, 8, 8, dtype=torch.uint8, device="cuda")
        assert images.suits(given, torch.float32, True)
        assert not images.suits(given.float(), torch.float32, True)
        assert not images.suits(given, torch.float64, True)
        assert not images.suits(given[0], torch.float32, True)
        assert not images.suits(torch.empty(4, 9, 8, 8, dtype=torch.uint8, device="cuda"), torch.float32, True)
    assert not images.suits(torch.empty(4, 3, 8, 8, dtype=torch.uint8), torch.float32, True)


def test_images_come_rounded_only_where_the_first_layer_rounds_them():
    names = ("resnet18", "vit_tiny_patch16_224", "convnext_atto", "timm/resnet10t", "densenet121")
    for name in names:
        with autocast(torch.bfloat16):
            assert input_dtype(build_encoder(name, 4, size=32), "cuda") == torch.bfloat16
            assert input_dtype(build_encoder(name, 4, size=32), "cpu") == torch.float32
    first = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    with autocast(torch.bfloat16):
        assert input_dtype(first, "cuda") == torch.float32
    assert input_dtype(build_encoder("resnet18", 4, size=32), "cuda") == torch.float32


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny_patch16_224"])
def test_rounded_images_give_the_bits_of_autocast(arch):
    torch.manual_seed(0)
    encoder = build_encoder(arch, 8, size=32)
    given = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        encoder.zero_grad()
        pixels = normalise(given, MEAN, STD, dtype, torch.channels_last)
        assert pixels.dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(pixels)
        out.float().square().sum().backward()
        found.append([out, *(p.grad for p in encoder.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_where_triton_cannot_run_one_sentence_says_so(monkeypatch):
    images.agrees.cache_clear()
    monkeypatch.setattr(by_triton, "on_gpu", lambda x: True)  # a CPU, on which triton launches nothing
    given = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    with pytest.warns(RuntimeWarning, match="normalised on cpu by torch's operators, not by triton: .+") as caught:
        found = [normalise(given, MEAN, STD) for _ in range(2)]
    assert len(caught) == 1
    assert all(torch.equal(x, images.by_torch(given, torch.tensor(MEAN), torch.tensor(STD))) for x in found)
    images.agrees.cache_clear()
    monkeypatch.setattr(by_triton, "available", lambda: False)
    assert not images.agrees(given.device, (3, 5, 7), torch.float32, False)  # there is nothing to say
    images.agrees.cache_clear()
