"""The panels as PNG, by matplotlib: for papers, and for a page without plotly."""

from __future__ import annotations

import base64
import io
import os
from typing import Any

import numpy as np

from moco import files
from moco.pictures.lettering import lettering, plain
from moco.report.curves import Line, Panel, curves, time_unit

_DASHES = ("-", "--", ":", "-.")
_MOST_NAMES = 12  # in a legend


def figure(panel: Panel, lines: list[Line], align: str) -> Any:
    """A matplotlib figure of a panel; None where no line says where it is on this axis."""
    from matplotlib.figure import Figure  # not pyplot's: no screen is needed

    drawn = [curve for curve in curves(panel, lines) if curve.x[align] is not None]
    if not drawn:
        return None
    found = Figure(figsize=(6, 3.6), layout="constrained")
    axes = found.subplots()
    latest = max(float(x[-1]) for curve in drawn if (x := curve.x[align]) is not None and len(x))
    seconds, unit = time_unit(latest) if align == "time" else (1.0, f"{align}s")
    named: set[int] = set()
    for curve in drawn:
        label = "_" if curve.line in named else plain(lines[curve.line].name)
        named.add(curve.line)
        dots = "." if np.isfinite(curve.y).sum() <= 30 else ""
        axes.plot(np.asarray(curve.x[align]) / seconds, curve.y, dots + _DASHES[curve.dash % 4], linewidth=1.4,
                  color=lines[curve.line].colour[0], label=label)  # fmt: skip
    for label, dash in {curve.label: curve.dash for curve in drawn if curve.label}.items():
        axes.plot([], [], _DASHES[dash % 4], color="0.4", label=label)
    if panel.level:
        axes.axhline(panel.level[0], color="0.5", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(panel.level[1], (0, panel.level[0]), xycoords=axes.get_yaxis_transform(), ha="left", va="bottom",
                      fontsize=8, color="0.4")  # fmt: skip
    axes.set(xlabel=unit, ylabel=panel.unit, title=plain(panel.title))
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if len(named) + len(set(panel.names.values())) > 2 and len(named) <= _MOST_NAMES:
        axes.legend(fontsize=8, loc="best")
    return found


def write(folder: str, sections: dict[str, tuple[list[Panel], list[Line]]], align: str) -> list[str]:
    """Write every panel as ``LOG_KEY.png`` (log_loss_ratio.png) into a folder; the paths."""
    paths = []
    with lettering():
        for log, (panels, lines) in sections.items():
            for panel in panels:
                if found := figure(panel, lines, align):
                    path = os.path.join(folder, f"{log}_{panel.key}.png")
                    files.write_figure(found, path, "--figures")
                    paths.append(path)
    return paths


def uri(panel: Panel, lines: list[Line], align: str) -> str:
    """A panel as a data URI; empty where there is nothing to draw."""
    png = io.BytesIO()
    with lettering():
        found = figure(panel, lines, align)
        if found is None:
            return ""
        found.savefig(png, format="png", dpi=100)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
