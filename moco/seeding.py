"""Randomness as a function of where it is used, never of what ran before.

Each draw comes from a generator keyed on the run's seed, the name of its stream and a few integers, such as
(step, rank) for synthetic negatives or (epoch, image, view) for augmentation. A resumed run therefore draws what
the uninterrupted run would have drawn, whatever the number of loader workers.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import threading
from collections.abc import Iterator

import numpy as np
import torch

from moco.files import run_of

_MASK = (1 << 64) - 1

# One number a stream, so that two streams with the same integers are independent.
STREAMS = {
    "init": 1, "order": 2, "view": 3, "shuffle": 4, "draws": 5, "step": 6, "split": 7, "probe": 8, "episode": 9,
    "sample": 10, "kind": 11, "augment": 21, "mix": 22, "retrieval": 23, "rankme": 24, "local": 31,
}  # fmt: skip


def _splitmix64(x: int) -> int:
    """The 64-bit finaliser of Steele, Lea and Flood (2014): neighbouring inputs give unrelated outputs."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def begin(seed: int, asked: bool | None = None) -> None:
    """What a run does before its first random number: torch's generator is of the stream "init", and cuDNN is asked for
    deterministic convolutions where the user gave the seed (``asked``), else for the fastest ones; by None for none."""
    torch.manual_seed(key("init", seed) >> 1)
    if asked is not None:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = asked, not asked


def key(stream: str, seed: int, *where: int) -> int:
    """A 64-bit key for the place ``where`` in ``stream``; different places give different keys."""
    state = _splitmix64(STREAMS[stream])
    for number in (seed, *where):
        state = _splitmix64(state ^ (int(number) & _MASK))
    return state


def torch_generator(stream: str, seed: int, *where: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator at its start, keyed on ``(stream, seed, *where)``."""
    generator = torch.Generator(device=device)
    generator.manual_seed(key(stream, seed, *where) >> 1)  # torch takes 63 bits
    return generator


def numpy_generator(stream: str, seed: int, *where: int) -> np.random.Generator:
    """A numpy generator at its start; Philox because making one is cheap (one a view)."""
    return np.random.Generator(np.random.Philox(key=key(stream, seed, *where)))


class _Kept(threading.local):
    """A generator of each thread, and what its state is set to, which is less work than to make one anew."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)
        self.generator = np.random.Generator(self.bits)
        self.start = self.bits.state  # has_uint32 and uinteger 0, buffer_pos at the buffer's end
        self.key = self.start["state"]["key"]  # (2,) uint64, the lower half first


_kept = _Kept()


def numpy_generator_for_now(stream: str, seed: int, *where: int) -> np.random.Generator:
    """As :func:`numpy_generator`, but the same object at each call of a thread: at its start until the next call."""
    _kept.key[0] = key(stream, seed, *where)
    _kept.bits.state = _kept.start
    return _kept.generator


def seed_step(seed: int, step: int, rank: int) -> None:
    """Key torch's global generators (dropout, stochastic depth) on (seed, step, rank)."""
    torch.manual_seed(key("step", seed, step, rank) >> 1)


@contextlib.contextmanager
def library_randomness(stream: str, seed: int, *where: int) -> Iterator[None]:
    """Python's and numpy's global generators keyed on a place, and as they were afterwards.

    For libraries whose functions draw from them and take no generator.
    """
    python, legacy = random.getstate(), np.random.get_state()
    value = key(stream, seed, *where)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def choose_seed(given: int | None, checkpoint: dict | None) -> int:
    """The flag's seed, else that of the checkpoint's run, else a new one.

    A resumed run keeps its seed even when another is given: the rest of its randomness would not fit the first part.
    """
    kept = run_of(checkpoint or {}).get("seed")
    if kept is not None:
        return int(kept)
    return secrets.randbits(31) if given is None else given
