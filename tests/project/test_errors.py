"""What people read: nothing in it is obeyed by a terminal, and every character can be written."""

import ast
import errno
import io
import os
import sys

import pytest
from conftest import ROOT

from moco.errors import OutageError, TrainingError, UserError, exit_code, printable, tell

ODD = "caf\xe9 \x1b[2J\x07\r\x9b31m \u202etxt.gpj \udcff\tend\n"
SHOWN = "caf\xe9 \\x1b[2J\\x07\\r\\x9b31m \\u202etxt.gpj \\udcff\tend\n"


def test_what_a_terminal_would_obey_is_shown():
    assert printable(ODD) == SHOWN


@pytest.mark.parametrize(("encoding", "accent"), [("utf-8", "\xe9"), ("ascii", "\\xe9")])
@pytest.mark.parametrize("error", [False, True])
def test_every_line_can_be_written_in_every_encoding(encoding, accent, error, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stderr" if error else "stdout", stream)
    tell("one", ODD, error=error)
    assert stream.buffer.getvalue().decode(encoding) == f"one\n{SHOWN}\n".replace("\xe9", accent)


def test_nothing_is_said_past_tell():
    """What is printed otherwise reaches a terminal raw, and ends the program where the encoding lacks a character."""
    files = [*(ROOT / "moco").rglob("*.py"), *ROOT.glob("main_*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "print"
    ]
    assert len(files) > 100 and found == []


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (OutageError, 75)])
def test_an_error_is_one_sentence_and_its_exit_code(kind, code, capsys):
    def fail():
        raise kind("no \x1b[31m here")

    assert exit_code(fail) == code
    assert capsys.readouterr().err == "error: no \\x1b[31m here\n"
    assert TrainingError.exit_code == 3


def test_a_full_disk_is_a_sentence_wherever_it_is_met(capsys):
    def fail(number):
        raise OSError(number, os.strerror(number), "a/b")

    assert exit_code(lambda: fail(errno.ENOSPC)) == 75
    assert capsys.readouterr().err == (
        "error: a/b cannot be written (No space left on device); make room or choose another folder.\n"
    )
    with pytest.raises(FileNotFoundError):
        exit_code(lambda: fail(errno.ENOENT))
