"""What the report draws: panels of one or more figures of a log, with the lines of all runs in them, thinned.

Legend: n points of one line.
"""

from __future__ import annotations

import colorsys
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moco.report.runs import Run, number

AXES = {"step": "steps", "epoch": "epochs", "time": "time"}  # what the curves can be drawn over
DRAWN = ("log", "lincls", "semisup")  # logs of trainings; the others have one record
MOST_POINTS = 2_000  # of a line
MOST_IN_ALL = 30_000  # of all lines of a panel
MOST_OTHERS = 24  # panels of numbers that are not listed below


@dataclass(frozen=True)
class Panel:
    """Figures that are drawn together.

    Args:
        key: of file names.
        names: of the figures in a log, and what the panel calls them: the first is drawn solid, the next dashed.
        unit: of the vertical axis; "%" stands for numbers in percent.
        level: a value to compare with, and its name.
        note: how to read it.
        scale: what the log's numbers are multiplied by.
    """

    key: str
    title: str
    names: dict[str, str]
    unit: str = ""
    level: tuple[float, str] | None = None
    note: str = ""
    scale: float = 1.0


_RETRIEVAL = {"precision_at_1": "precision@1", "r_precision": "R-precision", "map_at_r": "mAP@R", "map": "mAP",
              "ami": "AMI", "nmi": "NMI"}  # fmt: skip
_ACC = {"train": "training batches", "val": "held-out images", "test": "test images"}
PANELS = (
    Panel("loss_ratio", "Loss relative to chance", {"loss_ratio": ""}, level=(1, "chance"),
          note="1: no better than guessing."),
    Panel("loss", "Loss", {"loss": "training batches", "val_loss": "held-out images", "test_loss": "test images"},
          "nats"),
    Panel("contrast", "Contrast accuracy", {"top1": "top-1", "top5": "top-5"}, "%",
          note="Queries whose key is nearer than all negatives, or all but four."),
    Panel("knn", "k-NN accuracy on held-out images", {"knn": ""}, "%"),
    Panel("online", "Online linear probe", {"online_acc1": "training batches", "online_val_acc1": "held-out images"},
          "%"),
    Panel("acc1", "Top-1 accuracy", {"acc1": _ACC["train"], "train_acc1": _ACC["train"], "val_acc1": _ACC["val"],
                                     "test_acc1": _ACC["test"]}, "%"),
    Panel("acc5", "Top-5 accuracy", {"acc5": _ACC["train"], "train_acc5": _ACC["train"], "val_acc5": _ACC["val"],
                                     "test_acc5": _ACC["test"]}, "%"),
    Panel("rankme", "Effective rank (RankMe)", {"rankme": "encoder features", "rankme_head": "projection output"},
          note="High: the features use many directions."),
    Panel("alignment", "Alignment", {"alignment": ""}, note="Squared distance of a query to its key: 0 is best."),
    Panel("uniformity", "Uniformity", {"uniformity": ""}, note="0: all queries are equal. Lower: they are spread."),
    Panel("feature_std", "Feature spread", {"feature_std": ""}, level=(1, "evenly spread"), note="0: collapsed."),
    Panel("hardest", "Cosine of the hardest negative", {"hardest": ""}),
    Panel("synthetic_mass", "Softmax mass of the synthetic negatives", {"synthetic_mass": ""}, "%", scale=100),
    Panel("old_mass", "Softmax mass of the queue's older half", {"old_mass": ""}, "%", level=(50, "even"), scale=100,
          note="Well below 50 %: the queue is stale."),
    Panel("false_negatives", "False negatives among the hardest", {"false_negatives": ""}, "%", scale=100,
          note="Share of the hardest queue rows that have the query's class."),
    Panel("no_positive", "Anchors without a positive", {"no_positive": ""}, "%", scale=100),
    Panel("grad_norm", "Gradient norm", {"grad_norm": ""}, note="Before clipping."),
    Panel("lr", "Learning rate", {"lr": "", "lr_classifier": "classifier", "lr_backbone": "encoder"}),
    Panel("speed", "Images per second", {"images_per_second": ""}, "images/s", note="Waiting included."),
    Panel("wait", "Time spent waiting for images", {"wait_share": ""}, "%", scale=100),
    *(Panel(name, f"Retrieval: {title}", {f"features/{name}": "features", f"head/{name}": "projection output"}, "%")
      for name, title in _RETRIEVAL.items()),
)  # fmt: skip
NOT_DRAWN = {"epoch", "time", "finished_epochs", "eta_seconds", "best_acc1"}  # places, and what follows from others
_HEAD = re.compile(r"(.+)/(lr[\d.e+-]+)$")  # of a probe with several rates

