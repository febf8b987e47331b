"""What a name says of a file or folder: an image, an archive, annotations, or what a system leaves beside images."""

from __future__ import annotations

import functools
import os
import re

# torchvision's, other names of formats that :mod:`moco.data.sources.decode` reads, and arrays.
IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".jpe", ".jfif", ".gif",
    ".npy",
)  # fmt: skip
# Images of formats that are not read: a class of them is no empty class.
UNREAD = frozenset((
    ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jpx", ".jxl", ".jxr", ".tga", ".psd", ".ico", ".pcx", ".sgi", ".ras",
    ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".exr", ".hdr", ".dcm", ".svs", ".czi",
    ".nd2", ".lif", ".ndpi", ".fits", ".svg", ".pbm", ".pnm", ".pfm", ".dds", ".qoi", ".eps",
))  # fmt: skip
_ARCHIVE = re.compile(r"\.(tar(\.\w{1,4})?|tgz|tbz2?|txz|tzst|zip|7z|rar)$", re.IGNORECASE)
_IMAGE_FOLDERS = frozenset((
    "jpegimages", "images", "image", "imgs", "img", "photos", "jpg", "jpegs", "rgb", "leftimg8bit", "data", "cls-loc",
))  # fmt: skip
_ABOUT_IMAGES = re.compile(
    r"(annot|label|mask|imageset|segmentation|gt|ground_?truth|bbox|bounding_?box|depth|instances|panoptic|stuff|"
    r"captions|keypoints|trimap|meta|split|doc|list|attributes|parts)",
    re.IGNORECASE,
)
_HELD_OUT = re.compile(r"(val|valid|validation|test|testing)([-_ ]?\d{1,4})?", re.IGNORECASE)

# Compared without case: Windows and macOS do not tell the cases apart, and neither do the archives made there.
_NAMES = frozenset((
    "__macosx", "network trash folder", "temporary items", "thevolumesettingsfolder", "desktop db", "desktop df",
    "icon\r",  # of macOS; what it calls ._NAME, .DS_Store, .Trashes, .Spotlight-V100 and .fseventsd is hidden
    "$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini",
    "@eadir", "#recycle", "#snapshot", "@tmp",  # Synology
    "@recycle", "@recently-snapshot", "@__thumb", "@sharebin",  # QNAP
    "lost+found", "__pycache__", "picasa.ini", "zbthumbnail.info",
))  # fmt: skip
_PATTERN = re.compile(
    r"\.(?!\.?$)"  # hidden, but not the parts . and .. of a path
    r"|synophoto_|synofile_|synoindex_|synovideo_|.*@syno(eastream|resource|thumb)"
    r"|~\$|found\.\d{3}$|thumbs\.db:|paxheaders?(\.\d+)?$",
    re.IGNORECASE,
)

CLUTTER_BEGINS = ".~sS"  # the names of clutter that end as images do: a million others need not be compared


def is_clutter(path: str) -> bool:
    """Whether a part of a relative POSIX path (``a/@eaDir/x.jpg``, ``./._x.jpg``) is hidden or of no image's making.

    Such folders are no classes, and such files no images, whatever their names end in.
    """
    folder, _, name = path.rpartition("/")
    return _is_clutter(name) or (folder != "" and _any_is_clutter(folder))


def _is_clutter(part: str) -> bool:
    return _PATTERN.match(part) is not None or part.lower() in _NAMES


@functools.lru_cache(1024)
def _any_is_clutter(folder: str) -> bool:
    """Of the parts of a path that many files share."""
    return any(map(_is_clutter, folder.split("/")))


def kind_of(name: str) -> str:
    """The extension of a file in lower case, ``.tar.gz`` whole, or "no extension"."""
    if archive := _ARCHIVE.search(name):
        return archive[0].lower()
    extension = os.path.splitext(name)[1].lower()
    return extension if 1 < len(extension) <= 12 else "no extension"


def is_archive(name: str) -> bool:
    """Whether the name is that of a tar or zip file or the like."""
    return bool(_ARCHIVE.search(name))


def holds_images(name: str) -> bool:
    """Whether a folder of this name holds a data set's images, not a class: ``JPEGImages``, ``images``."""
    return name.lower() in _IMAGE_FOLDERS


def is_held_out(name: str) -> bool:
    """Whether a folder of this name may hold held-out images: ``test``, ``Valid``, ``test2017``."""
    return bool(_HELD_OUT.fullmatch(name))


def is_about_images(name: str) -> bool:
    """Whether a folder beside such a one holds what is known of the images: ``Annotations``, ``SegmentationClass``."""
    return bool(_ABOUT_IMAGES.match(name))
