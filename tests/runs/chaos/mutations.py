"""Files whose structure is whole (checksums too) and whose entries make no sense: what no program of ours writes."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

PLAIN: list[Any] = [None, "", "x\x1b[31my", "a\0b", -1, -(10**30), 10**30, float("nan"), float("inf"), [], {}, [[]],
                    {"a": None}, "0" * 5000]  # fmt: skip
TEXTS = [b"", b"\0", b"\n", b"/", b".", b"..", b"../../etc/passwd", b"/dev/zero", b"\xff\xfe\x80", b"\x1b[31mred",
         b"checkpoint_9999.pth.tar", b"x" * 100_000, b"[" * 100_000, b"{" * 100_000, b"9" * 10_000, b"NaN",
         b"null"]  # fmt: skip

_LAUGHS = b"".join(b"%c: &%c [%s]\n" % (99 + i, 99 + i, b", ".join([b"*%c" % (98 + i)] * 8)) for i in range(8))
YAMLS = [b"b: &b [x, x]\n" + _LAUGHS, b"lr: !!python/object/apply:os.system ['true']\n", b"\tlr: 1\n",
         b"lr: 1\nlr: 2\n", b"? [1]\n: 2\n", b"1: 2\n", b"lr: *x\n", b"- 1\n", b"--- 1\n--- 2\n", b"lr: 2024-13-45\n",
         b"lr: 0x1p3\n", b"lr: 1:1:1\n"]  # fmt: skip


def mutate(path: Path, form: str, rng: random.Random) -> str:
    """Change a file of some ``form``; says how."""
    return _FORMS[form](path, rng)


def _somewhere(tree: Any, rng: random.Random) -> tuple[Any, Any]:
    """A container inside ``tree`` and a key of it; each level is as likely to be left as to be entered."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = rng.choice(keys)
        inside = tree[key]
        if not (isinstance(inside, (dict, list)) and inside) or rng.random() < 0.15:
            return tree, key
        tree = inside


def _change(place: tuple[Any, Any], rng: random.Random, values: list[Any]) -> str:
    container, key = place
    if rng.random() < 0.25:
        del container[key]
        return f"{key!r:.80} is gone"
    others = [value for value in values if repr(value) != repr(container[key])]
    container[key] = rng.choice(others)
    return f"{key!r:.80} is {container[key]!r:.60}"


def _checkpoint(path: Path, rng: random.Random) -> str:
    state = torch.load(path, weights_only=True)
    container, key = _somewhere(state, rng)
    # nothing reads BatchNorm's counter of steps, and an optimizer keeps nothing of a weight that had no gradient yet
    while str(key).endswith("num_batches_tracked") or (isinstance(container, dict) and isinstance(key, int)):
        container, key = _somewhere(state, rng)
    if isinstance(container[key], torch.Tensor) and rng.random() < 0.7:
        name, change = rng.choice(list(_TENSORS.items()))
        container[key] = change(container[key])
        said = f"{key!r} {name}"
    else:
        said = _change((container, key), rng, [*PLAIN, torch.zeros(2), {-1: -1}])
    torch.save(state, path)
    return said


_TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "of one number": lambda x: torch.ones(1),
    "without numbers": lambda x: torch.empty(0),
    "with an axis more": lambda x: x[None].clone(),
    "one row longer": lambda x: torch.cat([torch.atleast_1d(x), torch.atleast_1d(x)[:1]]),
    "not finite": lambda x: torch.full(x.shape, float("nan")),
    "of bytes": lambda x: torch.full(x.shape, 7, dtype=torch.uint8),
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: torch.atleast_1d(x.float()).to_sparse(),
}


def _json(path: Path, rng: random.Random) -> str:
    if rng.random() < 0.4 or not path.read_bytes().strip():
        return _text(path, rng)
    said, value = _changed(json.loads(path.read_text()), rng)
    path.write_text(json.dumps(value))
    return said


def _changed(value: Any, rng: random.Random) -> tuple[str, Any]:
    """What was changed somewhere in plain values, and what they are then."""
    tree = [value]
    said = _change(_somewhere(tree, rng), rng, PLAIN)
    return said, tree[0] if tree else []


def _jsonl(path: Path, rng: random.Random) -> str:
    lines = path.read_bytes().splitlines()
    place = rng.randrange(len(lines))
    if rng.random() < 0.5:
        lines[place] = rng.choice(TEXTS)
        said = f"line {place} is {lines[place]!r:.60}"
    else:
        said, value = _changed(json.loads(lines[place]), rng)
        said, lines[place] = f"line {place}: {said}", json.dumps(value).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")
    return said


