"""What the program says can be followed: every flag, command and file that a sentence names is there."""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from support import programs

from moco import doors
from moco.cli import projects

FLAG = re.compile(r"(?<![\w-])--[a-z][A-Za-z0-9]*(?:[-_][a-z0-9]+)*(?![\w-]|[{[])")  # whole ones, nothing filled in
MODULE = re.compile(r"python3? -m ([a-z]\w*(?:\.\w+)*)")
COMMAND = re.compile(r"(?:`|\brun |\bby |\bfor |\bthat )moco ([a-z_]+)(?![\w:])")
PATH = re.compile(r"\b(?:docs|configs|detection|requirements)/[\w./-]*\.(?:md|yml|yaml|py|txt)\b")
# of other programs: docker, torchrun, SLURM, pip, git, tensorboard; and of `moco` itself
FOREIGN = {
    "--shm-size", "--nproc-per-node", "--nproc_per_node", "--nnodes", "--standalone", "--extra-index-url", "--gres",
    "--gpus", "--signal", "--requeue", "--no-build-isolation", "--depth", "--logdir", "--version",
    *(name for program in projects.programs() for row in program.options for name in row.spellings),
    "--dir_data", "--config_name", "--data_folder",
}  # fmt: skip
STYLES = ("moco/pictures/colours.py", "moco/report/page.py", "detection/install_for_ci.py")  # CSS, and pip's words
FILES = [*(ROOT / "moco").rglob("*.py"), *(ROOT / "detection").glob("*.py"), *ROOT.glob("main_*.py")]
FILES = [path for path in FILES if str(path.relative_to(ROOT)) not in STYLES]


def docstrings(tree: ast.AST) -> set[ast.AST]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body[0] for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    return {one.value for one in bodies if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)}


def text_of(node: ast.AST) -> str | None:
    """What a literal says, with {} for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def sentences(path: Path) -> Iterator[tuple[str, str]]:
    """Every text of a module that is not its documentation, with its place."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    left_out = inside | docstrings(tree)
    for node in ast.walk(tree):
        if node not in left_out and (text := text_of(node)):
            yield f"{path.relative_to(ROOT)}:{node.lineno}", text  # type: ignore[attr-defined]


SENTENCES = [sentence for path in FILES for sentence in sentences(path)]


def missing(pattern: re.Pattern, there) -> list[str]:
    found = [(place, name) for place, text in SENTENCES for name in pattern.findall(text)]
    assert found, "the pattern finds what there is"
    return [f"{place}: {name}" for place, name in found if not there(name)]


@pytest.fixture(scope="module")
def known() -> set[str]:
    parsers = [programs.parser_of(name) for name in programs.NAMES if name != "detection"]
    for parser in parsers:  # also those of commands within commands
        parsers += [one for action in parser._actions if isinstance(action.choices, dict) for one in
                    action.choices.values() if isinstance(one, argparse.ArgumentParser)]  # fmt: skip
    flags = {word for parser in parsers for action in parser._actions for word in action.option_strings}
    own = (ROOT / "detection/run.py").read_text() + (ROOT / "detection/train_net.py").read_text()
    return flags | set(FLAG.findall(own)) | FOREIGN


def test_every_flag_that_is_named_is_one(known):
    assert missing(FLAG, lambda flag: flag in known or flag.replace("_", "-") in known) == []


def test_every_module_that_is_named_can_be_started():
    names = sorted({name for _, text in SENTENCES for name in MODULE.findall(text)} - {"moco"})
    # in a process of its own: the commands' names stand for functions here where a test has called them
    look = "import importlib.util as u, sys; print(*[name for name in sys.argv[1:] if u.find_spec(name)])"
    found = subprocess.run([sys.executable, "-c", look, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert missing(MODULE, {*found.stdout.split(), "moco"}.__contains__) == []


def test_every_command_that_is_named_is_one():
    assert missing(COMMAND, lambda name: name in doors.NAMES) == []


def test_every_file_that_is_named_is_there():
    assert missing(PATH, lambda name: (ROOT / name).exists()) == []


def test_what_is_checked_is_what_is_said():
    """The check itself: of a text with a mistake each pattern finds it."""
    text = "run moco lincl --knm by python -m moco.lincl, see docs/nowhere.md, not docs--x"
    found = [pattern.findall(text) for pattern in (FLAG, MODULE, COMMAND, PATH)]
    assert found == [["--knm"], ["moco.lincl"], ["lincl"], ["docs/nowhere.md"]]
