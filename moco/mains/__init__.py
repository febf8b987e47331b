"""The three mains as modules, for moco.console: moco.mains.main_pretrain and its like.

A wheel has them in this folder, a checkout at its top: see setup.py.
"""

from moco.resources import MAINS

__path__ = [str(MAINS)]
