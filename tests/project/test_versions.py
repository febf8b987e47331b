"""requirements/: the locked versions cover pyproject.toml and are admitted by it, the oldest are its bounds."""

import re

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import pages

PROJECT = pages.project()
EXTRAS = PROJECT["optional-dependencies"]
CORE = PROJECT["dependencies"]
TEST = [line for name in ("test", "detection", "docs") for line in EXTRAS[name] if not line.startswith(PROJECT["name"])]


def pins(name: str) -> dict[str, str]:
    """Versions by name. A line is a name and a version: no path, no host, no option."""
    lines = [line for line in (ROOT / "requirements" / name).read_text().splitlines() if not line.startswith("#")]
    matches = [re.fullmatch(r"([\w-]+)==([\w.]+)(; python_version == \"[\d.]+\" and sys_platform == \"linux\")?", x)
               for x in lines]  # fmt: skip
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return {canonicalize_name(match[1]): match[2] for match in matches if match}


@pytest.mark.parametrize("line", [*CORE, *TEST])
def test_the_lock_has_what_the_tests_need_in_a_version_that_is_admitted(line):
    requirement = Requirement(line)
    version = pins("lock.txt").get(canonicalize_name(requirement.name))
    assert version, "make lock"
    assert requirement.specifier.contains(version), "make lock"


@pytest.mark.parametrize(
    "line", [*CORE, *EXTRAS["export"], *EXTRAS["demo"], *(x for x in EXTRAS["test"] if x.startswith("triton"))]
)
def test_a_bound_is_the_version_that_the_tests_ran_with(line):
    """A bound that nothing ran with is a guess."""
    requirement = Requirement(line)
    (bound,) = requirement.specifier
    oldest = pins("oldest.txt")[canonicalize_name(requirement.name)]
    assert bound.operator == ">="
    assert re.sub(r"(\.0)+$", "", oldest) == re.sub(r"(\.0)+$", "", bound.version)


def test_the_lock_knows_the_requirements_of_requirements():
    assert {"scipy", "huggingface-hub", "safetensors", "pluggy", "numpy"} <= pins("lock.txt").keys()
    assert canonicalize_name(PROJECT["name"]) not in pins("lock.txt")
