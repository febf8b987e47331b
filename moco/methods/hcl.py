"""HCL: Contrastive Learning with Hard Negative Samples, arXiv 2010.04592. The same: views of one image."""

from functools import partial

from moco.config import InBatchConfig
from moco.methods import losses

supervised = False


def loss(config: InBatchConfig) -> losses.Loss:
    """Negatives count by e^{beta s / T}, corrected for a share ``tau_plus`` of them that are positives."""
    return partial(losses.hcl, beta=config.beta, tau_plus=config.tau_plus, estimator=config.estimator)
