"""What a GPU makes of this project, in one command of under eight minutes: tests, sanitizer, errors, times, verdicts.

    make gpu                                                   installs into .venv, then runs the next line there
    python benchmarks/gpu.py [--out runs/gpu] [--limit 450]    on a machine with an NVIDIA GPU
    python benchmarks/gpu.py --dry                             without one: tiny shapes, triton's interpreter, no times

It needs torch, triton and numpy, and leaves out the parts whose other packages this Python lacks: pytest and timm for
the tests, torchvision, Pillow, tqdm and scikit-learn for whole steps and views, lightly for a row of the loss.

Each part (gpu_parts/) runs in a process and within a time limit of its own, so that no failure stops the rest. Parts
that time nothing run side by side first, after the look at the machine; those that time run alone, the most important
ones first, while there is time. What a part has found before its end, however that came, is kept:

    OUT/table.md        the verdicts, then every part's rows
    OUT/results.json    the same for programs
    OUT/log.txt         what the parts printed

The exit code is 0 when every part ran to its end and found nothing wrong; a goal that is missed is no fault.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # on a bare card nothing is installed

from benchmarks.gpu_parts import PARTS  # noqa: E402
from benchmarks.gpu_parts import verdicts as judge  # noqa: E402
from benchmarks.gpu_parts.findings import Findings, Late  # noqa: E402

LEAST = 25  # seconds under which no part that times is begun
FOR_TIMES = 220  # seconds kept for those while the others run
GRACE = 5  # seconds between a request to end and the end
DRY_SECONDS = 600  # a part of a dry run, on a slow machine


# ------------------------------------------------------------------------------------------------------ one part


def one_part(name: str, work: Path, dry: bool) -> int:
    """Run a part in this process; it leaves WORK/NAME.json."""
    signal.signal(signal.SIGTERM, _late)
    found, error = Findings(work / f"{name}.json", dry), ""
    try:
        _prepare(dry)
        importlib.import_module(f"benchmarks.gpu_parts.{name}").run(found)
    except BaseException as caught:  # whatever it is, it is a line of the table
        error = "".join(traceback.format_exception_only(caught)).strip()
        traceback.print_exc()
    found.keep(error)
    return int(bool(error))


def _late(*_: object) -> None:
    raise Late("ended by its time limit")


def _prepare(dry: bool) -> None:
    import torch

    if dry:
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU; --dry runs on a CPU")


# ---------------------------------------------------------------------------------------------------- all parts


@dataclass
class Job:
    """A part that runs; ``ends`` by the monotonic clock."""

    name: str
    process: subprocess.Popen
    began: float
    ends: float
    log: Path

    def finish(self) -> dict[str, Any]:
        """Wait until its limit at most, and end its processes then; what it left."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.1, self.ends - time.monotonic()))
        if self.process.returncode is None:
            self._end()
        seconds = round(time.monotonic() - self.began, 1)
        print(f"== {self.name}: {seconds} s, exit code {self.process.returncode}", flush=True)
        return {"seconds": seconds, "exit_code": self.process.returncode, **_left_by(self.log)}

    def _end(self) -> None:
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
                return


def begin(name: str, argv: list[str], work: Path, seconds: float, env: dict[str, str] | None = None) -> Job:
    """Start a part, a process group of its own, that prints into WORK/NAME.log and leaves WORK/NAME.json."""
    log = work / f"{name}.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            argv, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=env, start_new_session=True
        )
    now = time.monotonic()
    return Job(name, process, now, now + seconds, log)


