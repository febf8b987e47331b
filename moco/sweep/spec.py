"""A sweep's YAML file: read, checked in full before anything runs, and turned into trials.

main: main_semisup.py                 # or main_lincls.py, main_pretrain.py, or a script with their contract
flags: {arch: resnet50}               # of every trial; true for a switch, a list for several values
paired: {train-percent: [1, 10], epochs: [60, 30]}          # lists walked together
grid: {lr-backbone: [0.01, 0.1]}      # crossed with each other and with the paired rows
one_run: lr                           # optional: a flag of the grid that takes all its values in one run
seeds: 3                              # 0, 1, 2; or a list; default: seed 0
group_by: [train-percent]             # one setting is selected for each value; default: one of all
baseline: {train-percent: 1}          # optional: the tables also have each setting's difference to this one, by seed
select: {metric: val_acc1, mode: max, flags: {val-only: true}}    # optional; flags only of these trials
report: {metrics: [acc1], flags: {}, resume: true}  # resume: test the selected networks, train no new ones
run: {gpus: [0, 1], gpus_per_trial: 1, slots: 2, minutes: 600, slurm: {...}}    # all optional
out: runs/sweeps/NAME                 # the default
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
from dataclasses import dataclass, field, replace
from typing import Any

from moco import files, resources
from moco.cli.parser import argv_of
from moco.errors import UserError
from moco.sweep import figures, paired
from moco.sweep.commands import ENTRY_POINTS, dests_of, flags_named, hyphens, parsed, plain, setting

# flags that the sweep itself gives, and the entry of the file that says with which value
OURS = {"save-dir": "out", "resume": "", "seed": "seeds", "max-minutes": "run: {minutes: ..}"}
OWN_FOLDER = ("save_dir", "trial")  # settings of our mains that would lead out of a trial's folder
KEYS = ("main", "flags", "grid", "paired", "one_run", "seeds", "group_by", "baseline", "select", "report", "run", "out")
RUN_KEYS = ("gpus", "gpus_per_trial", "slots", "minutes", "slurm")


@dataclass(frozen=True)
class Trial:
    """One run of the entry point. ``settings`` is what the sweep varies, without the seed. Trials with the same words
    share one folder, so they are one run."""

    settings: dict[str, Any]
    seed: int
    folder: str
    command: list[str]  # from the script on, without the interpreter
    parent: str = ""  # folder of a finished trial whose checkpoints this one goes on from
    row: tuple[str, Any] | None = None  # (flag, value): whose figures these are in a run of many values


@dataclass(frozen=True)
class Stage:
    """What one pass over settings looks at: ``metrics`` of result.json, with ``flags`` added to every command.

    mode: whether the best is the max or the min. resume: go on from the checkpoints of the selection's trials instead
    of training again.
    """

    metrics: list[str]
    flags: dict[str, Any]
    mode: str = "max"
    resume: bool = False


@dataclass(frozen=True)
class Run:
    """Where trials run. gpus: ids, None for all there are. slots: trials at a time without GPUs, or SLURM jobs at a
    time. minutes: after which a trial is told to save and stop. slurm: parameters of submitit's executor."""

    gpus: list[str] | None = None
    gpus_per_trial: int = 1
    slots: int | None = None
    minutes: float | None = None
    slurm: dict[str, Any] | None = None


