"""Run the tests of numbers as other processors would compute them: make test-machines.

torch's own kernels and oneDNN's can be told to keep to a lesser processor's instructions; a setting above what this one
has changes nothing. A bound that holds under one setting and not under another fits one processor's rounding: bounds
near float32's are derived (conftest.rounding), or measured on the machine that runs the test. Prints a line a setting;
exit code 1 where a test failed. tests/project/test_machines.py runs the heart of it, the loss, in every `make test`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # tests/
SETTINGS = [
    *({"ATEN_CPU_CAPABILITY": name} for name in ("default", "avx2", "avx512")),
    *({"ONEDNN_MAX_CPU_ISA": name} for name in ("AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "AVX512_CORE_AMX")),
]
LESSER = [{**SETTINGS[0], **SETTINGS[3]}, {**SETTINGS[1], **SETTINGS[4]}]  # in every `make test`, of both libraries
HEART = ["kernels/test_kernels.py"]
# Of the fused head's suite, in which a processor multiplies for the library alone: a minute and a half is for once.
FUSED, PART = ["kernels/by_triton_interpreted.py"], "blocks_that_a_gpu_gets and 128 or each_type or closed_forms"
NUMBERS = [
    *HEART,
    "kernels/test_by_triton.py::test_the_interpreted_programs_agree_with_the_reference",
    *(f"{room}/test_{name}.py" for room, names in {
        "benchmarks": "contrastive_loss",
        "data": "levels pixel_statistics",
        "data/augment": "all_ways batched by_numpy by_pil views_by_triton",
        "data/sources": "bands decode",
        "eval": "between_epochs embed fewshot finetune_loss finetune_recipes knn mined neighbours rankme retrieval",
        "kernels": "draws images norm threads trial",
        "library": "criteria momentum load_encoder",
        "methods": "controls losses negatives",
        "models": "buffers encoder in_batch local_crops moco moco_v3 more_views supcon_queue",
        "train": "diagnoses online_probe queue_and_schedule schedules start step",
        "runs": "many_channels",
        "weights": "average export full_files read settings",
    }.items() for name in names.split()),
]  # fmt: skip


def name_of(setting: dict[str, str]) -> str:
    """As it is typed."""
    return " ".join(f"{name}={value}" for name, value in setting.items())


def run(setting: dict[str, str], tests: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    """pytest on ``tests`` (names below tests/) in a process with this setting and one thread."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words, *(str(HERE / t) for t in tests)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **setting}
    return subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)


def main(words: list[str]) -> int:
    """All settings one after another; ``words`` go to pytest."""
    failed = False
    for setting in SETTINGS:
        child = run(setting, NUMBERS, *words)
        failed |= child.returncode != 0
        lines = child.stdout.splitlines()
        print(f"{name_of(setting)}: {'passed' if not child.returncode else 'FAILED'}", flush=True)
        print("\n".join(f"    {line}" for line in lines if line.startswith(("FAILED", "ERROR"))), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
