"""Files that survive a kill at any instant: checkpoints, text, figures.

Every file is written beside, flushed to the disk and then put in the place of the old one.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import pickle
import re
import stat
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from moco import archive, owner, processes, schema, signals
from moco.errors import DISK, UserError, one_line

if TYPE_CHECKING:  # otherwise in the functions that use it: a wrong flag is answered before a second of imports
    from torch import Tensor

_FLOATS = ("float16", "bfloat16", "float32", "float64")
# of the entries of a network, those that must be floats
_WEIGHT = re.compile(r"(weight|bias|running_mean|running_var|_token|pos_embed|pos_embedding)$")


# ------------------------------------------------------------------------------------------------- one file


def read(path: str) -> dict:
    """The dictionary in a checkpoint file, tensors on the CPU.

    Raises:
        UserError: no such file, damaged, not a checkpoint, or more than weights (arbitrary code is never run).
    """
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}; check the path.")
    import torch

    from moco import plain

    try:
        with open(path, "rb") as file, warnings.catch_warnings(), torch.serialization.safe_globals(plain.SAFE):
            archive.check(file)
            warnings.simplefilter("ignore")  # a foreign file's oddities are reported below, in one sentence
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything; torch seeks before the start of a very short file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
        raise UserError(f"{path} {_why_unreadable(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint dictionary.")
    if wrong := schema.problem(state):
        raise UserError(f"{path} {wrong}.")
    return state


def checksums(path: str) -> str:
    """What there is to say of the checksums of a file that :func:`read` takes; empty where it has them."""
    if path.endswith(".safetensors"):
        return "a safetensors file, without checksums: damage in its weights cannot be seen"
    with open(path, "rb") as file:
        return archive.check(file)


def can_be_read(path: str) -> bool:
    """Whether :func:`read` takes the file, which costs as much."""
    try:
        read(path)
    except UserError:
        return False
    return True


def run_of(state: dict) -> dict[str, Any]:
    """What a checkpoint of ours says of the run that wrote it; empty for other files."""
    run = state.get("run")
    return run if isinstance(run, dict) else {}


def _why_unreadable(error: Exception) -> str:
    text = str(error)
    if isinstance(error, archive.Damaged):
        return text
    found = re.search(r"(?i)unsupported (?:global: )?(?:global|class) ([\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and found and found.group(1).startswith("torch.distributed."):
        return (
            f"is one process's share of a network that was trained in shares (FSDP: {found.group(1)}); give the whole "
            "weights, of DINOv2 teacher_checkpoint.pth in its folder eval/."
        )
    if isinstance(error, pickle.UnpicklingError) and found:
        return (
            f"needs {found.group(1)} to be loaded, which is more than weights; refused. If you trust the file, re-save "
            "its tensors alone, or allow the name with torch.serialization.add_safe_globals."
        )
    if re.search(r"magic number|Unsupported operand 149", text):  # a pickle by itself, of protocol 2 or 4
        return (
            "is a pickle that torch.save did not write, such as those of projects in JAX; save its arrays by "
            "torch.save in a dictionary of tensors, by the names of torchvision or timm."
        )
    return "is no readable checkpoint: truncated, damaged or another kind of file."


def open_regular(path: str, most: float = math.inf) -> BinaryIO:
    """A file to read, without buffer, as :func:`regular_handle` opens it."""
    return os.fdopen(regular_handle(path, most), "rb", buffering=0)


def open_text(path: str, newline: str | None = None) -> TextIO:
    """A list of names to read, as :func:`regular_handle` opens it: UTF-8, and the bytes of names that are not."""
    return open(regular_handle(path), encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def regular_handle(path: str, most: float = math.inf) -> int:
    """The descriptor of a file to read that somebody else made; OSError for any other thing: a pipe would wait for
    ever, a device fill the memory, and to open one can be to start it.

    most: bytes; OSError for a longer file.
    """
    _refuse_odd(os.stat(path), most)
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # no waiting, whatever took its place meanwhile
    try:
        _refuse_odd(os.fstat(handle), most)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _refuse_odd(status: os.stat_result, most: float) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "a pipe, socket or device, no file")
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"{status.st_size:,} bytes are above the limit of {most:,.0f}")


@contextlib.contextmanager
def replacing(path: str, choose: str = "--save-dir") -> Iterator[str]:
    """A path beside ``path`` to write to. At the end it is flushed to the disk and put in the place of the old file: a
    kill at any instant leaves the old one or the new one, and perhaps what was written beside, which the next to write
    there removes. The folder is made.

    Args:
        choose: the flag that says where files go, for the sentence.

    Raises:
        UserError: the disk is full, the folder cannot be written or is another run's by now (:mod:`moco.owner`); an
            older file of that name is untouched.
    """
    folder, name = os.path.split(path)
    beside = processes.temporary(path)
    signals.unfinished.add(beside)
    try:
        owner.check(path)
        os.makedirs(folder or ".", exist_ok=True)
        processes.remove_stale(folder, name)
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        owner.check(path)
        replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(beside)
        found = _of_the_disk(error)
        if found is None:
            raise
        reason = one_line(found, 200)
        raise UserError(f"{path} cannot be written ({reason}); make room or choose another {choose}.") from found
    finally:
        signals.unfinished.discard(beside)


def _of_the_disk(error: BaseException) -> OSError | None:
    """The system's error behind the failure of a writer; libraries in other languages only quote it."""
    if isinstance(error, OSError):
        return error
    quoted = (n for n in DISK if f"(os error {n})" in str(error) or os.strerror(n) in str(error))
    number = next(quoted, None) if isinstance(error, Exception) else None
    return None if number is None else OSError(number, os.strerror(number))