def _yaml(path: Path, rng: random.Random) -> str:
    import yaml

    if rng.random() < 0.3:
        path.write_bytes(rng.choice(YAMLS))
        return f"it is {path.read_bytes()!r:.60}"
    if rng.random() < 0.3:
        return _text(path, rng)
    said, value = _changed(yaml.safe_load(path.read_text()), rng)
    path.write_text(yaml.safe_dump(value))
    return said


def _text(path: Path, rng: random.Random) -> str:
    text = rng.choice(TEXTS)
    path.write_bytes(text)
    return f"it is {text!r:.60}"


def _lines(path: Path, rng: random.Random) -> str:
    lines = path.read_bytes().splitlines()
    os.mkfifo(path.parent / "pipe.png")
    os.symlink("/dev/zero", path.parent / "device.png")
    os.symlink("loop.png", path.parent / "loop.png")
    names = [b"pipe.png", b"device.png", b"loop.png", b"missing.png", str(path.parent).encode(), *TEXTS]
    for place in rng.sample(range(len(lines)), rng.choice((1, 2, len(lines)))):
        new = rng.choice(names)
        head, tab, label = lines[place].partition(b"\t")
        half = rng.random() < 0.5
        if head.startswith(b"{"):
            lines[place] = json.dumps({"image_path": new.decode(errors="surrogateescape"), "label": 0}).encode()
        else:
            lines[place] = new + tab + label if half else head + tab + new
    path.write_bytes(b"\n".join(lines) + b"\n")
    return f"lines such as {lines[place]!r:.80}"


def _npz(path: Path, rng: random.Random) -> str:
    with np.load(path) as found:
        arrays = dict(found)
    name, (what, change) = rng.choice(list(arrays)), rng.choice(list(_ARRAYS.items()))
    arrays[name] = change(arrays[name])
    if rng.random() < 0.1:
        del arrays[name]
        what = "is gone"
    np.savez(path, **arrays)
    return f"{name} {what}"


_ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "negative": lambda x: -1 - x.astype(np.int64),
    "huge": lambda x: np.full(x.shape, 2**62),
    "of floats": lambda x: x / 3,
    "not finite": lambda x: np.full(x.shape, np.nan),
    "shorter": lambda x: x[:-1],
    "longer": lambda x: np.concatenate([x, x]),
    "empty": lambda x: x[:0],
    "without an axis": lambda x: np.array(5),
    "with an axis more": lambda x: x[None],
    "of texts": lambda x: x.astype(str),
    "reversed": lambda x: x[::-1],
    "of bytes that are no text": lambda x: np.full(x.shape, 255, np.uint8),
}


