"""`python -m moco.sweep`: read a spec, run its trials, select, run what is reported, write the tables."""

from __future__ import annotations

import itertools
import os
import sys
import threading

from moco import doors, resources, signals
from moco.cli.parser import Parser
from moco.errors import UserError, exit_code, tell
from moco.sweep import pool, report, spec, trial

FAILED_EXIT = 1


def main(argv: list[str] | None = None) -> int:
    """One sweep from its file to its tables; returns the exit code (see the package)."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    text = "Run a grid of settings. Words after -- go to every trial."
    parser = Parser(doors.typed("sweep"), text, allow_abbrev=True)
    parser.add_argument("spec", metavar="SPEC.yml", help="YAML file of the sweep, or the name of a recipe")
    parser.add_argument("--out", metavar="DIR", help="folder to write to (default: the file's, else runs/sweeps/NAME)")
    parser.add_argument("--gpus", nargs="+", metavar="ID", help="run on these GPUs, one trial each (default: all)")
    parser.add_argument("--slots", type=int, metavar="N", help="run without GPUs, N trials at a time")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    args = parser.parse_args(argv[:cut])

    def work() -> int:
        sweep = spec.read_spec(
            resources.find_recipe(args.spec, "sweeps"), argv[cut + 1 :], args.out, gpus=args.gpus, slots=args.slots
        )
        return dry_run(sweep) if args.dry_run else run(sweep)

    return exit_code(work)


def dry_run(sweep: spec.Spec) -> int:
    """Print the command of every trial."""
    for command in dict.fromkeys(resources.shown(*item.command) for item in sweep.trials(sweep.stages[0])):
        tell(command)  # once for all settings of one run
    if sweep.select and sweep.select.flags != sweep.report.flags:
        without, instead = (sweep.words_of(stage) for stage in (sweep.select, sweep.report))
        how = " and ".join(f"{way} {told}" for way, told in (("without", without), ("with", instead)) if told)
        tell(f"# then each selected setting again, {how}, under {len(sweep.seeds)} seeds")
    for note in sweep.notes:
        tell(f"# {note}")
    return 0


def run(sweep: spec.Spec) -> int:
    """Run what is not yet done, and write the tables whatever happens on the way."""
    try:
        os.makedirs(sweep.out, exist_ok=True)
    except OSError as error:
        raise UserError(f"{sweep.out} cannot be made ({error.strerror}); choose another --out.") from error
    for note in sweep.notes:
        tell(note)
    before, stop = _attempts(sweep), threading.Event()
    with signals.listening(), signals.led_by(lambda number, again: stop.set()):
        chosen = _stages(sweep, before, stop)
        tell("\n" + report.write_tables(sweep, chosen))
        if (code := signals.code()) is not None:
            tell("stopped: run the same command again to continue")
            return code
    return FAILED_EXIT if _something_is_missing(sweep, chosen) else 0


def _attempts(sweep: spec.Spec) -> dict[str, str | None]:
    """What each trial ended with before the sweep began, by folder; what is damaged there is told."""
    found: dict[str, str | None] = {}
    for folder in dict.fromkeys(item.folder for stage in sweep.stages for item in sweep.trials(stage)):
        for name in trial.damaged(folder):
            tell(f"{os.path.join(folder, name)} is damaged and counts as absent")
        record = trial.read_record(folder)
        found[folder] = record.attempt if record else None
    return found


def _stages(sweep: spec.Spec, before: pool.Before, stop: threading.Event) -> list[dict]:
    """Run the trials that selection looks at, then those of the selected settings, which are returned."""
    chosen = [] if sweep.select else sweep.settings
    if sweep.select:
        _run_all(sweep, sweep.select, sweep.settings, before, stop)
    if not stop.is_set():
        chosen = report.selected(sweep)
        _run_all(sweep, sweep.report, chosen, before, stop)
    return chosen


def _run_all(
    sweep: spec.Spec, stage: spec.Stage, settings: list[dict], before: pool.Before, stop: threading.Event
) -> None:
    todo = list({item.folder: item for item in sweep.trials(stage, settings)}.values())
    numbers = itertools.count(1)

    def say(item: spec.Trial, record: trial.Record) -> None:
        name = f"[{next(numbers)}/{len(todo)}] {os.path.basename(item.folder)}"
        if record.status != trial.DONE:
            tell(f"{name} {record.summary()} (folder {item.folder})")
            return
        when = "was done before" if record.attempt in ("", before.get(item.folder)) else record.summary()
        found = [] if item.row else [f"{metric} {trial.number(item, metric)}" for metric in stage.metrics]
        tell(f"{name} {when}{': ' * bool(found)}{', '.join(found)}")

    where = pool.Slurm(sweep.run, sweep.out) if sweep.run.slurm else pool.Local(sweep.run, stop)
    pool.run_all(todo, where, before, stop, say)


def _something_is_missing(sweep: spec.Spec, chosen: list[dict]) -> bool:
    groups = set(map(sweep.group, sweep.settings))
    return len(set(map(sweep.group, chosen))) < len(groups) or any(
        report.why_unfinished(item, stage) for _, stage, mine in report.passes(sweep, chosen) for item in mine
    )


if __name__ == "__main__":
    sys.exit(signals.run(main))
