"""Registers, spills and shared memory of the Triton programs, compiled for GPUs that need not be here.

    python -m benchmarks.speed.kernel_resources [--widths 32 128 512]

NVIDIA figures are read from the cubin with the cuobjdump that triton ships, AMD figures from the assembly's metadata.
Legend: C feature width.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco.data.augment import by_triton as views
from moco.kernels import by_triton, images, norm

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
INT64 = ("ids", "queue_ids", "slots_a", "slots_b", "rank")
INT32 = ("rows", "partial", "maxima", "above", "near_rows", "counts", "floors")
COUNTS = ("K", "C", "H", "N", "W", "Sq", "Sp", "Ss", "Sn", "closed", "stride_q", "stride_k", "stride_a", "stride_b",
          "stride_s", "tiles", "chunk", "spare", "splits", "pixels", "width", "height", "blocks")  # fmt: skip
OF_WIDTH = ("stride_q", "stride_k", "C")
ALIGNED = (*OF_WIDTH, "stride_s", "chunk", "pixels", "width", "height")
# Multiples of 16, and at places where a wide load may begin, or not: what a user's sizes and draws may be.
EITHER = ("K", "W", "ids", "queue_ids", "slots_a", "slots_b", "stride_a", "stride_b", "query_x", "query_y", "pair_y",
          "pair_z", "sign_v", "noise_w")  # fmt: skip
BYTES = ("images", "source", "out", "hues")
OF_NORM = {"tracked": "*i64", "momentum": "fp32", "eps": "fp32"}  # types of its programs' arguments
OF_NORM |= dict.fromkeys(("pieces", "pixels", "channels", "parts", "each", "splits", "groups"), "i32")
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")  # among the constants of a program, of its compilation
MEMORIES = {"contiguous": False, "channels_last": True}
WIDTHS = (32, 128, 512)
QUERIES = (32, 256)
PRECISIONS = ("fp32", "tf32", "tf32x3", "bf16")


@dataclass(frozen=True)
class Usage:
    """Of one program on one target: registers a thread, bytes spilled a thread, bytes of shared memory a program."""

    registers: int
    spilled: int
    shared: int


def signature(program: Any, constants: dict[str, Any], precision: str = "fp32") -> dict[str, str]:
    """Types of a program's arguments, as the launcher passes them for products in a precision."""
    types, name_of = {}, program.__name__
    for name in program.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in COUNTS:
            types[name] = "i32"
        elif name in ("inverse_t", "scale"):
            types[name] = "fp32"
        elif name in BYTES:
            types[name] = "*u8"
        elif name in INT32 and (name != "partial" or name_of not in ("pull", "finish")):
            types[name] = "*i32"
        elif name == "queue" and name_of in ("score", "pull") and precision == "bf16":
            types[name] = "*bf16"
        else:
            types[name] = "*i64" if name in INT64 else "*fp32"
    known = OF_NORM | dict.fromkeys(("x", "y", "dx", "dy"), f"*{precision}")
    return types | {name: kind for name, kind in known.items() if name in types}


def variants(width: int, queries: int = 32, precisions: tuple[str, ...] = PRECISIONS) -> dict[str, tuple[Any, ...]]:
    """Every program, in its largest form, with its constants and precision, for features of width C; K is 65,536, the
    hardest set 1,024, the draws SynCo's."""
    code, plan = by_triton.programs(), by_triton.GridPlan(queries, 65536, width, 1024, 960)
    found = {}
    for precision in precisions:
        for name, constants in plan.constants(precision, masked=True).items():
            if name in ("score", "pull"):
                found[f"{name}, {precision}"] = getattr(code, name), constants, precision, width
            else:
                found[name] = getattr(code, name), constants, precision, width
    return {name: variant for name, variant in found.items() if name != "pull, fp32"}  # by the library


def others() -> dict[str, tuple[Any, ...]]:
    """Every program beside those of the loss."""
    return {**of_views(), **of_norm(), **of_images()}


