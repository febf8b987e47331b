"""The program as functions: pretrain, evaluate, embed, neighbours and export. The options of each are the flags of its
command.

Each function reads its options as the command line does (:mod:`moco.library.words`), so files of ``config``, recipes by
name, other spellings and ranges hold here too, and refuses what the command refuses, with the same sentence in a
:class:`moco.MocoError`. Training and evaluation run in a process of their own (:mod:`moco.library.child`).
"""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from moco import cli, errors, files
from moco.cli import commands, looking
from moco.cli.parser import Parser
from moco.errors import OutageError, UserError
from moco.library import child
from moco.library.results import Checkpoint, Embedding, RunResult, embedding_of, path_of, result_of
from moco.library.words import arguments, options_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from moco.library.options import (
        EmbedOptions,
        EvaluateOptions,
        ExportKind,
        ExportOptions,
        NeighboursOptions,
        PretrainOptions,
    )

F = TypeVar("F", bound=Callable)
StrPath = str | os.PathLike[str]
_OUT = {"save_dir": "give out", "trial": "give out", "stop_code": "a function has no exit code"}
_MODEL = {**_OUT, "pretrained": "give checkpoint"}
_MEASURES = dict.fromkeys(("knn", "few_shot"), 'give protocol="knn" or "few_shot"')
_READ = {"out": "it is an argument", "checkpoint": "it is an argument"}


class Program(NamedTuple):
    """A command as a function."""

    name: str  # of the function
    parser: Callable[[], Parser]
    parse: Callable[[list[str]], Namespace]
    worker: str  # module:function
    left_out: Mapping[str, str]  # flags that the function has itself

    def arguments(self, options: Mapping[str, Any], *own: str) -> Namespace:
        """What the command makes of ``own`` words and the options."""
        return arguments(f"moco.{self.name}", self.parser(), self.parse, options, [*own], self.left_out)

    def run(self, args: Namespace) -> int:
        """In a process of its own."""
        args.stop_code = 0  # 75 is an outage
        return child.run(self.worker, args)


PRETRAIN = Program("pretrain", cli.pretrain_parser, cli.parse_pretrain, "moco.mains.main_pretrain:worker", _OUT)
LINCLS = Program(
    "evaluate", cli.lincls_parser, cli.parse_lincls, "moco.mains.main_lincls:worker", {**_MODEL, **_MEASURES}
)
SEMISUP = Program("evaluate", cli.semisup_parser, cli.parse_semisup, "moco.mains.main_semisup:worker", _MODEL)
RETRIEVAL = Program(
    "evaluate", commands.retrieval_parser, commands.parse_retrieval, "moco.eval.retrieval:retrieval_worker", _READ
)
EMBED = Program("embed", commands.embed_parser, commands.parse_embed, "moco.eval.embed:embed_worker", _READ)
NEIGHBOURS = Program(
    "neighbours", looking.neighbours_parser, looking.parse_neighbours, "moco.eval.neighbours:neighbours_worker", _READ
)
EXPORT = Program(
    "export", commands.export_parser, lambda words: commands.export_parser().parse_args(words), "", {**_READ, "to": ""}
)
PROTOCOLS = {
    "knn": (LINCLS, ["--knn"]), "few_shot": (LINCLS, ["--few-shot"]), "linear": (LINCLS, []), "finetune": (SEMISUP, []),
    "retrieval": (RETRIEVAL, []),
}  # fmt: skip


def has_options(*programs: Program) -> Callable[[F], F]:
    """Give a function of ``**options`` a signature with all of them, and a list of them at the end of its docstring."""

    def described(function: F) -> F:
        every = (option for program in programs for option in options_of(program.parser(), program.left_out))
        found = {option.name: option for option in every}
        own = [p for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]
        keyword = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
        more = [keyword(o.name, default=o.default, annotation=o.type) for o in found.values()]
        function.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
        lines, group = [], ""
        for o in found.values():
            lines += [f"\n  {o.group}:"] * (o.group != group)
            lines.append(f"    {o.name}: {o.help or o.type}")
            group = o.group
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n" + "\n".join(lines) + "\n"
        return function

    return described


