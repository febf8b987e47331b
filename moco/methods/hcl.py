"""HCL: Contrastive Learning with Hard Negative Samples, arXiv 2010.04592. The same: views of one image."""

from functools import partial

from moco.methods import losses

supervised = False


def loss(beta: float = 1.0, tau_plus: float = 0.1, estimator: str = "hard") -> losses.Loss:
    """Negatives count by e^{beta s / T}, corrected for a share ``tau_plus`` of them that are positives."""
    return partial(losses.hcl, beta=beta, tau_plus=tau_plus, estimator=estimator)
