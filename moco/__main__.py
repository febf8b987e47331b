"""python -m moco: the command `moco`."""

import sys

from moco import console

if __name__ == "__main__":
    sys.exit(console.main("python -m moco"))
