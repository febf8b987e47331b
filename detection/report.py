"""Detection results of several trials: mean, standard deviation, and a row beside the published ones."""

from __future__ import annotations

import statistics
from typing import Any

MEASURES = ("AP50", "AP", "AP75")
WORDS = {"bbox": "", "segm": "mask "}

# PASCAL VOC 2007 test after 24k iterations on 2007+2012 trainval, R50-C4: trials, AP50, AP, AP75, from the README files
# of MoCo (means of 5 trials) and SynCo (trials not said). No published row is kept for the other recipes.
PUBLISHED = {
    "pascal_voc_R_50_C4_24k": {
        "supervised, ImageNet": ("5", 81.3, 53.5, 58.8),
        "MoCo v1, 200 epochs": ("5", 81.5, 55.9, 62.6),
        "MoCo v2, 200 epochs": ("5", 82.4, 57.0, 63.6),
        "MoCo v2, 800 epochs": ("5", 82.5, 57.4, 64.0),
        "SynCo, 200 epochs": ("", 82.6, 57.2, 63.9),
        "SynCo, 800 epochs": ("", 82.8, 57.4, 64.0),
    }
}


def summary(trials: list[dict[str, Any]]) -> dict[str, dict[str, float | list[float]]]:
    """Mean and sample standard deviation (0 for one trial) of AP50, AP and AP75, in percent; ``mask AP`` for masks.

    Args:
        trials: what each trial's evaluator found: kind of prediction, then measure.
    """
    found = {}
    for kind in (kind for kind in WORDS if kind in trials[0]):
        for measure in MEASURES:
            values = [float(trial[kind][measure]) for trial in trials]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found[WORDS[kind] + measure] = {"mean": statistics.fmean(values), "std": spread, "trials": values}
    return found


def table(found: dict[str, dict[str, Any]], name: str, trials: int, recipe: str) -> str:
    """A Markdown table: the published rows of the recipe, if any, and ours.

    Args:
        found: from :func:`summary`.
        name: of the checkpoint.
        recipe: see :func:`published`.
    """
    rows = [["pretraining", "trials", *found], ["---"] * (len(found) + 2)]
    rows += [[f"{who} (published)", *map(str, values)] for who, values in published(recipe).items()]
    rows.append([name, str(trials), *(_with_spread(one, trials) for one in found.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def published(recipe: str) -> dict[str, tuple[str, float, float, float]]:
    """Trials, AP50, AP and AP75 by who published them; ``recipe``: a config's name, as methods share the rows of the
    one whose name theirs begins with."""
    return next((rows for base, rows in PUBLISHED.items() if recipe.startswith(base)), {})


def _with_spread(one: dict[str, Any], trials: int) -> str:
    return f"{one['mean']:.1f} ± {one['std']:.1f}" if trials > 1 else f"{one['mean']:.1f}"