@has_options(PRETRAIN)
def pretrain(
    data: StrPath | None = None, out: StrPath | None = None, **options: Unpack[PretrainOptions]
) -> RunResult:  # fmt: skip
    """Pretrain an encoder as ``moco pretrain`` does, and wait for its end.

    The run is a process of its own, also where it is a single one: it leaves this one as it was (memory of the GPU,
    random numbers, threads, signals), may be called in any thread, in a notebook and in a script without ``if __name__
    == "__main__"``, and what is written appears here. ``nproc=2`` starts two processes, ``nproc="all"`` one for each
    GPU. Ctrl-C lets the run finish its step and save before KeyboardInterrupt is raised; should this process be killed,
    the run saves and ends too. To step through a run with a debugger start ``main_pretrain.py`` itself.

    Args:
        data: a folder of images, with or without train/ and val/; a text file of paths; or the root of ``dataset``.
            None with ``dataset=NAME``; None without it is the built-in demo.
        out: the run's folder (by default the current one; of the demo runs/demo). Like the command, the function never
            writes over another run without ``overwrite=True``, and goes on with ``resume="auto"``.
        options: the flags of the command by their names in Python: ``--batch-size 64`` is ``batch_size=64``, a switch
            is True or False, a list is several values. Also ``config``, a YAML file or a recipe by its name.

    Returns:
        The run's folder, newest checkpoint and last figures.

    Raises:
        moco.UserError: an option that cannot be used, no such folder, a folder that holds another run, ..
        moco.TrainingError: the run has diverged.
        moco.OutageError: images or a disk are gone, memory was short, a process was killed: what could be saved is.
        KeyboardInterrupt: after the checkpoint.

    Example:
        >>> run = moco.pretrain(data="my_images", out="runs/mine", arch="resnet18", epochs=100)
        >>> run.checkpoint, run.metrics["loss"], run.knn
    """
    args = PRETRAIN.arguments(options, *_images(data), *_flag("--save-dir", out))
    PRETRAIN.run(args)
    return result_of(args.save_dir, args.epochs, args.steps)


Protocol = Literal["knn", "linear", "few_shot", "finetune", "retrieval"]


@has_options(LINCLS, SEMISUP, RETRIEVAL)
def evaluate(
    checkpoint: Checkpoint | None, data: StrPath | None = None, protocol: Protocol = "knn", out: StrPath | None = None,
    **options: Unpack[EvaluateOptions],
) -> dict[str, Any]:  # fmt: skip
    """Measure an encoder as ``moco lincls``, ``moco semisup`` and ``moco retrieval`` do; a process of its own does it,
    see :func:`pretrain`.

    Args:
        checkpoint: what :func:`pretrain` returned, the folder of a run, or a checkpoint file of this or another
            project; ``torchvision:NAME`` for its published weights of ``arch``; None for random weights.
        data: labelled images, of which some are held out: a folder with train/ and val/, or the root of ``dataset``.
        protocol: "knn", "few_shot" and "retrieval" measure the frozen features; "linear" trains a linear classifier on
            them; "finetune" trains the encoder too, on all or ``train_percent`` of the labels.
        out: where checkpoints, the log and the result go; "linear" and "finetune" need it. Without it nothing is kept
            of the others but what is returned.
        options: the flags of the protocol's command.

    Returns:
        The content of the result file, such as ``{"knn": 93.2, "k": 200, ..}`` or ``{"acc1": 71.1, ..}``, in percent;
        empty where the run was stopped before its end.

    Raises:
        moco.UserError, moco.TrainingError, moco.OutageError, KeyboardInterrupt: as :func:`pretrain`.

    Example:
        >>> moco.evaluate(run, "my_images")["knn"]
        >>> moco.evaluate(run, "my_images", "linear", out="runs/mine_linear", epochs=20)["acc1"]
    """
    if protocol not in [*PROTOCOLS]:  # which need not be hashable
        raise UserError(f"protocol is one of {', '.join(PROTOCOLS)}, not {protocol!r}.")
    program, mode = PROTOCOLS[protocol]
    if out is None and protocol in ("linear", "finetune"):
        raise UserError(f'protocol="{protocol}" trains: give out, the folder of its checkpoints and result.')
    model = [] if checkpoint is None else [path_of(checkpoint)]
    with _folder(out) as folder:
        if program is RETRIEVAL:
            own = [*model, *_images(data), *_flag("--out", folder)]
        else:
            own = [*mode, *_images(data), *(_flag("--pretrained", *model)), *_flag("--save-dir", folder)]
        args = program.arguments(options, *own)
        name = protocol if protocol in ("knn", "few_shot", "retrieval") else "result"
        name = next((mode for mode in ("lr_find", "evaluate") if getattr(args, mode, False)), name)
        path = os.path.join(folder, f"{name}.json")
        before = _written(path)
        program.run(args)
        return files.read_json(path) if _written(path) != before else {}


