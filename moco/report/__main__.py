"""python -m moco.report, `moco report`: a page about runs."""

import os
import sys

from moco import signals
from moco.errors import exit_code, tell


def main(argv: list[str] | None = None) -> int:
    """Write the page of the runs that are named; the exit code."""
    from moco.cli import looking

    args = looking.parse_report(argv)
    from moco.report import page, runs

    def work() -> int:
        found = runs.find(args.runs)
        path = args.out or os.path.join(args.runs[0] if len(args.runs) == 1 else ".", "report.html")
        page.write(found, path)
        tell(f"{len(found)} run{'s' * (len(found) != 1)}: {path}")
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(signals.run(main))
