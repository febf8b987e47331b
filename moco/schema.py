"""What the entries of a checkpoint of ours and of a backbone's card may be: one table, asked once when a file is read.

A file is ours when it has a dictionary ``run``; of other projects' files nothing is asked when they are read, and
:func:`not_gone_on` before a run goes on from one. Entries that this version does not know are left alone, those of
later versions among them; an entry may be missing where an earlier version did not write it. See
moco/train/checkpoint.py, moco/eval/linear_checkpoint.py and moco/eval/finetune.py for who writes what.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

MOST = 1 << 48  # of anything that is counted
_DEEPEST = 40  # dictionaries and lists in one another
_OVERLAP = 1 << 28  # bytes that tensors may have beyond their storages, as repeated numbers cost a file nothing


class Kind(NamedTuple):
    """What a plain value may be: ``words`` for a sentence, and whether a value is so."""

    words: str
    fits: Callable[[Any], bool]


def _whole(least: int = 0, most: int = MOST) -> Kind:
    return Kind(f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most)


def _number(least: float = -math.inf, most: float = math.inf, odd: bool = False) -> Kind:
    def fits(value: Any) -> bool:
        return type(value) in (int, float) and (odd or math.isfinite(value)) and least <= value <= most

    return Kind("a number" if odd else "a finite number in its range", fits)


def _is_tensor(value: Any) -> bool:
    from torch import Tensor

    return isinstance(value, Tensor)


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (list, tuple)):
        return depth < 3 and all(_is_plain(item, depth + 1) for item in value)
    return value is None or type(value) in (str, bool, int) or (type(value) is float and not math.isnan(value))


def _named(kind: Kind) -> Kind:
    def fits(value: Any) -> bool:
        return isinstance(value, dict) and all(type(name) is str and kind.fits(item) for name, item in value.items())

    return Kind(f"a dictionary of names, each with {kind.words}", fits)


def _of_one(kind: Kind) -> Kind:
    """Also as a tensor of one number, which upstream's accuracies are."""

    def fits(value: Any) -> bool:
        if _is_tensor(value):
            plain = value.numel() == 1 and "strided" in str(value.layout) and not value.is_quantized
            value = value.item() if plain else None
        return kind.fits(value)

    return Kind(kind.words, fits)


COUNT, POSITIVE, SHARE = _whole(), _number(math.ulp(0.0)), _number(0, 1)
PERCENT, NUMBER, ANY_NUMBER = _number(0, 100), _number(), _number(odd=True)
WORD, FLAG = Kind("a word", lambda v: type(v) is str), Kind("true or false", lambda v: type(v) is bool)
NO_VALUE = Kind("nothing", lambda v: v is None)
NOTHING = Kind("nothing", lambda v: v is None or (type(v) is dict and not v))
DICTIONARY = Kind("a dictionary", lambda v: isinstance(v, dict))
NETWORK, FLAGS = _named(Kind("a tensor", _is_tensor)), _named(Kind("a plain value", _is_plain))


def _are_levels(value: Any) -> bool:
    numbers = value[:2] if isinstance(value, (list, tuple)) else []
    right = len(numbers) == 2 and all(NUMBER.fits(x) for x in numbers) and numbers[0] < numbers[1]
    return right and list(value[2:]) in ([], ["float"])


LEVELS = Kind("the values of black and of white", _are_levels)
# In these tables a name with "?" may be missing, [kind] is a list of such, and of (kind, kind) either fits.
IMAGES = {"stem?": WORD, "size?": _whole(1, 1 << 14), "channels?": _whole(1, 64), "mean?": [NUMBER], "std?": [POSITIVE],
          "levels?": LEVELS}  # fmt: skip
RULE = {"best": ANY_NUMBER, "num_bad_epochs": COUNT, "last_epoch": COUNT, "_last_lr": [NUMBER]}
PRETRAINING = {
    "method": WORD, "recipe": FLAGS, "projection?": {"kind?": WORD, "widths?": [COUNT], "batchnorm?": FLAG},
    "data?": {"name?": WORD, "images?": COUNT}, "epochs?": COUNT, "steps?": COUNT,
    "seed?": _whole(-MOST * MOST, MOST * MOST), "torch?": WORD, "finetuned?": {"name": WORD, "epochs": COUNT},
}  # fmt: skip
RUN = {
    "seed?": _whole(-MOST * MOST, MOST * MOST), "step?": COUNT, "draw?": COUNT, "batch?": COUNT, "ema_due?": FLAG,
    "bad_steps?": COUNT, "bad_images?": {"seen": [COUNT]}, "best_epoch?": COUNT, "losses?": [[NUMBER]],
    "plateau?": (NOTHING, {"factor": SHARE, "rule": RULE}), "batches?": _named(COUNT), "flags?": FLAGS,
    "settings?": FLAGS, "data?": {"name": WORD, "images": COUNT, "fingerprint": WORD, "levels?": LEVELS},
    "torch?": {"version": WORD, "processor": WORD, "threads?": _whole(1, 1 << 20)}, "processes?": _whole(1, 1 << 20),
    "head?": (NOTHING, {"impl": WORD, "precision?": WORD, "device?": WORD, "asked?": [WORD]}), "images?": IMAGES,
    "changes?": _named(_whole(0, 256)), "classes?": (NOTHING, [WORD]), "averaged?": [WORD], "lr?": POSITIVE,
    "pretraining?": PRETRAINING,
}  # fmt: skip
SCALER = {"scale": POSITIVE, "growth_factor": _number(1), "backoff_factor": SHARE, "growth_interval": _whole(1),
          "_growth_tracker": COUNT}  # fmt: skip
