"""SimCLR: A Simple Framework for Contrastive Learning, arXiv 2002.05709. The same: views of one image."""

from functools import partial

from moco.methods import losses

supervised = False


def loss(base_temperature: float | None = 0.07) -> losses.Loss:
    """NT-Xent, multiplied by T / base_temperature as SupContrast's SimCLR is; None for the paper's."""
    return partial(losses.supcon, base_temperature=base_temperature)
