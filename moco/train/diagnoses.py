"""What looks wrong in a run, and the flag that helps: judged from the numbers of the log alone, so that a recorded run
can be judged again. Each diagnosis is made once, and none that follows from an earlier one.

The table of docs/looking.md has them all, and docs/experiments.md the runs on which the bounds were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moco.config import typed
from moco.train.metrics import Mean

COLLAPSE, ABOVE, LEAK, STALE, FALSE, STILL, STARVED = DIAGNOSES = (
    "collapse", "loss above chance", "leaking BatchNorm", "stale queue", "false negatives", "k-NN does not move",
    "starved loader",
)  # fmt: skip
CAUSES = {  # what explains a sign as well, and is to be mended first
    COLLAPSE: (LEAK,),
    ABOVE: (COLLAPSE,),
    LEAK: (COLLAPSE,),
    STALE: (COLLAPSE, LEAK),
    FALSE: (COLLAPSE,),
    STILL: (COLLAPSE, ABOVE, LEAK, FALSE),
}
SPREAD = 0.05  # feature_std of a collapse; 1 is even
WORST = 1.6  # loss_ratio; synthetic negatives alone bring it above 1
LEAKED, ALL = 35.0, 90.0  # top1 in the first tenth of a run, or its first three epochs, where features do not spread
NARROW = 0.4  # (feature_std), or whatever they do
RISE, FALL, AGE = 0.03, 0.5, 0.1  # of loss_ratio; top1, at most this share of what it was; of old_mass
FALSE_SHARE, FALSE_MORE = 0.6, 0.15  # of the hardest rows, and by how much more than chance
VALIDATIONS, RISEN, POINTS = 4, 5.0, 2.0  # k-NN accuracy: how many, since the first, above an untrained network's
LOSS_MOVED = 0.02  # of loss_ratio
FEW = 3  # images that share BatchNorm's statistics
WAITED, WORTH = 0.4, 60.0  # share of two epochs in succession, with so many seconds of the run left


@dataclass(frozen=True)
class Setting:
    """What the sentences need of a run besides its reports.

    Args:
        flags: the settings by their flags, without dashes and with underscores.
        total_steps: of the whole run.
        chance: the formula of the loss of guessing.
        may_leak: BatchNorm may tell which key is a query's: keys are not shuffled, in a method with a queue.
        alike: the share of all pairs of images that are of one class; None where negatives have no labels.
        guess: percent of held-out images in the largest class: the k-NN accuracy of guessing.
        class_size: labelled training images of an average class.
        together: images whose statistics BatchNorm shares.
        loader: what would feed a starved run, asked when it is needed.
    """

    flags: Mapping[str, Any] = field(default_factory=dict)
    total_steps: int = 0
    chance: str = "chance"
    may_leak: bool = False
    alike: float | None = None
    guess: float = 0.0
    class_size: float = math.inf
    together: float = math.inf
    loader: Callable[[], str] = str

    def here(self, flag: str) -> str:
        """The flag and its present value."""
        return f"{flag} (here {typed(self.flags.get(flag.removeprefix('--').replace('-', '_')))})"


class EpochMeans(NamedTuple):
    """The means of an epoch's reports, NaN where there are none."""

    epoch: int
    step: int  # its last
    loss_ratio: float
    top1: float
    feature_std: float
    old_mass: float
    false_negatives: float
    synthetic_mass: float
    wait_share: float
    eta_seconds: float

    def early(self, total_steps: int) -> bool:
        """Whether it ended in the first tenth of the run."""
        return 10 * self.step < total_steps


MEANS = EpochMeans._fields[2:]