HEAD = {"lr": POSITIVE, "layer": NETWORK, "optimizer": DICTIONARY, "best_acc1": PERCENT, "diverged": FLAG}
ONLINE = {"layer": NETWORK, "optimizer": DICTIONARY, "classes": [WORD]}
ENTRIES = {
    "epoch?": COUNT, "arch?": WORD, "state_dict?": NETWORK, "optimizer?": DICTIONARY, "scaler?": (NOTHING, SCALER),
    "best_acc1?": PERCENT, "acc1?": PERCENT, "trained?": NETWORK, "heads?": [HEAD], "run": RUN,
    "online_probe?": (NOTHING, ONLINE),
}  # fmt: skip
# Of the cards that moco.export writes, and of the flags of a run that lie beside it, where None is the data set's own.
CARD = {name: (NO_VALUE, kind) for name, kind in {
    **IMAGES, "arch?": WORD, "width?": COUNT, "changes?": _named(_whole(0, 256)), "source?": WORD, "epoch?": COUNT,
    "dataset?": WORD, "aug?": WORD, "method?": WORD, "pretraining?": PRETRAINING,
    "measured?": [{"measure": WORD, "top1": PERCENT, "by": WORD}], "classes?": [WORD],
}.items()}  # fmt: skip
# Of a file of upstream's or of another project's, as far as a run can go on from it or it can be averaged.
THEIRS = {
    "epoch?": COUNT, "arch?": (NO_VALUE, WORD), "state_dict?": NETWORK, "optimizer?": {"param_groups?": [DICTIONARY]},
    "scaler?": (NOTHING, SCALER), "best_acc1?": _of_one(PERCENT), "acc1?": _of_one(PERCENT),
}  # fmt: skip
# Of the flags of a pretraining those that a queue and its synthetic negatives are computed by.
_SIZES = _whole(0, 1 << 20)
QUEUE_RECIPE = {
    "--moco-t?": _number(1e-6, 1e6), "--batch-size?": _whole(1), "--n-hard?": _whole(1), "--bn-splits?": _whole(1),
    "--aug?": WORD, "--decode?": WORD, "--mochi?": [_SIZES], "--type-starts?": [WORD],
    "--control?": WORD,
    **{f"--n{i}?": _SIZES for i in range(1, 7)},
    **{f"--{name}?": _number(-1e6, 1e6) for name in ("sigma", "delta", "eta")},
    "--hard-start-epoch?": COUNT, "--hard-stop-epoch?": COUNT,
}  # fmt: skip
# What every file with an optimizer has had from its program's first version on, and since files hold the flags.
_PRETRAINING = {"seed", "step", "draw", "batch", "ema_due", "bad_steps", "bad_images"}
_WITH_FLAGS = {"data", "torch", "batch", "seed"}


def problem(state: dict) -> str:
    """What is wrong with a checkpoint's entries, the end of a sentence that begins with the file; empty where nothing
    is, and for files that are not ours as far as their tensors go."""
    if wrong := _odd_values(state):
        return wrong
    ours = isinstance(state.get("run"), dict)
    if "run" not in state and _certainly_ours(state):
        return "is damaged: it lacks the entry run"
    if not ours and ("run" not in state or not state.keys() & {"scaler", "heads", "best_acc1"}):
        return ""
    return wrong_entry(ENTRIES, state) or _lost_of_optimizers(state) or _missing(state) or _disagreement(state)


def not_gone_on(state: dict) -> str:
    """What is wrong with any project's checkpoint that a run is to go on from, or that is averaged."""
    return wrong_entry(THEIRS, state)


def _certainly_ours(state: dict) -> bool:
    """Of a file without ``run``: it has what none but this project's programs write."""
    network = state.get("state_dict")
    names = network.keys() if isinstance(network, dict) else ()
    if "module.calls" in names:  # moco.MoCo's in DistributedDataParallel, saved by a loop of somebody's own
        return False
    queued = "module.queue_ids" in names
    scaled = "scaler" in state and any(str(name).startswith("module.encoder_q.") for name in names)
    classifier = "best_acc1" in state and "optimizer" in state and bool({"heads", "trained", "scaler"} & state.keys())
    return queued or scaled or classifier


def card_problem(card: Any) -> str:
    """What is wrong with a card, or with the flags of a run, the end of a sentence; empty where nothing is."""
    if wrong := wrong_entry(CARD, card):
        return wrong
    given = {name: value for name, value in card.items() if value is not None}
    return "" if _agree(given) else "is damaged: its entries mean and std do not fit its channels"