@has_options(EMBED)
def embed(
    checkpoint: Checkpoint, data: StrPath | None = None, out: StrPath | None = None, **options: Unpack[EmbedOptions]
) -> Embedding:
    """Features of a set of images, as ``moco embed`` writes them; a process of its own makes them, see
    :func:`pretrain`.

    Args:
        checkpoint: as in :func:`evaluate`.
        data: images, with labels or without: a folder, a text file of paths, or the root of ``dataset``. Of a folder
            with train/ and val/ it is the images in val/, unless ``split="train"``.
        out: a folder for features.npz (or .safetensors), embedding.png and embedding.html. Without it no file and no
            picture is made.
        options: the flags of the command.

    Returns:
        Features, labels and paths of the images that could be read.

    Raises:
        moco.UserError, moco.OutageError, KeyboardInterrupt: as :func:`pretrain`.

    Example:
        >>> found = moco.embed("runs/mine", "my_images", out="runs/mine/embedding")
        >>> found.features.shape, found.paths[0]
    """
    files_of = [name for name in ("picture", "points", "beside", "format") if out is None and name in options]
    if files_of:
        raise UserError(f"{files_of[0]} is of the files that go to out; give both.")
    with _folder(out) as folder:
        own = [path_of(checkpoint), *_images(data), "--out", folder, *([] if out else ["--picture", "none"])]
        args = EMBED.arguments(options, *own)
        EMBED.run(args)
        names = [f"features.{args.format}"]
        names += ["embedding.png", "embedding.html"] if args.picture != "none" else []
        return embedding_of(os.path.join(folder, names[0]), [Path(folder, name) for name in names] if out else [])


@has_options(NEIGHBOURS)
def neighbours(
    checkpoint: Checkpoint, data: StrPath | None = None, images: Sequence[StrPath] = (), out: StrPath | None = None,
    **options: Unpack[NeighboursOptions],
) -> dict[str, Any]:  # fmt: skip
    """Images beside the images whose features are the most similar, as ``moco neighbours`` finds them; a process of its
    own does it, see :func:`pretrain`.

    Args:
        checkpoint: as in :func:`evaluate`.
        data: images, with labels or without: a folder, a text file of paths, or the root of ``dataset``.
        images: pictures of your own as queries; by default queries are drawn from ``data``.
        out: a folder for neighbours.png, neighbours.html and neighbours.json. Without it no file is left.
        options: the flags of the command; ``--class`` is ``class_name``.

    Returns:
        The content of neighbours.json: ``queries``, a list of ``{"name", "class", "neighbours": [{"name", "class",
        "similarity"}, ..]}``, and ``same_class``, the percentage of all neighbours that are of their query's class.

    Raises:
        moco.UserError, moco.OutageError, KeyboardInterrupt: as :func:`pretrain`.

    Example:
        >>> found = moco.neighbours("runs/mine", "my_images", ["query.jpg"], k=5)
        >>> for query in found["queries"]:
        ...     print(query["name"], query["neighbours"])
    """
    with _folder(out) as folder:
        own = [word for path in images for word in _images(path)]
        args = NEIGHBOURS.arguments(options, path_of(checkpoint), *_images(data), *own, *_flag("--out", folder))
        path = os.path.join(folder, "neighbours.json")
        before = _written(path)
        NEIGHBOURS.run(args)
        return files.read_json(path) if _written(path) != before else {}


@has_options(EXPORT)
def export(
    checkpoint: Checkpoint, to: ExportKind, out: StrPath | None = None, **options: Unpack[ExportOptions]
) -> Path:
    """Write a checkpoint's backbone for another tool, as ``moco export`` does; in this process, on the CPU.

    Args:
        checkpoint: as in :func:`evaluate`, but a file.
        to: what to write.
        out: the file (by default beside the checkpoint and named after it).
        options: the flags of the command.

    Returns:
        The file, of ``hub`` the folder; a card with architecture, size and statistics lies beside it or in it.

    Raises:
        moco.UserError: an option or a checkpoint that cannot be used, or a library that computes other features.
        moco.OutageError: the disk is full or gone.

    Example:
        >>> moco.export("runs/mine", "timm", "mine.timm.pth")
    """
    args = EXPORT.arguments(options, path_of(checkpoint), "--to", to, *_flag("--out", out))
    import torch

    from moco.weights import export

    with torch.random.fork_rng(devices=[]), _disk():  # a network that is built draws its first weights
        export.run_export(args)
    return Path(export.destination(args))


# ------------------------------------------------------------------------------------------------- small parts


def _images(data: StrPath | None) -> list[str]:
    """DIR as a word; a folder's name may begin like a flag's."""
    if data is None:
        return []
    path = _path("data", data)
    return [os.path.join(".", path) if path.startswith("-") else path]


def _flag(flag: str, value: StrPath | None = None) -> list[str]:
    return [] if value is None else [f"{flag}={_path('out', value)}"]


def _path(name: str, value: Any) -> str:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise UserError(f"{name} is a path, not {value!r}.")
    return path


@contextlib.contextmanager
def _folder(out: StrPath | None) -> Iterator[str]:
    """``out``, or a folder that is removed afterwards."""
    if out is not None:
        yield _path("out", out)
        return
    with tempfile.TemporaryDirectory(prefix="moco-") as folder:
        yield folder


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    """A disk that is full or gone, as the commands have it."""
    try:
        yield
    except OSError as error:
        if not (said := errors.of_the_disk(error)):
            raise
        raise OutageError(said) from error


def _written(path: str) -> tuple[int, int]:
    """Tells one version of a file from another."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns
