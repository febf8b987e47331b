"""Damage to a file that a program reads: to its bytes, or to what they mean."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.runs.chaos import mutations
from tests.runs.chaos.scenes import Scene, differ
from tests.runs.chaos.verdicts import RIGHT, SENTENCE, WRONG, Verdict, ill_mannered

Change = Callable[[bytearray, random.Random, int], str]  # bytes, changed in place; a place in them; what was done


def spoil(path: Path, rng: random.Random) -> str:
    """Damage some bytes; says how."""
    data = bytearray(path.read_bytes())
    near = rng.random() < 0.4  # headers and directories lie at the ends
    where = rng.choice((rng.randrange(2048), -1 - rng.randrange(8192))) if near else rng.randrange(2**40)
    said = rng.choices(list(_CHANGES), (8, 2, 3, 2, 1, 1, 1))[0](data, rng, where % max(len(data), 1))
    path.write_bytes(data)
    return said


def _bit(data: bytearray, rng: random.Random, where: int) -> str:
    if not data:
        return "nothing"
    bit = rng.randrange(8)
    data[where] ^= 1 << bit
    return f"bit {bit} of byte {where} flipped"


def _bits(data: bytearray, rng: random.Random, where: int) -> str:
    places = [rng.randrange(len(data)) for _ in range(rng.randint(2, 50))] if data else []
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    return f"{len(places)} bits flipped"


def _cut(data: bytearray, rng: random.Random, where: int) -> str:
    del data[where:]
    return f"cut to {where} bytes"


def _zero(data: bytearray, rng: random.Random, where: int) -> str:
    first, count = where & ~511, rng.choice((512, 4096, 65536))
    data[first : first + count] = bytes(len(data[first : first + count]))
    return f"bytes {first} to {first + count} zero"


def _empty(data: bytearray, rng: random.Random, where: int) -> str:
    data.clear()
    return "empty"


def _noise(data: bytearray, rng: random.Random, where: int) -> str:
    data[where : where + 64] = rng.randbytes(64)
    return f"noise at byte {where}"


def _grown(data: bytearray, rng: random.Random, where: int) -> str:
    data += rng.randbytes(rng.choice((1, 512, 70000)))
    return "bytes added at the end"


_CHANGES: tuple[Change, ...] = (_bit, _bits, _cut, _zero, _empty, _noise, _grown)


def case(kind: str, scenes: list[Scene], base: Path, here: Path, seed: int, number: int) -> Verdict:
    """One damaged file through one program. kind: flip or mutate."""
    rng = random.Random(f"{seed} {kind} {number}")
    scene = rng.choices(scenes, [scene.weight for scene in scenes])[0]
    wanted, normal = scene.undisturbed(base, here)
    scene.set_up(base, here)
    name = rng.choice(sorted(name for name in scene.files if (here / name).exists()))
    (form, exact), path = scene.files[name], here / name
    said = spoil(path, rng) if kind == "flip" else mutations.mutate(path, form, rng)
    ended = scene.run(here)
    why = ill_mannered(ended, normal.peak, scene.codes)
    if not why and ended.code == 0 and exact[kind == "mutate"]:
        try:
            why = differ(wanted, scene.value(here, ended))
        except Exception as error:  # no result, or none that can be read
            why = f"exit code 0, but {type(error).__name__}: {error}"
    verdict = WRONG if why else SENTENCE if ended.code else RIGHT
    return Verdict(kind, number, f"{form} by {scene.words[0].removeprefix('moco.')}", f"{scene.name}, {name}: {said}",
                   verdict, why)  # fmt: skip
