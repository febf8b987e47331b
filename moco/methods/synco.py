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

from moco.errors import UserError
from moco.methods.negatives import Recipe, synthetic

EXTRAPOLATIONS = {"code": "extrapolation", "paper": "extrapolation-paper"}


def recipe(
    n1: int = 256,
    n2: int = 256,
    n3: int = 256,
    n4: int = 64,
    n5: int = 64,
    n6: int = 64,
    sigma: float = 0.01,
    delta: float = 0.01,
    eta: float = 0.01,
    extrapolation: str = "code",
) -> Recipe:
    """n1 .. n6 negatives of types 1 .. 6 a query."""
    if extrapolation not in EXTRAPOLATIONS:
        raise UserError(f"unknown extrapolation {extrapolation!r}; use code or paper")
    return (
        synthetic("interpolation", n1),
        synthetic(EXTRAPOLATIONS[extrapolation], n2),
        synthetic("mixup", n3),
        synthetic("noise", n4, sigma),
        synthetic("perturbation", n5, delta),
        synthetic("adversarial", n6, eta),
    )
