"""What is said of mistaken words: flags that no argument takes, choices that there are not, flags without effect.

No torch here.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Container, Iterable, Sequence
from typing import Any

from moco.cli import projects
from moco.methods.registry import METHODS

_SCALES = {"sigma": "n4", "delta": "n5", "eta": "n6", "extrapolation": "n2"}  # SynCo's, and the counts that use them
_TIMES = ("hard_start_epoch", "hard_stop_epoch")
_SHORT = re.compile(r"^argument -\w(/[^:]*)?: ")
_UNKNOWN, _CHOICE = "unrecognized arguments: ", re.compile(r"^argument ([^:]*): invalid choice: '([^']*)'")


def explained(message: str, actions: Sequence[argparse.Action], words: Sequence[str]) -> str:
    """argparse's message on the ``words`` that it read, with what was probably meant."""
    if message.startswith(_UNKNOWN):
        return _UNKNOWN + _unknown(message.removeprefix(_UNKNOWN).split(), actions, words)
    if _SHORT.match(message):  # -bs 64, which argparse reads as -b s
        return message + _of_project(actions, [word for word in words if re.match("-[a-z]", word)], words)
    found = _CHOICE.match(message)
    return message + (_close_choice(found[1], found[2], actions) if found else "")


def _unknown(left: list[str], actions: Sequence[argparse.Action], words: Sequence[str]) -> str:
    """The flags among the words that nothing takes, each with its value, and no others: argparse takes a value behind
    an unknown flag for DIR, and leaves DIR."""
    flags = [word for word in left if word.startswith("-")]
    if not flags:
        return " ".join(left) + "; one DIR is read" * any(action.dest == "data" for action in actions)
    shown = [word for flag in flags for word in (flag, *_value_of(flag, words))]
    known = [name for action in actions for name in action.option_strings]
    return " ".join(shown) + (_of_project(actions, flags, words) or close_to(flags[0], known))


def _of_project(actions: Sequence[argparse.Action], unknown: Sequence[str], words: Sequence[str]) -> str:
    """What to type where an unknown flag is of a program that --compat knows; empty where none is."""
    main = next((str(getattr(action.type, "main", "")) for action in actions if action.dest == "compat"), "")
    known = {name for action in actions for name in action.option_strings}
    return projects.hint(main, [flag for flag in unknown if flag.partition("=")[0] not in known], words)


def _value_of(flag: str, words: Sequence[str]) -> list[str]:
    place = words.index(flag) + 1 if flag in words and "=" not in flag else len(words)
    return [word for word in words[place : place + 1] if not word.startswith("-") and not os.path.exists(word)]


def _close_choice(name: str, word: str, actions: Sequence[argparse.Action]) -> str:
    found = [action for action in actions if name in ("/".join(action.option_strings), action.dest, action.metavar)]
    plain = {_plain(str(choice)): choice for action in found for choice in action.choices or ()}
    close = difflib.get_close_matches(_plain(word), list(plain), 1)
    if close:
        return f"; did you mean {plain[close[0]]}?"
    return "; images of your own are given as DIR, without --dataset" * (name == "--dataset")


def _plain(word: str) -> str:
    """Without case and signs."""
    return re.sub("[^a-z0-9]", "", word.lower())


def close_to(flag: str, known: Iterable[str]) -> str:
    """; did you mean --moco-k? Empty where nothing is close."""
    found = difflib.get_close_matches(flag.partition("=")[0].replace("_", "-"), list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


def idle_notes(args: argparse.Namespace, typed: dict[str, Any]) -> list[str]:
    """A sentence for each flag on the command line that the method, as it is chosen, does not look at; of synthetic
    negatives see :func:`idle_negatives`."""
    queue = args.family == "queue"
    looks = {
        "moco_m": queue or args.family == "momentum", "shuffle_bn": queue, "check_every": queue,
        "head_precision": queue and not METHODS[args.method].queue,
        **dict.fromkeys(("beta", "tau_plus", "estimator"), args.method == "hcl"),
    }  # fmt: skip
    flags = [
        f"--{'no-' * (typed[name] is False)}{name.replace('_', '-')}"
        for name, looked in looks.items()
        if name in typed and not looked
    ]
    return [f"warning: {flag} has no effect with --method {args.method}" for flag in flags]


def idle_negatives(args: argparse.Namespace, typed: Container[str], filed: Container[str]) -> list[str]:
    """A sentence about flags of synthetic negatives that are given and that nothing uses."""
    others = () if "method" in typed else filed  # a file's are of its own method, which another one may replace
    names: tuple[str, ...] = {"moco": ("n_hard", *_TIMES, *_SCALES), "mochi": ("n_hard", *_SCALES)}.get(
        args.negatives, tuple(scale for scale, count in _SCALES.items() if not getattr(args, count))
    )
    found = [f"--{name.replace('_', '-')}" for name in names if name in typed or name in others]
    if not found:
        return []
    why = {
        "mochi": "MoCHi has three numbers, --mochi N S S2",
        "synco": "no negatives of its kind are asked for",
        "moco": f"--method {args.method} makes no synthetic negatives; to make some, give --method synco, or "
        "--mochi N S S2",
    }[args.negatives]
    return [f"warning: {', '.join(found)} {'does' if len(found) == 1 else 'do'} nothing: {why}"]
