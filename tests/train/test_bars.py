"""Progress bars: on a terminal they and the lines do not tear each other, on a pipe there are none."""

import contextlib
import fcntl
import io
import os
import pty
import select
import struct
import sys
import termios

from moco import bars
from moco.errors import tell
from moco.train.runlog import RunLog


@contextlib.contextmanager
def on_a_terminal(monkeypatch, columns=120):
    """Inside standard output and error are a terminal; gives a function that reads what was written there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    settings = termios.tcgetattr(theirs)
    settings[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    with open(theirs, "w", encoding="utf-8", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)

        def read() -> str:
            found = b""
            while select.select([ours], [], [], 0.3)[0]:  # the kernel hands on what was written a little later
                found += os.read(ours, 1 << 20)
            return found.decode()

        yield read
    os.close(ours)


def shown(text: str) -> list[str]:
    """The lines that a terminal shows once it has got the text: a return goes to a line's begin, and what is then
    written covers what was there."""
    lines = []
    for line in text.split("\n"):
        cells: list[str] = []
        for piece in line.split("\r"):
            cells[: len(piece)] = piece
        lines.append("".join(cells).rstrip())
    return lines


def test_lines_stand_above_the_bar_and_the_bar_has_the_newest_figures(monkeypatch, tmp_path):
    with on_a_terminal(monkeypatch) as terminal, RunLog(str(tmp_path), tensorboard=False) as log:
        with log.bar(3, desc="epoch 4") as bar:
            log.line("one")
            bar.update()
            log.scalars(1, {"loss": 6.25, "images_per_second": 480.4}, text="two")
            log.scalars(1, {"knn": 61.5})
            bar.refresh()
            tell("three")
            during = terminal()
        with log.bar(3, desc="epoch 5"):
            pass
        after = terminal()
    assert "loss 6.2500, k-NN 61.50 %, 480 images/s" in during.rpartition("three")[2]  # drawn again below
    assert [line for line in shown(during + after) if line] == ["one", "two", "three"]  # and gone behind it
    assert "epoch 5" in after


def test_a_narrow_terminal_cuts_the_bar_before_its_figures(monkeypatch, tmp_path):
    """80 columns have all of them, 40 the loss; a longer line would leave its rests above."""
    for columns, expected in ((80, "loss 6.2500, k-NN 61.50 %, 480 images/s"), (40, "loss 6.2500")):
        with on_a_terminal(monkeypatch, columns) as terminal, RunLog(str(tmp_path), tensorboard=False) as log:
            log.scalars(1, {"loss": 6.25, "images_per_second": 480.4, "knn": 61.5})
            with log.bar(1000, desc="epoch 123", initial=999):
                drawn = terminal().split("\r")
        assert max(map(len, drawn)) <= columns
        assert any(f"epoch 123: 999/1000, {expected}" in line for line in drawn)


def test_what_is_counted_is_shown_on_a_terminal_alone(monkeypatch):
    with on_a_terminal(monkeypatch) as terminal:
        assert list(bars.counted("abc", 3, "letters")) == ["a", "b", "c"]
        text = terminal()
    assert "letters" in text
    assert [line for line in shown(text) if line] == []
    piped = io.StringIO()
    monkeypatch.setattr(sys, "stderr", piped)
    assert list(bars.counted("abc", 3, "letters")) == ["a", "b", "c"]
    assert piped.getvalue() == ""
