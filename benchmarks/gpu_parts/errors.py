"""The fused loss against float64: loss, gradient, rank and statistics, in every geometry, and twice the same bits."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from moco.config import SynCoConfig
from moco.kernels.spec import LossOutput
from moco.methods import synco

from . import clock
from .findings import Findings
from .problems import CASES, DRY, Case, Problem, both_passes, make, parents_of, same_bits

# Loss and gradient, relative, at T 0.2; errors of similarities grow with 1 / T and enter an exponent.
LIMITS = {"fp32": (1e-5, 1e-4), "tf32x3": (1e-5, 1e-4), "tf32": (2e-3, 5e-3), "bf16": (5e-3, 2e-2)}


def run(found: Findings) -> None:
    worst: dict[str, float] = {}
    for case in CASES:
        if found.dry and case.name not in DRY:
            continue
        with found.guarded(case.name):
            case = case.tiny() if found.dry else case
            p = make(case, found.device, len(case.name))
            of_gradient = judged(found, case, p)
            scale = max(1.0, 0.2 / case.temperature) ** 2
            worst[case.precision] = max(worst.get(case.precision, 0.0), of_gradient / scale)
    for precision, value in worst.items():
        found.note(f"worst gradient error, {precision}", value)
    not_numbers(found)
    if not found.dry:
        large(found)


def judged(found: Findings, case: Case, p: Problem) -> float:
    """A row about one case; the gradient's relative error."""
    how = {"precision": case.precision, "temperature": case.temperature}
    clock.poison(found.device)
    ours = both_passes(p, **how)
    clock.poison(found.device)
    same = same_bits(ours, both_passes(p, **how))
    with parents_of(p, case.precision):
        gold = both_passes(p.double(), "reference", temperature=case.temperature)
    of_loss, of_gradient, of_rest, ranks = differences(ours, gold)
    scale = max(1.0, 0.2 / case.temperature) ** 2
    loss_limit, limit = (most * scale for most in LIMITS[case.precision])
    good = of_loss <= loss_limit and max(of_gradient, of_rest) <= limit and same
    good = good and (ranks <= 0.02 * case.n or case.precision != "fp32")
    told = f"loss {of_loss:.1e}, gradient {of_gradient:.1e}, statistics {of_rest:.1e}, ranks off {ranks}/{case.n}"
    found.note(f"error, {case.name}", told + ", twice the same bits" * same, good=good)
    if case.n * case.total <= 1 << 24 and case.precision == "fp32":  # where the other implementation is cheap
        against_forms(found, case, ours[1], both_passes(p, "cpu", **how)[1], limit)
    return of_gradient


def against_forms(found: Findings, case: Case, ours: Tensor, forms: Tensor, limit: float) -> None:
    """Query by query: in other groups the library rounds otherwise, a row at the edge of a query's set may be another
    one, and all of its draws behind that slot are then others."""
    apart = (ours - forms).norm(dim=1) / forms.norm(dim=1).clamp(min=1e-9)
    others, middle = int((apart > limit).sum()), float(apart.median())
    told = f"apart in the middle query's gradient, {others} of {case.n} above {limit:.0e}"
    found.note(f"closed forms, {case.name}", middle, told, middle <= limit and others <= max(1, 0.02 * case.n))


def differences(ours: tuple[LossOutput, Tensor], gold: tuple[LossOutput, Tensor]) -> tuple[float, float, float, int]:
    """Of the loss and of the gradient, relative; of the statistics, absolute; how many ranks are others."""
    (head, gradient), (exact, exact_gradient) = ours, gold
    of_loss = abs(float(head.loss) - float(exact.loss)) / max(abs(float(exact.loss)), 1e-6)
    of_gradient = float((gradient - exact_gradient).norm() / exact_gradient.norm().clamp(min=1e-9))
    rest = [abs(float(getattr(head, name)) - float(getattr(exact, name))) for name in ("hardest", "synthetic_mass")]
    return of_loss, of_gradient, max(rest), int((head.rank != exact.rank).sum())


def not_numbers(found: Findings) -> None:
    """NaN in, NaN out; a query that has left out everything costs nothing."""
    small = Case("", 8, 512, 32, 32, synco.recipe(SynCoConfig(9, 9, 9, 3, 3, 3)))
    small = small.tiny() if found.dry else small
    with found.guarded("NaN in, NaN out"):
        p = make(small, found.device)
        p.q[1, 2] = math.nan
        found.note("NaN in, NaN out", good=math.isnan(float(both_passes(p)[0].loss)), value="")
    with found.guarded("everything left out"):
        p = make(replace(small, masked=True), found.device)
        p = p._replace(masks={name: torch.zeros_like(ids) for name, ids in p.masks.items()})
        head, gradient = both_passes(p)
        found.note("everything left out", "", good=float(head.loss) == 0 and float(gradient.abs().max()) == 0)


def large(found: Findings) -> None:
    """The last queries of a matrix of more than 2^31 elements get what they get by themselves."""
    with found.guarded("offsets beyond 2^31"):
        case = Case("", 1032, (1 << 21) + 16, recipe=synco.recipe(SynCoConfig(64, 64, 64, 16, 16, 16)))
        p = make(case, found.device)
        head, gradient = both_passes(p, precision="fp32")
        few, few_gradient = both_passes(p.rows(case.n - 4, case.n), precision="fp32")
        apart = float((gradient[-4:] * case.n - few_gradient * 4).norm() / (few_gradient * 4).norm())
        ranks = int((head.rank[-4:] - few.rank).abs().max())
        found.note("offsets beyond 2^31", f"gradient {apart:.1e}, ranks {ranks} apart", good=apart < 1e-3 and ranks < 8)
