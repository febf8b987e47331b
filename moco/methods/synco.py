"""SynCo: Synthetic Hard Negatives in Contrastive Learning, arXiv 2410.02401.

n, n_a, n_b are rows of the query's ``n_hard`` hardest; e ~ N(0, I).

====  =============  =====  ==========================  =================
type  kind           count  u, before normalisation     coefficient
====  =============  =====  ==========================  =================
1     interpolation  n1     a q + (1 - a) n             a ~ U(0, .5)
2     extrapolation  n2     q + b (n - q)               b ~ U(1, 1.5)
3     mixup          n3     g n_a + (1 - g) n_b         g ~ U(0, 1)
4     noise          n4     n + sigma e                 sigma
5     perturbation   n5     n + delta d(q.n)/dn         delta; that is q
6     adversarial    n6     n + eta sgn(d(q.n)/dn)      eta; that is sgn(q)
====  =============  =====  ==========================  =================

Type 2 is what SynCo's code computes; its text has n + b (n - q), which ``extrapolation="paper"`` gives.
"""

from moco.config import SynCoConfig
from moco.errors import UserError
from moco.methods.negatives import Recipe, synthetic

EXTRAPOLATIONS = {"code": "extrapolation", "paper": "extrapolation-paper"}


def recipe(config: SynCoConfig | None = None) -> Recipe:
    """n1 .. n6 negatives of types 1 .. 6 a query."""
    c = config or SynCoConfig()
    if c.extrapolation not in EXTRAPOLATIONS:
        raise UserError(f"unknown extrapolation {c.extrapolation!r}; use code or paper")
    return (
        synthetic("interpolation", c.n1),
        synthetic(EXTRAPOLATIONS[c.extrapolation], c.n2),
        synthetic("mixup", c.n3),
        synthetic("noise", c.n4, c.sigma),
        synthetic("perturbation", c.n5, c.delta),
        synthetic("adversarial", c.n6, c.eta),
    )
