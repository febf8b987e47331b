"""SimCLR: A Simple Framework for Contrastive Learning, arXiv 2002.05709. The same: views of one image."""

from functools import partial

from moco.config import InBatchConfig
from moco.methods import losses


def loss(config: InBatchConfig) -> losses.Loss:
    """NT-Xent, multiplied by T / base_temperature as SupContrast's SimCLR is; None for the paper's."""
    return partial(losses.supcon, base_temperature=config.base_temperature)
