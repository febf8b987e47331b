"""MoCo's CIFAR-10 recipe at its full length on one GPU, in commands of a few minutes: k-NN beside the published 82.6.

    python -m benchmarks.accuracy.cifar10_gpu pack [--data cifar10.tar]      -> runs/cifar10.npz, 56 MB, which travels
    python -m benchmarks.accuracy.cifar10_gpu run [--method moco|mochi|synco] [--seed S] [--minutes 8.5] [flags]
    python -m benchmarks.accuracy.cifar10_gpu pieces --out DIR [--which 0 4]  the state that goes on, in files of 15 MiB

``run`` is main_pretrain.py with configs/moco_cifar10.yml: its data set is the pack, decoded into memory in seconds, its
views are made on the GPU, and k-NN (k=200, T=.1) is read on the encoder's features and on the 128-d output, which is
what the published number is of. The encoders are compiled and replayed as CUDA graphs. Flags of main_pretrain.py behind
it win, such as --symmetric (published: 85.3) or -j 8; they and the seed are in the name of the run's folder.

A run stops by itself after --minutes, counted from the command's start, with a checkpoint in --work; the same command
goes on from it. DIR/NAME gets log.txt, log.jsonl and result.json (k-NN by epoch, seconds, images/s, flags, card,
versions), a megabyte at most. The checkpoint (137 MB: two ResNet-18, momentum, queue) stays in --work. To go on
elsewhere, bring its pieces there and name their folder by --pieces.

The pack holds the image files as they are. The published number is of the original pixels; where the files are JPEG,
a run learns from those. Without a GPU: --dry, with a tiny network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

BEGAN = time.monotonic()
ROOT = Path(__file__).resolve().parents[2]
TAR = ROOT.parent / "shared" / "data" / "cifar10.tar"
PACK, WORK, OUT = ROOT / "runs" / "cifar10.npz", ROOT / "runs" / "cifar10_gpu_work", ROOT / "runs" / "cifar10_gpu"
NEEDS = {"torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "PIL": "Pillow", "tqdm": "tqdm",
         "yaml": "PyYAML", "tensorboard": "tensorboard"}  # fmt: skip
SPLITS = ("train", "test")
PIECE = 15 << 20  # bytes
# A checkpoint takes a second to write, and a look at the log makes the host wait. What is timed here is MoCo's step
# alone, and a command that stopped in time has not failed.
RUN = ["--config", str(ROOT / "configs" / "moco_cifar10.yml"), "--hard-start-epoch", "1", "--aug-device", "gpu",
       "--amp", "bf16", "--channels-last", "--save-every", "20", "--keep", "1", "--knn-every", "50", "-p", "97",
       "--no-online-probe", "--no-report", "--stop-code", "0", "--resume", "auto"]  # fmt: skip
# A network this small is bound by the host's launches (11,500 images/s in eager mode on an H200, 21,000 so).
GRAPHS = ["--compile", "--compile-mode", "reduce-overhead"]
DRY = ["-a", "test_resnet", "--stem", "imagenet", "-b", "16", "--moco-k", "1024", "--bn-splits", "2", "--epochs", "2",
       "--knn-every", "1", "-p", "1", "-j", "0", "--amp", "off"]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the images


def pack(data: Path, target: Path) -> None:
    """One file of all image files of ``data``, a tar or folder of train/CLASS/* and test/CLASS/*, as they are.

    Raises:
        UserError: there is no such data, or a split of it is empty.
    """
    import numpy as np

    from moco.errors import UserError

    if not data.exists():
        raise UserError(f"no CIFAR-10 at {data}: give --data, a tar or folder of train/CLASS/* and test/CLASS/*.")
    files = dict(sorted(_files(data)))
    split_of = [Path(name).parts[0] for name in files]
    if set(split_of) != set(SPLITS):
        raise UserError(f"{data} does not hold images as train/CLASS/* and test/CLASS/*: give such a tar or folder.")
    class_of = [Path(name).parts[1] for name in files]
    classes = sorted(set(class_of))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".part")
    with open(beside, "wb") as file:
        np.savez(
            file, classes=np.array(classes), labels=np.array([classes.index(name) for name in class_of], np.uint8),
            splits=np.array([SPLITS.index(s) for s in split_of], np.uint8),
            ends=np.cumsum([len(x) for x in files.values()]), data=np.frombuffer(b"".join(files.values()), np.uint8),
        )  # fmt: skip
    beside.replace(target)
    print(f"{len(files)} images in {target}: {target.stat().st_size / 1e6:.1f} MB")


def _files(data: Path) -> Iterator[tuple[str, bytes]]:
    """(SPLIT/CLASS/NAME, content) of each image file."""
    pattern = re.compile(rf"({'|'.join(SPLITS)})/[^/]+/[^/]+\.(jpe?g|png)", re.IGNORECASE)
    if data.is_dir():
        names = ((path.relative_to(data).as_posix(), path) for path in data.glob("*/*/*"))
        yield from ((name, path.read_bytes()) for name, path in names if pattern.fullmatch(name))
        return
    with tarfile.open(data) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            stream = tar.extractfile(member) if pattern.fullmatch(name) else None
            if stream is not None:
                yield name, stream.read()


def unpack(source: Path) -> tuple[Any, Any, Any]:
    """As a reader of :mod:`moco.data.sources.named`: images to pretrain on, the same labelled, held-out ones; in
    memory, uint8.

    Raises:
        UserError: there is no pack.
    """
    import numpy as np
    from PIL import Image

    from moco.data import ArraySource
    from moco.errors import UserError

    if not source.is_file():
        raise UserError(f"no packed CIFAR-10 at {source}: make it by `python -m benchmarks.accuracy.cifar10_gpu pack`.")
    with np.load(source, allow_pickle=False) as held:
        classes, labels, splits, ends, data = (held[name] for name in ("classes", "labels", "splits", "ends", "data"))
    files = (data[a:b].tobytes() for a, b in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])  # (n, 32, 32, 3)
    train, test = (
        ArraySource(f"cifar10/{name}", pixels[splits == i], 3, classes.tolist(), labels[splits == i])
        for i, name in enumerate(SPLITS)
    )
    return train, train, test


# ------------------------------------------------------------------------------------------------------- the run


def words_of(args: argparse.Namespace) -> list[str]:
    """The flags of main_pretrain.py; later ones win."""
    from benchmarks.accuracy.cifar10_methods import METHODS
    from moco import distributed

    counts = [word for word in METHODS[args.method] if word not in ("--method", args.method)]
    method = ["--method", args.method, *counts]
    workers = str(max(1, distributed.cores() - 2))  # a core for the launches, one for what pins memory
    return [*RUN, "-j", workers, *method, *(DRY if args.dry else GRAPHS), "--seed", str(args.seed), *args.argv]


def name_of(args: argparse.Namespace) -> str:
    """Of the run's folder: the method, the seed and what differs from the recipe."""
    more = re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(args.argv)).strip("-")
    return "_".join(filter(None, ["dry" * args.dry, args.method, more, f"seed{args.seed}"]))


def report(
    trainer: Any, encoder: Any, sources: Any, extractor: Any, seed: int, config: Any, recorded: Sequence[str] = ()
) -> None:
    """In the place of :func:`moco.eval.between_epochs.report`: k-NN on features and on the head's output, from one
    pass."""
    import torch

    from moco.eval.knn import knn_predict

    if trainer.exit_code is not None or "knn" in recorded or not trainer.due(config.knn_every):
        return
    with torch.compiler.set_stance("force_eager"):  # to compile for these batches too takes longer than four passes
        bank, queries = (extractor.shard(encoder, source, head=True) for source in (sources.train, sources.val))
    found, classes = {}, len(sources.train.classes)
    for name, rows, asked in (("knn", bank.x, queries.x), ("knn_output", bank.z, queries.z)):
        predicted = knn_predict(
            replace(bank, x=rows),
            asked,
            k=config.k,
            temperature=config.temperature,
            num_classes=classes,
            device=extractor.device,
        )
        found[name] = 100.0 * int((predicted[0] == queries.labels).sum()) / len(queries.labels)
    at = trainer.progress
    text = f"epoch {at.trained}: k-NN {found['knn']:.2f} % on features, {found['knn_output']:.2f} % on the output"
    trainer.log.scalars(at.step, found, epoch=at.trained, finished_epochs=at.epoch, text=text)


@contextlib.contextmanager
def inserted(source: Path, ends: float) -> Iterator[None]:
    """main_pretrain.py reads the pack as cifar10, measures by :func:`report`, and stops at ``ends`` (monotonic clock),
    however long it took to build the model."""
    from moco.eval import between_epochs
    from moco.train.stop import StopRequest

    def limited(_: float | None) -> StopRequest:
        return StopRequest((ends - time.monotonic()) / 60)

    with (
        mock.patch("moco.data.sources.named.cifar10", side_effect=lambda *_: unpack(source)),
        mock.patch.object(between_epochs, "report", report),
        mock.patch("moco.train.outage.StopRequest", limited),
    ):
        yield


class Both(io.TextIOBase):
    """What is printed, and the same in a file that is whole after every line."""

    def __init__(self, path: Path) -> None:
        self.screen, self.file = sys.stdout, open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, text: str) -> int:
        self.screen.write(text)
        return self.file.write(text)

    def flush(self) -> None:
        self.screen.flush()

    def close(self) -> None:
        self.file.close()
        super().close()


def run(args: argparse.Namespace) -> int:
    """Train until the end or the time limit, write the small files, say how to go on."""
    import main_pretrain
    from moco import cli, distributed
    from moco.errors import USAGE_EXIT, UserError

    if not args.dry and distributed.device().type != "cuda":
        raise UserError("torch finds no GPU: 200 epochs are not for a CPU; --dry runs every step of it, tiny.")
    name, argv = name_of(args), words_of(args)
    work, out = args.work / name, args.out / name
    settings = cli.parse_pretrain([*argv, "--save-dir", str(work)])
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    if args.pieces:
        join(args.pieces, work)
    before = records(work)
    ends, code = BEGAN + 60 * args.minutes, None
    try:
        with inserted(args.pack, ends), Both(out / "log.txt") as both, contextlib.redirect_stdout(both):
            code = distributed.launch(main_pretrain.worker, settings)
    finally:
        if code != USAGE_EXIT:  # then nothing was run; whatever else ended it, what was measured is kept
            print(said(write(work, out, argv, before, settings.epochs), work))
    return code


def records(work: Path) -> list[dict]:
    """The lines of log.jsonl; none before a run's start."""
    path = work / "log.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def write(work: Path, out: Path, argv: list[str], before: list[dict], epochs: int) -> dict:
    """The small files of a command in both folders; returns result.json's content."""
    path, found = work / "result.json", records(work)
    commands = json.loads(path.read_text("utf-8"))["commands"] if before and path.exists() else []
    first, last = (max((x["step"] for x in some), default=0) for some in (before, found))
    speeds = [x["images_per_second"] for x in found if x.get("images_per_second") and x["step"] > first]
    commands.append(
        {"from_step": first, "to_step": last, "seconds": round(time.monotonic() - BEGAN, 1),
         "images_per_second": round(sorted(speeds)[len(speeds) // 2]) if speeds else None, **machine()}
    )  # fmt: skip
    measured = {x["finished_epochs"]: {n: x[n] for n in ("knn", "knn_output")} for x in found if "knn_output" in x}
    flags = [word.removeprefix(f"{ROOT}/") for word in argv]
    result = {
        "finished": epochs in measured, "epochs": epochs, "knn": measured, "published_moco_knn_output": 82.6,
        "seconds": round(sum(one["seconds"] for one in commands), 1), "flags": flags, "commands": commands,
    }  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    for name in ("result.json", "log.jsonl"):
        if (work / name).exists():
            shutil.copy(work / name, out / name)
    return json.loads(path.read_text("utf-8"))


def machine() -> dict[str, str]:
    """Card, versions and commit."""
    import torch

    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return {"card": card, "torch": torch.__version__, "triton": version, "commit": commit()}


def commit() -> str:
    """Of this checkout; "unknown" for a copy without its history."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()
    return "unknown"


def said(result: dict, work: Path) -> str:
    """Where the run is, in two lines."""
    one = result["commands"][-1]
    speed = f"steps {one['from_step']} to {one['to_step']}, {one['images_per_second']} images/s, {one['seconds']} s"
    if result["finished"]:
        last = result["knn"][str(result["epochs"])]
        output = f"k-NN {last['knn_output']:.2f} % on the output (published for plain MoCo: 82.6)"
        return f"{speed}\nfinished: {output}, {last['knn']:.2f} % on features"
    return f"{speed}\nnot finished: the same command goes on; its state is {state(work)}"


# ----------------------------------------------------------------------------------------------------- the state


def state(work: Path) -> str:
    """The newest checkpoint and its size, in words."""
    from moco.run_folder import newest

    path = newest(str(work))
    return f"{path}, {Path(path).stat().st_size / 1e6:.0f} MB" if path else f"nothing in {work} yet"


def pieces(args: argparse.Namespace) -> int:
    """Copy the newest checkpoint in pieces, numbers ``which`` [first, end) of them, with the log and result."""
    from moco.errors import UserError
    from moco.run_folder import newest

    name = name_of(args)
    work, out = args.work / name, args.out / name
    path = newest(str(work))
    if path is None:
        raise UserError(f"{work} holds no checkpoint: start the run, or give its --method, --seed and flags.")
    out.mkdir(parents=True, exist_ok=True)
    content = Path(path).read_bytes()
    parts = [content[at : at + PIECE] for at in range(0, len(content), PIECE)]
    first, end = args.which or (0, len(parts))
    for number, part in list(enumerate(parts))[first:end]:
        (out / f"{Path(path).name}.{number:02d}of{len(parts):02d}").write_bytes(part)
    for small in ("result.json", "log.jsonl"):
        shutil.copy(work / small, out / small)
    print(f"{path}, {len(content) / 1e6:.0f} MB: pieces {first} to {min(end, len(parts)) - 1} of {len(parts)} in {out}")
    return 0


def join(source: Path, work: Path) -> None:
    """Put pieces together in ``work``, where no checkpoint is there yet.

    Raises:
        UserError: they are not all there, or are of several checkpoints.
    """
    from moco.errors import UserError
    from moco.run_folder import newest

    if newest(str(work)):
        return
    found = sorted(source.glob("*.[0-9][0-9]of[0-9][0-9]"))
    names = {path.name.rpartition(".")[0] for path in found}
    count = int(found[0].name[-2:]) if found else 0
    if len(names) != 1 or len(found) != count:
        raise UserError(f"{source} holds {len(found)} pieces of {len(names)} checkpoints: bring all {count} of one.")
    for small in ("result.json", "log.jsonl"):
        if (source / small).exists():
            shutil.copy(source / small, work / small)
    (work / names.pop()).write_bytes(b"".join(path.read_bytes() for path in found))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "run", "pieces"))
    parser.add_argument("--data", type=Path, default=TAR, help="tar or folder of train/CLASS/*.jpg, test/CLASS/*.jpg")
    parser.add_argument("--pack", type=Path, default=PACK, help="the packed images (default: runs/cifar10.npz)")
    parser.add_argument("--method", choices=("moco", "mochi", "synco"), default="moco")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="minutes after which a run saves and stops (default: 8.5)"
    )
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the checkpoints (runs/cifar10_gpu_work)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the small files (runs/cifar10_gpu)")
    parser.add_argument("--pieces", type=Path, help="folder of the pieces of a checkpoint to go on from")
    parser.add_argument("--which", type=int, nargs=2, metavar=("FIRST", "END"), help="pieces to copy (default: all)")
    parser.add_argument("--dry", action="store_true", help="two epochs of a tiny network on a CPU")
    args, args.argv = parser.parse_known_args(argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    missing = [title for name, title in NEEDS.items() if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: this Python lacks {', '.join(missing)}: install them, or take another.", file=sys.stderr)
        return 2
    from moco.errors import exit_code

    work = {"pack": lambda: pack(args.data, args.pack), "run": lambda: run(args), "pieces": lambda: pieces(args)}
    return exit_code(work[args.what])


if __name__ == "__main__":
    sys.exit(main())
