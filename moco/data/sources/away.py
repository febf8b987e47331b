"""Whether an image that cannot be read is bad, or the data is gone for now: a folder that is not mounted, a server that
does not answer. A bad image is replaced, as it will be in every run; for data that is gone a run waits.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from moco.data.sources.decode import BadImageError
from moco.errors import OutageError

PAUSES = (0.1, 0.5, 2.0)  # seconds between attempts at an image of which the system says that it cannot be read now
ENOUGH = 8  # images, far apart, none of which can be read: then it is not the images
REST_SECONDS = 2.0  # in which a process that found the data gone does not ask for each image of its batch again
# What is wrong with a file or its name, which is not the fault of the disk, unless the folder is gone too.
_OF_THE_FILE = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EFBIG,
}  # fmt: skip
# What is never wrong with a file, but with the way to it or with this process.
_OF_THE_WAY = {
    errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENODEV, errno.EAGAIN, errno.EBUSY,
    errno.ENOMEM, errno.EMFILE, errno.ENFILE,
}  # fmt: skip


class ImagesAwayError(OutageError):
    """The images cannot be read now, and none of them is bad; the text says what is gone."""


def system_error(error: BaseException) -> int:
    """The system's number of what a BadImageError comes from; 0 where the file was read and is no image."""
    return (error.__cause__.errno or 0) if isinstance(error.__cause__, OSError) else 0


def doubtful(error: BadImageError) -> bool:
    """Whether the error may be of the disk as well as of this image: a bad sector, or all that the disk has."""
    return system_error(error) not in (0, *_OF_THE_FILE)


def read_patiently(load: Callable[[], Any], missing: Callable[[], str], pauses: Sequence[float] = PAUSES) -> Any:
    """``load()``, and again after an error of the system that may pass: an image that is replaced because the disk
    hesitated is another run.

    Args:
        missing: what of the data is not there, empty where all of it is (:meth:`moco.data.Source.missing`).

    Raises:
        BadImageError: the image itself is bad, or :func:`doubtful`.
        ImagesAwayError: the data is gone.
    """
    for pause in (*pauses, None):
        try:
            return load()
        except BadImageError as error:
            number = system_error(error)
            if number in _OF_THE_FILE and (gone := missing()):
                raise ImagesAwayError(gone) from error
            if not number or (pause is None and number not in _OF_THE_WAY):
                raise
            if pause is None:
                raise ImagesAwayError(str(error)) from error
            if number in _OF_THE_FILE:  # once more, as the folder may have come back just now
                return load()
            time.sleep(pause)


def is_empty(folder: str) -> bool:
    """Whether there is nothing in the folder, or no such folder: what is left of a disk that is not mounted."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


_resting_until = 0.0  # of this process


def rest() -> None:
    """Begin REST_SECONDS."""
    global _resting_until
    _resting_until = time.monotonic() + REST_SECONDS


def resting() -> bool:
    """Whether this process has just found the data gone."""
    return time.monotonic() < _resting_until
