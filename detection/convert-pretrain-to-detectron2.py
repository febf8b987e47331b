"""python detection/convert-pretrain-to-detectron2.py CHECKPOINT OUT.pkl"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone without installing

from moco import signals

if __name__ == "__main__":
    signals.begin("stopped")

from moco.cli.common import encoder_file
from moco.errors import UserError, exit_code, tell
from moco.weights.detectron2_names import convert, pixels_of, write_pickle


def main(argv: list[str]) -> int:
    """Convert one file; the exit code."""
    return exit_code(lambda: work(argv))


def work(argv: list[str]) -> None:
    """Convert the file words[0] and write words[1]."""
    if len(argv) != 2:
        raise UserError(f"this takes two words, a checkpoint and the file to write, not {len(argv)}: {__doc__}")
    source = encoder_file(argv[0])
    tensors = convert(source)
    write_pickle(tensors, argv[1])
    tell(f"wrote {len(tensors)} arrays of the backbone to {argv[1]}")
    if pixels := pixels_of(source):
        tell(f"images are normalised as in training by appending {shlex.join(pixels)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
