"""What detection needs beside this package's own dependencies, and a sentence on how to install what is missing."""

from __future__ import annotations

import importlib
import warnings

from moco import resources
from moco.errors import UserError

NEEDS = f"python -m {resources.extra('detection')}"
DETECTRON2 = "python -m pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
MODULES = {
    "cv2": NEEDS,
    "pycocotools.mask": NEEDS,
    "fvcore.nn": NEEDS,
    "detectron2.engine": DETECTRON2,
    "detectron2.modeling": DETECTRON2,
}


def check() -> None:
    """Import what training needs.

    Raises:
        UserError: something is missing or does not load; the sentence names the command that installs it.
    """
    for module, command in MODULES.items():
        try:
            with warnings.catch_warnings():  # theirs, on import: functions are scripted, which torch deprecates
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        except ImportError as error:
            name = module.partition(".")[0]
            raise UserError(f"detection needs {name}, which does not import ({error}); run: {command}") from error
