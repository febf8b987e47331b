"""Logs of runs as RunLog leaves them, for tests of what reads them."""

import html
import json
import re
from pathlib import Path
from typing import Any


def write_log(folder: Path, *records: dict | str, log: str = "log", events: list[dict] | None = None,
              settings: dict[str, Any] | None = None) -> Path:  # fmt: skip
    """A run's folder; text among the records goes into the log as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (record if isinstance(record, str) else json.dumps(record) + "\n" for record in records)
    (folder / f"{log}.jsonl").write_text("".join(lines))
    if events is not None:
        (folder / f"{log}_events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if settings is not None:
        (folder / f"{log}_settings.json").write_text(json.dumps(settings))
    return folder


def event(kind: str, time: float = 0.0, step: int = 0, epoch: int = 0, text: str = "", **more: Any) -> dict:
    """One line of NAME_events.jsonl."""
    return {"time": time, "step": step, "epoch": epoch, "kind": kind, "text": text, **more}


BEGIN = event("begin", 100.0, resumed=None, command="moco pretrain DIR")
FINISHED = event("end", 200.0, 4, 1, reason="finished", exit_code=0, next=None)
EPOCHS = [
    {"step": s, "epoch": (s - 1) // 2, "time": 100.0 + 10 * s, "loss": 8.0 / s, "loss_ratio": 1.0 / s, "top1": 10.0 * s}
    for s in range(1, 5)
]


def words_of(page: Path) -> str:
    """The text of a page, without its elements and what its scripts would add."""
    body = page.read_text(encoding="utf-8").partition("<body>")[2].partition("<script")[0]
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", body)).split())
