"""The pages of the site that no file holds: every flag of every command, and the Python interface.

Flags are read from the parsers, names from ``moco.__all__`` and words from docstrings when the site is built, so these
pages are never older than the code.
"""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from unittest.mock import patch

import moco
from moco import cli, doors
from moco.cli.parser import NumberRange

# --------------------------------------------------------------------------------------------------------- flags


def flags() -> str:
    """Every command with its flags, as Markdown."""
    lines = ["# Every flag", "", "What `moco COMMAND --help` prints, of the version " + moco.__version__ + ".", ""]
    for title, names in doors.COMMANDS.items():
        for name, summary in names.items():
            lines += [f"## moco {name}", "", f"{title[0].upper()}{title[1:]}: {_plain(summary)}.", ""]
            lines += _of_parser(parser_of(name), name)
    return "\n".join(lines)


class _Made(BaseException):
    """Carries the parser that a command has made."""


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a command, which each makes before it does anything else."""

    def stop(parser: argparse.ArgumentParser, *_) -> None:
        raise _Made(parser)

    packages = {of: f"moco.{of}.__main__" for of in ("data", "report", "sweep")}
    module = {"detection": "detection.run", **packages}.get(name)
    main = getattr(cli, f"parse_{name}") if name in doors.MAINS else import_module(module or doors.MODULES[name]).main
    with patch.object(argparse.ArgumentParser, "parse_known_args", stop):
        try:
            main([])
        except _Made as made:
            return made.args[0]
    raise AssertionError(f"moco {name} parses nothing")


def _of_parser(parser: argparse.ArgumentParser, anchor: str) -> list[str]:
    """The tables of a parser, one for each of its groups, and those of its subcommands."""
    lines: list[str] = []
    for group in parser._action_groups:
        rows = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        nested = [action for action in rows if isinstance(action, argparse._SubParsersAction)]
        rows = [action for action in rows if action not in nested]
        if rows:
            lines += [f"### {group.title} {{ #{anchor}-{group.title.replace(' ', '-')} }}", ""]
            lines += ["| flag | meaning | default | values |", "| --- | --- | --- | --- |"]
            lines += [_row(parser, action) for action in rows] + [""]
        for action in nested:
            for name, one in action.choices.items():
                lines += [f"### moco {anchor} {name}", "", *_of_parser(one, f"{anchor}-{name}")]
    return lines


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    metavar = action.metavar or {int: "N", float: "X"}.get(getattr(action.type, "kind", action.type), "NAME")
    value = formatter._format_args(argparse.Namespace(**{**vars(action), "choices": None}), metavar)
    value = "" if action.nargs == 0 else value
    names = [f"`{word}`" for word in action.option_strings if not word.startswith("--no-")] or [f"`{value}`"]
    names[-1] = f"`{names[-1][1:-1]} {value}`" if value and action.option_strings else names[-1]
    text = _plain(formatter._expand_help(action)) if action.help else ""
    text = re.sub(r"(?<![\w-])(--[a-z][a-z0-9-]*)", r"`\1`", text)
    return f"| {', '.join(names)} | {text} | {_default(action.default)} | {_values(action)} |"


def _default(value: object) -> str:
    """As it is typed; none where the flag is not there, of which the meaning says what holds then."""
    if isinstance(value, bool):
        return "on" if value else ""
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(f"`{x}`" for x in values if x not in (None, "", argparse.SUPPRESS))


def _values(action: argparse.Action) -> str:
    if action.choices:
        return ", ".join(f"`{x}`" for x in action.choices)
    if isinstance(action.type, NumberRange):
        return _plain(re.sub("^(must be|is) ", "", action.type.sentence))
    return {int: "a whole number", float: "a number"}.get(action.type, "")


def _plain(text: str) -> str:
    """Words in which nothing is markup."""
    return re.sub(r"[&<>|$~*_`\[\]{}\\]", lambda match: f"&#{ord(match[0])};", " ".join(text.split()))


# -------------------------------------------------------------------------------------------------------- Python

# The public names under the words that a reader looks for.
PUBLIC = {
    "The program as functions": ("pretrain", "evaluate", "embed", "neighbours", "export", "RunResult", "Embedding"),
    "Encoders": ("load_encoder", "Encoder"),
    "Losses": ("MoCoLoss", "MoCHiLoss", "SynCoLoss", "SupConLoss", "SimCLRLoss", "HCLLoss", "DCLLoss"),
    "Momentum contrast": ("MoCo", "hard_negatives", "MoCHiConfig", "SynCoConfig"),
    "Errors": ("MocoError", "UserError", "TrainingError", "OutageError"),
}
DEFINED = {
    f"moco.{name}": "moco.library.program" for name in ("embed", "neighbours", "export")
}  # modules that are functions
# What lies below: modules, and the names of each that others may use.
BELOW = {
    "The loss operator": {"moco.kernels": ("contrastive_loss", "labelled_loss", "resolve", "resolve_precision"),
                          "moco.kernels.spec": ("Draws", "LossOutput", "hardest_rows")},
    "Methods": {"moco.methods.registry": ("Family", "Method"),
                "moco.methods.losses": ("Pairs", "compare", "supcon", "dcl", "hcl", "schane"),
                "moco.methods.negatives": ("Kind", "Synthetic", "draw", "HardNegatives")},
    "Models": {"moco.models.base": ("StepOutput", "Contrast", "Momentum"), "moco.models.moco": ("MoCo",),
               "moco.models.in_batch": ("BatchContrast",), "moco.models.moco_v3": ("MoCoV3",),
               "moco.models.encoder": ("build_encoder", "features", "around_head")},
    "Weights": {"moco.weights.read": ("Backbone", "load_backbone", "open_backbone"),
                "moco.weights.layouts": ("File", "open_file")},
    "Configuration": {"moco.config": ("NegativesConfig", "ModelConfig", "MoCoConfig",
                                      "InBatchConfig", "MoCoV3Config", "EncoderConfig", "OptimizerConfig",
                                      "ScheduleConfig", "SubsetConfig", "ClassifierConfig", "ObjectiveConfig",
                                      "ValidationConfig", "FewShotConfig", "ViewConfig", "PretrainConfig")},
}  # fmt: skip


def interface() -> str:
    """What `import moco` offers, as Markdown with mkdocstrings' blocks."""
    if differ := {name for names in PUBLIC.values() for name in names} ^ set(moco.__all__):
        raise AssertionError(f"PUBLIC in docs/site/reference.py is not moco.__all__: {sorted(differ)}")
    homes = {name: DEFINED.get(module, module) for name, module in moco._MODULES.items()}
    return _page(
        "Python interface",
        "What `import moco` offers; [the library](library.md) shows it at work. What lies below is on "
        "[a page of its own](internals.md).",
        {title: [(f"{homes[name]}.{name}", f"moco.{name}") for name in names] for title, names in PUBLIC.items()},
    )


def internals() -> str:
    """The modules below the public names."""
    return _page(
        "Below the public names",
        "Modules that [the public names](api.md) are made of. They may change with any version.",
        {title: [(f"{module}.{name}",) * 2 for module, names in modules.items() for name in names]
         for title, modules in BELOW.items()},
    )  # fmt: skip


def _page(title: str, text: str, sections: dict[str, list[tuple[str, str]]]) -> str:
    """Sections of objects, each by its path and how it is called."""
    lines = [f"# {title}", "", text, ""]
    for section, objects in sections.items():
        lines += [f"## {section}", "", *(line for path, heading in objects for line in _block(path, heading))]
    return "\n".join(lines)


def _block(path: str, heading: str) -> list[str]:
    return [f"::: {path}", "    options:", f"      heading: {heading}", f"      toc_label: {heading}", ""]


PAGES = {"flags.md": flags, "api.md": interface, "internals.md": internals}