# Pairs for light and dark pages, found by a search for the largest distance (OKLab) between the two most similar ones,
# also as seen with the three kinds of colour blindness (Machado et al., 2009); contrast to the ground above 3.
COLOURS = (
    ("#0c3ed5", "#4e82f9"), ("#e56612", "#f18b57"), ("#479158", "#8fca9a"), ("#d338f0", "#c554db"),
    ("#8a6606", "#f9d99b"), ("#036a60", "#bbfbf1"), ("#fe289d", "#f95ba6"), ("#5c3d1b", "#9b7f64"),
    ("#832685", "#fcadfb"), ("#142457", "#8da1d2"),
)  # fmt: skip


def colour(number: int, of: int) -> tuple[str, str]:
    """Of a line, on light and on dark ground; the same for all of its figures."""
    if of <= len(COLOURS):
        return COLOURS[number]
    dark, light = (0.38, 0.68) if number % 2 else (0.5, 0.78)
    return _hex(number / of, dark), _hex(number / of, light)


def _hex(hue: float, lightness: float) -> str:
    return "#" + "".join(f"{round(255 * x):02x}" for x in colorsys.hls_to_rgb(hue, lightness, 0.75))


@dataclass
class Line:
    """What has one colour: a run, or one rate of a probe that has several.

    Args:
        figures: names in the log by the names that they would have alone.
    """

    run: Run
    name: str
    colour: tuple[str, str] = COLOURS[0]
    figures: dict[str, str] = field(default_factory=dict)


def lines_of(runs: Iterable[Run]) -> list[Line]:
    """The lines of all trainings, in their order."""
    found: list[Line] = []
    for run in runs:
        if run.log in DRAWN:
            mine: dict[str, Line] = {"": Line(run, run.name)}
            for figure in run.figures:
                head = _HEAD.match(figure)
                plain, rate = (head[1], head[2]) if head else (figure, "")
                line = mine.setdefault(rate, Line(run, f"{run.name}, lr {rate[2:]}"))
                line.figures[plain] = figure
            found += mine.values()
    for i, line in enumerate(found):
        line.colour = colour(i, len(found))
    return found


def panels_of(lines: list[Line]) -> list[Panel]:
    """The panels in which one of these lines has a number, and panels of figures that none is for."""
    there = dict.fromkeys(name for line in lines for name, figure in line.figures.items() if _drawn(line.run, figure))
    known: set[str] = set(NOT_DRAWN)
    found = []
    for panel in PANELS:
        if panel.key == "knn":
            several = {name: f"k = {name[4:]}" for name in there if re.fullmatch(r"knn_\d+", name)}
            panel = replace(panel, names={"knn": "first k", **several} if several else panel.names)
        known |= set(panel.names)
        if any(name in there for name in panel.names):
            found.append(panel)
    others = [name for name in there if name not in known][:MOST_OTHERS]
    return found + [Panel(re.sub(r"[^\w.-]", "_", name)[:80], name, {name: ""}) for name in others]


def _drawn(run: Run, figure: str) -> bool:
    return bool(np.isfinite(np.frombuffer(run.figures[figure][1])).any())


# ------------------------------------------------------------------------------------------------------ one line


@dataclass
class Curve:
    """One figure of one line: where and what, n each; NaN is a gap.

    dash: number of the figure in its panel. level: of a thinned curve the mean around each point, by which it is
    smoothed: its extremes have another one.
    """

    line: int
    dash: int
    label: str
    x: dict[str, np.ndarray | None]  # by axis; None where a log does not say it
    y: np.ndarray
    level: np.ndarray | None = None


def curves(panel: Panel, lines: list[Line], most: int | None = None) -> Iterator[Curve]:
    """The curves of a panel, each of at most ``most`` points and a few."""
    most = most or most_points(len(lines))
    labels = list(dict.fromkeys(panel.names.values()))
    for i, line in enumerate(lines):
        for name, label in panel.names.items():
            figure = line.figures.get(name)
            if figure is None or not _drawn(line.run, figure):
                continue
            steps, values = (np.frombuffer(part) for part in line.run.figures[figure])
            order = np.argsort(steps, kind="stable")
            steps, values = steps[order], values[order]
            kept = thinned(values, most)
            level = panel.scale * levels(values, most)[kept] if len(kept) < len(values) else None
            steps, values = steps[kept], panel.scale * values[kept]
            x = {"step": steps, "epoch": epochs_at(line.run, steps), "time": seconds_at(line.run, steps)}
            yield Curve(i, labels.index(label), label, x, values, level)


