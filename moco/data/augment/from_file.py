"""Augmentation of a user's own: a YAML file with a preset's values, checked, and the words that a run records of it.

The words are what ``--aug`` takes everywhere: a preset's name, and what the file has otherwise than that preset, such
as ``v2 crop_scale=0.4,1 turn_p=0.75 others.blur_p=0``. They hold all that is needed to make the views again; the file
is not read a second time. No torch here: a wrong file is answered before a second of imports.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

from moco.data.augment.presets import OPERATIONS, PRESETS, Preset, wrong_order
from moco.errors import UserError, tell
from moco.files import read_yaml


class _Number(NamedTuple):
    """A number from ``low`` to ``high``; ``pair``: a list of two, the first at most the second."""

    low: float
    high: float
    pair: bool = False
    above: bool = False  # low itself is none

    @property
    def words(self) -> str:
        span = f"above {self.low:g} and up to {self.high:g}" if self.above else f"from {self.low:g} to {self.high:g}"
        return f"two numbers {span}, [LOW, HIGH]" if self.pair else f"a number {span}"

    def holds(self, x: float) -> bool:
        return (x > self.low if self.above else x >= self.low) and x <= self.high


_SHARE = _Number(0, 1)
_STRENGTH = _Number(0, 100)  # 100: what 16 bits of a view hold between two operations (by_numpy.py)
KEYS = {
    "crop_scale": _Number(0, 1, pair=True, above=True), "crop_ratio": _Number(0, 100, pair=True, above=True),
    "jitter_p": _SHARE, "brightness": _STRENGTH, "contrast": _STRENGTH, "saturation": _STRENGTH,
    "hue": _Number(0, 0.5), "grey_p": _SHARE, "blur_p": _SHARE, "blur_sigma": _Number(0, 100, pair=True, above=True),
    "flip_p": _SHARE, "vflip_p": _SHARE, "turn_p": _SHARE, "degrees": _Number(0, 180), "shear": _Number(0, 80),
    "solarize_p": _SHARE,
}  # fmt: skip
TOP = ("preset", "order", *KEYS, "others")
# The operations by the key that says whether they are made at all, and what means nothing without it.
_MADE = {
    "jitter": ("jitter_p",), "grey": ("grey_p",), "blur": ("blur_p",), "solarize": ("solarize_p",),
    "flip": ("flip_p",), "vflip": ("vflip_p",), "turn": ("turn_p",), "affine": ("degrees", "shear"),
}  # fmt: skip
_IDLE = {"brightness": "jitter_p", "contrast": "jitter_p", "saturation": "jitter_p", "hue": "jitter_p",
         "blur_sigma": "blur_p"}  # fmt: skip
Values = dict[str, Any]  # checked ones by key, those of other views as others.KEY
Place = Callable[[str], str]  # how a sentence names the place of a key: mine.yml, line 3


# ------------------------------------------------------------------------------------------------- what is given


def augmentation(text: str) -> str:
    """The words of ``--aug``: of a preset's name, of a YAML file, or of such words, in their shortest form.

    Raises:
        UserError: the end of a sentence that begins with the flag.
    """
    if text in PRESETS:
        return text
    if set(text.split()[:1]) & set(PRESETS) and not os.path.isfile(text):
        return _shortest(text.split()[0], _of_words(text))
    if not text.endswith((".yml", ".yaml")) and not os.path.isfile(text):
        raise UserError(f"{text} is no preset{_near(text, PRESETS)}: choose one of {', '.join(PRESETS)}, or give a "
                        "YAML file of your own, FILE.yml.")  # fmt: skip
    return read_augmentation(text)


def one_augmentation(text: str) -> str:
    """:func:`augmentation` of programs that make one view of an image: without ``others``."""
    words = augmentation(text)
    if get_preset(words).others is not None:
        raise UserError(f"{text} has values of a second view (others), and here images have one: choose another.")
    return words


def found_beside(config: str, value: Any) -> Any:
    """A file that a --config names: as it stands, like all of its paths, else beside the config, which is told."""
    other = os.path.join(os.path.dirname(config), str(value))
    if os.path.exists(str(value)) or not os.path.isfile(other):
        return value
    tell(f"{config}: --aug {value} is taken from beside it, {other}", error=True)
    return other


augmentation.beside_config = found_beside  # type: ignore[attr-defined]  # see moco/cli/parser.py
one_augmentation.beside_config = found_beside  # type: ignore[attr-defined]


def read_augmentation(path: str) -> str:
    """The words of a YAML file, the beginning of which is the preset that it names.

    Raises:
        UserError: it cannot be read, or a key or a value is none.
    """
    entries: Any = read_yaml(path, path)
    if not isinstance(entries, dict):
        raise UserError(f"{path} must be a list of KEY: VALUE lines that begins with a preset, such as preset: v2.")
    lines, twice = _lines(path)

    def place(key: str) -> str:
        return f"{path}, line {lines[key]}" if key in lines else path

    if twice:
        raise UserError(f"{place(twice)}: {twice} is given twice; leave one of them out.")
    entries = {str(key): value for key, value in cast("dict[Any, Any]", entries).items()}
    base = _base(entries.pop("preset", None), place)
    return _shortest(base, _checked(base, entries, place))


def get_preset(words: str) -> Preset:
    """The preset of a name, or of the words that :func:`augmentation` gives; UserError when there is none."""
    if words in PRESETS:
        return PRESETS[words]
    base = "".join(words.split()[:1])
    if base not in PRESETS:
        raise UserError(f"unknown augmentation preset {words}: choose one of {', '.join(PRESETS)}")
    return _resolved(base, _of_words(words))


def with_crop_min(words: str, low: float) -> str:
    """The words with another lower end of ``crop_scale``, for all views."""
    preset = get_preset(words)
    high = preset.crop_scale[1]
    if low > high:
        raise UserError(f"--crop-min {low:g} is above the {high:g} of crop_scale's upper end.")
    values = {key: value for key, value in _of_words(words).items() if key != "others.crop_scale"}
    return _shortest(words.split()[0], {**values, "crop_scale": (low, high)})


# ------------------------------------------------------------------------------------------------- keys and values


def _base(name: Any, place: Place) -> str:
    if isinstance(name, str) and name in PRESETS:
        return name
    said = "names no preset to begin with" if name is None else f"preset: {_shown(name)} is none"
    raise UserError(f"{place('preset')}: {said}{_near(str(name), PRESETS)}: write preset: and one of "
                    f"{', '.join(PRESETS)}.")  # fmt: skip


def _checked(base: str, entries: dict[str, Any], place: Place) -> Values:
    """The values of a file's entries, without its preset."""
    values: Values = {}
    for key, value in entries.items():
        if key == "others":
            if not isinstance(value, dict) or not value:
                raise UserError(f"{place(key)}: others: holds KEY: VALUE lines of the second view.")
            own = cast("dict[Any, Any]", value)
            values |= {f"others.{name}": _value(f"others.{name}", one, place) for name, one in own.items()}
        else:
            values[key] = _value(key, value, place)
    _check_together(base, values, place)
    return values


def _value(key: str, value: Any, place: Place) -> Any:
    """One value, as a preset holds it."""
    bare = key.removeprefix("others.")
    known = TOP if key == bare else tuple(KEYS)
    if bare not in KEYS and key != "order":
        raise UserError(f"{place(key)}: {key} is no key of an augmentation{_near(bare, known)}; these are "
                        f"{', '.join(known)}.")  # fmt: skip
    if bare == "order":
        return _order(value, place)
    kind = KEYS[bare]
    numbers = [_number(one) for one in (value if isinstance(value, list | tuple) else [value])]
    count = 2 if kind.pair else 1
    fits = len(numbers) == count and isinstance(value, list | tuple) == kind.pair
    if not fits or not all(map(kind.holds, numbers)) or numbers != sorted(numbers):
        raise UserError(f"{place(key)}: {key} is {kind.words}, not {_shown(value)}.")
    return tuple(numbers) if kind.pair else numbers[0]


def _number(value: Any) -> float:
    """NaN for what is none; text such as 1e-1 is one, which YAML takes for text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _order(value: Any, place: Place) -> tuple[str, ...]:
    listed = [str(name) for name in cast("list[Any]", value)] if isinstance(value, list | tuple) else []
    if odd := next((name for name in listed if name not in OPERATIONS), ""):
        raise UserError(f"{place('order')}: order: {odd} is no operation{_near(odd, OPERATIONS)}: these are "
                        f"{', '.join(OPERATIONS)}.")  # fmt: skip
    if not listed or len(set(listed)) < len(listed):
        raise UserError(f"{place('order')}: order is a list of operations, each once, such as [crop, jitter, flip].")
    if wrong := wrong_order(tuple(listed)):
        raise UserError(f"{place('order')}: order [{', '.join(listed)}]: {wrong}.")
    return tuple(listed)


def _check_together(base: str, values: Values, place: Place) -> None:
    """UserError for a value that would change nothing, as its operation is never made."""
    preset = _resolved(base, values)
    views = (preset, preset.of_view(1))
    for key, value in values.items():
        bare = key.removeprefix("others.")
        need = _IDLE.get(bare)
        if need and value and not any(getattr(view, need) for view in views):
            raise UserError(f"{place(key)}: {key} changes nothing while {need} is 0; give {need} as well.")
        missing = [name for name, keys in _MADE.items() if bare in keys and value and name not in preset.order]
        if missing:
            raise UserError(
                f"{place(key)}: {key} is {_shown(value)}, but order leaves {missing[0]} out; name it there."
            )


# ------------------------------------------------------------------------------------------------- presets and words


def _resolved(base: str, values: Values) -> Preset:
    """A preset with other values: those without ``others.`` hold for all views, where others does not say otherwise."""
    start = PRESETS[base]
    everywhere = {key: value for key, value in values.items() if not key.startswith("others.") and key != "order"}
    second = {key.removeprefix("others."): value for key, value in values.items() if key.startswith("others.")}
    one = dataclasses.replace(start, **everywhere, others=None)
    two = dataclasses.replace(start.of_view(1), **{**everywhere, **second}, others=None)
    order = values.get("order") or _with_missing(start.order, (one, two))
    one, two = (dataclasses.replace(view, order=order) for view in (one, two))
    return one if one == two else dataclasses.replace(one, others=two)


def _with_missing(order: tuple[str, ...], views: Iterable[Preset]) -> tuple[str, ...]:
    """The order with the operations that the views need and it lacks, each behind those that come before it in
    OPERATIONS."""
    for name in OPERATIONS:
        needed = any(getattr(view, key) for view in views for key in _MADE.get(name, ()))
        if needed and name not in order:
            earlier = OPERATIONS[: OPERATIONS.index(name)]
            at = max((place + 1 for place, other in enumerate(order) if other in earlier), default=0)
            order = (*order[:at], name, *order[at:])
    return order


def _shortest(base: str, values: Values) -> str:
    """The words of a preset without what it has anyway; its name alone where it is a published one."""
    preset = _resolved(base, values)
    if named := next((name for name, known in PRESETS.items() if known == preset), ""):
        return named
    kept = dict(values)
    for key in reversed(list(values)):
        fewer = {name: value for name, value in kept.items() if name != key}
        kept = fewer if _resolved(base, fewer) == preset else kept
    sorted_keys = sorted(kept, key=lambda key: (key.startswith("others."), TOP.index(key.removeprefix("others."))))
    return " ".join([base, *(f"{key}={_text(kept[key])}" for key in sorted_keys)])


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, cast("tuple[Any, ...]", value)))
    return value if isinstance(value, str) else repr(value).removesuffix(".0")


def _of_words(words: str) -> Values:
    """The values that words name behind their preset; UserError, the end of a sentence, where one is none."""
    base, *entries = words.split()
    values: Values = {}

    def place(_: str) -> str:
        return words

    for entry in entries:
        key, _, text = entry.partition("=")
        parts = text.split(",")
        pair = key == "order" or (key.removeprefix("others.") in KEYS and KEYS[key.removeprefix("others.")].pair)
        values[key] = _value(key, parts if pair else text, place)
    _check_together(base, values, place)
    return values


# ------------------------------------------------------------------------------------------------- words for messages


def _near(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word.replace("-", "_"), [name for name in known if name != word], 1)
    return f" (did you mean {found[0]}?)" if found else ""


def _shown(value: Any) -> str:
    """As it stands in a file, but for long ones."""
    text = "nothing" if value is None else str(list(value) if isinstance(value, tuple) else value)
    text = text.lower() if isinstance(value, bool) else text
    return text if len(text) < 60 else f"{text[:57]}..."


def _lines(path: str) -> tuple[dict[str, int], str]:
    """The line of each key, those of others as others.KEY, and a key that is given twice, if any: what a file that
    holds a dictionary says."""
    import yaml

    with open(path, encoding="utf-8") as file:
        node = yaml.compose(file, yaml.SafeLoader)
    lines: dict[str, int] = {}
    twice = ""
    waiting: list[tuple[str, Any]] = [("", node)]
    for start, mapping in waiting:
        for key, value in mapping.value:
            name = f"{start}{key.value}"
            twice = twice or name * (name in lines)
            lines[name] = key.start_mark.line + 1
            if name == "others" and isinstance(value, yaml.MappingNode):
                waiting.append(("others.", value))
    return lines, twice
