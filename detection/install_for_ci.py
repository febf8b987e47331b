"""python detection/install_for_ci.py: detectron2's Python part into this environment, for tests without a compiler.

For users: ``needs.DETECTRON2``, upstream's own command, which compiles. This script is for CI and for a CPU: the wheel
in requirements-ci.txt is a third party's copy of upstream's Python of April 2024 with two lines edited. Its compiled
part ``_C`` was built for one Python and is deleted. Our recipes do not need it (ROIAlign and NMS are torchvision's);
deformable convolution, rotated boxes and the fast COCO evaluator do. The file is pinned by its hash.
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
PURE = [
    "--only-binary=:all:",
    "--python-version",
    "3.10",
    "--implementation",
    "cp",
    "--abi",
    "none",
    "--platform",
    "any",
]


def main() -> int:
    """Install, unless a detectron2 is there; pip's exit code."""
    if importlib.util.find_spec("detectron2"):
        print("detectron2 is here already; nothing to do")
        return 0
    folder = Path(sysconfig.get_path("data")) / "share" / "detectron2-python"
    shutil.rmtree(folder, ignore_errors=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--require-hashes",
    ]
    done = subprocess.run([*pip, *PURE, "--target", str(folder), "-r", str(HERE / "requirements-ci.txt")])
    if done.returncode:
        print("error: pip could not fetch detectron2's Python part; see above, or install detectron2.", file=sys.stderr)
        return done.returncode
    # Not detectron2's: a top-level package named tools, a compiled part for another Python, and a record of both.
    for path in (folder / "tools", *folder.glob("detectron2/_C*.so"), *folder.glob("*.dist-info")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (Path(sysconfig.get_path("purelib")) / "detectron2-python.pth").write_text(f"{folder}\n")
    print(f"detectron2's Python part (no compiled code) is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