def replace(beside: str, path: str) -> None:
    """Give a whole file its name, on the disk too."""
    os.replace(beside, path)
    handle = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(handle)  # the new name itself must reach the disk
    finally:
        os.close(handle)


def write(state: dict, path: str, choose: str = "--save-dir") -> None:
    """Write a checkpoint as :func:`replacing` does."""
    with replacing(path, choose) as beside, open(beside, "wb") as file:
        torch_save(_of_own_size(state), file)


def torch_save(value: Any, file: Any) -> None:
    """torch.save to an open file, with the file's own OSError where it cannot be written: torch raises RuntimeError, as
    does whatever else goes wrong meanwhile, such as the death of a loader's process."""
    import torch

    kept: Any = _Kept(file)
    try:
        torch.save(value, kept)
    except RuntimeError as error:
        raise (kept.error or error) from None


class _Kept:
    """A file, and the error with which it could not be written."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.error = error
            raise


def write_text(text: str, path: str, choose: str = "--save-dir") -> None:
    """Write a text file, UTF-8 but for the bytes of file names that are none, as :func:`replacing` does."""
    with replacing(path, choose) as beside, open(beside, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def write_json(value: Any, path: str, choose: str = "--save-dir") -> None:
    """Write plain values as :func:`replacing` does."""
    write_text(json.dumps(value, indent=2) + "\n", path, choose)


def write_csv(path: str, rows: Iterable[Iterable[Any]], choose: str = "path") -> None:
    """Write a table, whose first row is its header, as :func:`replacing` does."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(text.getvalue(), path, choose)


def read_json(path: str) -> dict[str, Any]:
    """A JSON file's dictionary; empty where there is none."""
    try:
        with open(regular_handle(path), encoding="utf-8") as file:
            return dictionary_of(file.read())
    except (OSError, ValueError):
        return {}


def dictionary_of(text: str) -> dict[str, Any]:
    """The dictionary that a JSON text is; empty where it is none."""
    try:
        found = json_of(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def json_of(text: str) -> Any:
    """What a JSON text says; ValueError also for one so deep that the parser gives up."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("too many brackets inside each other") from error


def records(path: str) -> Iterator[dict[str, Any]]:
    """The records of a log, a JSON dictionary a line; none where there is no file, and no damaged ones."""
    with contextlib.suppress(OSError), open(regular_handle(path), encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                if isinstance(found := json_of(line), dict):
                    yield found


def read_yaml(path: str, name: str) -> Any:
    """What a YAML file holds.

    Args:
        name: of the file in sentences.

    Raises:
        UserError: it cannot be read, or is no YAML.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            entries = yaml.safe_load(file)
        for text in _strings(entries):
            if b"\0" in os.fsencode(text):  # which raises a ValueError for what no file name can hold
                raise ValueError(f"NUL in {text!r}")
        return entries
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes that are no UTF-8, no such date
        raise UserError(f"{name} is not a YAML file: {one_line(error)}") from error


def _strings(value: Any) -> Iterator[str]:
    """All text in plain values, keys too."""
    if isinstance(value, str):
        yield value
    for item in [*value.items()] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from _strings(item)


def write_figure(figure: Any, path: str, choose: str = "--save-dir") -> None:
    """Write a matplotlib figure, not one of pyplot's, which keeps them, as PNG as :func:`replacing` does."""
    with replacing(path, choose) as beside:
        figure.savefig(beside, format="png", dpi=110, bbox_inches="tight")


def _of_own_size(value: Any) -> Any:
    """The same, where a view of a larger memory is a tensor of its own: torch would write the whole memory."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if type(value) is dict:
        return {name: _of_own_size(item) for name, item in value.items()}
    return type(value)(map(_of_own_size, value)) if type(value) in (list, tuple) else value


# ------------------------------------------------------------------------------ tensors that nothing computes with


def odd_tensors(tensors: dict[str, Tensor], like: dict[str, Tensor] | None = None) -> dict[str, str]:
    """What those tensors hold that no network can compute with, by name; empty for sound ones.

    Args:
        like: the network's own entries, which tell weights from counters; by default a weight is known by its name.
    """
    found = {}
    for name, value in tensors.items():
        weight = like[name].is_floating_point() if like and name in like else bool(_WEIGHT.search(name))
        if summary := _diagnose_tensor(name, value, weight):
            found[name] = summary
    return found


def _diagnose_tensor(name: str, value: Tensor, weight: bool) -> str:
    import torch

    kind = str(value.dtype).removeprefix("torch.") if value.layout == torch.strided else "sparse"
    if kind not in _FLOATS:
        return f"{kind} numbers" if weight or kind == "sparse" else ""
    if not torch.isfinite(value.float()).all():  # as float32, in which it will be computed with
        return "NaN or infinity"
    return "a negative variance" if name.endswith("running_var") and bool((value < 0).any()) else ""


def refuse_odd(tensors: dict[str, Tensor], path: str, like: dict[str, Tensor] | None = None) -> None:
    """UserError if a file has :func:`odd_tensors`: any number from them would be meaningless."""
    if odd := odd_tensors(tensors, like):
        first, summary = next(iter(odd.items()))
        more = f" ({len(odd)} such tensors)" if len(odd) > 1 else ""
        raise UserError(f"{path} cannot be used: {first} holds {summary}{more}; take another checkpoint of that run "
                        "(python -m moco.describe lists the faults).")  # fmt: skip
