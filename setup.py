"""What pyproject.toml cannot say: where the parts of a wheel lie in a checkout, and README.md as an index shows it."""

import re
from pathlib import Path

from setuptools import find_packages, setup


def readme() -> str:
    """README.md, of its relative links and pictures only the words: on a package index they lead nowhere."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    return re.sub(r"!?\[([^]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    # moco/mains has a folder in a checkout as well, which leads to the top; in a wheel the mains themselves are there.
    packages=[*find_packages(include=["moco", "moco.*"], exclude=["moco.mains"]), "moco.recipes", "moco_detection"],
    py_modules=[f"moco.mains.main_{name}" for name in ("pretrain", "lincls", "semisup")],
    package_dir={"moco.mains": ".", "moco.recipes": "configs", "moco_detection": "detection"},
    package_data={
        "moco": ["py.typed"],
        "moco.cli": ["projects.txt"],
        "moco.pictures": ["assets/*"],
        "moco.recipes": ["*.yml", "sweeps/*.yml"],
        "moco_detection": ["configs/*.yaml"],
    },
)
