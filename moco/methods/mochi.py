"""MoCHi: Hard Negative Mixing for Contrastive Learning, arXiv 2010.01028.

The paper's triple (N, s, s') is ``n_hard`` and the two counts. n, n_a, n_b are rows of the query's N hardest.

====  =============  =======  ==========================  ===========
type  kind           count    u, before normalisation     coefficient
====  =============  =======  ==========================  ===========
1     mixup          s        g n_a + (1 - g) n_b         g ~ U(0, 1)
2     interpolation  s'       a q + (1 - a) n             a ~ U(0, .5)
====  =============  =======  ==========================  ===========
"""

from moco.config import MoCHiConfig
from moco.methods.negatives import Recipe, synthetic


def recipe(config: MoCHiConfig | None = None) -> Recipe:
    """s negatives of type 1 and s2 of type 2 a query."""
    c = config or MoCHiConfig()
    return synthetic("mixup", c.s), synthetic("interpolation", c.s2)
