"""Where recipes and the three mains lie: configs/ and the top of a checkout, moco/recipes and moco/mains of a wheel.

setup.py moves them, so that git has one copy of each and site-packages no more names than needed. No torch here.
"""

from __future__ import annotations

import difflib
import importlib
import os
import shlex
from pathlib import Path
from typing import Any

from moco.errors import UserError, tell

HERE = Path(__file__).resolve().parent
INSTALLED = (HERE / "recipes").is_dir()  # from a wheel
RECIPES = HERE / "recipes" if INSTALLED else HERE.parent / "configs"
MAINS = HERE / "mains" if INSTALLED else HERE.parent
DETECTION = "moco_detection" if INSTALLED else "detection"  # the package


def script(name: str) -> str:
    """The path of one of the three mains, such as main_pretrain.py."""
    return str(MAINS / name)


def shown(path: str, *words: str) -> str:
    """The command line of a script, as it is typed here: python main_pretrain.py ..., from a wheel moco pretrain ..."""
    script = os.path.basename(path)
    known = INSTALLED and os.path.abspath(path) == str(MAINS / script)
    first = ["moco", script.removeprefix("main_").removesuffix(".py")] if known else ["python", path]
    return shlex.join([*first, *words])


def extra(name: str) -> str:
    """The command that installs what an extra of pyproject.toml names."""
    package = "moco-hard-negatives" if INSTALLED else "."
    return f"pip install '{package}[{name}]'"  # unquoted, zsh would take the brackets for a pattern


def package(name: str, extra_name: str, need: str) -> Any:
    """An optional package, imported; without it a UserError that begins with ``need`` and says which extra has it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{need}: run `{extra(extra_name)}`.") from error


def find_recipe(name: str, kind: str = "") -> str:
    """The path of a YAML file: ``name`` itself where there is such a file, else the recipe of that name, which is told.

    Args:
        name: a path; or synco_in1k_200ep, with or without .yml and configs/ before it.
        kind: the folder in configs/ ("" or "sweeps").

    Raises:
        UserError: neither; the sentence names the recipes that are spelled alike, or all.
    """
    if os.path.exists(name) and not os.path.isdir(name):
        return name
    known = {path.stem: str(path) for path in sorted((RECIPES / kind).glob("*.yml"))}
    stem, suffix = os.path.splitext(name.removeprefix(os.path.join("configs", kind, "")))
    if stem in known and suffix in ("", ".yml", ".yaml"):
        tell(f"{name}: no such file, so the recipe {known[stem]} is used", error=True)
        return known[stem]
    near = difflib.get_close_matches(os.path.basename(stem), known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the recipes are {', '.join(known)}."
    raise UserError(f"{name} is neither a file nor a recipe of this project; {hint}")
