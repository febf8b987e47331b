"""`python -m tests.runs.chaos`: the cases in two lanes beside each other, until the time or the counts are spent."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

DOORS = ("moco.eval.embed", "moco.eval.mined.command", "moco.eval.neighbours", "moco.eval.retrieval",
         "moco.report.page", "moco.weights.average", "moco.weights.describe", "moco.weights.export")  # fmt: skip
SHORT = {"kill": 3, "flip": 40, "mutate": 40, "disk": 8}  # a kill is a run with two signals
LANES = (("kill",), ("flip", "mutate", "disk"))
SHORT_LANES = (("kill", "disk"), ("flip", "mutate"))


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 where anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.runs.chaos", description="Inject faults, and judge.")
    parser.add_argument("--minutes", type=float, help="how long (default: the short form, by counts)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="folder of all files, emptied first")
    parser.add_argument("--only", metavar="KIND[:NUMBER]", help="kill, flip, mutate or disk; with a number one case, "
                        "whose files are kept in --out")  # fmt: skip
    parser.add_argument("--short", action="store_true", help="take --only's case from the short form")
    args = parser.parse_args(argv)
    from tests.runs.chaos import verdicts

    out = args.out.resolve()
    short = args.short or not (args.minutes or args.only)
    prepare(out, short)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
    lanes = [(args.only,)] if args.only else LANES if args.minutes else SHORT_LANES
    pids = [fork_lane(number, kinds, out, args.seed, deadline) for number, kinds in enumerate(lanes)]
    broken = [pid for pid in pids if os.waitpid(pid, 0)[1]]
    found = verdicts.read(out)
    print(verdicts.table(found))
    told = verdicts.summary(found, f"--seed {args.seed}{' --short' * short}")
    (out / "summary.json").write_text(json.dumps(told, indent=1) + "\n")
    print(*told["wrong"], sep="\n")
    return 1 if broken or told["wrong"] or not found else 0


def prepare(out: Path, short: bool) -> None:
    """Import all that a program may, and make the templates."""
    import shutil

    import torch
    import torch.utils.tensorboard

    torch.set_num_threads(1)
    for name in ("timm", "main_pretrain", "main_lincls", "main_semisup", "safetensors.torch", *DOORS):
        __import__(name)
    from moco import owner
    from tests.runs.chaos import scenes

    owner.WATCH_SECONDS = 0.5  # and not a minute, for each damaged owner.json
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    scenes.build(out / "base", short)
    gc.freeze()  # no collection writes to the pages that every fork shares


def fork_lane(number: int, kinds: tuple[str, ...], out: Path, seed: int, deadline: float | None) -> int:
    """A process that works through its kinds in turn."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        lane(number, kinds, out, seed, deadline)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def lane(number: int, kinds: tuple[str, ...], out: Path, seed: int, deadline: float | None) -> None:
    """Cases until the time or the counts are spent."""
    from tests.runs.chaos import damage, disk, kills, scenes, verdicts

    base, here, note = out / "base", out / f"lane{number}" / "here", out / f"lane{number}.jsonl"
    here.parent.mkdir()
    short = not (base / "resnet").exists()
    readers, writers = scenes.readers(base, short), scenes.writers(base)
    for kind, which in cases(kinds, deadline):
        try:
            if kind == "kill":
                found = kills.Chain(base, here, seed, which, short).run()
            elif kind == "disk":
                found = [disk.case(writers, base, here, seed, which)]
            else:
                found = [damage.case(kind, readers, base, here, seed, which)]
        except Exception:
            found = [verdicts.Verdict(kind, which, "?", "the case itself", verdicts.WRONG, traceback.format_exc())]
        for verdict in found:
            verdicts.note(verdict, note)
            if verdict.verdict == verdicts.WRONG:
                print(verdict.line(f"--seed {seed}{' --short' * short}"), flush=True)


def cases(kinds: tuple[str, ...], deadline: float | None) -> Iterator[tuple[str, int]]:
    """Kind and number of each case in turn."""
    kind, _, number = kinds[0].partition(":")
    if number:
        yield kind, int(number)
    elif deadline is None:
        yield from ((kind, which) for kind in kinds for which in range(SHORT[kind]))
    else:
        for which in itertools.count():
            for kind in kinds:
                if time.monotonic() > deadline:
                    return
                yield kind, which


if __name__ == "__main__":
    sys.exit(main())
