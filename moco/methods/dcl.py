"""DCL: Decoupled Contrastive Learning, arXiv 2110.06848. The same: views of one image."""

from moco.config import InBatchConfig
from moco.methods import losses


def loss(config: InBatchConfig) -> losses.Loss:
    """SimCLR's without the positive in the denominator."""
    return losses.dcl


def left_out(views: int) -> int:
    """Candidates that are in no denominator: the positives."""
    return views - 1
