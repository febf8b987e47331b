"""Names of files and classes in pictures that matplotlib draws: any text, and no warning of what no font has."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from moco.errors import printable

# Behind DejaVu Sans, which comes with matplotlib: what Linux and macOS have for Chinese, Japanese and Korean.
OTHERS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Noto Sans KR", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "Arial Unicode MS",
)  # fmt: skip


def plain(name: str) -> str:
    """As matplotlib shows it: no formula between dollars, and no bytes that are not UTF-8, at which it fails."""
    return printable(name).replace("$", r"\$")


@contextlib.contextmanager
def lettering() -> Iterator[None]:
    """Figures that are made and written within have letters of every font that is installed for them, and boxes in the
    place of those that none has."""
    import matplotlib
    from matplotlib import font_manager

    there = set(font_manager.get_font_names())
    families = ["DejaVu Sans", *(name for name in OTHERS if name in there)]
    with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield
