"""The floors of the house: imports go down, and each has the few neighbours that its name allows."""

import ast
import functools
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MAINS = ("main_pretrain", "main_lincls", "main_semisup")
DOORS = ("average", "bench", "demo", "describe", "embed", "export", "retrieval", "data.__main__", "sweep",
         "report", "neighbours", "negatives", "console")  # fmt: skip
# A floor imports those above it in this table, and its neighbours where no circle results.
FLOORS = [
    # the last four for the flags
    (
        "moco.errors",
        "moco.archive",
        "moco.plain",
        "moco.schema",
        "moco.processes",
        "moco.owner",
        "moco.seeding",
        "moco.signals",
        "moco.files",
        "moco.run_folder",
        "moco.config",
        "moco.resources",
        "moco.doors",
        "moco.methods.registry",
        "moco.data.registry",
        "moco.data.augment.presets",
        "moco.data.augment.from_file",
    ),
    ("moco.distributed", "moco.bars", "moco.kernels", "moco.cli"),
    ("moco.data", "moco.methods", "moco.pictures"),
    ("moco.models",),
    ("moco.train", "moco.weights"),
    ("moco.eval",),
    (*(f"moco.{name}" for name in DOORS), "moco.__main__", "moco.mains", "moco.library", *MAINS, "detection"),
    ("benchmarks", "tests"),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
NEVER = (("moco.models", "moco.data"), ("moco.train", "moco.eval"))  # the second is of one floor or upwards as well
# A launcher and its Triton programs are one file in two, as only the second needs triton: the first imports it at its
# first launch, the second has the first's constants.
PROGRAMS = {"triton_kernels", "images_triton", "norm_triton", "draws_triton"}
HAVE_FLAGS = FLOORS[-2] + FLOORS[-1] + ("moco.cli",)


def files() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = [*ROOT.glob("moco/**/*.py"), *ROOT.glob("detection/*.py"), *(ROOT / f"{name}.py" for name in MAINS)]
    found += [*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("tests/**/*.py")]
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in found}
    names.pop("moco")
    return names


MODULES = files()


def room(module: str) -> str:
    """The room that a module lies in: moco.data.sources.cache in moco.data."""
    while module not in FLOOR and "." in module:
        module = module.rpartition(".")[0]
    return module


@functools.cache
def nodes(module: str) -> list[ast.AST]:
    """The import statements of a module, wherever they are."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def imported(module: str) -> set[str]:
    """The project's modules that a module names in its import statements, wherever they are."""
    base = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in nodes(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] if node.level else []
            name = ".".join([*start, node.module or ""]).strip(".")
            inside = {f"{name}.{alias.name}" for alias in node.names}
            found |= inside if inside <= set(MODULES) else {name, *inside}
    return {name for name in found if name in MODULES}


ARROWS = {(a, b) for a in MODULES for b in imported(a) if b != a}


def test_every_module_has_a_floor():
    assert {name for name in MODULES if room(name) not in FLOOR} == set()


def test_imports_go_down():
    assert [(a, b) for a, b in sorted(ARROWS) if FLOOR[room(b)] > FLOOR[room(a)]] == []


@pytest.mark.parametrize(("above", "below"), NEVER)
def test_neighbours_that_do_not_know_each_other(above, below):
    assert [(a, b) for a, b in sorted(ARROWS) if (room(a), room(b)) == (above, below)] == []


def test_only_commands_know_flags():
    assert [(a, b) for a, b in sorted(ARROWS) if room(b) == "moco.cli" and room(a) not in HAVE_FLAGS] == []


def test_no_test_module_imports_another():
    """What two of them use lies in tests/support or is a fixture of conftest.py."""
    named = {name.rpartition(".")[2]: name for name in MODULES if name.startswith("tests.")}
    suites = {n for n in named if n.startswith("test_") or n.endswith("_interpreted")}
    assert [(n, found) for n in named.values() if (found := suites & raw_imports(n))] == []


def test_there_are_no_circles():
    launches = {(a, b) for a, b in ARROWS if b.rpartition(".")[2] in PROGRAMS and room(a) == room(b)}
    edges = {name: {b for a, b in ARROWS - launches if a == name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path, name))}"
        if name not in done:
            for target in edges[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_one_folder_uses_torch_distributed():
    users = {n for n in MODULES if "torch.distributed" in raw_imports(n) and not n.startswith("tests.")}
    assert {room(name) for name in users} == {"moco.distributed"}


def raw_imports(module: str) -> set[str]:
    plain = {a.name for n in nodes(module) if isinstance(n, ast.Import) for a in n.names}
    return plain | {n.module or "" for n in nodes(module) if isinstance(n, ast.ImportFrom)}


def test_flags_need_no_torch():
    plain = ("moco.config", "moco.errors", "moco.methods.registry", "moco.data.registry")
    for name in (n for n in MODULES if n.startswith("moco.cli") or n in plain):
        assert "torch" not in raw_imports(name), name


def test_one_file_replaces_files():
    """And the lock of a folder itself, of which moco.files knows."""
    users = [n for n, path in MODULES.items() if "os.replace(" in path.read_text(encoding="utf-8")]
    assert {name for name in users if not name.startswith("tests.")} == {"moco.files", "moco.owner"}


def test_no_module_shadows_the_standard_library():
    names = {part for name in MODULES if name.startswith("moco.") for part in name.split(".")} - {"moco", "__main__"}
    assert not names & set(sys.stdlib_module_names)


def test_entry_points_are_short():
    for name in MAINS:
        assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) < 150
    for name in DOORS[:7]:
        assert len(MODULES[f"moco.{name}"].read_text(encoding="utf-8").splitlines()) < 30
    for path in (MODULES[name] for name in MODULES if room(name) == "moco.cli"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 250, path.name


@pytest.mark.parametrize(("name", "lines"), [("main_pretrain", 46), ("main_semisup", 50)])
def test_a_worker_is_a_table_of_contents(name, lines):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    (worker,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "worker")
    assert worker.end_lineno is not None and worker.end_lineno - worker.lineno < lines


def test_no_two_test_files_have_one_name():
    """pytest takes the second for the first and leaves its tests out."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
