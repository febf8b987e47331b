"""From image files to batches of two views: sources, views, datasets, loaders. Its names stand in public.py.

They are imported when the first of them is used: ``python -m moco.data`` answers a wrong flag before it imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moco.data.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        return getattr(importlib.import_module("moco.data.public"), name)
