"""What came of each case: counts by kind, and a line for each that is wrong."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.runs.chaos.attempts import Ended

RIGHT, SENTENCE, WRONG = "right", "sentence", "WRONG"
GIGABYTE = 1 << 30


@dataclass
class Verdict:
    """kind: kill, flip, mutate or disk; group: what the table counts together."""

    kind: str
    number: int
    group: str
    what: str
    verdict: str
    why: str = ""

    def line(self, seed: int) -> str:
        return f"WRONG {self.what}: {self.why}\n    python -m tests.runs.chaos --seed {seed} --only {self.kind}:{self.number}"


def ill_mannered(ended: Ended, normal: int, codes: tuple[int, ...] = (0, 2)) -> str:
    """Why no damage excuses how a program ended; empty where nothing is wrong. normal: bytes of its undisturbed peak."""
    if ended.code is None:
        return "it hung"
    if ended.code < 0:
        return f"ended by signal {-ended.code}"
    if "Traceback (most recent call last)" in ended.text or "MemoryError" in ended.text:
        return f"a stack trace, {tail(ended.text)}"
    if odd := [c for c in ended.text if ord(c) < 32 and c not in "\n\r\t"]:
        return f"the control character {odd[0]!r} reaches the terminal"
    if ended.peak > normal + GIGABYTE:
        return f"{(ended.peak - normal) / GIGABYTE:.1f} GiB more than undamaged"
    if ended.left:
        return ended.left[0]
    if ended.code not in codes:
        return f"exit code {ended.code}, {tail(ended.text)}"
    if ended.code == 2 and sum(line.startswith("error") for line in ended.text.splitlines()) != 1:
        return f"not one sentence: {tail(ended.text)}"
    return ""


def tail(text: str) -> str:
    """The last line."""
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "nothing printed"


def note(verdict: Verdict, path: Path) -> None:
    """Add to the file of a lane."""
    with open(path, "a") as file:
        file.write(json.dumps(asdict(verdict)) + "\n")


def read(folder: Path) -> list[Verdict]:
    """Of all lanes."""
    lines = (line for path in sorted(folder.glob("lane*.jsonl")) for line in path.read_text().splitlines())
    return [Verdict(**json.loads(line)) for line in lines]


def table(found: list[Verdict]) -> str:
    """Counts by kind and group."""
    counts = Counter((v.kind, v.group, v.verdict) for v in found)
    rows = sorted({(v.kind, v.group) for v in found})
    shown = [f"{'kind':8}{'what':44}{'tried':>7}{'right':>7}{'sentence':>10}{'WRONG':>7}"]
    for kind, group in [*rows, ("all", "")]:
        mine = [sum(n for key, n in counts.items() if kind in (key[0], "all") and (kind == "all" or key[1] == group)
                    and key[2] == verdict) for verdict in (RIGHT, SENTENCE, WRONG)]  # fmt: skip
        shown.append(f"{kind:8}{group:44}{sum(mine):7}{mine[0]:7}{mine[1]:10}{mine[2]:7}")
    return "\n".join(shown)


def summary(found: list[Verdict], seed: int) -> dict:
    """What summary.json holds."""
    kinds = {}
    for kind in dict.fromkeys(v.kind for v in found):
        mine = Counter(v.verdict for v in found if v.kind == kind)
        kinds[kind] = {"tried": mine.total(), **{name: mine[name] for name in (RIGHT, SENTENCE, WRONG)}}
    return {"seed": seed, "kinds": kinds, "wrong": [v.line(seed) for v in found if v.verdict == WRONG]}
