"""One table: what was asked of a card, beside what was measured there.

Floors are those of an H100: 3.0 TB/s copied, 50 / 400 / 780 TFLOP/s in fp32 / tf32 / bf16; they are what the stages of
the fused step cannot do without, two products in tf32 and one read of the similarities among them. The rows of a table
are {what, value, limit, verdict}; a verdict is "met", "missed" or "not measured".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from .findings import BAD, OK, shown

MET, MISSED, UNKNOWN = "met", "missed", "not measured"
FUSED, PLAIN = "triton, tf32", "plain MoCo, as published"
FLOORS = {(32, 65536): 41, (32, 262144): 150, (256, 65536): 151, (256, 262144): 571, (1024, 65536): 505}  # us
NEAR = 1.5  # times a floor that still counts as at it

Numbers = dict[str, float]  # by the rows' names


class Goal(NamedTuple):
    """``value`` of the numbers, None where one is missing, is to be at most ``limit``."""

    what: str
    value: Callable[[Numbers], float | None]
    limit: float


def ratio(name: str, base: str) -> Callable[[Numbers], float | None]:
    def of(numbers: Numbers) -> float | None:
        return numbers[name] / numbers[base] if name in numbers and numbers.get(base) else None

    return of


def loss_goals() -> list[Goal]:
    goals = []
    for n, limit in ((32, 0.5), (256, 0.4)):
        size = f"N {n}, K 65536"
        for how in ("us by events", "us by graph"):
            value = ratio(f"{size}, {FUSED}, {how}", f"{size}, {PLAIN}, {how}")
            goals.append(Goal(f"loss, tf32, relative to plain MoCo, {size}, {how}", value, limit))
        for name in (FUSED, "triton, fp32"):
            value = ratio(f"{size}, {name}, MiB", f"{size}, {PLAIN}, MiB")
            goals.append(Goal(f"memory of the loss, {name}, relative to plain MoCo, {size}", value, 1.0))
    return goals


def floor_goals() -> list[Goal]:
    return [
        Goal(
            f"loss, tf32, over the H100's floor of {floor} us, N {n}, K {total}",
            lambda numbers, name=f"N {n}, K {total}, {FUSED}, us by graph", floor=floor: (
                numbers[name] / floor if name in numbers else None
            ),
            NEAR,
        )
        for (n, total), floor in FLOORS.items()
    ]


def step_goals() -> list[Goal]:
    goals = []
    for batch in (32, 256):
        for splits in (1, 8):
            name = f"N {batch}, bn-splits {splits}, synco, time relative to moco"
            what = f"SynCo's whole step relative to plain MoCo's, {batch} images, bn-splits {splits}"
            goals.append(Goal(what, lambda numbers, name=name: numbers.get(name), 1.01))
            waits = f"N {batch}, bn-splits {splits}, synco, host waits"
            goals.append(Goal(f"host waits of that step, {batch} images, bn-splits {splits}", _number(waits), 0))
    return goals


def _number(name: str) -> Callable[[Numbers], float | None]:
    return lambda numbers: numbers.get(name)


def judged(parts: dict[str, dict]) -> list[dict]:
    """A row for each goal and floor, and one for each part that asks whether something is right."""
    rows = [row for part in parts.values() for row in part.get("rows", ())]
    numbers = {row["what"]: float(row["value"]) for row in rows if isinstance(row["value"], (int, float))}
    found = [row for name, part in parts.items() if (row := _of_part(name, part))]
    for goal in (*loss_goals(), *floor_goals(), *step_goals()):
        value = goal.value(numbers)
        verdict = UNKNOWN if value is None else MET if value <= goal.limit else MISSED
        found.append({"what": goal.what, "value": value, "limit": f"at most {goal.limit:g}", "verdict": verdict})
    return found


def _of_part(name: str, part: dict) -> dict | None:
    """How many of a part's checks are right, and whether it ended by itself; None where it asks nothing."""
    asked = [row for row in part.get("rows", ()) if row["verdict"]]
    if not (asked or part.get("error") or part.get("left_out")):
        return None
    right = sum(row["verdict"] == OK for row in asked)
    verdict = MISSED if right < len(asked) or part.get("error") else MET
    if part.get("left_out"):
        verdict = UNKNOWN
    told = part.get("left_out") or f"{right} of {len(asked)}" + f"; {part['error']}" * bool(part.get("error"))
    return {"what": f"part {name}: checks that are right", "value": told, "limit": "all", "verdict": verdict}


def table(rows: Iterable[dict]) -> str:
    lines = ["| asked | measured | goal | verdict |", "| --- | ---: | ---: | --- |"]
    lines += [_line(row["what"], shown(row["value"]), row["limit"], row["verdict"]) for row in rows]
    return "\n".join(lines)


def details(name: str, about: str, part: dict) -> str:
    """All rows of one part."""
    lines = [f"## {name}: {about}", ""]
    lines += [f"Did not end by itself: {part['error']}.", ""] if part.get("error") else []
    if part.get("left_out"):
        return "\n".join([*lines, f"Left out: {part['left_out']}.", ""])
    lines += ["| what | found | unit | verdict |", "| --- | ---: | --- | --- |"]
    lines += [_line(row["what"], shown(row["value"]), row["unit"], row["verdict"]) for row in part.get("rows", ())]
    return "\n".join([*lines, ""])


def wrong(parts: dict[str, dict]) -> list[str]:
    """What is to be looked at, a line each."""
    found = [f"{name}: {part['error']}" for name, part in parts.items() if part.get("error")]
    for name, part in parts.items():
        bad = (row for row in part.get("rows", ()) if row["verdict"] == BAD)
        found += [f"{name}: {row['what']}: {shown(row['value'])} {row['unit']}".strip() for row in bad]
    return found


def _line(*cells: str) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |"
