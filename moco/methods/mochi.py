"""MoCHi: Hard Negative Mixing for Contrastive Learning, arXiv 2010.01028.

The paper's triple (N, s, s') is ``n_hard`` and the two counts. n, n_a, n_b are rows of the query's N hardest.

====  =============  =======  ==========================  ===========
type  kind           count    u, before normalisation     coefficient
====  =============  =======  ==========================  ===========
1     mixup          s        g n_a + (1 - g) n_b         g ~ U(0, 1)
2     interpolation  s'       a q + (1 - a) n             a ~ U(0, .5)
====  =============  =======  ==========================  ===========
"""

from moco.methods.negatives import Recipe, synthetic


def recipe(s: int = 512, s2: int = 256, start_epoch_1: int = 0, start_epoch_2: int = 0) -> Recipe:
    """s negatives of type 1 and s2 of type 2 a query; each may start at an epoch of its own."""
    return (
        synthetic("mixup", s, start_epoch=start_epoch_1),
        synthetic("interpolation", s2, start_epoch=start_epoch_2),
    )
