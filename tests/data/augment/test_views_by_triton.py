"""Views finished by Triton, without a GPU: pixels by triton's interpreter, machine code by its compilers."""

import contextlib
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import interpreted
from torch._subclasses.fake_tensor import FakeTensorMode

from moco.data.augment import by_torch
from moco.data.augment import by_triton as triton_views
from moco.kernels import by_triton

pytest.importorskip("triton", reason="needs the package triton: pip install triton")

ORDER = ("jitter", "grey", "blur", "flip")
PROGRAMS = ("luminances", "points", "blur, first", "blur, second")


def test_the_interpreted_programs_give_pils_pixels():
    assert interpreted("data/augment/views_interpreted.py") >= 18


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_compiles_without_spills(name, target, resources, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    used = resources.usage(target, *resources.of_views()[f"views: {name}"])
    assert 0 < used.registers <= 64
    assert used.spilled == 0
    assert used.shared <= 4 * 1024


def test_no_product_is_fused_with_the_sum_after_it(resources, tmp_path, monkeypatch):
    """PIL rounds both. The interpreter cannot see a fused multiply-add: it is looked for in the machine code."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    disassembler = Path(resources.cuobjdump()).with_name("nvdisasm")
    found = {}
    for allowed in (False, True):
        for name in PROGRAMS[:3]:
            built = resources.compile_for("sm_80", *resources.of_views()[f"views: {name}"], enable_fp_fusion=allowed)
            (tmp_path / "program.cubin").write_bytes(built.asm["cubin"])
            words = [str(disassembler), "-c", str(tmp_path / "program.cubin")]
            code = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            assert "FADD" in code
            found[name, allowed] = code.count("FFMA")
    assert not any(found[name, False] for name in PROGRAMS[:3])
    assert all(found[name, True] for name in PROGRAMS[:3])  # so it would be seen
    assert all(known["enable_fp_fusion"] is False for known in triton_views.program_constants(True).values())


def table(*rows):
    return torch.stack([by_torch.pack_params(*row) for row in rows])


PLAIN, JITTERED = (None, False, None, True), ([("contrast", 0.6), ("hue", 0.1)], True, None, False)
BLURRED = ([("brightness", 0.6), ("contrast", 1.2)], False, 1.0, False)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((PLAIN, PLAIN), ["points 2"]),
        ((PLAIN, JITTERED), ["luminances 1", "points 2"]),
        ((PLAIN, JITTERED, BLURRED), ["luminances 2", "points 2", "blur 1", "blur 1"]),
        ((BLURRED, BLURRED), ["luminances 2", "blur 2", "blur 2"]),
    ],
)
def test_a_batch_is_at_most_four_launches_and_the_host_waits_for_none(rows, expected, monkeypatch):
    """On images of a GPU that have no data: whatever asks for a value raises."""
    launched = []

    def note(program, grid, *_, **__):
        if grid[0]:
            launched.append(f"{program.fn.__name__} {grid[0]}")

    monkeypatch.setattr(by_triton, "run_program", note)
    monkeypatch.setattr(torch.cuda, "device_of", lambda images: contextlib.nullcontext())
    monkeypatch.setattr(triton_views, "hue_tables", lambda device: (None, None, None))
    monkeypatch.setattr(triton_views, "agrees", lambda device, shape: shape == (3, 8, 6))
    numbers = table(*rows).numpy()
    parameters: Any = SimpleNamespace(numpy=lambda: numbers)  # a tensor's numbers are not to be had in this mode
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(len(rows), 3, 8, 6, dtype=torch.uint8, device="cuda")
        found = triton_views.finish(images, parameters, ORDER)
    assert (found.shape, found.dtype, found.device) == (images.shape, torch.uint8, images.device)
    assert launched == expected


def test_what_it_cannot_do_is_left_to_torch():
    assert triton_views.suits(table(PLAIN, JITTERED, BLURRED), ORDER)
    assert triton_views.suits(table(PLAIN), ())
    assert not triton_views.suits(table(PLAIN, BLURRED), ("blur", "grey"))
    assert not triton_views.suits(table(PLAIN, (None, False, 2.5, False)), ORDER)
    assert not triton_views.suits(table(PLAIN, (*PLAIN, False, True)), (*ORDER, "vflip"))
    assert not triton_views.suits(table(PLAIN, (*PLAIN, False, False, 2)), (*ORDER, "turn"))
    assert triton_views.suits(table(PLAIN, PLAIN), (*ORDER, "vflip", "turn"))
    assert not triton_views.suits(table((BLURRED[0] + JITTERED[0], False, None, False)), ORDER)


def test_where_triton_cannot_run_one_sentence_says_so(monkeypatch):
    triton_views.agrees.cache_clear()
    cpu = torch.device("cpu")  # on which triton launches nothing
    with pytest.warns(RuntimeWarning, match="finished on cpu by torch's operators, not by triton: .+") as caught:
        found = [triton_views.agrees(cpu, (3, 5, 7)) for _ in range(2)]
    assert found == [False, False]
    assert len(caught) == 1
    monkeypatch.setattr(by_triton, "available", lambda: False)
    assert not triton_views.agrees(cpu, (3, 7, 5))  # without the package there is nothing to say