@dataclass(frozen=True)
class Spec:
    """A checked sweep."""

    path: str
    main: str
    flags: dict[str, Any]
    settings: list[dict[str, Any]]
    one_run: tuple[str, list[Any]] | None  # a flag that takes all its values at once, in the first stage
    seeds: list[int]
    group_by: list[str]
    select: Stage | None  # None: nothing is chosen, every setting is reported
    report: Stage
    run: Run
    out: str
    argv: list[str] = field(default_factory=list)  # of the command line, for every trial
    baseline: dict[str, Any] = field(default_factory=dict)  # values of a setting; empty for no differences
    notes: tuple[str, ...] = ()  # what a reader of its figures must know

    def trials(self, stage: Stage, settings: list[dict[str, Any]] | None = None) -> list[Trial]:
        """Each setting (all by default) under each seed."""
        chosen = self.settings if settings is None else settings
        return [self._trial(stage, setting, seed) for setting in chosen for seed in self.seeds]

    def group(self, setting: dict[str, Any]) -> tuple:
        """The values of ``group_by``, as words: one setting is selected for each."""
        return tuple(plain(setting[name]) for name in self.group_by)

    @property
    def told_apart_by(self) -> list[str]:
        """The settings in which those that are reported differ."""
        return self.group_by if self.select else [*self.settings[0]]

    def baseline_of(self, setting: dict[str, Any], reported: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The setting that another one is compared with, see :func:`moco.sweep.paired.partner`."""
        return paired.partner(self.baseline, self.told_apart_by, setting, reported)

    @property
    def stages(self) -> list[Stage]:
        """The selection, where there is one, and the report; the first of them runs every setting."""
        return [stage for stage in (self.select, self.report) if stage]

    def _trial(self, stage: Stage, setting: dict[str, Any], seed: int) -> Trial:
        varied, row = {**setting, "seed": seed}, None
        if self.one_run and stage is self.stages[0]:
            name, values = self.one_run
            varied[name], row = values, (name, setting[name]) if len(values) > 1 else None
        argv = self._argv({**self.flags, **stage.flags, **varied})
        code = hashlib.sha256(json.dumps([self.main, *argv]).encode()).hexdigest()[:10]
        named = ",".join(f"{name}={plain(value)}" for name, value in varied.items())
        folder = os.path.join(self.out, "trials", re.sub(r"[^\w.,=+-]", "_", named)[:120] + "-" + code)
        parent = self._trial(self.select, setting, seed).folder if stage.resume and self.select else ""
        script = resources.script(self.main) if self.main in ENTRY_POINTS else self.main
        command = [script, *argv, "--save-dir", folder, "--resume", "auto"]
        return Trial(setting, seed, folder, command, parent, row)

    def _argv(self, flags: dict[str, Any]) -> list[str]:
        # DIR goes first, because a flag with several values before it would take it for one of them; what else the
        # command line gave goes last, because the last word of a flag wins.
        at = next((i for i, word in enumerate(self.argv) if word.startswith("-")), len(self.argv))
        return [*self.argv[:at], *self._said(flags), *self.argv[at:]]

    def _said(self, flags: dict[str, Any]) -> list[str]:
        return [word for name in sorted(flags) for word in argv_of(f"--{name}", flags[name], dests_of(self.main))]

    def words_of(self, stage: Stage) -> str:
        """A stage's own flags, as they are typed."""
        return shlex.join(self._said(stage.flags))


def read_spec(path: str, argv: list[str] | None = None, out: str | None = None, **run: Any) -> Spec:
    """The spec in a file, with every command it will start accepted by the entry point's own parser.

    Args:
        path: of the YAML file.
        argv: for every trial, put behind the file's flags.
        out: the sweep's folder instead of the file's.
        run: entries that take the place of the file's ``run``; None leaves the file's.

    Raises:
        UserError: one sentence that names the file, the entry and what is wrong with it.
    """
    try:
        spec = _build(path, _load(path), argv or [], out, {k: v for k, v in run.items() if v is not None})
        _check_spellings(spec)
        _check_argv(spec)
        for stage in spec.stages:
            _check_figures(spec, stage)
        spec = replace(spec, notes=tuple(_notes(spec)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return spec


# --------------------------------------------------------------------------------------------------- the entries


def _load(path: str) -> dict[str, Any]:
    return _mapping(files.read_yaml(path, "this sweep"), "the file", KEYS)


def _build(path: str, entries: dict[str, Any], argv: list[str], out: str | None, run: dict[str, Any]) -> Spec:
    main = entries.get("main")
    if main not in ENTRY_POINTS and not (isinstance(main, str) and os.path.isfile(main)):
        raise UserError(f"main must be one of {', '.join(ENTRY_POINTS)} or the path of a script like them, not {main}.")
    flags, grid, together = (_flags(entries.get(name), name) for name in ("flags", "grid", "paired"))
    settings = _settings(flags, grid, together)
    group_by = [hyphens(name) for name in _list(entries.get("group_by", []), "group_by")]
    for name in group_by:
        if name not in settings[0]:
            raise UserError(f"group_by {name} is neither in grid nor in paired: name one of their settings.")
    baseline = _mapping(entries.get("baseline", {}), "baseline")
    baseline = {hyphens(name): value for name, value in baseline.items()}
    one_run = _one_run(main, entries.get("one_run"), grid)
    select, report = _stages(entries, {*settings[0], *flags})
    if report.resume and one_run:
        raise UserError("report resume does not go with one_run: a checkpoint of many values is not one of them.")
    name = os.path.splitext(os.path.basename(path))[0]
    folder = out or str(entries.get("out") or os.path.join("runs", "sweeps", name))
    seeds = _seeds(entries.get("seeds", [0]))
    where = _run(entries, run)
    spec = Spec(path, main, flags, settings, one_run, seeds, group_by, select, report, where, folder, argv, baseline)
    paired.check(baseline, spec.told_apart_by, settings)
    return spec


def _settings(flags: dict, grid: dict, paired: dict) -> list[dict[str, Any]]:
    for where, lists in (("grid", grid), ("paired", paired)):
        for name, values in lists.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"{where} {name} must be a list of values, not {values}.")
    if len({len(values) for values in paired.values()}) > 1:
        lengths = ", ".join(f"{name} {len(values)}" for name, values in paired.items())
        raise UserError(f"paired lists are walked together and must have one length, not {lengths}.")
    names = [*flags, *grid, *paired]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twice[0]} stands in two of flags, grid and paired; leave it in one.")
    rows = [dict(zip(paired, row, strict=True)) for row in zip(*paired.values(), strict=True)] or [{}]
    cells = [dict(zip(grid, cell, strict=True)) for cell in itertools.product(*grid.values())]
    settings = [{**row, **cell} for row in rows for cell in cells]
    if len({tuple(map(plain, setting.values())) for setting in settings}) < len(settings):
        raise UserError("grid or paired holds a setting twice; each would be the same run: remove one.")
    return settings


def _one_run(main: str, entry: Any, grid: dict[str, Any]) -> tuple[str, list[Any]] | None:
    if entry is None:
        return None
    if main in ENTRY_POINTS and (main, entry) != ("main_lincls.py", "lr"):
        raise UserError(f"one_run is for lr of main_lincls.py, which has a row of figures for each rate, not {entry}.")
    if hyphens(entry) not in grid:
        raise UserError(f"one_run {entry} is not in grid: add its values there.")
    return hyphens(entry), grid[hyphens(entry)]


def _stages(entries: dict[str, Any], taken: set[str]) -> tuple[Stage | None, Stage]:
    if "report" not in entries:
        raise UserError("report is missing: write report: {metrics: [acc1]}.")
    report = _stage(entries["report"], "report", ("metrics", "flags", "resume"), taken)
    if entries.get("select") is None:
        return None, replace(report, resume=False)
    select = _stage(entries["select"], "select", ("metric", "mode", "flags"), taken)
    if select.flags == report.flags and set(select.metrics) & set(report.metrics):
        raise UserError(
            f"{select.metrics[0]} is both selected on and reported: such a figure is too good; select on a validation "
            "figure, or give select and report different flags."
        )
    return select, report


def _stage(entry: Any, where: str, keys: tuple[str, ...], taken: set[str]) -> Stage:
    entry = _mapping(entry, where, keys)
    metrics = entry.get(keys[0])
    metrics = [metrics] if isinstance(metrics, str) else metrics
    if not isinstance(metrics, list) or not metrics or not all(isinstance(name, str) for name in metrics):
        raise UserError(f"{where} needs {keys[0]}: the name of a number in result.json.")
    mode = entry.get("mode", "max")
    if mode not in ("max", "min"):
        raise UserError(f"select mode must be max or min, not {mode}.")
    flags = _flags(entry.get("flags"), f"{where} flags")
    if both := taken & set(flags):
        raise UserError(f"{sorted(both)[0]} stands in {where} flags and in flags, grid or paired; leave it in one.")
    return Stage(metrics, flags, mode, resume=entry.get("resume", False) is True)


def _seeds(entry: Any) -> list[int]:
    seeds = list(range(entry)) if type(entry) is int else entry
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"seeds must be their number or a list of whole numbers, not {entry}.")
    if len(set(seeds)) < len(seeds):
        raise UserError("seeds holds a value twice; each would be the same run: remove one.")
    return seeds