def _left_by(log: Path) -> dict[str, Any]:
    try:
        return json.loads(log.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {"rows": [], "error": f"left nothing; its log ends: {log.read_text(errors='replace')[-300:]}"}


@dataclass
class Run:
    """All parts of one run: where their files lie, and until when there is time."""

    work: Path
    dry: bool
    ends: float

    def left(self) -> float:
        return self.ends - time.monotonic()

    def begin(self, name: str, seconds: float) -> Job:
        env = {
            "TRITON_CACHE_DIR": str(self.work / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            **os.environ, "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg",
        }  # fmt: skip
        env.update({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if self.dry else {})
        argv = [sys.executable, __file__, "--part", name, "--out", str(self.work), *["--dry"] * self.dry]
        return begin(name, argv, self.work, DRY_SECONDS if self.dry else seconds, env)

    def together(self, names: Sequence[str]) -> dict[str, dict]:
        """Side by side; one after another in a dry run, whose machine may have one core."""
        jobs, found = [], {}
        for name in names:
            jobs.append(self.begin(name, min(PARTS[name].seconds, max(10.0, self.left() - FOR_TIMES))))
            if self.dry:
                found[name] = jobs.pop().finish()
        for job in sorted(jobs, key=lambda job: job.ends):
            found[job.name] = job.finish()
        return found

    def alone(self, names: Sequence[str]) -> dict[str, dict]:
        """One after another, while there is time."""
        found: dict[str, dict] = {}
        for name in names:
            if self.left() < LEAST and not self.dry:
                found[name] = {"left_out": f"{self.left():.0f} of the run's seconds were left"}
                continue
            found[name] = self.begin(name, min(PARTS[name].seconds, self.left() - GRACE)).finish()
        return found


def measure(names: Sequence[str], run: Run) -> dict[str, dict]:
    """What every part found, in the order of PARTS."""
    lacking = {name: ", ".join(missing) for name in names if (missing := PARTS[name].missing())}
    found = {name: {"left_out": f"this Python has no {missing}"} for name, missing in lacking.items()}
    here = [name for name in names if name not in lacking]
    first = [name for name in here if name == "machine"]
    found |= run.alone(first)
    found |= run.together([name for name in here if not PARTS[name].alone])
    found |= run.alone([name for name in here if PARTS[name].alone and name not in first])
    return {name: found[name] for name in PARTS if name in found}


def write(out: Path, found: dict[str, dict], work: Path, seconds: float) -> str:
    """The three files; returns the verdicts."""
    verdicts = judge.judged(found)
    times = ", ".join(f"{name} {part.get('seconds', 'left out')}" for name, part in found.items())
    short = f"# GPU\n\n{seconds:.0f} s; seconds by part: {times}.\n\n{judge.table(verdicts)}\n"
    parts = [judge.details(name, PARTS[name].about, part) for name, part in found.items()]
    (out / "table.md").write_text("\n".join([short, *parts]))
    about = {"seconds": round(seconds, 1), "verdicts": verdicts, "parts": found}
    (out / "results.json").write_text(json.dumps(about, indent=1) + "\n")
    logs = [(name, work / f"{name}.log") for name in found]
    text = [f"######## {name}\n{log.read_text(errors='replace')[-200000:]}" for name, log in logs if log.exists()]
    (out / "log.txt").write_text("\n".join(text))
    return short


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of the files (runs/gpu)")
    parser.add_argument(
        "--limit", type=float, default=450, help="time limit of the whole run in seconds (default: 450)"
    )
    usual = [name for name, part in PARTS.items() if part.usual]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=usual, help="default: all but tuning")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny, by triton's interpreter; nothing is timed")
    parser.add_argument("--list", action="store_true", help="print the parts, their limits and packages")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # of the child process
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        for name, part in PARTS.items():
            how = "alone" if part.alone else "beside others"
            print(f"{name}: {part.about}; at most {part.seconds} s, {how}; needs torch, {', '.join(part.needs)}")
        return 0
    if args.part:
        return one_part(args.part, args.out, args.dry)
    began, out = time.monotonic(), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu_"))
    try:
        found = measure(args.parts, Run(work, args.dry, began + args.limit))
        print("\n" + write(out, found, work, time.monotonic() - began))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    bad = judge.wrong(found)
    print(f"{len(bad)} to look at" + "".join(f"\n  {line[:220]}" for line in bad[:30]))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
