"""Recipes of synthetic hard negatives, as data, and the draws they ask for.

Legend: N queries, C feature width, H hardest rows a query, S synthetic negatives a query.

Every synthetic negative is h = u / |u| with u = x q + y n_a + z n_b + w e + v sgn(q); n_a and n_b are drawn uniformly
and with replacement from the query's hardest rows, e ~ N(0, I). A kind says how one coefficient c becomes the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from moco import seeding
from moco.config import MoCoConfig
from moco.errors import UserError
from moco.kernels import draws as by_counters
from moco.kernels.spec import Draws
from moco.methods.controls import copies, rows_of
from moco.methods.registry import CONTROLS, METHODS


@dataclass(frozen=True)
class Kind:
    """One type of synthetic negative: its group in ``Draws`` and the weights its coefficient c gives."""

    group: str  # query | pair | sign | noise
    weights: Callable[[Tensor], tuple[Tensor, ...]]  # c -> (x, y), (y, z), (v,) or (w,) by group
    low: float  # c ~ U(low, high) unless a recipe says otherwise
    high: float
    stream: int  # of its randomness


KINDS = {
    "mixup": Kind("pair", lambda c: (c, 1 - c), 0.0, 1.0, 1),  # c n_a + (1-c) n_b
    "interpolation": Kind("query", lambda c: (c, 1 - c), 0.0, 0.5, 2),  # c q + (1-c) n: the query weighs less
    "extrapolation": Kind("query", lambda c: (1 - c, c), 1.0, 1.5, 3),  # q + c (n - q), SynCo's code
    "extrapolation-paper": Kind("query", lambda c: (-c, 1 + c), 1.0, 1.5, 3),  # n + c (n - q), SynCo's text
    "noise": Kind("noise", lambda c: (c,), 0.01, 0.01, 4),  # n + c e
    "perturbation": Kind("query", lambda c: (c, torch.ones_like(c)), 0.01, 0.01, 5),  # n + c q: d(q.n)/dn = q
    "adversarial": Kind("sign", lambda c: (c,), 0.01, 0.01, 6),  # n + c sgn(q)
}
GROUPS = {  # in the column order of Draws, with the names of their weights there
    "query": ("query_x", "query_y"),
    "pair": ("pair_y", "pair_z"),
    "sign": ("sign_v",),
    "noise": ("noise_w",),
}


@dataclass(frozen=True)
class Synthetic:
    """``count`` negatives a query of one kind, coefficients from U(low, high), active once both starts are reached."""

    kind: str
    count: int
    low: float
    high: float
    start_epoch: int = 0
    start_step: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"unknown kind of synthetic negative {self.kind!r}; use one of {', '.join(KINDS)}")
        if self.count < 0:
            raise UserError(f"{self.count} negatives of kind {self.kind}: give a count of 0 or more")
        if not self.low <= self.high:
            raise UserError(f"coefficients of {self.kind} from {self.low} to {self.high}: give the smaller one first")


Recipe = tuple[Synthetic, ...]


def group_counts(recipe: Recipe, control: str | None = None) -> tuple[int, int, int, int]:
    """Negatives a query in each group of ``Draws``, all rows active."""
    sizes = by_counters.group_sizes(counted(recipe))
    return (sum(sizes), 0, 0, 0) if control else sizes


def in_columns(recipe: Recipe) -> Recipe:
    """The rows of a recipe in the order of their columns in ``Draws``."""
    return tuple(sorted(recipe, key=lambda row: list(GROUPS).index(KINDS[row.kind].group)))


def synthetic(kind: str, count: int, constant: float | None = None) -> Synthetic:
    """A row of a recipe with the published range of its kind, or with the ``constant``."""
    if constant is None and kind in KINDS:
        return Synthetic(kind, count, KINDS[kind].low, KINDS[kind].high)
    return Synthetic(kind, count, constant or 0.0, constant or 0.0)


def starting_at(recipe: Recipe, epochs: Mapping[str, int], steps: Mapping[str, int]) -> Recipe:
    """The same rows, each from its kind's first epoch or step; a kind is called alike in both of SynCo's versions."""
    return tuple(
        replace(row, start_epoch=epochs.get(kind, 0), start_step=steps.get(kind, 0))
        for row, kind in ((row, row.kind.removesuffix("-paper")) for row in recipe)
    )


def active(recipe: Iterable[Synthetic], epoch: int, start: int = 0, stop: int | None = None, step: int = 0) -> Recipe:
    """The rows in use in an optimizer step of ``epoch``: absolute epochs [start, stop), never stopping for None, each
    from its own start. ``step`` counts from the run's first, 0."""
    if epoch < start or (stop is not None and epoch >= stop):
        return ()
    return tuple(row for row in recipe if row.count > 0 and epoch >= row.start_epoch and step >= row.start_step)


