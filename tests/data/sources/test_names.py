"""What is never a class and never an image, by its name."""

import pytest

from moco.data.sources.names import is_clutter

CLUTTER = [
    ".DS_Store",
    "._x.jpg",
    "__MACOSX/a/0.jpg",
    "a/@eaDir/0.jpg/SYNOPHOTO_THUMB_XL.jpg",
    "SYNOPHOTO_THUMB_M.jpg",
    "Thumbs.db",
    "thumbs.db",
    "a/desktop.ini",
    "Desktop.ini",
    "$RECYCLE.BIN/S-1-5/0.jpg",
    ".ipynb_checkpoints/0-checkpoint.png",
    ".thumbnails/large/x.png",
    "lost+found",
    "#recycle/0.jpg",
    ".Trash-1000/files/0.jpg",
    ".git/objects",
    ".Spotlight-V100",
    "./._x.jpg",
    "@Recycle/x.jpg",
    "FOUND.000/a.jpg",
    "__pycache__",
    "a/x.jpg@SynoEAStream",
    "~$list.jpg",
    "PaxHeaders.0/x.jpg",
    "./a/.AppleDouble/x.jpg",
]
CLUTTER += ["System Volume Information", "system volume information/x.jpg", "Icon\r", "Network Trash Folder/0.jpg"]
IMAGES = [
    "x.jpg",
    "./x.jpg",
    "a/x.jpg",
    "./a/./x.jpg",
    "../x.jpg",
    "a..b/x.jpg",
    "recycle/x.jpg",
    "lost/x.jpg",
    "thumbs/x.jpg",
    "macosx/0.png",
    "#1/x.jpg",
    "$5/x.jpg",
    "@home/x.jpg",
    "_x.jpg",
    "n01440764/n01440764_10026.JPEG",
    "~x.jpg",
    "found.jpg",
    "trash/x.jpg",
    "desktop/x.jpg",
    "eaDir/x.jpg",
]


@pytest.mark.parametrize("path", CLUTTER)
def test_clutter(path):
    assert is_clutter(path)


@pytest.mark.parametrize("path", [*IMAGES, "a b/x.jpg", "Thumbs db/x.jpg"])
def test_images_are_none(path):
    assert not is_clutter(path)
