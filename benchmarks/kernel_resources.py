"""Registers, spills and shared memory of the Triton programs, compiled for GPUs that need not be here.

    python benchmarks/kernel_resources.py [--widths 32 128 512]

NVIDIA figures are read from the cubin with the cuobjdump that triton ships, AMD figures from the assembly's metadata.
Legend: C feature width.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco.kernels import fused, views

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
INT64 = ("ids", "queue_ids", "slots_a", "slots_b", "rank")
COUNTS = ("K", "C", "H", "N", "Sq", "Sp", "Ss", "Sn", "closed", "stride_q", "stride_k", "stride_a", "stride_b",
          "pixels", "width", "height", "blocks")  # fmt: skip
ALIGNED = ("K", "C", "stride_q", "stride_k", "pixels", "width", "height")
BYTES = ("images", "source", "out", "hues")
WIDTHS = (32, 96, 128, 512)


@dataclass(frozen=True)
class Usage:
    """Of one program on one target: registers a thread, bytes spilled a thread, bytes of shared memory a program."""

    registers: int
    spilled: int
    shared: int


def signature(program: Any, constants: dict[str, Any], precision: str = "fp32") -> dict[str, str]:
    """Types of a program's arguments, as the launcher passes them for products in fp32 or bf16."""
    types = {}
    for name in program.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in COUNTS:
            types[name] = "i32"
        elif name in ("inverse_t", "scale"):
            types[name] = "fp32"
        elif name in BYTES:
            types[name] = "*u8"
        elif name in ("rows", "partial"):
            types[name] = "*i32"
        elif name == "probability":
            types[name] = f"*{precision}"
        else:
            types[name] = "*i64" if name in INT64 else "*fp32"
    return types


def variants(width: int) -> dict[str, tuple[Any, ...]]:
    """Every program, in its largest form, with its constants and precision, for features of width C."""
    code = fused.programs()
    return {
        "select": (code.select, {"MASKED": True, "BLOCK_K": fused.SELECT_K}),
        "head": (code.head, {"MASKED": True, "GRADIENT": True, **fused.blocks(width)}),
        "head, bf16": (code.head, {"MASKED": True, "GRADIENT": True, **fused.blocks(width)}, "bf16"),
        "average": (code.average, {"BLOCK_N": fused.BLOCK_N}),
        **of_views(),
    }


def of_views() -> dict[str, tuple[Any, ...]]:
    """Every program that finishes views, for colour."""
    code, block = views.programs(), {"COLOUR": True, "BLOCK": views.BLOCK}
    walk = {"COLOUR": True, "LIST": views.BLURRED, "BLOCK": views.ROWS, "SEGMENT": views.SEGMENT}
    return {
        "views: luminances": (code.luminances, {"LIST": views.CONTRASTED, **block}),
        "views: points": (code.points, {"LIST": views.SHARP, **block}),
        "views: blur, first": (code.blur, {"FIRST": True, **walk}),
        "views: blur, second": (code.blur, {"FIRST": False, **walk}),
    }


def compile_for(target: str, program: Any, constants: dict[str, Any], precision: str = "fp32", **options: int):
    """What ``triton.compile`` makes of a program for a target; pointers and widths are taken as multiples of 16."""
    import triton
    from triton.backends import compiler
    from triton.compiler import ASTSource

    types = signature(program, constants, precision)
    aligned = [i for i, (name, kind) in enumerate(types.items()) if kind.startswith("*") or name in ALIGNED]
    if hasattr(compiler, "AttrsDescriptor"):  # triton 3.2
        hints = compiler.AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
        source = ASTSource(fn=program, signature=types, constants=constants, attrs=hints)
    else:
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(fn=program, signature=types, constexprs=constants, attrs=attributes)
    gpu = compiler.GPUTarget(*TARGETS[target])
    usual = views.options(constants) if "COLOUR" in constants else {"num_warps": fused.WARPS}
    return triton.compile(source, target=gpu, options={**usual, **options})


def cuobjdump() -> str:
    """The tool that triton ships; TRITON_CUOBJDUMP_PATH names another, as it does for triton."""
    from triton.backends import nvidia

    return os.environ.get("TRITON_CUOBJDUMP_PATH") or str(Path(nvidia.__file__).parent / "bin" / "cuobjdump")


def cuda_usage(cubin: bytes) -> Usage:
    """From the resource table of a cubin: local memory (stack) is where spilled registers go."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([cuobjdump(), "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"])


def hip_usage(assembly: str) -> Usage:
    """From the metadata of the assembly: vector registers, and scratch, where spilled ones go."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, name
        return int(found.group(1))

    return Usage(number("vgpr_count"), number("private_segment_fixed_size"), number("group_segment_fixed_size"))


def usage(target: str, program: Any, constants: dict[str, Any], precision: str = "fp32", **options: int) -> Usage:
    """Compile a program for a target, with further options of triton, and read what it uses."""
    compiled = compile_for(target, program, constants, precision, **options)
    found = hip_usage(compiled.asm["amdgcn"]) if target == "gfx942" else cuda_usage(compiled.asm["cubin"])
    return Usage(found.registers, found.spilled, max(found.shared, compiled.metadata.shared))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="feature widths C")
    args = parser.parse_args(argv)
    unbuilt: dict[str, str] = {}

    def cell(target: str, variant: tuple[Any, ...]) -> str:
        if target not in unbuilt:
            try:
                used = usage(target, *variant)
                return f"{used.registers} / {used.spilled} / {used.shared / 1024:.1f} |"
            except Exception as error:  # an older triton lacks a target's assembler or linker, and says so in many ways
                lines = str(error).splitlines()
                unbuilt[target] = next((line for line in lines if "fatal" in line), lines[0] if lines else repr(error))
        return "not built |"

    print(f"registers a thread / bytes spilled / shared KiB; {fused.WARPS} warps a program of the head\n")
    print("| program | C |", *(f"{target} |" for target in TARGETS))
    print("| --- | --- |", *("---: |" for _ in TARGETS))
    for width in args.widths:
        for name, variant in variants(width).items():
            of_width = name.startswith("head")
            if of_width or width == args.widths[0]:
                cells = [cell(target, variant) for target in TARGETS]
                print(f"| {name} | {width if of_width else 'any'} |", *cells, flush=True)
    for target, why in unbuilt.items():
        print(f"\n{target}: this triton cannot build for it: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
