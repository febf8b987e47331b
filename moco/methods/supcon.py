"""SupCon: Supervised Contrastive Learning, arXiv 2004.11362. The same: views of images of one class.

Without a queue the loss is here; with one (its section 4) it is ``moco.kernels.labelled_loss``, and the recipe of
synthetic negatives is another method's.
"""

from functools import partial

from moco.config import InBatchConfig
from moco.methods import losses


def loss(config: InBatchConfig) -> losses.Loss:
    """The sum over positives outside the logarithm, multiplied by T / base_temperature; None for the paper's."""
    return partial(losses.supcon, base_temperature=config.base_temperature)
