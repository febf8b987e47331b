"""BatchNorm over parts by Triton, without a GPU: numbers by triton's interpreter, machine code by its compilers."""

import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT, environment, interpreted, launched_by
from support.machine_code import judges_code, machine_code
from support.versions import dataless_gpu
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from moco.kernels import by_triton, norm
from moco.models.batchnorm import SplitBatchNorm2d, split_batchnorm
from moco.models.encoder import build_encoder

FORWARD, BACKWARD = ["statistics", "normalise"], ["gradients", "spread"]
SHAPES = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]  # channels and sides of a ResNet-50's stages


def test_the_interpreted_programs_agree_with_float64():
    assert interpreted("kernels/norm_interpreted.py") >= 32


@judges_code
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    ("last", "precision", "align"), [(True, "bf16", 16), (True, "fp32", 1), (False, "fp32", 16), (False, "bf16", 1)]
)
def test_it_compiles_without_spills(last, precision, align, target, resources, tmp_path, monkeypatch):
    """Aligned and not, with the most splits to merge; with sixteen the rest of a GPU's registers stay free."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, variant in resources.of_norm(last, precision, align).items():
        used = resources.usage(target, *variant)
        assert 0 < used.registers <= 128, name
        assert used.spilled == 0, name
        assert used.shared <= 4 * 1024, name


@judges_code
@pytest.mark.parametrize(("last", "align", "bits"), [(True, 16, 128), (True, 8, 128), (False, 16, 128), (False, 4, 64)])
def test_activations_are_read_and_written_in_wide_pieces(last, align, bits, resources, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, variant in resources.of_norm(last, "bf16", align).items():
        code = machine_code(resources, variant, tmp_path)
        assert re.search(rf"LDG\.E\.{bits}", code), name
        assert re.search(rf"STG\.E\.{bits}", code) or "statistics" in name or "gradients" in name
        assert not re.search(r"STG\.E\.U16", code), name
        assert "ATOM" not in code
        assert "RED." not in code


@judges_code
def test_no_offset_of_an_activation_is_computed_in_32_bits(resources, tmp_path, monkeypatch):
    """N C h w passes 2^31 with large images; the number of a part is widened before it is multiplied."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, variant in resources.of_norm().items():
        code = resources.compile_for("sm_90", *variant).asm["ttir"]
        rest = re.search(r"(%\S+) = arith.divsi %\S+, %groups", code)
        part = rest and re.search(rf"(%\S+) = arith.divsi {rest.group(1)}, %splits", code)
        assert part, name
        wide = re.findall(rf"(%\S+) = arith.extsi {part.group(1)} : i32 to i64", code)
        assert any(f"arith.muli {number}, " in code for number in wide), name
        narrow = re.findall(rf"arith.muli {part.group(1)}, (%\S+) : i32", code)
        assert set(narrow) <= {"%channels"}, name  # S C, of what is kept of a part


