"""The short form of the chaos run, and that the run sees what it looks for."""

import io
import json
import os
import random
import signal
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, fork

from tests.runs.chaos import __main__ as chaos
from tests.runs.chaos import kills, mutations, verdicts
from tests.runs.chaos.attempts import Ended


def run_chaos(words: list[str], out: Path) -> None:
    with open(out, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(chaos.main(words))


@pytest.mark.dist
def test_what_the_short_run_injects_is_survived_or_told(tmp_path):
    process = fork(run_chaos, ["--out", str(tmp_path / "chaos")], tmp_path / "output.txt")
    process.join(600)
    process.kill()
    process.join()
    text = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 0, text
    found = json.loads((tmp_path / "chaos" / "summary.json").read_text())
    assert found["wrong"] == [], text
    tried = {kind: counts["tried"] for kind, counts in found["kinds"].items()}
    assert {kind: tried[kind] for kind in ("flip", "mutate", "disk")} == {
        k: chaos.SHORT[k] for k in tried if k != "kill"
    }
    assert tried["kill"] >= 2 * chaos.SHORT["kill"]
    assert all(found["kinds"][kind]["right"] for kind in ("kill", "flip", "mutate"))
    assert found["kinds"]["flip"]["sentence"] and found["kinds"]["mutate"]["sentence"]


@pytest.mark.parametrize(
    ("ended", "why"),
    [
        (Ended(None, ""), "it hung"),
        (Ended(-11, ""), "ended by signal 11"),
        (Ended(2, "error: no.\nTraceback (most recent call last):\nValueError: x"), "a stack trace, ValueError: x"),
        (Ended(2, "error: \x1b[31mno."), "the control character '\\x1b' reaches the terminal"),
        (Ended(0, "", 3 << 30), "2.0 GiB more than undamaged"),
        (Ended(0, "", left=["process 7"]), "process 7"),
        (Ended(1, "no"), "exit code 1, no"),
        (Ended(2, "no"), "not one sentence: no"),
        (Ended(2, "error: no."), ""),
        (Ended(0, "done"), ""),
    ],
)
def test_what_no_damage_excuses(ended, why):
    assert verdicts.ill_mannered(ended, 1 << 30) == why


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_that_loses_work_is_wrong(number, tmp_path, monkeypatch):
    chain = kills.Chain(tmp_path, tmp_path / "here", 0, 0, short=True)
    chain.main = "main_pretrain"
    sender = kills.Sender(number, "main", 0.0, False)
    sender.sent = sender.caught = True
    code = -9 if number == signal.SIGKILL else 143
    monkeypatch.setattr(kills, "newest_step", lambda folder: (1, 0, 3))
    monkeypatch.setattr(kills, "last_logged", lambda folder: 5)
    assert chain.judge(Ended(code, ""), sender, (2, 0, 6)).startswith("the newest checkpoint went back")
    lost = chain.judge(Ended(code, ""), sender, (1, 0, 3))
    assert lost.startswith("5 steps are logged and 3 are saved") == (number == signal.SIGTERM)
    assert chain.judge(Ended(1, ""), sender, (1, 0, 3)).startswith("exit code 1 and not")


@pytest.mark.parametrize("form", ["text", "json", "yaml", "lines", "tar"])
def test_a_mutation_changes_the_file_and_is_the_same_for_a_seed(form, tmp_path):
    content = {"tar": b"\0" * 10240, "json": b'{"a": [1]}', "yaml": b"a: [1]\n"}.get(form, b"one\ttwo\nthree\n")
    if form == "tar":
        with tarfile.open(fileobj=(stream := io.BytesIO()), mode="w", format=tarfile.USTAR_FORMAT) as tar:
            tar.addfile(tarfile.TarInfo("1.jpg"))
        content = stream.getvalue()
    made = []
    for copy in ("one", "two"):
        (tmp_path / copy).mkdir()
        path = tmp_path / copy / "file"
        path.write_bytes(content)
        mutations.mutate(path, form, random.Random("7"))
        made.append(path.read_bytes().replace(str(path.parent).encode(), b""))
    assert made[0] == made[1] != content


def test_the_command_is_in_the_makefile():
    assert "-m tests.runs.chaos --minutes $(MINUTES)" in (ROOT / "Makefile").read_text()