def of_views() -> dict[str, tuple[Any, ...]]:
    """Every program that finishes views, for colour."""
    from moco.data.augment import triton_kernels as code

    known = views.program_constants(True)
    return {
        "views: luminances": (code.luminances, known["luminances"]),
        "views: points": (code.points, known["points"]),
        "views: blur, first": (code.blur, {"FIRST": True, **known["blur"]}),
        "views: blur, second": (code.blur, {"FIRST": False, **known["blur"]}),
    }


def of_norm(last: bool = True, precision: str = "bf16", align: int = 16, merged: int = norm.MOST) -> dict[str, Any]:
    """Every program of BatchNorm over parts; last: channels_last; merged: most splits of a part."""
    shape = (64, 64, 56, 56) if align > 1 else (64, 67, 7, 7)
    alone = norm.plan(shape, last, 8).constants | {"ALIGN": align}
    constants = {**alone, "BLOCK_S": merged}
    code = by_triton.programs("norm_triton")
    return {
        "norm: statistics": (code.statistics, alone, precision),
        "norm: normalise": (code.normalise, constants, precision),
        "norm: gradients": (code.gradients, alone, precision),
        "norm: spread": (code.spread, constants, precision),
    }


def of_images(precision: str = "bf16", align: int = 16) -> dict[str, Any]:
    """The program that normalises images, for colour, in both memories."""
    pixels = 224 * 224 if align > 1 else 223 * 225
    made = {f"images: {memory}": images.constants(3, pixels, last) for memory, last in MEMORIES.items()}
    code = by_triton.programs("images_triton")
    return {name: (code.to_floats, constants, precision) for name, constants in made.items()}


def compile_for(
    target: str, program: Any, constants: dict[str, Any], precision: str = "fp32", width: int = 0,
    aligned: bool = True, **options: int,
):  # fmt: skip
    """What ``triton.compile`` makes of a program for a target; width: C; aligned: what may be no multiple of 16 is."""
    import triton
    from triton.backends import compiler
    from triton.compiler import ASTSource

    if target == "gfx942" and str(constants.get("PRECISION", "")).startswith("tf32"):
        constants = {**constants, "PRECISION": "ieee"}  # as by_triton.py does there
    usual = {name: constants[name] for name in OPTIONS if name in constants}
    constants = {name: value for name, value in constants.items() if name not in usual}
    types = signature(program, constants, precision)
    open_ = getattr(program, "do_not_specialize", None) or ()
    wide = [
        i for i, (name, kind) in enumerate(types.items())
        if name not in open_ and (kind.startswith("*") or name in ALIGNED or name in EITHER)
        and (aligned or name not in EITHER) and (width % 16 == 0 or name not in OF_WIDTH)
    ]  # fmt: skip
    if hasattr(compiler, "AttrsDescriptor"):  # triton 3.2
        hints = compiler.AttrsDescriptor.from_hints(dict.fromkeys(wide, 16))
        source = ASTSource(fn=program, signature=types, constants=constants, attrs=hints)
    else:
        attributes = {(i,): [["tt.divisibility", 16]] for i in wide}
        source = ASTSource(fn=program, signature=types, constexprs=constants, attrs=attributes)
    gpu = compiler.GPUTarget(*TARGETS[target])
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


def usage(target: str, *variant: Any, aligned: bool = True, **options: int) -> Usage:
    """Compile a variant of a program for a target, with further options of triton, and read what it uses."""
    compiled = compile_for(target, *variant, aligned=aligned, **options)
    found = hip_usage(compiled.asm["amdgcn"]) if target == "gfx942" else cuda_usage(compiled.asm["cubin"])
    return Usage(found.registers, found.spilled, max(found.shared, compiled.metadata.shared))


def loads(ptx: str) -> int:
    """Bytes that a thread asks of memory in one pass of the innermost loop that asks for most, or without a loop."""
    lines = ptx.splitlines()
    labels = {line[:-1]: n for n, line in enumerate(lines) if line.startswith("$L") and line.endswith(":")}
    asked = [_asked(line) for line in lines]
    bodies = []
    for n, line in enumerate(lines):
        to = re.search(r"bra(?:\.uni)?\s+(\$L\w+);", line)
        if to and labels.get(to.group(1), n) < n:
            bodies.append(sum(asked[labels[to.group(1)] : n]))
    return max(bodies, default=0) or sum(asked)


