"""Imports go one way: from the entry points down to leaves, without circles."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MAINS = ("main_pretrain", "main_lincls", "main_semisup")

# Lower layers never import higher ones; a module may import its own layer only where no circle results.
LAYERS = [
    {
        "moco.errors",
        "moco.seeding",
        "moco.schedule",
        "moco.key_queue",
        "moco.kernels",
        "moco.losses",
        "moco.words",
        "moco.options",
        "moco.command_options",
        "moco.flag_classes",
    },
    {"moco.distributed", "moco.encoder", "moco.negatives", "moco.data", "moco.checkpoint", "moco.optimizers"},
    {
        "moco.methods",
        "moco.buffers",
        "moco.builder",
        "moco.meters",
        "moco.knn",
        "moco.fewshot",
        "moco.pretrained",
        "moco.objective",
        "moco.settings",
        "moco.resume",
    },
    {"moco.batch_family", "moco.labelled_queue"},
    {"moco.engine", "moco.models", "moco.probe", "moco.embed", "moco.finetune"},
    {"moco.probe_file", "moco.probe_report"},
    {"moco.lr_find", "moco.retrieval", "moco.validation"},
    {
        "main_pretrain",
        "main_lincls",
        "main_semisup",
        "moco.demo",
        "moco.export",
        "moco.describe",
        "moco.sweep",
        "moco.bench",
        "moco.traffic",
    },
    {"moco.average"},
]


def package(module: str) -> str:
    """moco.data.views and moco.kernels.cpu belong to their folder's layer."""
    return ".".join(module.split(".")[:2])


def imports(path: Path, module: str) -> set[str]:
    found = set()
    base = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = base.split(".")
            start = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            name = ".".join(x for x in (start, node.module) if x)
            found |= {f"{name}.{alias.name}" for alias in node.names} if name == "moco" else {name}
    return {package(name) for name in found if name.split(".")[0] in ("moco", *MAINS)}


def modules() -> dict[str, Path]:
    files = [*ROOT.glob("moco/**/*.py"), *(ROOT / f"{name}.py" for name in MAINS)]
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    names.pop("moco")
    return names


def graph() -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for name, path in modules().items():
        edges.setdefault(package(name), set()).update(imports(path, name) - {package(name), "moco"})
    return edges


def test_every_module_has_a_layer():
    assert set(graph()) <= set().union(*LAYERS)


def test_imports_go_down():
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    wrong = [(a, b) for a, targets in graph().items() for b in targets if layer[b] > layer[a]]
    assert wrong == []


def test_there_are_no_circles():
    edges = graph()

    def reach(name: str, seen: frozenset[str]) -> None:
        assert name not in seen, f"circle through {name}"
        for target in edges[name]:
            reach(target, seen | {name})

    for name in edges:
        reach(name, frozenset())


def test_only_one_file_uses_torch_distributed():
    users = {n for n, p in modules().items() if "torch.distributed" in _raw_imports(p)}
    assert users == {"moco.distributed"}


def _raw_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    plain = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    return plain | {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}


def test_flags_need_no_torch():
    for name in ("words", "options", "command_options", "flag_classes"):
        assert "torch" not in _raw_imports(ROOT / "moco" / f"{name}.py")


def test_no_module_shadows_the_standard_library():
    names = {part for name in modules() for part in name.split(".")} - {"moco"}
    assert not names & set(sys.stdlib_module_names)


def test_entry_points_are_short():
    for name in MAINS:
        assert len((ROOT / f"{name}.py").read_text().splitlines()) < 150
