"""HCL: Contrastive Learning with Hard Negative Samples, arXiv 2010.04592. The same: views of one image."""

from functools import partial

from moco.config import InBatchConfig
from moco.methods import losses


def loss(config: InBatchConfig) -> losses.Loss:
    """Negatives count by e^{beta s / T}, corrected for a share ``tau_plus`` of them that are positives."""
    return partial(losses.hcl, beta=config.beta, tau_plus=config.tau_plus, estimator=config.estimator)


def left_out(views: int) -> int:
    """Candidates that are not in a positive's denominator: the other positives."""
    return views - 2
