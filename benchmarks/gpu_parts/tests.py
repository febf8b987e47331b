"""pytest -m gpu: the suites of Triton programs compiled, and what only a card shows."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from .findings import Findings

ROOT = Path(__file__).resolve().parents[2]
# By name: to collect the others takes packages that a machine with a card may lack.
SUITES = sorted(ROOT.glob("tests/**/*_interpreted.py"))
FILES = ["tests/runs/test_gpu.py", *(str(path.relative_to(ROOT)) for path in SUITES)]
WORKERS = 6  # processes: most of a test's time goes to compiling
# One process writes TEST VERDICT, several write [gwN] [ 7%] VERDICT TEST.
VERDICT = r"\b(PASSED|FAILED|ERROR)\b"
TEST = rf"tests/\S+?::.*?(?= {VERDICT}| - |$)"


def run(found: Findings) -> None:
    argv = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", "-m", "gpu", "-vv"]
    argv += ["--collect-only", *FILES[:1]] if found.dry else FILES
    argv += [] if found.dry or importlib.util.find_spec("xdist") is None else ["-n", str(WORKERS)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    lines: list[str] = []
    with subprocess.Popen(
        [sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env
    ) as child:
        try:
            for line in child.stdout or ():
                print(line, end="", flush=True)
                lines.append(line.strip())
        finally:  # a run that the limit ends leaves the names of what has failed so far
            report(found, lines)
    found.note("pytest -m gpu, exit code", child.returncode, good=child.returncode == 0)


def report(found: Findings, lines: list[str]) -> None:
    """How many tests passed, and the name of each that did not. In a dry run they are only collected."""
    found_in = [(re.search(VERDICT, line), re.search(TEST, line)) for line in lines]
    verdicts = {(test.group(), verdict.group()) for verdict, test in found_in if verdict and test}
    passed = [test for test, verdict in verdicts if verdict == "PASSED"]
    failed = {test for test, verdict in verdicts if verdict != "PASSED"}
    if found.dry:
        there = sum("<Function test_" in line for line in lines)
        found.note("pytest -m gpu, tests there", there, good=there > 0)
        return
    found.note("pytest -m gpu, passed", len(passed), good=bool(passed))  # where all are skipped nothing was tested
    for name in sorted(failed)[:40]:
        found.note("pytest -m gpu, failed", name[:200], good=False)