class Diagnoses:
    """Told of every report and validation; each answer is what to say of it, mostly nothing. A run that is resumed
    begins anew."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.told: dict[str, str] = {}
        self.means = {name: Mean() for name in MEANS}
        self.epochs: list[EpochMeans] = []
        self.knn: list[float] = []
        self.untrained: float | None = None  # k-NN accuracy of the untrained network, once it was asked for

    def fresh(self, found: Mapping[str, str]) -> list[str]:
        """The sentences that are new and no consequence of others; of a moment's signs the cause comes first."""
        said = []
        for name in DIAGNOSES:
            if found.get(name) and not {name, *CAUSES.get(name, ())} & self.told.keys():
                self.told[name] = found[name]
                said.append(found[name])
        return said

    def report(self, epoch: int, values: Mapping[str, float]) -> list[str]:
        """A report of ``epoch``, by the names of the log."""
        for name, mean in self.means.items():
            mean.add(values.get(name, math.nan))
        if epoch == 0:  # it may look like anything
            return []
        return self.fresh(
            {COLLAPSE: collapsed(values, epoch, self.setting), ABOVE: above_chance(values, epoch, self.setting)}
        )

    def epoch_ended(self, epoch: int, step: int, changed: bool = False) -> list[str]:
        """``epoch`` has ended at ``step``. changed: in it the loss became another, as negatives began or stopped."""
        now = EpochMeans(epoch, step, *(mean.value for mean in self.means.values()))
        self.means = {name: Mean() for name in MEANS}
        self.epochs = [*([] if changed else self.epochs), now]
        own = self.setting
        return self.fresh({
            LEAK: leaking(now, own), STALE: stale(self.epochs, own), FALSE: false_negatives(now, own),
            STARVED: starved(self.epochs, own),
        })  # fmt: skip

    def validated(self, step: int, knn: float, untrained: Callable[[], float]) -> list[str]:
        """The k-NN accuracy at ``step``, percent. ``untrained``: measures that of an untrained network, once, where the
        accuracies alone say that nothing moves; it is called on all processes or on none."""
        self.knn.append(knn)
        if 5 * step < self.setting.total_steps or not unmoved(self.knn):
            return []
        if self.untrained is None:
            self.untrained = untrained()
        return self.fresh({STILL: still(self.knn, self.untrained, self.epochs, self.setting)})


def collapsed(values: Mapping[str, float], epoch: int, own: Setting) -> str:
    """All queries are one vector."""
    if not values["feature_std"] < SPREAD:
        return ""
    return (
        f"all queries look the same, the encoder has collapsed: feature_std is {values['feature_std']:.3f} in epoch "
        f"{epoch} (1 is even, below {SPREAD:g} is a collapse). Lower {own.here('--lr')} or "
        f"{own.here('--wd')}, and go back to a checkpoint from before it."
    )


def above_chance(values: Mapping[str, float], epoch: int, own: Setting) -> str:
    """The loss is worse than guessing's, by more than synthetic negatives explain."""
    if not values["loss_ratio"] > WORST:
        return ""
    return (
        f"the loss is worse than guessing: {values['loss_ratio']:.2f} of {own.chance} in epoch {epoch} (below 1 is "
        f"normal, up to {WORST:g} with synthetic negatives). Lower {own.here('--lr')} or raise "
        f"{own.here('--moco-t')}."
    )


def leaking(now: EpochMeans, own: Setting) -> str:
    """Keys are found at once, by BatchNorm's statistics."""
    beginning = now.epoch < 3 or now.early(own.total_steps)
    at_once = now.top1 >= ALL or (now.top1 >= LEAKED and now.feature_std < NARROW)
    if not own.may_leak or not beginning or now.epoch == 0 or not at_once:
        return ""
    flags = own.flags
    cure = f"give a --batch-size that is a multiple of 8 (here {flags.get('batch_size', '?')})"
    if not flags.get("shuffle_bn", True):
        cure = "leave out --no-shuffle-bn (here --shuffle-bn is off)"
    elif flags.get("bn_splits") is not None:
        cure = f"leave out {own.here('--bn-splits')}"
    return (
        f"top1 is {now.top1:.0f} % already in epoch {now.epoch} (below {LEAKED:g} so early where nothing leaks), "
        f"feature_std {now.feature_std:.2f} (1 is even): keys are not shuffled, so BatchNorm's statistics tell which "
        f"key is a query's. To shuffle them, {cure}."
    )


def stale(epochs: list[EpochMeans], own: Setting) -> str:
    """The loss was low only because old keys could be told from new ones by their age, and rises as they no longer can:
    the epoch differs so from the one with the lowest loss. The beginning of a run says nothing yet."""
    judged = [
        e for e in epochs
        if e.epoch and not e.early(own.total_steps) and not math.isnan(e.loss_ratio + e.top1 + e.old_mass)
    ]  # fmt: skip
    if epochs[-1] not in judged:
        return ""
    now, was = epochs[-1], min(judged, key=lambda e: e.loss_ratio)
    older = now.old_mass - was.old_mass >= AGE and now.top1 <= FALL * was.top1
    if not older or now.loss_ratio - was.loss_ratio < RISE:
        return ""
    return (
        f"since epoch {was.epoch} the loss has risen from {was.loss_ratio:.3f} to {now.loss_ratio:.3f} of {own.chance} "
        f"and top1 has fallen from {was.top1:.1f} to {now.top1:.1f}: the queue was stale, its old keys were told from "
        f"new ones by their age (its older half had {100 * was.old_mass:.0f} % of the softmax mass, now "
        f"{100 * now.old_mass:.0f} %; 50 % is even). Raise {own.here('--moco-m')} or lower --lr."
    )


