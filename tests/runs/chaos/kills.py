"""Signals at random instants, to any process of a run, until it ends: the result is that of the undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from moco import files, run_folder
from tests.runs.chaos import scenes
from tests.runs.chaos.attempts import Ended, attempt, catches, children, members, start, start_truly, watch
from tests.runs.chaos.verdicts import RIGHT, WRONG, Verdict, tail

CODES = {signal.SIGKILL: 137, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 75}
TRUE_START_SECONDS = 4.0  # what importing torch adds to a life
MAINS = ("main_pretrain", "main_lincls", "main_semisup", "moco.sweep")
LAYOUTS = {"": [], "2 workers": ["-j", "2"], "2 processes": ["--nproc", "2"],
           "2 processes, 2 workers": ["--nproc", "2", "-j", "2"]}  # fmt: skip


class Chain:
    """One run, disturbed a few times and then left to its end."""

    def __init__(self, base: Path, here: Path, seed: int, number: int, short: bool) -> None:
        self.rng = random.Random(f"{seed} kill {number}")
        self.base, self.here, self.number = base, here, number
        self.main = self.rng.choices(MAINS, (8, 4, 4, 0 if short else 1))[0]
        self.layout = self.rng.choice(list(LAYOUTS)) if self.main != "moco.sweep" else ""
        self.truly = not short and self.rng.random() < 0.04
        self.inside = ["--save-steps", "2"] * self.rng.randrange(2)
        self.times = 2 if short else self.rng.randint(1, 5)
        self.verdicts: list[Verdict] = []

    def words(self, folder: Path) -> list[str]:
        if self.main == "moco.sweep":
            return [self.main, str(self.base / "sweep" / "spec.yml"), "--out", str(folder)]
        own = {"main_pretrain": scenes.PRETRAIN, "main_lincls": scenes.LINCLS, "main_semisup": scenes.SEMISUP}[
            self.main
        ]
        given = [] if own is scenes.PRETRAIN else ["--pretrained", f"{self.base}/weights/pretrained.pth.tar"]
        return [*own, *given, *LAYOUTS[self.layout], *self.inside, "--resume", "auto", "--save-dir", str(folder),
                str(self.base / "images")]  # fmt: skip

    def undisturbed(self) -> tuple[Path, float]:
        """The folder of the run that nothing disturbs, and how many seconds it took."""
        folder = self.here.parent / f"undisturbed {self.main.removeprefix('moco.')} {self.layout}".strip()
        noted = folder.with_suffix(".json")
        if not noted.exists():
            began = time.monotonic()
            ended = attempt(self.words(folder), self.here.with_suffix(".txt"))
            assert ended.code == 0, f"{self.words(folder)} fails undisturbed: {ended.text}"
            noted.write_text(json.dumps(time.monotonic() - began))
        return folder, json.loads(noted.read_text())

    def run(self) -> list[Verdict]:
        """The verdicts on each signal, the last one also on what the run came to."""
        whole, life = self.undisturbed()
        shutil.rmtree(self.here, ignore_errors=True)
        for _ in range(self.times):
            if self.disturb(life) or self.verdicts[-1].verdict == WRONG:
                break
        if all(v.verdict == RIGHT for v in self.verdicts):
            self.finish(whole)
        return self.verdicts

    def disturb(self, life: float) -> bool:
        """One signal; whether the run has ended by itself, done."""
        number = self.rng.choice(list(CODES))
        target = self.rng.choice(("main", "main", "rank", "group") + ("worker",) * (number == signal.SIGKILL))
        target = "main" if self.main == "moco.sweep" else target  # its trials are sessions of their own
        instant = self.rng.random() * (life + TRUE_START_SECONDS * self.truly)
        out, before = self.here.with_suffix(".txt"), newest_step(self.here)
        pid = (start_truly if self.truly else start)(self.words(self.here), out)
        sender = Sender(number, target, instant, "processes" in self.layout)
        ended = watch(pid, out, sender)
        why = self.judge(ended, sender, before)
        what = f"{number.name} to {target} at {instant:.2f} s of {self.main} {self.layout}".rstrip()
        self.note(f"{number.name} to {target}", what + " (true start)" * self.truly, why)
        return ended.code == 0

    def judge(self, ended: Ended, sender: Sender, before: tuple) -> str:
        """Why that end is wrong."""
        if ended.code is None:
            return f"it hung: {tail(ended.text)}"
        if ended.left:
            return ended.left[0]
        early = not sender.caught and sender.number != signal.SIGKILL  # nothing of ours ran yet: the system's default
        expected = {0, CODES[sender.number]} if sender.sent else {0}
        expected |= {-sender.number} if early or sender.number == signal.SIGKILL else set()
        if sender.sent and sender.target == "worker":
            expected |= {1, 75, 137}
        if ended.code not in expected:
            return f"exit code {ended.code} and not {CODES[sender.number]}: {tail(ended.text)}"
        if "Traceback" in ended.text and not early:
            return f"a stack trace, {tail(ended.text)}"
        return self.lost(ended, sender, before)

    def lost(self, ended: Ended, sender: Sender, before: tuple) -> str:
        """What of the work is gone: with a signal that asks nothing, with KILL what was not yet saved."""
        now, logged = newest_step(self.here), last_logged(self.here)
        if now < before:
            return f"the newest checkpoint went back from {before} to {now}"
        asked = ended.code in (129, 130, 143) or (
            sender.number == signal.SIGUSR1 and ended.code == 75 and sender.caught
        )
        asked &= "nothing to save" not in ended.text  # before the first step the log may be a killed run's
        if asked and self.main == "main_pretrain" and now[-1] < logged:
            return f"{logged} steps are logged and {now[-1]} are saved: {tail(ended.text)}"
        return ""

    def finish(self, whole: Path) -> None:
        """Let it end, and compare."""
        ended = attempt(self.words(self.here), self.here.with_suffix(".txt"))
        why = "" if ended.code == 0 and not ended.left else f"resumed, exit code {ended.code}: {tail(ended.text)}"
        value = scenes.of_file("results.md") if self.main == "moco.sweep" else scenes.log_value
        why = why or scenes.differ(value(whole, ended), value(self.here, ended))
        strays = [p.name for p in self.here.rglob("*") if p.name.endswith((".tmp", ".part"))]
        why = why or ("left " + strays[0] if strays else "")
        self.note(
            "the run's end", f"{self.main} {self.layout} after {len(self.verdicts)} signals ({self.history()})", why
        )

    def history(self) -> str:
        return "; ".join(v.what.split(" of m")[0] for v in self.verdicts)

    def note(self, group: str, what: str, why: str) -> None:
        self.verdicts.append(Verdict("kill", self.number, group, what, WRONG if why else RIGHT, why))


class Sender:
    """Sends a signal once, at an instant; an :data:`Act`."""

    def __init__(self, number: signal.Signals, target: str, instant: float, several: bool) -> None:
        self.number, self.target, self.instant, self.several = number, target, instant, several
        self.sent = self.caught = False

    def __call__(self, pid: int, seconds: float) -> None:
        if self.sent or seconds < self.instant:
            return
        self.sent = True
        whom = self.whom(pid)
        listens = signal.SIGUSR1 if self.number == signal.SIGINT else self.number  # Python itself has one of Ctrl-C
        self.caught = all(catches(process, listens) for process in {pid, *(whom if self.target == "rank" else ())})
        for process in whom:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, self.number)

    def whom(self, pid: int) -> list[int]:
        """The processes that are meant; the main one where there is no other."""
        if self.target == "group":
            return members(pid)
        below = children(pid) if self.target == "worker" or self.several else []
        if self.target == "worker":
            below = [grandchild for child in below for grandchild in children(child)] or below
        return [below[-1]] if below and self.target != "main" else [pid]


def newest_step(folder: Path) -> tuple[int, ...]:
    """How far the run's newest checkpoint is."""
    state: dict[str, Any] = {}
    for name in ("checkpoint.pth.tar", "checkpoint_semisup.pth.tar"):
        if (folder / name).exists():
            state = files.read(str(folder / name))
    path = run_folder.newest(str(folder))
    state = files.read(path) if path else state
    run = state.get("run", {})
    return (state["epoch"], run.get("batch", 0), run.get("step", 0)) if state else (0, 0, 0)


def last_logged(folder: Path) -> int:
    """The last step in the log."""
    found = scenes.records(folder / "log.jsonl")
    return max((record["step"] for record in found), default=0)
