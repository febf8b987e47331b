"""python requirements/lock.py: write lock.txt, the versions here of all that the extra `test` installs (make lock).

pip takes the file as constraints (-c): pyproject.toml says which packages, the file which versions. Each line holds for
this Python on Linux, where the tests ran; on other machines pip chooses versions as if there were no file.
"""

import sys
from importlib.metadata import distribution
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
HEAD = "# Written by `make lock`: the versions that the tests ran with, as constraints for pip (-c).\n"


def versions() -> dict[str, str]:
    """Name and installed version of each package that `pip install '.[test]'` needs, directly or not."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    found: dict[str, str] = {}
    todo, seen = [Requirement(line) for line in (*project["dependencies"], f"{project['name']}[test]")], set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if (name, *sorted(wanted.extras)) in seen:
            continue
        seen.add((name, *sorted(wanted.extras)))
        if name == project["name"]:  # its extras as they are written now, not as they were when it was installed
            lines = [line for extra in wanted.extras for line in project["optional-dependencies"][extra]]
        else:
            package = distribution(name)
            found[name], lines = package.version.split("+")[0], package.requires or []
        needed = (Requirement(line) for line in lines)
        where = [{"extra": extra} for extra in ("", *wanted.extras)]
        todo += [r for r in needed if not r.marker or any(r.marker.evaluate(e) for e in where)]
    return dict(sorted(found.items()))


if __name__ == "__main__":
    here = f'python_version == "{sys.version_info[0]}.{sys.version_info[1]}" and sys_platform == "linux"'
    lines = (f"{name}=={version}; {here}\n" for name, version in versions().items())
    (HERE / "lock.txt").write_text(HEAD + "".join(lines))
