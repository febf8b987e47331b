"""Work on data sets from the command line: python -m moco.data index DIR [--out FOLDER]."""

from __future__ import annotations

import sys

from moco import options
from moco.data.index import write_index
from moco.errors import USAGE_EXIT, UserError


def main(argv: list[str] | None = None) -> int:
    """Write the index of an image folder; the exit code."""
    args = options.parse_data(argv)
    try:
        for path, images in write_index(args.folder, args.out):
            print(f"wrote {path}: {images} images")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_EXIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