def draw(
    recipe: Iterable[Synthetic], n: int, hard: int, dim: int, key: int, device: torch.device | str = "cpu"
) -> Draws | None:
    """The draws of ``recipe`` for n queries, slots in [0, hard), noise of width dim; None when nothing is drawn.

    A function of its arguments alone, and of whether a GPU draws: there one launch draws all (moco/kernels/draws.py).
    Each kind has a stream of its own, keyed on (``key``, kind), so that two recipes that differ in one kind give all
    others the same coefficients, parents and noise: an ablation is paired. Both extrapolations are one kind here.
    Tensors are float32; inside a group the columns follow the recipe's order.
    """
    rows = tuple(row for row in recipe if row.count > 0)
    if not rows:
        return None
    if by_counter(device):
        return by_counters.draw(counted(rows), n, hard, dim, seeding.key("kind", key) >> 1, torch.device(device))
    parts = {field.name: [torch.empty(n, 0, device=device)] for field in fields(Draws)}
    parts |= {name: [torch.empty(n, 0, dtype=torch.int64, device=device)] for name in ("slots_a", "slots_b")}
    parts["noise"] = [torch.empty(n, 0, dim, device=device)]
    of_group = [list(GROUPS).index(KINDS[row.kind].group) for row in rows]
    for _, row, stream in sorted(zip(of_group, rows, streams(rows), strict=True), key=lambda entry: entry[0]):
        generator = seeding.torch_generator("kind", key, *stream, device=device)
        for name, drawn in _draw_row(row, n, hard, dim, generator).items():
            parts[name].append(drawn)
    return Draws(**{name: found[1] if len(found) == 2 else torch.cat(found, 1) for name, found in parts.items()})


def by_counter(device: torch.device | str) -> bool:
    """Whether a device draws by moco/kernels/draws.py."""
    return torch.device(device).type == "cuda"


def streams(recipe: Recipe) -> list[tuple[int, int]]:
    """The stream of each row's randomness, and which of its rows this is: a second row of a kind draws anew."""
    numbers = [KINDS[row.kind].stream for row in recipe]
    return [(number, numbers[:i].count(number)) for i, number in enumerate(numbers)]


@functools.lru_cache(64)
def counted(recipe: Recipe) -> tuple[by_counters.Row, ...]:
    """The rows of a recipe as numbers; their weights are straight lines in the coefficient."""
    found: list[by_counters.Row] = []
    for row, (stream, again) in zip(recipe, streams(recipe), strict=True):
        kind = KINDS[row.kind]
        lines = tuple((float(w[1] - w[0]), float(w[0])) for w in kind.weights(torch.tensor([0.0, 1.0])))
        group = list(GROUPS).index(kind.group)
        found.append(by_counters.Row(group, stream << 16 | again, row.count, row.low, row.high, lines))
    return tuple(found)