def most_points(lines: int) -> int:
    """Of each of so many lines."""
    return max(200, min(MOST_POINTS, MOST_IN_ALL // max(1, lines)))


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Which of n values to draw: all, or the first, the last, and in each of most / 2 sections the least and the
    largest, and one that is NaN."""
    if len(values) <= most:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for part in _sections(len(values), most):
        here = values[part]
        bad = np.isnan(here)
        if bad.any():
            kept.add(int(part[bad.argmax()]))
        if not bad.all():
            low, high = int(part[np.nanargmin(here)]), int(part[np.nanargmax(here)])
            kept |= {low, high if low != high else int(part[-1])}  # two of each, as smoothing weighs points alike
    return np.array(sorted(kept))


def levels(values: np.ndarray, most: int) -> np.ndarray:
    """Of each of n values the mean of its section in :func:`thinned`; NaN stays NaN."""
    found = values.copy()
    for part in _sections(len(values), most):
        sound = part[~np.isnan(values[part])]
        found[sound] = values[sound].mean() if len(sound) else np.nan
    return found


def _sections(n: int, most: int) -> list[np.ndarray]:
    return np.array_split(np.arange(n), max(1, most // 2))


def epochs_at(run: Run, steps: np.ndarray) -> np.ndarray | None:
    """Finished epochs at these steps, with fractions; None where the log does not say, as in a first epoch.

    Exact where records say how many epochs were finished, and at the same pace after the last of them. Before the
    first of them an epoch ends with its last record; a last epoch that is shorter than the one before it has not ended.
    """
    if "finished_epochs" in run.figures:
        return _counted(*_known(run, "finished_epochs"), steps)
    at, epoch = _known(run, "epoch")
    if not len(at):
        return None
    numbers = np.unique(epoch)
    ends = np.array([at[epoch == number].max() for number in numbers])
    if len(ends) == 1 and not _ended(run):
        return None
    if len(ends) > 1:
        ends[-1] = max(ends[-1], 2 * ends[-2] - (ends[-3] if len(ends) > 2 else 0))
    x, y = np.concatenate([[0.0], ends]), np.concatenate([[0.0], numbers + 1])
    rising = np.concatenate([[True], np.diff(np.maximum.accumulate(x)) > 0])
    return np.interp(steps, x[rising], y[rising])


def _counted(at: np.ndarray, finished: np.ndarray, steps: np.ndarray) -> np.ndarray | None:
    """Epochs at these steps where ``finished`` of them are known ``at`` some."""
    sound = (at > 0) & (finished > 0)
    x, of = np.unique(at[sound], return_index=True)
    if not len(x):
        return None
    x, y = np.concatenate([[0.0], x]), np.concatenate([[0.0], finished[sound][of]])
    pace = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return np.interp(steps, x, y) + pace * np.maximum(0.0, steps - x[-1])


def _known(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a figure where it is a number, in the order of steps."""
    steps, values = map(np.asarray, run.figures.get(name, (array("d"), array("d"))))
    order = np.argsort(steps, kind="stable")
    order = order[np.isfinite(values[order])]
    return steps[order], values[order]


def _ended(run: Run) -> bool:
    """Whether the only epoch of a log was finished; where an older version recorded no events, it may have been."""
    measured = any(name == "finished_epochs" or name.startswith(("val_", "test_")) for name in run.figures)
    return measured or not run.events or any(event.get("reason") == "finished" for event in run.events)


def seconds_at(run: Run, steps: np.ndarray) -> np.ndarray | None:
    """Seconds of work up to these steps, without those between a stop and its resumption; NaN before the first record
    with a time, None where no step comes after it."""
    at, clock = _known(run, "time")
    if not len(at) or not (steps >= at[0]).any():
        return None
    begins = np.array(
        sorted(t for e in run.events if e["kind"] == "begin" and (t := number(e.get("time"))) is not None)
    )
    before = begins[begins <= clock[0]]
    first = clock[0] - before[-1] if len(before) else 0.0
    worked = np.diff(clock)
    if len(begins):
        # where a process began between two records, what counts is the time since then
        last = begins[np.maximum(0, np.searchsorted(begins, clock[1:], side="right") - 1)]
        worked = np.where((last > clock[:-1]) & (last <= clock[1:]), clock[1:] - last, worked)
    seconds = np.concatenate([[first], first + np.cumsum(np.maximum(0.0, worked))])
    last_at = np.concatenate([np.diff(at) > 0, [True]])  # of records of one step the last
    return np.interp(steps, at[last_at], seconds[last_at], left=np.nan)


def data_of(panel: Panel, lines: list[Line], of: list[Line]) -> dict[str, Any]:
    """A panel and the curves of some lines as plain values, for the page; ``of``: all lines, which it numbers."""
    numbers = [of.index(line) for line in lines]
    return {
        "title": panel.title, "unit": panel.unit, "level": panel.level,
        "curves": [{
            "line": numbers[curve.line], "dash": curve.dash, "label": curve.label, "y": _rounded(curve.y, 5),
            **({} if curve.level is None else {"level": _rounded(curve.level, 5)}),
            **{axis: None if x is None else _rounded(x, 7) for axis, x in curve.x.items()},
        } for curve in curves(panel, lines)],
    }  # fmt: skip


def _rounded(values: np.ndarray, digits: int) -> list[float | None]:
    shown = (float(f"{value:.{digits}g}") for value in values.tolist())
    return [None if value != value else int(value) if value.is_integer() else value for value in shown]


def time_unit(seconds: float) -> tuple[float, str]:
    """Of an axis that is so long: seconds of its unit, and its name."""
    return (1.0, "seconds") if seconds < 120 else (60.0, "minutes") if seconds < 7200 else (3600.0, "hours")
