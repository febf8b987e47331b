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

    def line(self, flags: str) -> str:
        again = f"python -m tests.runs.chaos {flags} --only {self.kind}:{self.number}"
        return f"WRONG {self.what}: {self.why}\n    {again}"


def ill_mannered(ended: Ended, normal: int, codes: tuple[int, ...] = (0, 2)) -> str:
    """Why no damage excuses how a program ended; empty where nothing is. normal: bytes of its undisturbed peak."""
    code, text = ended.code, ended.text
    if code is None:
        return "it hung"
    odd = next((c for c in text if ord(c) < 32 and c not in "\n\r\t"), "")
    told = sum(line.startswith("error") for line in text.splitlines())
    more = ended.peak - normal
    wrong = {
        f"ended by signal {-code}": code < 0,
        f"a stack trace, {tail(text)}": "Traceback (most recent call last)" in text or "MemoryError" in text,
        f"the control character {odd!r} reaches the terminal": odd,
        f"{more / GIGABYTE:.1f} GiB more than undamaged": more > GIGABYTE,
        "".join(ended.left[:1]): ended.left,
        f"exit code {code}, {tail(text)}": code not in codes,
        f"not one sentence: {tail(text)}": code == 2 and told != 1,
    }
    return next((why for why, holds in wrong.items() if holds), "")


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


def summary(found: list[Verdict], flags: str) -> dict:
    """What summary.json holds."""
    kinds = {}
    for kind in dict.fromkeys(v.kind for v in found):
        mine = Counter(v.verdict for v in found if v.kind == kind)
        kinds[kind] = {"tried": mine.total(), **{name: mine[name] for name in (RIGHT, SENTENCE, WRONG)}}
    return {"flags": flags, "kinds": kinds, "wrong": [v.line(flags) for v in found if v.verdict == WRONG]}