@pytest.mark.parametrize("batch", [32, 256])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("channels", "side"), SHAPES)
def test_a_launch_fills_a_gpu_and_its_programs_are_short(channels, side, last, batch):
    how = norm.plan((batch, channels, side, side), last, 8)
    blocks = -(-how.pixels // how.constants["BLOCK_P"])
    assert how.splits * how.units >= how.images * blocks > (how.splits - 1) * how.units  # nothing left out, none idle
    assert how.splits <= how.merged
    assert 896 <= how.groups * how.parts * how.splits <= 1024  # 132 SMs, six or seven programs each
    assert how.units <= (13 if batch == 32 else 98)


@pytest.fixture
def launched(monkeypatch):
    """Names of what is launched on tensors of a GPU that have no data."""
    return launched_by(norm, monkeypatch)


@dataless_gpu
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", by_triton.DTYPES)
def test_it_is_two_launches_each_way_and_the_host_waits_for_none(dtype, memory, launched):
    """Whatever asks for a value, so that no graph could capture it, raises."""
    made = SplitBatchNorm2d(nn.BatchNorm2d(6, 1e-5, 0.1), 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = made.to("cuda")
        x = torch.empty(8, 6, 5, 5, dtype=dtype, device="cuda").to(memory_format=memory).requires_grad_()
        out = made(x)
        assert launched == FORWARD
        assert (out.shape, out.dtype, out.stride()) == (x.shape, x.dtype, x.stride())
        # Autograd's engine wants a real GPU: what it would call, without it.
        gradients = norm._SplitBatchNorm.backward(out.grad_fn, torch.empty_like(out))
    assert launched == FORWARD + BACKWARD
    assert (gradients[0].shape, gradients[0].dtype) == (x.shape, dtype)
    assert [(g.shape, g.dtype) for g in gradients[1:3]] == [((6,), torch.float32)] * 2
    assert gradients[0].stride() == x.stride()
    assert not any(gradients[3:])


@dataless_gpu
def test_every_batchnorm_of_a_network_uses_it(launched):
    net = split_batchnorm(build_encoder("resnet50", 8, size=224), 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to("cuda")
        with torch.no_grad():
            net(torch.empty(32, 3, 224, 224, device="cuda"))
    assert Counter(launched) == dict.fromkeys(FORWARD, 53)
    launched.clear()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        net.eval()(torch.empty(32, 3, 224, 224, device="cuda"))
        net.train()(torch.empty(1, 3, 224, 224, device="cuda").expand(7, -1, -1, -1))  # one part
    assert launched == []


@dataless_gpu
def test_what_it_cannot_do_is_left_to_torch(launched):
    weight = torch.ones(6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(8, 6, 5, 5, device="cuda")
        assert norm.suits(x, weight, 2)
        assert not norm.suits(x.double(), weight, 2)
        assert not norm.suits(x, weight.double(), 2)
        assert not norm.suits(x, None, 2)
        assert not norm.suits(x[:0], weight, 2)
        assert not norm.suits(torch.empty(8, 6, 1, 1, device="cuda").expand(-1, -1, 2**15, 2**15), weight, 2)
    assert not norm.suits(torch.empty(8, 6, 5, 5), weight, 2)


def test_a_compiler_is_still_given_one_formula(launched):
    made, graphs = SplitBatchNorm2d(nn.BatchNorm2d(6, 1e-5, 0.1), 2), []
    call = torch.compile(made, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    call(torch.randn(8, 6, 5, 5))
    assert len(graphs) == 1
    assert launched == []


def test_where_triton_cannot_run_one_sentence_says_so_and_the_numbers_are_todays(monkeypatch):
    norm.agrees.cache_clear()
    monkeypatch.setattr(by_triton, "on_gpu", lambda x: True)  # a CPU, on which triton launches nothing
    x = torch.randn(4, 3, 5, 5)
    plain, asked = (nn.Sequential(SplitBatchNorm2d(nn.BatchNorm2d(3, 1e-5, 0.1), 2)) for _ in range(2))
    with pytest.warns(RuntimeWarning, match="computed on cpu part by part, not by triton: .+") as caught:
        found = [asked(x) for _ in range(2)]
    assert len(caught) == 1
    monkeypatch.undo()
    assert all(torch.equal(a, plain(x)) for a in found)
    monkeypatch.setattr(by_triton, "available", lambda: False)
    norm.agrees.cache_clear()
    assert not norm.agrees(x.device, x.dtype, (3, 5, 5), False, 4)  # without the package there is nothing to say
    norm.agrees.cache_clear()


def test_nothing_imports_triton_before_a_launch():
    modules = "moco.kernels.norm, moco.kernels.images"
    code = f"import sys, {modules}; assert not [name for name in sys.modules if name.startswith('triton')]"
    subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, check=True, timeout=300)


def test_the_right_answer_is_found_inside_of_a_checkpoint():
    """With --recompute the first forward of a shape is in one, whose hooks would take this answer's tensors too."""
    found = []

    def block(x):
        root = x.sin()
        if not found:
            shapes = [(4, 3, 2, 2)] * 2 + [(3,)] * 4
            found.append(norm._by_torch(*(torch.rand(shape, dtype=torch.float64) for shape in shapes)))
        return (root * root).exp()

    x = torch.ones(3, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert len(found) == 1
    assert torch.allclose(x.grad, torch.sin(2 * x.detach()) * (x.detach().sin() ** 2).exp())
