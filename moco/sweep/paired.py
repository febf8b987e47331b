"""Which setting of a sweep each other one is compared with, seed by seed.

Two runs of one seed share their images and what they draw, so that much of the spread over seeds is in both: the
difference of the pairs has a smaller spread than either mean.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from moco.errors import UserError
from moco.sweep.commands import plain

Settings = dict[str, Any]


def words(settings: Settings) -> str:
    """For people."""
    return ", ".join(f"{name} {plain(value)}" for name, value in settings.items())


def partner(
    baseline: Settings, names: Iterable[str], setting: Settings, among: Collection[Settings]
) -> Settings | None:
    """The baseline that a setting is compared with: the one of ``among`` with the values of ``baseline`` or, of
    several, the one that also has the setting's own values of the other ``names``; None where there is none, and for a
    baseline itself."""
    found = _matching(baseline, among)
    if not baseline or setting in found:
        return None
    if len(found) > 1:
        found = _matching({name: setting[name] for name in names if name not in baseline}, found)
    return found[0] if len(found) == 1 else None


def check(baseline: Settings, names: list[str], settings: list[Settings]) -> None:
    """UserError where a setting has no baseline to be compared with, or several.

    names: what tells the settings apart that are reported: with a selection, which leaves one setting for each of
    their values, those of ``group_by``.
    """
    for name in baseline:
        if name not in settings[0]:
            raise UserError(f"baseline {name} is neither in grid nor in paired: name one of their settings.")
        if name not in names:
            raise UserError(f"baseline {name}: the selection would choose among its values; add {name} to group_by.")
    reported = [*{tuple(plain(setting[name]) for name in names): setting for setting in settings}.values()]
    fits = _matching(baseline, reported)
    if not fits:
        raise UserError(f"baseline {words(baseline)} is no setting of grid and paired: give the values of one.")
    for setting in reported:
        if baseline and setting not in fits and partner(baseline, names, setting, reported) is None:
            own = words({name: setting[name] for name in names})
            raise UserError(
                f"baseline {words(baseline)} fits {len(fits)} settings, and it is open which of them {own} is compared "
                "with: give more of its values."
            )


def _matching(values: Settings, among: Collection[Settings]) -> list[Settings]:
    """Those with these values."""
    return [setting for setting in among if all(plain(setting[name]) == plain(values[name]) for name in values)]