def wrong_entry(kind: Any, value: Any, where: str = "") -> str:
    """The first entry that is not of its kind, in words; empty where all are."""
    if isinstance(kind, Kind):
        return "" if kind.fits(value) else _is_not(where, value, kind.words)
    if isinstance(kind, tuple):
        found = [wrong_entry(one, value, where) for one in kind]
        return "" if "" in found else found[-1]
    if isinstance(kind, list):
        if not isinstance(value, (list, tuple)):
            return _is_not(where, value, "a list")
        return next(filter(None, (wrong_entry(kind[0], item, f"{where}[{n}]") for n, item in enumerate(value))), "")
    return _wrong_in(kind, value, where)


def _wrong_in(kinds: dict, value: Any, where: str) -> str:
    if not isinstance(value, dict):
        return _is_not(where, value, "a dictionary")
    for name, kind in kinds.items():
        bare = name.removesuffix("?")
        place = f"{where}.{bare}" if where else bare
        if bare in value:
            if wrong := wrong_entry(kind, value[bare], place):
                return wrong
        elif bare == name:
            return f"is damaged: it lacks the entry {place}"
    return ""


def _is_not(where: str, value: Any, words: str) -> str:
    shown = repr(value)[:40] if type(value) in (str, int, float, bool, type(None)) else f"a {type(value).__name__}"
    return f"is damaged: its entry {where} is {shown}, not {words}"


# ------------------------------------------------------------------------------------------- entries together


def _lost_of_optimizers(state: dict) -> str:
    """Files of earlier versions do not say of how many weights an optimizer keeps something."""
    for part in (state, *state.get("heads", ())):
        optimizer = part.get("optimizer", {})
        held = optimizer.get("state")
        if "kept" in optimizer and (not isinstance(held, dict) or repr(optimizer["kept"]) != str(len(held))):
            return "is damaged: its optimizer does not have the state of as many weights as were kept"
    return ""


def _missing(state: dict) -> str:
    """Of what a program goes on from."""
    run, classifier, wanted = state["run"], "best_acc1" in state, set()
    if "optimizer" in state:
        wanted |= {"seed"} if classifier else _PRETRAINING if "scaler" in state else set()
        if "flags" in run:
            wanted |= _WITH_FLAGS | (set() if classifier else {"plateau", "losses"})
        wanted |= set() if classifier or not run.get("batch") else {"batches"}
    lost = sorted(wanted - run.keys())
    top = sorted({"epoch", "arch"} - state.keys()) if wanted else []
    return f"is damaged: it lacks the entry {top[0] if top else 'run.' + lost[0]}" if top or lost else ""


def _disagreement(state: dict) -> str:
    """Numbers that no run has at once."""
    run = state["run"]
    epoch, step, draw, batch = state.get("epoch", 0), run.get("step"), run.get("draw", MOST), run.get("batch", 0)
    flags, data, batches = run.get("flags", {}), run.get("data", {}), run.get("batches", {})
    images = data.get("images", MOST)
    steps, size = batches.get("steps an epoch", MOST), batches.get("batches a step", 1)
    last = flags.get("--epochs") if not flags.get("--steps") else None
    rules = [
        (not run.keys() >= _PRETRAINING or epoch <= step <= draw <= max(step, 1) << 12, "step"),
        (run.get("bad_steps", 0) <= (MOST if step is None else step), "bad_steps"),
        (run.get("best_epoch", 0) <= epoch + 1, "best_epoch"),
        (batch <= min(images, steps * size), "batch"),
        (not isinstance(last, int) or epoch <= last, "flags"),
        (all(number < images for number in run.get("bad_images", {"seen": []})["seen"]), "bad_images"),
        (all(len(row) == 2 for row in run.get("losses", [])), "losses"),
        (_agree(run.get("images", {})), "images"),
    ]
    wrong = [name for right, name in rules if not right]
    return f"is damaged: its entry run.{wrong[0]} does not fit the others" if wrong else ""


def _agree(images: dict) -> bool:
    given = [images[name] for name in ("mean", "std") if name in images]
    return all(len(numbers) == images.get("channels", len(numbers)) for numbers in given)


# -------------------------------------------------------------------------------------------------- all values


def _odd_values(state: dict) -> str:
    """Of any file: what no reader can go through."""
    spare, rest = _OVERLAP, [(state, 0)]
    while rest:
        value, depth = rest.pop()
        if depth > _DEEPEST:
            return "is no checkpoint: its entries lie too deep in one another"
        if isinstance(value, (dict, list, tuple)):
            rest += [(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]
        elif _is_tensor(value):
            if value.device.type != "cpu":
                return f"is no checkpoint that can be used: it has a tensor on {value.device.type}, without numbers"
            if "strided" in str(value.layout):
                spare -= max(0, value.nbytes - value.untyped_storage().nbytes())
    return "" if spare >= 0 else "is no checkpoint that can be used: its tensors are larger than what is stored of them"
