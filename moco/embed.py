"""A picture of an embedding: features in two dimensions by t-SNE, points coloured by class.

Legend: N points, F feature width.
"""

from __future__ import annotations

import numpy as np


def tsne(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """(N, F) features to (N, 2) by t-SNE (van der Maaten and Hinton, 2008) on cosine distances; N of at least 4."""
    from sklearn.manifold import TSNE

    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    perplexity = min(30.0, (len(unit) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(unit)


def picture(panels: list[tuple[str, np.ndarray, np.ndarray]], classes: list[str], path: str) -> None:
    """Write a PNG with one scatter plot a panel.

    Args:
        panels: (title, (N, 2) points, (N,) labels).
        classes: names for the legend, by label.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 6), squeeze=False)
    colours = plt.get_cmap("tab10" if len(classes) <= 10 else "tab20")
    for axis, (title, points, labels) in zip(axes[0], panels, strict=True):
        for label, name in enumerate(classes):
            mine = points[labels == label]
            axis.scatter(mine[:, 0], mine[:, 1], s=8, color=colours(label % colours.N), label=name)
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
    if len(classes) <= 20:
        axes[0][-1].legend(markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