def _tar(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    heads = [first for first in range(0, len(data), 512) if data[first + 257 : first + 262] == b"ustar"]
    first = rng.choice(heads)
    if rng.random() < 0.3 and (labels := [h for h in heads if data[h : h + 100].rstrip(b"\0").endswith(b".cls")]):
        first, text = rng.choice(labels), rng.choice([b"-5", b"x", b"9" * 11, b"200000000", b"9" * 400, b"\xff", b""])
        data[first + 124 : first + 136] = b"%011o\0" % len(text)
        data[first + 512 : first + 1024] = text.ljust(512, b"\0")
        said = f"a label is {text[:20]!r}"
    else:
        at, new = rng.choice([
            (124, b"77777777777\0"), (124, b"\x80" + b"\xff" * 11), (124, b"-0000000001\0"), (124, b"zzzzzzzzzzz\0"),
            *((156, bytes([c])) for c in b"1234567LKxgS"), (0, b"../../x.jpg\0"), (0, b"\xff\xfe.jpg\0"),
            (0, b"\0" * 100), (0, b"a\x1b[31m.png\0"), (257, b"wrong\0"),
        ])  # fmt: skip
        data[first + at : first + at + len(new)] = new
        said = f"header at {first}: {new[:12]!r} at {at}"
    head = data[first : first + 512]
    head[148:156] = b" " * 8
    data[first + 148 : first + 156] = b"%06o\0 " % sum(head)
    if path.with_name("index.npz").exists():
        said += " (an index lies beside)"
    path.write_bytes(data)
    return said


@functools.cache
def _png_bomb(side: int = 30000) -> bytes:
    """A white square of a bit a pixel, which takes 2.7 GB in colour."""
    rows = zlib.compressobj(1)
    body = b"".join([*(rows.compress(b"\0" + b"\xff" * (side // 8)) for _ in range(side)), rows.flush()])
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(path: Path, rng: random.Random) -> str:
    data, which = path.read_bytes(), rng.randrange(6)
    if which == 0:
        path.write_bytes(_png_bomb())
        return "30,000 x 30,000 pixels, whole"
    if which == 1:
        return _special(path, rng)
    width, height = rng.choice(((65500, 65500), (2**31 - 1, 1), (0, 0), (100_000, 100_000), (48, 40)))
    depth, colour = rng.choice(((8, 2), (16, 6), (8, 3), (1, 0), (7, 9)))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, rng.choice((0, 1)))
    more = _chunk(rng.choice((b"zTXt", b"iCCP", b"eXIf", b"tRNS", b"acTL")), rng.randbytes(40)) if which == 2 else b""
    path.write_bytes(data[:8] + _chunk(b"IHDR", head) + more + data[33:])
    return f"header of {width} x {height}, depth {depth}, colour {colour}"


def _special(path: Path, rng: random.Random) -> str:
    path.unlink()
    kind = rng.choice(("pipe", "/dev/zero", "loop", "folder", "socket", "gone"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        import socket

        folder = os.open(path.parent, os.O_RDONLY)  # by which the name is short enough for a socket
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
            made.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)
    elif kind != "gone":
        os.symlink(path.name if kind == "loop" else kind, path)
    return f"a {kind} in its place"


def _jpg(path: Path, rng: random.Random) -> str:
    data, which = bytearray(path.read_bytes()), rng.randrange(5)
    if which == 0:
        path.write_bytes(_png_bomb())
        return "a PNG of 30,000 x 30,000 under that name"
    if which == 1:
        return _special(path, rng)
    if which == 2:
        from PIL import Image

        side = io.BytesIO()
        Image.new("L", (20_000, 20_000)).save(side, "jpeg", quality=1)
        path.write_bytes(side.getvalue())
        return "20,000 x 20,000 pixels, whole"
    found = re.search(rb"\xff[\xc0\xc2]", bytes(data))
    assert found
    size = rng.choice(((65500, 65500), (0, 0), (1, 65535), (20_000, 24_000)))
    data[found.start() + 5 : found.start() + 9] = struct.pack(">HH", *size)
    if which == 3:
        data[found.start() + 9] = rng.choice((0, 1, 2, 4, 255))
    path.write_bytes(data)
    return f"header of {size}"


def _pixels(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    place = rng.choice((48, 56, *range(64, 64 + 24 * 24, 8)))
    value = rng.choice((-1, 0, 1, 2**62, 2**31, len(data)))
    data[place : place + 8] = struct.pack("<q", value)
    path.write_bytes(data)
    return f"{value} at {place}"


def _safetensors(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    size = struct.unpack_from("<Q", data)[0]
    if rng.random() < 0.2:
        path.write_bytes(struct.pack("<Q", rng.choice((2**63, 2**40, 0, size + 1))) + data[8:])
        return "another length of the header"
    tree = json.loads(data[8 : 8 + size])
    if rng.random() < 0.3 and "card" in tree.get("__metadata__", {}):
        tree["__metadata__"]["card"] = rng.choice(("{", "[]", "null", '{"arch": 3}', "[" * 50_000, '{"size": -1}'))
        said = f"the card is {tree['__metadata__']['card']!r:.40}"
    else:
        said = _change(_somewhere(tree, rng), rng, PLAIN)
    head = json.dumps(tree).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data[8 + size :])
    return said


_FORMS: dict[str, Callable[[Path, random.Random], str]] = {
    "checkpoint": _checkpoint, "json": _json, "jsonl": _jsonl, "yaml": _yaml, "text": _text, "lines": _lines,
    "npz": _npz, "tar": _tar, "png": _png, "jpg": _jpg, "pixels": _pixels, "safetensors": _safetensors,
}  # fmt: skip


def _or_special(form: str) -> Callable[[Path, random.Random], str]:
    """Of a file that is come upon, and not asked for: it may be no file at all."""
    return lambda path, rng: _special(path, rng) if rng.random() < 0.3 else _FORMS[form](path, rng)


_FORMS |= {f"found {form}": _or_special(form) for form in ("json", "jsonl", "text", "yaml", "png")}