def _asked(line: str) -> int:
    """Bytes of a thread's load from global memory, 0 for other instructions."""
    load = re.search(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.[busf](\d+)", line)
    if load:
        return int(load.group(1) or 1) * int(load.group(2)) // 8
    copy = re.search(r"cp\.async\.c[ag]\.shared\.global.*?\], (?:0x)?(\w+)", line)
    return int(copy.group(1), 16) if copy else 0


def rounds(plan: by_triton.GridPlan) -> dict[str, str]:
    """How many blocks a program of each launch takes one after another, each a wait for memory."""
    return {
        "score": f"{-(-plan.width // by_triton.BLOCK_C)}",
        "compact": f"{-(-plan.chunk // by_triton.COMPACT_K)}, after a search of 16 at most in registers",
        "exact": f"1 of {plan.step * plan.chunks:,} candidates, searched 16 times at most, from the L1",
        "draws": "1 (slot, row, vector)",
        "combine": f"{-(-plan.tiles // 1024)} and {-(-plan.blocks // 32)}",
        "weigh": "1",
        "pull": f"{-(-plan.split // by_triton.PULL_K)}",
        "finish": f"{-(-plan.splits // 64)}",
    }


def occupancy(queries: int, width: int = 128) -> str:
    """A table of the launches of a step at K 65,536: programs, blocks in a row, bytes on their way to a thread."""
    plan = by_triton.GridPlan(queries, 65536, width, 1024, 960)
    forms, grids, in_a_row = variants(width, queries, ("tf32x3",)), plan.grids(), rounds(plan)
    lines = [
        "| launch | programs | blocks in a row | bytes a thread asks for in a block |",
        "| --- | ---: | --- | ---: |",
    ]
    for name, grid in grids.items():
        form = forms[name if name in forms else f"{name}, tf32x3"]
        asked = loads(compile_for("sm_90", *form).asm["ptx"])
        lines.append(f"| {name} | {math.prod(grid):,} | {in_a_row[name]} | {asked} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="feature widths C")
    parser.add_argument("--queries", type=int, nargs="+", default=QUERIES, help="numbers of queries N")
    args = parser.parse_args(argv)
    unbuilt: dict[str, str] = {}

    def cell(target: str, variant: tuple[Any, ...]) -> str:
        if target not in unbuilt:
            try:
                both = [usage(target, *variant, aligned=aligned) for aligned in (True, False)]
                registers, spilled, shared = (max(x) for x in zip(*map(dataclasses.astuple, both), strict=True))
                return f"{registers} / {spilled} / {shared / 1024:.1f} |"
            except Exception as error:  # an older triton lacks a target's assembler or linker, and says so in many ways
                lines = str(error).splitlines()
                unbuilt[target] = next((line for line in lines if "fatal" in line), lines[0] if lines else repr(error))
        return "not built |"

    print("registers a thread / bytes spilled / shared KiB, the larger of sizes that divide 16 and others\n")
    print("| program | N | C |", *(f"{target} |" for target in TARGETS))
    print("| --- | --- | --- |", *("---: |" for _ in TARGETS))
    rows: dict[tuple[Any, ...], tuple[str, ...]] = {}  # a program that two sizes do not change is shown once
    forms = [(n, c, *form) for n in args.queries for c in args.widths for form in variants(c, n).items()]
    for queries, width, name, variant in [*forms, *(("any", "any", *form) for form in others().items())]:
        known = (name, *sorted(variant[1].items()))
        if known not in rows:
            rows[known] = tuple(cell(target, variant) for target in TARGETS)
            print(f"| {name} | {queries} | {width} |", *rows[known], flush=True)
    for target, why in unbuilt.items():
        print(f"\n{target}: this triton cannot build for it: {why}")
    for queries in args.queries:
        print(f"\nK 65,536, N {queries}, C 128, tf32x3, sm_90 ({by_triton.FILL} programs or more fill a GPU):\n")
        print(occupancy(queries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