def _run(entries: dict[str, Any], given: dict[str, Any]) -> Run:
    run = _mapping(entries.get("run", {}), "run", RUN_KEYS)
    if "gpus" in given or "slots" in given:  # one of the two on the command line takes the place of both
        run = {name: value for name, value in run.items() if name not in ("gpus", "slots")}
    run = {name: value for name, value in {**run, **given}.items() if value is not None}
    if "gpus" in run and "slots" in run:
        raise UserError("run: give gpus (one trial each) or slots (trials at a time without GPUs), not both.")
    for name in ("slots", "gpus_per_trial"):
        if type(run.get(name, 1)) is not int or run.get(name, 1) < 1:
            raise UserError(f"run {name} must be a whole number of at least 1, not {run[name]}.")
    if type(run.get("minutes", 1)) not in (int, float) or not run.get("minutes", 1) > 0:
        raise UserError(f"run minutes must be a number above 0, not {run['minutes']}.")
    if "gpus" in run:
        run["gpus"] = [str(gpu) for gpu in _list(run["gpus"], "run gpus")]
    _check_slurm(run)
    return Run(**run)


def _check_slurm(run: dict[str, Any]) -> None:
    if "slurm" not in run:
        return
    parameters = _mapping(run["slurm"], "run slurm")
    if "gpus" in run or "gpus_per_trial" in run:
        raise UserError("run: with slurm, GPUs are asked for by its own gpus_per_node.")
    if "minutes" not in run and "timeout_min" not in parameters:
        raise UserError("run: slurm needs timeout_min, or run needs minutes: submitit's own limit is 5 minutes.")


