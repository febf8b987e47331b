"""``import moco`` offers its names without the cost of importing torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

import moco

TREE = ast.parse(Path(moco.__file__).read_text(encoding="utf-8"))


def test_importing_moco_imports_no_torch():
    code = """
import sys, moco
assert set(moco.__all__) <= set(dir(moco))
heavy = {"torch", "numpy", "timm", "PIL", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


@pytest.mark.parametrize("name", moco.__all__)
def test_a_public_name_is_there_and_documented(name):
    assert getattr(moco, name).__doc__
    assert name in dir(moco)


def test_the_table_the_list_and_the_imports_for_type_checkers_agree():
    checked = next(node for node in TREE.body if isinstance(node, ast.If))
    imports = {alias.name: node.module for node in checked.body for alias in node.names}  # type: ignore[attr-defined]
    assert imports == moco._MODULES
    assert sorted(moco._MODULES) == sorted(moco.__all__)


def test_other_names_are_refused_as_python_does():
    with pytest.raises(AttributeError, match="no attribute 'SynCoLos'"):
        _ = moco.SynCoLos
