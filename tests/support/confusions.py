"""Confusion matrices as moco.pictures.confusion writes them, for tests of what counts them."""

import csv
import io

import numpy as np


def read_confusion(text: str) -> tuple[np.ndarray, list[str]]:
    """The matrix, and the names of its classes."""
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    return np.array([row[1:] for row in rows], dtype=np.int64), head[1:]
