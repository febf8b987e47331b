"""SimCLR: A Simple Framework for Contrastive Learning, arXiv 2002.05709. The same: views of one image.

NT-Xent is SupCon's loss of such positives, multiplied by T / base_temperature as SupContrast's SimCLR is.
"""

from moco.methods.supcon import loss  # noqa: F401
