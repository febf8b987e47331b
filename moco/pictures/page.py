"""A web page in one file that loads nothing: it works offline, from a mail, and years later."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moco.errors import printable
from moco.pictures import colours

ASSETS = os.path.join(os.path.dirname(__file__), "assets")
# The policy forbids to load anything from anywhere. The empty icon keeps a server from being asked for one.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{styles}</style>
</head>
<body>
<h1>{title}</h1>
{body}
{data}{scripts}</body>
</html>
"""


def page(
    title: str, *, body: str = "", data: Any = None, scripts: Sequence[str] = (), styles: Sequence[str] = ()
) -> str:
    """The text of a page, for :func:`moco.files.write_text`.

    Args:
        title: plain text, also the heading.
        body: HTML; what comes from a user went through :func:`text`.
        data: plain values for scripts, which read ``JSON.parse(document.getElementById("data").textContent)``: strings
            as :func:`moco.errors.printable` has them, null for NaN and infinities. Scripts show them by textContent.
        scripts, styles: names of files in assets/, or paths, whose text goes into the page in this order, behind
            page.css, which has the colours (``var(--right)``) and light and dark.
    """
    sheets = [colours.style(), *(_asset(name) for name in ("page.css", *styles))]
    embedded = f'<script type="application/json" id="data">{_json(data)}</script>\n' if data is not None else ""
    return _PAGE.format(
        title=text(title), body=body, data=embedded, styles="".join(f"{sheet.rstrip()}\n" for sheet in sheets),
        scripts="".join(f"<script>\n{_asset(name).rstrip()}\n</script>\n" for name in scripts),
    )  # fmt: skip


def text(name: str) -> str:
    """Any file's or class's name as HTML, in an element or in an attribute between quotes."""
    return html.escape(printable(name))


def _asset(name: str) -> str:
    with open(os.path.join(ASSETS, name), encoding="utf-8") as file:
        found = file.read()
    assert not re.search("</(script|style)", found, re.IGNORECASE), f"{name} would end its own element"
    return found


def _json(value: Any) -> str:
    """As the text of an element script: ASCII, without "<"."""
    return json.dumps(_shown(value), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_shown(key): _shown(item) for key, item in value.items()}
    return [_shown(item) for item in value] if isinstance(value, (list, tuple)) else value
