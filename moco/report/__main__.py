"""python -m moco.report, `moco report`: a page about runs. Exit codes: 0 done; 2 input that cannot be used."""

import os
import sys
import time
from argparse import Namespace

from moco import signals
from moco.errors import exit_code, tell

QUIET = 2  # looks without a run at work after which a folder of several is done: a sweep's next trial takes a while


def main(argv: list[str] | None = None) -> int:
    """Write the page of the runs that are named, again and again with --watch; the exit code."""
    from moco.cli import looking

    args = looking.parse_report(argv)
    return exit_code(lambda: _write(args))


def _write(args: Namespace) -> int:
    from moco.report import FILE, figures, page

    path = args.out or os.path.join(args.runs[0] if len(args.runs) == 1 else ".", FILE)
    quiet = QUIET  # where nothing is at work from the beginning, nothing is waited for
    told = False
    while True:
        report = page.of(args.runs, args.align)
        quiet = 0 if report.running else quiet + 1
        done = args.watch is None or quiet >= min(QUIET, len(report.runs))
        report.again = None if done else args.watch
        page.write(report, path)
        written = figures.write(args.figures, report.sections, report.align) if args.figures else []
        if args.watch is None or done:
            pictures = f"; {len(written)} figures in {args.figures}" if args.figures else ""
            tell(f"{len(report.runs)} run{'s' * (len(report.runs) != 1)}: {path}{pictures}")
            return 0
        if not told:
            tell(f"{path} is written every {args.watch:g} s until the runs end; Ctrl-C ends this command, not the runs")
        told = True
        time.sleep(args.watch)


if __name__ == "__main__":
    sys.exit(signals.run(main))
