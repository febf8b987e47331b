"""How many channels the images of a folder have: that of a few files which may have others than grey and colours."""

from __future__ import annotations

from typing import NamedTuple

from moco.data.sources import bands
from moco.data.sources.base import Source, spread_indices
from moco.data.sources.decode import BadImageError, open_tiff, reading
from moco.errors import UserError

LOOKED = 16  # files, spread over the set


class Look(NamedTuple):
    """One file: its channels, 0 where it is grey or colour; what they are; whether one can read it as grey or colour
    too; how many pages it has, none of them a channel."""

    name: str
    channels: int = 0
    parts: str = ""  # "bands" or "pages"
    plain: bool = True
    pages: int = 1


def settle_channels(source: Source, asked: int | None) -> None:
    """Give ``source`` the channels that were asked for, else those that its files have, and note what was taken.

    Grey and colour images keep the channels that the source has. Among such, others count as grey or colour too where
    they can be read so.

    Raises:
        UserError: an array of two readings, files of several numbers of channels, or none of the number asked for.
    """
    seen = _looked(source, asked)
    if asked is not None and seen and all(_differs(look, asked) for look in seen):
        own = f"has {seen[0].channels} {seen[0].parts}" if seen[0].channels else "is grey or colour"
        raise UserError(
            f"{seen[0].name} {own}, but --channels or the checkpoint is of {asked} channels: give images of {asked}"
        )
    notes, several = source.found.notes, {look.channels: look for look in seen if look.channels}
    one = next(iter(several.values())) if len(several) == 1 and all(look.channels for look in seen) else None
    if asked is None and one is not None:
        source.channels = one.channels
        notes.append(f"{one.name} has {one.channels} {one.parts}, read as {one.channels} channels of an image")
    elif asked is None and (odd := [look for look in several.values() if not look.plain]):
        other = next(look for look in seen if look.channels != odd[0].channels)
        raise UserError(
            f"{source.name} holds images of different channels, {odd[0].name} {odd[0].channels} and {other.name} "
            f"{other.channels or 'grey or colour'}: keep those of one kind, or type --channels {odd[0].channels}, and "
            "others count as unreadable"
        )
    notes.extend(filter(None, (_dropped(look, source.channels) for look in _distinct(seen))))


def _differs(look: Look, asked: int) -> bool:
    """Whether a file cannot be read as so many channels. Grey and colours may come with transparency."""
    if not look.channels:
        return asked > 4
    return look.channels != asked and not (asked in (1, 3) and look.plain)


def _distinct(seen: list[Look]) -> list[Look]:
    """The first file of each kind."""
    return list({look[1:]: look for look in reversed(seen)}.values())


def _dropped(look: Look, channels: int) -> str:
    """What of a file is not read; empty where all is."""
    if look.pages > 1:
        return f"{look.name} has several pages, of which the first is read"
    if look.channels in (0, channels) or not look.plain:
        return ""
    part = "first page" if look.parts == "pages" else "colours"
    return f"{look.name} has {look.channels} {look.parts}, of which the {part} alone is read: see --channels"


def _looked(source: Source, asked: int | None) -> list[Look]:
    """Some of the files, without those that cannot be read."""
    found = []
    for index in spread_indices(len(source), LOOKED) if source.files() else ():
        name = source.name_of(index)
        if not name.lower().endswith(bands.EXTENSIONS):
            found.append(Look(name))
            continue
        try:
            data = source.read(index)
            if data is not None:
                found.append(reading(name, lambda data=data, name=name: _look(name, data, asked)))
        except BadImageError as error:
            if isinstance(error.__cause__, bands.TwoReadingsError):
                raise
    return found


def _look(name: str, data: bytes, asked: int | None) -> Look:
    if data.startswith(bands.ARRAY):
        channels = _of_array(bands.array_shape(data), asked)
        return Look(name) if channels in (1, 3) else Look(name, channels, "channels", plain=False)
    if not data.startswith(bands.TIFF):
        return Look(name)
    image = open_tiff(data)
    channels, paged = bands.tiff_layers(image, data)
    if channels:
        return Look(name, channels, "pages" if paged else "bands", image is not None)
    return Look(name, pages=1 if image is None else bands.pages_of(image, 2))


def _of_array(shape: tuple[int, ...], asked: int | None) -> int:
    """Its channels, which are not those asked for where they cannot be."""
    try:
        return bands.array_channels(shape, asked)[0]
    except bands.TwoReadingsError:
        raise
    except ValueError:
        return bands.array_channels(shape)[0]
