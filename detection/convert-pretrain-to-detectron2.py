"""python detection/convert-pretrain-to-detectron2.py CHECKPOINT OUT.pkl"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone without installing

from detection.convert import convert, write
from moco.errors import USAGE_EXIT, UserError


def main(words: list[str]) -> int:
    """Convert one file; the exit code."""
    if len(words) != 2:
        print(f"error: {__doc__}", file=sys.stderr)
        return USAGE_EXIT
    try:
        tensors = convert(words[0])
        write(tensors, words[1])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_EXIT
    print(f"wrote {len(tensors)} arrays of the backbone to {words[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
