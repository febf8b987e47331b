"""The commands: `moco` lists them, each answers to every way of typing it, and what is no command says so."""

import ast
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from conftest import ROOT, environment

import moco
from moco import console, doors

FILES = [*(ROOT / "moco").rglob("*.py"), *(ROOT / "detection").glob("*.py")]
MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}
MODULES |= {f"moco.mains.main_{name}": ROOT / f"main_{name}.py" for name in doors.MAINS}


def starts_something(path: Path) -> bool:
    """Whether the file has a line ``if __name__ == "__main__":``."""
    tests = [node.test for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    return any(ast.unparse(test) == "__name__ == '__main__'" for test in tests)


def test_doors_are_the_modules_that_start_something():
    started = {name.removesuffix(".__main__") for name, path in MODULES.items() if starts_something(path)}
    assert started == {name.removesuffix(".__main__") for name in MODULES if doors.is_door(name)}
    assert started == {"moco", *doors.MODULES.values(), *doors.OTHERS}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_that_is_no_command_says_so(name, monkeypatch, capsys):
    """As its package meets it under ``python -m``, when it is imported."""
    monkeypatch.setattr(sys, "argv", ["-m", "CKPT", "DIR"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-W", "error", "-m", name, "CKPT", "DIR"])
    package = name.partition(".")[0]
    if doors.is_door(name):
        return doors.check(package)
    with pytest.raises(SystemExit, match="2"):
        doors.check(package)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {name} is no command; ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["-m", "moco.eval.knn", "CKPT", "DIR"], "type `python -m moco lincls --knn`"),
        (["-um", "moco.knn", "CKPT"], "type `python -m moco lincls --knn`"),  # no such file
        (["-mmoco.embd"], "did you mean `python -m moco embed`?"),
        (["-m", "detection.recipe", "-m"], "`python -m moco` lists the commands"),
        (["-m", "moco", "knn", "CKPT"], "type `python -m moco lincls --knn`"),
    ],
)
def test_python_itself_ends_with_the_sentence(words, end):
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(f"; {end}\n") and done.stderr.count("\n") == 1


def test_other_programs_import_the_packages_as_they_like(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m", "tests"])
    for name in ("pytest", "mocos.knn", "another.moco.knn"):
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", name, "tests"])
        doors.check("moco")
    monkeypatch.setattr(sys, "argv", ["knn.py"])
    doors.check("moco")


# ------------------------------------------------------------------------------------------------------ moco NAME


@pytest.fixture
def answer(monkeypatch, capsys, restored):
    """``answer(*words)``: exit code, output and errors of the command `moco`, which may not import torch for it."""
    monkeypatch.setitem(sys.modules, "torch", None)

    def run(*words: str, how: str = "moco") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/moco", *words])
        try:
            code = console.main(how)
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    return run


def test_it_lists_every_command_on_a_line_of_its_own(answer):
    code, out, err = answer()
    assert (code, err) == (0, "")
    assert answer("--help") == answer("-h") == (code, out, err)
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == doors.NAMES
    assert max(map(len, out.splitlines())) < 100
    assert answer(how="python -m moco")[1].startswith("usage: python -m moco COMMAND")


def test_it_has_a_version(answer):
    assert answer("--version") == (0, f"moco {moco.__version__}\n", "")


@pytest.mark.parametrize(
    ("word", "end"),
    [
        ("pretrian", "moco has no command pretrian; did you mean `moco pretrain`?"),
        ("main_lincls.py", "moco has no command main_lincls.py; type `moco lincls`"),
        ("few-shot", "moco has no command few-shot; type `moco lincls --few-shot`"),
        ("DIR", "moco has no command DIR; `moco` lists the commands"),
        ("--epochs", "--epochs is no flag of moco itself; the command comes first: moco COMMAND --epochs"),
    ],
)
def test_a_word_that_is_no_command(word, end, answer):
    assert answer(word, "3") == (2, "", f"error: {end}\n")


@pytest.mark.parametrize("name", doors.NAMES)
def test_a_command_answers_before_torch_is_imported(name, answer, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    code, out, _ = answer(name, "--help")
    assert (code, out.split(" [-h]")[0]) == (0, f"usage: moco {name}")
    code, out, err = answer(name, "--no-such-flag")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "script", "name", "expected"),
    [
        ("moco.__main__", "/at/moco/__main__.py", "embed", "python -m moco embed"),
        ("moco.embed", "/at/moco/embed.py", "embed", "python -m moco.embed"),
        ("moco.data.__main__", "/at/moco/data/__main__.py", "data", "python -m moco.data"),
        ("moco.mains.main_lincls", "/at/main_lincls.py", "lincls", "python -m moco.mains.main_lincls"),
        (None, "main_pretrain.py", "pretrain", "python main_pretrain.py"),
        (None, "../main_lincls.py", "lincls", "python ../main_lincls.py"),
        (None, "detection/run.py", "detection", "python detection/run.py"),
        (None, "/usr/bin/moco", "embed", "moco embed"),
        (None, "/usr/bin/moco-lincls", "lincls", "moco-lincls"),
        ("pytest.__main__", "/at/pytest/__main__.py", "embed", "moco embed"),
        (None, "my_script.py", "export", "moco export"),
        ("moco.bench", "/at/moco/bench.py", "pretrain", "moco pretrain"),  # whose flags it takes
    ],
)
def test_usage_names_what_was_typed(module, script, name, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, name])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", module and ModuleSpec(module, None))
    assert doors.typed(name) == expected
