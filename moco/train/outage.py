"""What a run does while images or room on the disk are gone: it waits, and answers who wants it to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from moco import distributed
from moco.data.sources import away
from moco.errors import OutageError, UserError
from moco.train.stop import StopRequest

Made = TypeVar("Made")
LOOK_SECONDS = 1.0  # between two looks whether it is back
GO_ON = "the same command with --resume auto goes on"
AGAIN = "type the command again when the images are back"  # of one that saves nothing on its way


class StoppedError(OutageError):
    """The run was asked to stop while it waited; it ends with the exit code of that."""

    def __init__(self, sentence: str, code: int, reason: str) -> None:
        super().__init__(sentence)
        self.exit_code, self.reason = code, reason


@dataclass
class Patience:
    """How long a run waits for what is gone, and what it does at first. By default it does not.

    minutes: 0: not at all. stop: who may want the run to end. say: where it says what it waits for. save: write the
    state from which the run can be continued, unless that was done; every process calls. saves: whether there is any.
    """

    minutes: float = 0.0
    stop: StopRequest = field(default_factory=lambda: StopRequest(None))
    say: Callable[[str], object] = field(default=lambda text: None)
    save: Callable[[], object] = field(default=lambda: None)
    saves: bool = False

    @classmethod
    def of(
        cls, minutes: float, max_minutes: float | None, say: Callable[[str], object], saves: bool = True
    ) -> Patience:
        """Of a run that ends after ``max_minutes``, if any; not ``saves``: of an evaluation."""
        return cls(minutes, StopRequest(max_minutes), say, saves=saves)

    def wait(self, why: str, look: Callable[[], str]) -> None:
        """Return once ``look()``, which says what is gone, says nothing on any process; every process has to call.

        Args:
            why: what ended the work on this process; empty where nothing did.

        Raises:
            OutageError: it did not come back in time.
            StoppedError: the run must end.
        """
        why, begun, told = distributed.any_text(why), time.monotonic(), False
        self.save()
        while left := distributed.any_text(look()):
            self._check(left, begun)
            if not told:
                saved = "what is trained is saved; " * self.saves
                self.say(f"{left}: {saved}waiting up to {self.minutes:g} minutes")
            told = True
            time.sleep(LOOK_SECONDS)
        if told:
            time.sleep(away.REST_SECONDS)  # until the loader's processes look again too
        self.say(f"{why}; going on after {time.monotonic() - begun:.0f} s")

    def _check(self, left: str, begun: float) -> None:
        late = time.monotonic() - begun >= 60 * self.minutes
        code, late = self.stop.look(late)
        if code is not None:
            then = GO_ON if self.saves else AGAIN
            raise StoppedError(f"stopped while waiting, as {left}: {then}", code, self.stop.reason(code))
        if late:
            waited = f", for {self.minutes:g} minutes (--data-patience)" * (self.saves or self.minutes > 0)
            raise OutageError(f"{left}{waited}; {f'the run is saved: {GO_ON}' if self.saves else AGAIN}")

    def keep_trying(self, work: Callable[[], Made]) -> Made:
        """``work()``, which writes files, and again while the disk refuses them.

        Raises:
            OutageError: the disk did not take them in time, or the run must end; older files are as they were.
        """
        begun, told = time.monotonic(), False
        while True:
            try:
                made = work()
            except UserError as error:
                if not isinstance(error.__cause__, OSError):
                    raise
                if self.stop.asked() or time.monotonic() - begun >= 60 * self.minutes:
                    raise OutageError(f"{error} What was saved before is untouched; {GO_ON} from there") from error
                if not told:
                    self.say(f"{error} Trying again for up to {self.minutes:g} minutes")
                told = True
                time.sleep(LOOK_SECONDS)
            else:
                if told:
                    self.say(f"written after {time.monotonic() - begun:.0f} s")
                return made
