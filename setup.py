"""Where the parts of a wheel lie in a checkout; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # moco/mains has a folder in a checkout as well, which leads to the top; in a wheel the mains themselves are there.
    packages=[*find_packages(include=["moco", "moco.*"], exclude=["moco.mains"]), "moco.recipes", "moco_detection"],
    py_modules=[f"moco.mains.main_{name}" for name in ("pretrain", "lincls", "semisup")],
    package_dir={"moco.mains": ".", "moco.recipes": "configs", "moco_detection": "detection"},
    package_data={
        "moco": ["py.typed"],
        "moco.recipes": ["*.yml", "sweeps/*.yml"],
        "moco_detection": ["configs/*.yaml"],
    },
)
