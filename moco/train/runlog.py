"""What a run says while it runs: meters, the console, log.jsonl, TensorBoard events, Weights & Biases.

Legend: N images, C classes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from typing import Any

from tqdm import tqdm

from moco import distributed, files, resources
from moco.errors import UserError, tell


class RunLog:
    """One run's log: readable lines on the console, numbers as ``NAME.jsonl``, TensorBoard events, and W&B if asked.

    Every process may call it; only the main one writes. To be used in ``with``, or closed. Each record of the file is
    one line of JSON with ``step`` and what :meth:`scalars` was given, written when the call returns; numbers that are
    not finite become null.

    Args:
        save_dir: the run's folder, made if missing.
        tensorboard: also write events into ``save_dir``/tensorboard/NAME.
        wandb: project on Weights & Biases to send the numbers to; a resumed run goes on in its page.
        config: the run's settings: written to NAME_settings.json, and for W&B.
        resume_step: None begins a new log in place of an older one; else the log goes on after this step, and what
            an interrupted run had written beyond it is dropped.
        name: tells apart two kinds of run in one folder.

    Raises:
        UserError: the folder cannot be written, or wandb is not installed.
    """

    def __init__(
        self,
        save_dir: str,
        tensorboard: bool = True,
        wandb: str | None = None,
        *,
        config: dict[str, Any] | None = None,
        resume_step: int | None = None,
        name: str = "log",
    ) -> None:
        self._file: Any = None
        self._events: Any = None
        self._wandb: Any = None
        self._main = distributed.is_main()
        if not self._main:
            return
        path = os.path.join(save_dir, f"{name}.jsonl")
        try:
            os.makedirs(save_dir, exist_ok=True)
            if wandb:
                self._wandb = _wandb_run(wandb, save_dir, name, config, resumed=resume_step is not None)
            files.write_text("" if resume_step is None else _records_until(path, resume_step), path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{path} cannot be written ({reason}); choose another --save-dir.") from error
        if config:
            settings = json.dumps(config, indent=1, default=str)
            files.write_text(settings + "\n", os.path.join(save_dir, f"{name}_settings.json"))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # half a second that other processes do not need

            # TensorBoard hides older events from purge_step on: a resumed run's curve does not double back.
            first = 0 if resume_step is None else resume_step + 1
            self._events = SummaryWriter(os.path.join(save_dir, "tensorboard", name), purge_step=first)

    def line(self, text: str) -> None:
        """One line on the console, above the bar if there is one."""
        if self._main:
            with tqdm.external_write_mode():
                tell(text)

    def scalars(self, step: int, values: dict[str, float], *, text: str | None = None, **extra: Any) -> None:
        """Record numbers of ``step``: as curves, and with ``extra`` (any JSON values) as one record of the file.

        ``text`` is what a reader of the console gets to see of it.
        """
        if text is not None:
            self.line(text)
        if not self._main:
            return
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step, **extra, **finite}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def bar(self, total: int, initial: int = 0, desc: str = "") -> tqdm:
        """A progress bar to use in ``with``; it shows only on the main process's terminal."""
        hidden = not (self._main and sys.stderr.isatty())
        return tqdm(total=total, initial=initial, desc=desc, disable=hidden, leave=False, dynamic_ncols=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish all files; a second call does nothing."""
        for output in (self._file, self._events):
            if output is not None:
                output.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._events = self._wandb = None


def _records_until(path: str, step: int) -> str:
    """The file's records up to ``step``; a line that a kill cut short is dropped."""
    if not os.path.exists(path):
        return ""
    kept = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if files.json_of(line)["step"] <= step:
                    kept.append(line if line.endswith("\n") else line + "\n")
    return "".join(kept)


def _wandb_run(project: str, save_dir: str, name: str, config: dict[str, Any] | None, resumed: bool) -> Any:
    wandb = resources.package("wandb", "wandb", "--wandb needs the package wandb")
    path = os.path.join(save_dir, f"{name}.wandb")
    known = None
    if resumed and os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            known = file.read().strip()
    run = wandb.init(project=project, dir=save_dir, config=config, id=known or None, resume="allow")
    files.write_text(str(run.id), path)
    return run