def false_negatives(now: EpochMeans, own: Setting) -> str:
    """The rows that synthetic negatives are made from are mostly no negatives."""
    if own.alike is None or not now.synthetic_mass > 0:
        return ""
    if not now.false_negatives >= max(FALSE_SHARE, own.alike + FALSE_MORE):
        return ""
    hard, rows = own.flags.get("n_hard", 0), own.flags.get("moco_k", 0)
    flag = f"N of --mochi (here {hard})" if own.flags.get("negatives") == "mochi" else own.here("--n-hard")
    wanted = math.ceil(2 * own.alike * rows)  # of them at most half can be of a class
    made = "copies of hard rows" if own.flags.get("control") else "synthetic negatives"
    labels = f"end the {made} earlier (--hard-stop-epoch) or use the labels (--method supcon)"
    cure = f"With classes so large no {flag} avoids it: {labels}"
    if hard < wanted <= rows // 2:
        cure = f"Raise {flag} to {wanted} or more, as the queue has about {own.alike * rows:.0f} rows of a class"
    return (
        f"{100 * now.false_negatives:.0f} % of a query's {hard} hardest rows are of its own class in epoch {now.epoch} "
        f"(by chance {100 * own.alike:.0f} %), so most {made} push images of a class apart. {cure}."
    )


def starved(epochs: list[EpochMeans], own: Setting) -> str:
    """The steps wait for images."""
    now = epochs[-1]
    if len(epochs) < 2 or not min(epoch.wait_share for epoch in epochs[-2:]) >= WAITED or now.eta_seconds < WORTH:
        return ""
    return (
        f"the steps have waited for images for {100 * now.wait_share:.0f} % of epoch {now.epoch} (a few "
        f"percent are normal), so the loader is the bottleneck: {own.loader()}"
    )


def loader_advice(facts: Mapping[str, Any], part: str = "") -> str:
    """What would feed a run faster.

    Args:
        facts: what may be changed, see :func:`moco.train.setup.loader_facts`.
        part: where most of the loader's time goes, decode, crop or augment; where it is not known, any.
    """
    if facts["workers"] < facts["cores"]:
        return f"try -j {facts['cores']} (now {facts['workers']})."
    if part in ("augment", "") and facts["gpu"] and not facts.get("on_device"):
        return "try --aug-device gpu (now cpu), which finishes the views there."
    if (part.startswith("decode") or not part) and facts["cache"]:
        return "try --cache DIR (now none), which keeps the decoded images in a file."
    if part != "augment" and facts["fast_decode"]:
        return "try --decode fast (now exact)."
    return f"all {facts['cores']} cores load already; store the images smaller, or train on a machine with more."


def unmoved(knn: list[float]) -> bool:
    """Whether accuracies, percent, have hardly risen since the first one."""
    return len(knn) >= VALIDATIONS and max(knn) - knn[0] < RISEN


def still(knn: list[float], untrained: float, epochs: list[EpochMeans], own: Setting) -> str:
    """k-NN accuracy is that of no training, or of guessing."""
    nothing = max(untrained, own.guess)
    if not unmoved(knn) or max(knn) >= nothing + POINTS:
        return ""
    return (
        f"k-NN accuracy has hardly moved in {len(knn)} validations, from {knn[0]:.1f} to {knn[-1]:.1f} % (an untrained "
        f"network has {untrained:.1f} %, guessing {own.guess:.1f} %). {_to_move_knn(max(knn) - untrained, epochs, own)}"
    )


def _to_move_knn(gain: float, epochs: list[EpochMeans], own: Setting) -> str:
    neighbours = own.flags.get("knn_k") or [0]
    if neighbours[0] > own.class_size:
        return (
            f"A class has {own.class_size:.0f} images to vote: lower {own.here('--knn-k')}, and see whether it moves."
        )
    if gain < -POINTS and own.together <= FEW:
        return (
            f"Training has made the features worse, as BatchNorm sees {own.together} images at a time: try --bn-splits "
            f"1 (here {typed(own.flags.get('bn_splits'))}) or a larger {own.here('--batch-size')}."
        )
    if gain < -POINTS:
        return f"Training has made the features worse: lower {own.here('--lr')}."
    losses = [epoch.loss_ratio for epoch in epochs if epoch.epoch > 0]
    fallen = f"from {losses[0]:.3f} to {losses[-1]:.3f} of {own.chance}" if losses else ""
    if losses and losses[0] - losses[-1] >= LOSS_MOVED:
        return (
            f"The loss has fallen {fallen}, so images are told apart by something else than their content: try "
            f"stronger views than those of {own.here('--aug')}."
        )
    cure = f"Nor has the loss, {fallen}: try to raise" if losses else "Try another"
    return f"{cure} {own.here('--lr')}."
