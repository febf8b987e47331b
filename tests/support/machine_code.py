"""What triton's compilers make of a program."""

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton: pip install triton")

# Triton 3.2 knows no sm_100, up to 3.4 it has no linker of its own for gfx942, and 3.4, 3.5 and 3.7 spill 8 to 16 bytes
# in one program of 24.
TRITON = tuple(map(int, version("triton").split(".")[:2]))
judges_code = pytest.mark.skipif(
    TRITON < (3, 6) or TRITON == (3, 7), reason="needs triton 3.6, or 3.8 and later, whose machine code is judged"
)


def machine_code(resources, variant, folder):
    built = resources.compile_for("sm_90", *variant)
    (folder / "program.cubin").write_bytes(built.asm["cubin"])
    words = [str(Path(resources.cuobjdump()).with_name("nvdisasm")), "-c", str(folder / "program.cubin")]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout
