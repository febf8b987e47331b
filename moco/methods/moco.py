"""MoCo: Momentum Contrast, arXiv 1911.05722; v2, arXiv 2003.04297. The negatives are the queue and nothing else."""

from moco.methods.negatives import Recipe


def recipe(config: None = None) -> Recipe:
    """No synthetic negatives."""
    return ()