def _draw_row(row: Synthetic, n: int, hard: int, dim: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The draws of one row of a recipe by their names in ``Draws``, each (N, count), noise (N, count, C)."""
    kind, shape, like = KINDS[row.kind], (n, row.count), {"generator": generator, "device": generator.device}
    drawn = {name: torch.randint(hard, shape, **like) for name in ("slots_a", "slots_b")[: 1 + (kind.group == "pair")]}
    if row.low == row.high:
        c = torch.full(shape, row.low, device=generator.device)
    else:
        c = torch.rand(shape, **like).mul_(row.high - row.low).add_(row.low)
    if kind.group == "noise":
        drawn["noise"] = torch.randn(*shape, dim, **like)
    return drawn | dict(zip(GROUPS[kind.group], kind.weights(c), strict=True))


@dataclass(frozen=True)
class HardNegatives:
    """The hook that a method with synthetic negatives fills: which draws a batch gets.

    Active in epochs [start, stop). Draws are keyed on (seed, number of the batch, rank, kind), so a resumed run, a run
    without one of the kinds and every implementation of the loss get the same ones. With a ``control`` the recipe says
    how many copies of queue rows there are and from when on, see :mod:`moco.methods.controls`.
    """

    recipe: Recipe
    hard: int  # H, of a control the rows that it copies from
    dim: int  # C
    seed: int
    rank: int
    device: torch.device
    start: int = 0
    stop: int | None = None
    control: str | None = None

    @classmethod
    def of(cls, config: MoCoConfig, seed: int, rank: int, device: torch.device) -> HardNegatives:
        """The hook of a config, of no rows where its method has none; ``hard`` is the loss's ``n_hard``.

        Raises:
            UserError: a control that deals out all copies at once, with kinds that start apart.
        """
        n = config.negatives
        recipe = starting_at(METHODS[n.method].hooks.recipe(n.recipe), n.kind_epochs, n.kind_steps)
        rows = [row for row in recipe if row.count]
        if n.control == "reweight" and len({(row.start_epoch, row.start_step) for row in rows}) > 1:
            raise UserError(
                "--control reweight weighs one set of rows, but by --type-starts the kinds begin apart; leave "
                "--type-starts out, or take --control hardest."
            )
        hard = rows_of(n.control if rows else None, config.n_hard, config.K, sum(row.count for row in rows))
        return cls(recipe, hard, config.C, seed, rank, device, n.start_epoch, n.stop_epoch, n.control)

    def __call__(self, n: int, epoch: int, number: int, step: int = 0) -> Draws | None:
        """Draws for n queries of batch ``number``, of ``step`` in ``epoch``; None while no kind is active."""
        rows = active(self.recipe, epoch, self.start, self.stop, step)
        draws = draw(rows, n, self.hard, self.dim, seeding.key("draws", self.seed, number, self.rank), self.device)
        if draws is None or self.control is None:
            return draws
        return copies(draws, dealt=self.hard if self.control == "reweight" else 0)

    def summary(self) -> str:
        """The recipe and its epochs, for the log."""
        kinds = ", ".join(f"{row.kind} {row.count}{_start(row)}" for row in self.recipe if row.count)
        until = "the end" if self.stop is None else f"epoch {self.stop - 1}"
        when = f"from epoch {self.start} (counted from 0) to {until}"
        kinds = kinds or "none, all counts are 0"
        if self.control:
            rows = CONTROLS[self.control].format(hard=self.hard)
            copied = f"{sum(row.count for row in self.recipe)} copies per query of {rows}"
            return f"control {self.control}: in place of synthetic negatives ({kinds}) {copied}, {when}"
        return f"synthetic negatives per query, from its {self.hard} hardest queue rows, {when}: {kinds}"

    def missed(self, steps: int, per_epoch: int) -> list[str]:
        """The kinds that never start in a run of so many steps, ``per_epoch`` in an epoch."""
        end = steps if self.stop is None else min(steps, self.stop * per_epoch)
        firsts = [max(per_epoch * max(self.start, row.start_epoch), row.start_step) for row in self.recipe]
        return [row.kind for row, first in zip(self.recipe, firsts, strict=True) if row.count and first >= end]


def _start(row: Synthetic) -> str:
    step = f" (from step {row.start_step})" if row.start_step else ""
    return f" (from epoch {row.start_epoch})" if row.start_epoch else step


def sentences(extra: object, steps: int, per_epoch: int, earlier: int | None = None) -> list[str]:
    """What the log of a run says of its synthetic negatives at the start, with a warning of kinds that never start.

    Args:
        extra: the model's hook; any other than :class:`HardNegatives` is of no recipe.
        steps, per_epoch: of the whole run, and of an epoch.
        earlier: a first epoch that would fit the run, for the warning.
    """
    if not isinstance(extra, HardNegatives):
        return []
    missed = extra.missed(steps, per_epoch)
    if not missed:
        return [extra.summary()]
    every = len(missed) == sum(row.count > 0 for row in extra.recipe)
    which = "the synthetic negatives" if every else f"negatives by {', '.join(missed)}"
    ends = f"this run ends after {steps} steps ({per_epoch} per epoch)"
    flags = "lower --hard-start-epoch (--warmup-epochs) or --type-starts, or raise --hard-stop-epoch"
    if earlier is not None and every and earlier < extra.start:
        flags = f"give --hard-start-epoch {earlier} (--warmup-epochs), or leave it to --auto"
    return [extra.summary(), f"warning: {which} never start, as {ends}; {flags}"]
