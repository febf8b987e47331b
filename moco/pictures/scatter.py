"""Points of classes in two dimensions, as a PNG."""

from __future__ import annotations

import numpy as np

from moco import files
from moco.pictures.colours import CLASSES, colour_of
from moco.pictures.lettering import lettering, plain

SHAPES = "o^sPXDv*"  # of the points: the second ten classes have the colours of the first and another shape
IN_LEGEND = 20  # classes at most


def scatter(panels: list[tuple[str, np.ndarray, np.ndarray]], classes: list[str], path: str) -> None:
    """Write a PNG with one scatter plot a panel.

    Args:
        panels: (title, (N, 2) points, (N,) labels).
        classes: names for the legend, by label.
        path: of the PNG.
    """
    from matplotlib.figure import Figure  # not pyplot's: no screen is needed

    with lettering():
        figure = Figure(figsize=(6 * len(panels), 6))
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, points, labels) in zip(axes, panels, strict=True):
            for label, name in enumerate(classes):
                mine = points[labels == label]
                shape = SHAPES[label // len(CLASSES) % len(SHAPES)]
                axis.scatter(mine[:, 0], mine[:, 1], s=8, color=colour_of(label), marker=shape, label=plain(name))
            axis.set(title=plain(title), xticks=[], yticks=[])
        if len(classes) <= IN_LEGEND:
            axes[-1].legend(markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
        files.write_figure(figure, path, "--out")