def _mapping(entry: Any, where: str, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be lines of NAME: VALUE, not {entry}.")
    if odd := [str(name) for name in entry if keys and name not in keys]:
        raise UserError(f"{where} has no entry {odd[0]}; it has {', '.join(keys)}.")
    return entry


def _list(entry: Any, where: str) -> list:
    if not isinstance(entry, list):
        raise UserError(f"{where} must be a list, not {entry}.")
    return entry


def _flags(entry: Any, where: str) -> dict[str, Any]:
    flags = {hyphens(name): value for name, value in _mapping(entry or {}, where).items()}
    if ours := [name for name in flags if name in OURS]:
        instead = f"; write {OURS[ours[0]]}" if OURS[ours[0]] else ""
        raise UserError(f"{where} {ours[0]}: the sweep gives this flag{instead}.")
    return flags


# -------------------------------------------------------------------------------------------- flags and figures


def _check_spellings(spec: Spec) -> None:
    """A flag may have several spellings, but one place: of two, the later word of the command would win."""
    for stage in spec.stages:
        seen: dict[str, str] = {}
        for name in dict.fromkeys([*spec.flags, *spec.settings[0], *stage.flags]):
            other = seen.setdefault(setting(spec.main, name), name)
            if other != name:
                raise UserError(f"{other} and {name} are two spellings of one flag; leave one of them out.")
            if setting(spec.main, name) in OWN_FOLDER and spec.main in ENTRY_POINTS:
                raise UserError(f"{name}: each trial has a folder of its own; write out.")


def _check_argv(spec: Spec) -> None:
    """Words of the command line must leave alone what tells the trials apart, and the two stages."""
    named = flags_named(spec.main, spec.argv)
    varied = [*OURS, *(OWN_FOLDER if spec.main in ENTRY_POINTS else ()), *spec.settings[0]]
    stages = [name for stage in spec.stages for name in stage.flags]
    for names, why in ((varied, "would make trials alike"), (stages, "would take the place of a stage's own flag")):
        for name in names:
            if word := named.get(setting(spec.main, name)):
                raise UserError(f"{word} after -- {why}; change it in the file.")


def _check_figures(spec: Spec, stage: Stage) -> None:
    """The entry point takes every command of a stage and writes the stage's metrics then."""
    if spec.main not in ENTRY_POINTS:
        return
    for trial in spec.trials(stage):
        found = _figures(spec, trial)
        odd = [name for name in stage.metrics if name not in found]
        if odd and not found:
            raise UserError(f"{spec.main} writes no result.json with --knn, --few-shot, --lr-find or --evaluate.")
        if odd:
            raise UserError(f"{spec.main} writes no {odd[0]} with these flags; it writes {', '.join(found)}.")


def _figures(spec: Spec, trial: Trial) -> figures.Figures:
    return figures.of(ENTRY_POINTS[spec.main], parsed(spec.main, tuple(trial.command[1:])), trial.row is not None)


def _notes(spec: Spec) -> list[str]:
    """What of the figures is not known or not independent.

    Raises:
        UserError: selected and reported are figures of the same images, where --val-share would hold some out.
    """
    if spec.main not in ENTRY_POINTS:
        return [f"metrics are taken as they are spelled: nothing is known of what {os.path.basename(spec.main)} writes"]
    if spec.select is None:
        return []
    metric, same = spec.select.metrics[0], {}
    for chosen, told in zip(spec.trials(spec.select), spec.trials(spec.report), strict=True):
        images, reported = _figures(spec, chosen)[metric], _figures(spec, told)
        same |= {name: images for name in spec.report.metrics if images and reported[name] == images}
    if not same:
        return []
    name, images = next(iter(same.items()))
    summary = f"{metric}, which selects, and {name}, which is reported, are both of {images}"
    if spec.main != "main_pretrain.py":
        raise UserError(f"{summary}: such a figure is too good; give select a --val-share of its own.")
    return [f"{summary}: the reported figure is as good as the selection made it"]
