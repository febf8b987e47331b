"""Draws as on a GPU, without one: the definition, and the program by triton's interpreter and its compilers.

Legend: N queries, C feature width, H hardest rows a query, S synthetic negatives a query.
"""

import contextlib
import math

import pytest
import torch
from conftest import interpreted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moco.config import SynCoConfig
from moco.kernels import by_triton, draws
from moco.methods import negatives, synco
from moco.methods.negatives import HardNegatives, draw, synthetic

CPU = torch.device("cpu")


def test_the_interpreted_program_gives_the_defined_draws():
    pytest.importorskip("triton", reason="needs the package triton: pip install triton")
    assert interpreted("kernels/draws_interpreted.py") >= 26


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers of Random123, kat_vectors: philox4x32 10
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)  # fmt: skip
def test_the_generator_is_philox(counter, key, words):
    found = draws.philox(key, *(torch.tensor([word]) for word in counter))
    assert " ".join(f"{int(word):08x}" for word in found) == words


def test_noise_is_normal_and_its_features_are_independent():
    rows = negatives.counted((synthetic("noise", 100),))
    noise = draws.by_torch(rows, 200, 40, 12, 99, CPU).noise.double()
    assert noise.isfinite().all()
    flat = noise.flatten(0, 1)  # (20,000, 12)
    deviation = len(flat) ** -0.5
    assert float(flat.mean(0).abs().max()) < 5 * deviation
    assert float((flat.T @ flat / len(flat) - torch.eye(12)).abs().max()) < 5 * 2**0.5 * deviation
    for limit in (0.5, 1, 2, 3):
        share = float((flat.abs() < limit).double().mean())
        assert abs(share - math.erf(limit / 2**0.5)) < 5 * (0.25 / flat.numel()) ** 0.5


def test_neither_more_negatives_nor_more_queries_change_what_was_drawn():
    few, many = synco.recipe(SynCoConfig(3, 2, 2, 2, 1, 1)), synco.recipe(SynCoConfig(9, 8, 7, 6, 5, 4))
    small, large = (draws.by_torch(negatives.counted(recipe), n, 40, 8, 7, CPU) for recipe, n in ((few, 2), (many, 5)))
    assert torch.equal(small.noise, large.noise[:2, :2])
    assert torch.equal(small.slots_b, large.slots_b[:2, :2])
    assert torch.equal(small.query_x[:, :3], large.query_x[:2, :3])
    assert torch.equal(small.sign_v, large.sign_v[:2, :1])


def test_where_triton_cannot_be_used_the_draws_are_the_same_and_it_is_said_once(monkeypatch, recwarn):
    monkeypatch.setattr(negatives, "by_counter", lambda device: True)
    expected = draws.by_torch(negatives.counted(synco.recipe()), 3, 40, 8, negatives.seeding.key("kind", 5) >> 1, CPU)
    for fault, said in (
        (RuntimeError("Failed to find C compiler\n..."), "Failed to find C compiler;"),
        (None, "its numbers are not the defined ones;"),
    ):
        draws.agrees.cache_clear()
        recwarn.clear()

        def spoiled(*given, fault=fault):
            if fault:
                raise fault
            found = draws.by_torch(*given)
            found.noise[0, 0, 0] += 0.01
            return found

        monkeypatch.setattr(by_triton, "available", lambda: True)
        monkeypatch.setattr(draws, "by_triton", spoiled)
        for _ in range(2):
            found = draw(synco.recipe(), 3, 40, 8, 5)
            assert found
            assert all(torch.equal(x, y) for x, y in zip(found.tensors(), expected.tensors(), strict=True))
        (warning,) = recwarn
        assert f"drawn on cpu by torch's operators, not by triton: {said}" in str(warning.message)
    draws.agrees.cache_clear()


class Operators(TorchDispatchMode):
    """Of those that would be launches on a GPU, the names."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if func.namespace == "aten" and not is_view and not name.startswith("empty"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_a_batch_is_drawn_in_one_launch(monkeypatch):
    """On tensors of a GPU that have no data: what asks for a value raises."""
    launched = []
    monkeypatch.setattr(by_triton, "run_program", lambda program, grid, *_, **__: launched.append(grid))
    monkeypatch.setattr(by_triton, "programs", lambda file: type("Programs", (), {"draw": None}))
    monkeypatch.setattr(draws, "agrees", lambda device: True)
    monkeypatch.setattr(draws, "table", lambda rows, device: (None, None))
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    negatives.counted(synco.recipe())  # once a recipe, on the CPU
    extra = HardNegatives(synco.recipe(), 1024, 128, 3, 0, torch.device("cuda", 0))
    with FakeTensorMode(), Operators() as operators:
        found = extra(32, 0, 5)
    assert found is not None
    assert launched == [(32, 8 + 64)]  # 960 columns in blocks of 128, and the noise of 64
    assert operators.names == []
    assert found.counts == (576, 256, 64, 64)
    assert all(t.device.type == "cuda" and t.is_contiguous() for t in found.tensors())


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_it_compiles_without_spills(target, resources, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason="needs the package triton: pip install triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"BLOCK_S": draws.BLOCK_S, "BLOCK_C": 32}
    pointers = {"whole": "*i32", "slots_a": "*i64", "slots_b": "*i64", "key": "i64"}
    pointers |= dict.fromkeys(("real", "weights", "noise"), "*fp32") | dict.fromkeys(constants, "constexpr")
    program = by_triton.programs("draws_triton").draw
    types = {name: pointers.get(name, "i32") for name in program.arg_names}
    try:
        source = ASTSource(fn=program, signature=types, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget(*resources.TARGETS[target]), options={"num_warps": 1})
    except Exception as error:
        old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)
        if not old:
            raise
        first = str(error).splitlines()[0]
        pytest.skip(f"needs triton 3.6 or later, which builds for {target}; {triton.__version__}: {first}")
    code = compiled.asm
    used = resources.hip_usage(code["amdgcn"]) if target == "gfx942" else resources.cuda_usage(code["cubin"])
    assert used.spilled == 0
    assert 0 < used.registers <= 128
