"""What a part finds: rows of the table, written as they come, so that whatever ends the part, that much comes back."""

from __future__ import annotations

import contextlib
import json
import math
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OK, BAD = "ok", "WRONG"


class Late(BaseException):
    """The part's time is over."""


class Findings:
    """Rows {what, value, unit, verdict} of one part. ``dry``: on a CPU, tiny, nothing is timed."""

    def __init__(self, path: Path, dry: bool):
        self.path, self.dry = path, dry
        self.rows: list[dict[str, Any]] = []
        self.keep("did not end by itself")

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def keep(self, error: str) -> None:
        """Write what there is. error: why there is no more; empty where nothing is missing."""
        self.path.write_text(json.dumps({"rows": self.rows, "error": error}))

    def note(self, what: str, value: Any, unit: str = "", good: bool | None = None, trace: str = "") -> None:
        """A row. good: whether the value is right, None where nothing is asked of it."""
        plain = value if isinstance(value, (int, float, str, type(None))) else str(value)
        plain = None if isinstance(plain, float) and math.isnan(plain) else plain  # json has no NaN
        verdict = "" if good is None else OK if good else BAD
        row = {"what": what, "value": plain, "unit": unit, "verdict": verdict}
        self.rows.append({**row, "trace": trace} if trace else row)
        print(f"  {what}: {shown(plain)} {unit} {verdict}", flush=True)
        self.keep("did not end by itself")

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """What fails in here is a row, and the part goes on."""
        try:
            yield
        except (KeyboardInterrupt, Late):
            raise
        except BaseException as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [repr(error)]
            told = f"{type(error).__name__}: {lines[0][:160]}"
            self.note(f"{what} FAILED", told, good=False, trace=traceback.format_exc()[-3000:])


def shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
