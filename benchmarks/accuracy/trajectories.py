"""Do two checkouts train the same numbers? Records 20 optimizer steps of every method and compares them bit by bit.

    python -m benchmarks.accuracy.trajectories record OUT.json [--checkout DIR] [--only NAME ...]
    python -m benchmarks.accuracy.trajectories compare BEFORE.json AFTER.json [--only NAME ...]
    python -m benchmarks.accuracy.trajectories both BEFORE_DIR AFTER_DIR [--only NAME ...]

`record` runs main_pretrain.py, main_semisup.py and main_lincls.py of a checkout (default: this one) as commands, on one
and on two CPU processes, on small pictures that it draws itself. A record holds every number of their logs (each step
is logged) and of their JSON results, the SHA-256 of every tensor of their checkpoints and the checkpoints' other
entries. It imports nothing of moco, so that a checkout may move and rename its modules. Fine-tuning and probe start
from the checkpoint of `moco/1`, so a change of it is a change of theirs.

`compare` prints one line a run, its first difference with both values, and exits with 1 where anything differs. A name
that only one record has is a difference too, but for what a checkpoint notes of its run: that is only told.
`both` records two checkouts side by side and compares them.

Times, rates, paths and versions are left out (LEFT_OUT), and a figure that is read off the queue, whose bits are
compared. --only takes a run (`synco/2`) or its two (`synco`). Compare records of one machine and one torch: other
processors round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CLASSES, TRAIN, VAL, SIDE = 10, 32, 8, 20  # 320 images to train on: 10 steps an epoch at batch 32

IMAGES = ["images", "--size", "16", "-j", "0", "--seed", "3", "-p", "1"]
NETWORK = ["-a", "test_resnet"]  # timm's, milliseconds a step
PRETRAIN = [*NETWORK, *IMAGES, "--amp", "off", "--head-precision", "fp32", "--moco-dim", "32", "--knn-k", "20"]
PRETRAIN += ["--knn-every", "1", "-b", "32", "--epochs", "2"]
QUEUE = ["--moco-k", "256", "--schedule", "1"]
BATCH = ["--schedule", "1"]
NEGATIVES = ["--n-hard", "32", "--n1", "8", "--n2", "8", "--n3", "8", "--n4", "4", "--n5", "4", "--n6", "4"]
START = ["--hard-start-epoch", "0"]
FIRST = "moco/1"  # whose checkpoint is fine-tuned and probed
TUNE = [*IMAGES, "--pretrained", "moco_1/checkpoint_0001.pth.tar", "-b", "32", "--epochs", "2"]
PROBE = [*TUNE, "--schedule", "1"]
RECIPE = ["--ema", "0.9", "--update-freq", "2", "--warmup-epochs", "1", "--mixup", "0.2", "--smoothing", "0.1"]

RUNS = {
    "moco": ["main_pretrain.py", *PRETRAIN, *QUEUE],
    "moco_symmetric": ["main_pretrain.py", *PRETRAIN, *QUEUE, "--symmetric", "--accum", "2", "-b", "16", "--mlp",
                       "--aug-plus", "--cos", "--ema", "0.9"],
    "moco_adamw": ["main_pretrain.py", *PRETRAIN, "--moco-k", "256", "--opt", "adamw", "--lr", "0.001", "--clip-grad",
                   "1", "--plateau", "0"],
    "moco_device": ["main_pretrain.py", *PRETRAIN, *QUEUE, "--aug", "v2", "--aug-device", "gpu", "--retrieval-every",
                    "1"],
    "moco_digits": ["main_pretrain.py", *PRETRAIN[:2], "--dataset", "mnist5k", *PRETRAIN[3:], *QUEUE, "--steps", "20"],
    "mochi": ["main_pretrain.py", *PRETRAIN, *QUEUE, *START, "--mochi", "64", "32", "16"],
    "synco": ["main_pretrain.py", *PRETRAIN, *BATCH, *START, "--method", "synco", "--moco-k", "2048"],
    "synco_starts": ["main_pretrain.py", *PRETRAIN, *QUEUE, *START, *NEGATIVES, "--extrapolation", "paper",
                     "--type-starts", "mixup=1", "noise=5steps"],
    "supcon_queue": ["main_pretrain.py", *PRETRAIN, *QUEUE, "--method", "supcon"],
    "supcon_synco": ["main_pretrain.py", *PRETRAIN, *QUEUE, *START, *NEGATIVES, "--method", "supcon"],
    **{m: ["main_pretrain.py", *PRETRAIN, *BATCH, "--method", m] for m in ("simclr", "supcon", "hcl", "dcl")},
    "moco_v3": ["main_pretrain.py", *PRETRAIN, *BATCH, "--method", "moco_v3", "--moco-mlp-dim", "64"],
    "simclr_views": ["main_pretrain.py", *PRETRAIN, *BATCH, "--method", "simclr", "--views", "3", "--sync-bn"],
    "tune_ce": ["main_semisup.py", *TUNE],
    "tune_supcon": ["main_semisup.py", *TUNE, "--loss", "supcon"],
    "tune_schane": ["main_semisup.py", *TUNE, "--loss", "schane"],
    "tune_freeze": ["main_semisup.py", *TUNE, "--weights", "freeze"],
    "tune_plateau": ["main_semisup.py", *TUNE, "--plateau", "0", "--epochs", "4", "-b", "64"],
    "tune_milestones": ["main_semisup.py", *TUNE, "--schedule", "1", "--lr", "0.1", "--sync-bn"],
    "tune_recipe": ["main_semisup.py", *TUNE, *RECIPE, "--epochs", "4", "--val-share", "0.2", "--few-shot",
                    "--few-shot-queries", "3"],
    "probe": ["main_lincls.py", *PROBE, "--lr", "30", "3", "0.3"],
    "probe_cached": ["main_lincls.py", *PROBE, "--features", "cached", "--lr", "10", "1"],
    "probe_warm": ["main_lincls.py", *PROBE, "--lr", "1", "0.1", "--opt", "lars", "--cos", "--warm", "--warm-epochs",
                   "1", "--val-share", "0.25"],
    "knn": ["main_lincls.py", *PROBE, "--knn", "--knn-k", "20", "5"],
    "few_shot": ["main_lincls.py", *PROBE, "--few-shot", "--few-shot-queries", "3", "--few-shot-episodes", "50"],
}  # fmt: skip

# The speed of the machine, where a run lies, what it was given (the same words on both sides) and what it ran on.
LEFT_OUT = {"images_per_second", "wait_share", "eta_seconds", "time", "step_ms", "pretrained", "settings", "torch"}
LEFT_OUT |= {"data.name"}
LEFT_OUT |= {"old_mass", "false_negatives"}  # read off the queue
SECTIONS = ("log", "results", "tensors", "entries")  # in the order compared


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 where runs failed or records differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    add = {name: commands.add_parser(name) for name in ("record", "compare", "both")}
    add["record"].add_argument("out", type=Path)
    add["record"].add_argument("--checkout", type=Path, default=ROOT)
    for name in ("compare", "both"):
        add[name].add_argument("before", type=Path)
        add[name].add_argument("after", type=Path)
    for name, run in {"record": record, "compare": compare, "both": both}.items():
        add[name].set_defaults(run=run)
        add[name].add_argument("--only", nargs="+", default=[], metavar="NAME", help="names of the runs (default: all)")
    add["record"].add_argument("--parallel", type=int, default=2, help="runs side by side (default: 2)")
    args = parser.parse_args(argv)
    if odd := [name for name in args.only if name.split("/")[0] not in RUNS]:
        parser.error(f"--only {odd[0]}: no such run; there are {', '.join(RUNS)}, each as NAME/1 and NAME/2.")
    return args.run(args)


def both(args: argparse.Namespace) -> int:
    """Record two checkouts at the same time, then compare."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        files = [Path(folder, name) for name in ("before.json", "after.json")]
        given = [
            argparse.Namespace(out=file, checkout=checkout, only=args.only, parallel=1)
            for file, checkout in zip(files, (args.before, args.after), strict=True)
        ]
        failed = any([*pool.map(record, given)])
        return max(int(failed), compare(argparse.Namespace(before=files[0], after=files[1], only=args.only)))


def chosen(only: list[str]) -> list[str]:
    """Names of runs, NAME/PROCESSES."""
    names = [f"{name}/{processes}" for name in RUNS for processes in (1, 2)]
    return [name for name in names if not only or {name, name.split("/")[0]} & set(only)]


# ------------------------------------------------------------------------------------------------------- record


def record(args: argparse.Namespace) -> int:
    """Run what is chosen and write the record; 1 where a command failed."""
    began, names, checkout = time.monotonic(), chosen(args.only), args.checkout.resolve()
    with tempfile.TemporaryDirectory() as folder:
        draw_images(Path(folder, "images"))
        check_imports(checkout, folder)
        runs = {}
        if FIRST in names or any(RUNS[name.split("/")[0]][0] != "main_pretrain.py" for name in names):
            runs[FIRST] = one_run(checkout, folder, FIRST)
        rest = [name for name in names if name not in runs]
        with ThreadPoolExecutor(args.parallel) as pool:
            runs.update(zip(rest, pool.map(partial(one_run, checkout, folder), rest), strict=True))
    about = {"checkout": str(checkout), "torch": torch.__version__, "seconds": round(time.monotonic() - began)}
    found = {"about": about, "runs": {name: runs[name] for name in names}}
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    failed = [name for name in names if "failed" in runs[name]]
    print(f"{args.out}: {len(names)} runs in {about['seconds']} s, failed: {', '.join(failed) or 'none'}", flush=True)
    return int(bool(failed))


def draw_images(root: Path) -> None:
    """An image folder of CLASSES noisy gradients, drawn by a fixed seed."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(-1, 1, SIDE)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for label in range(CLASSES):
            angle, colour = 2 * np.pi * label / CLASSES, np.cos(label + np.arange(3))
            pattern = (np.cos(angle) * ramp[:, None] + np.sin(angle) * ramp)[..., None] * colour
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = 128 + 60 * pattern + 40 * rng.standard_normal((SIDE, SIDE, 3))
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{label}_{i}.png")


def environment(checkout: Path) -> dict[str, str]:
    """This environment with the checkout's modules first, one thread a process, no GPU and no scheduler."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_", "OMPI_", "PMI_", "PBS_", "MASTER_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    return {**kept, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def check_imports(checkout: Path, folder: str) -> None:
    """Print which moco the commands import; exit where an installed one comes before the checkout's."""
    words = [sys.executable, "-c", "import moco; print(moco.__file__)"]
    asked = subprocess.run(words, cwd=folder, env=environment(checkout), capture_output=True, text=True)
    path = asked.stdout.strip()
    if not path or checkout not in Path(path).resolve().parents:
        sys.exit(f"{checkout} is no checkout: its commands import {path or asked.stderr}")
    print(f"moco is {path}", flush=True)


def one_run(checkout: Path, folder: str, name: str) -> dict[str, Any]:
    """Run one command in ``folder``, where all paths are relative, and read what it wrote."""
    began, (run, processes) = time.monotonic(), name.split("/")
    out, (script, *words) = f"{run}_{processes}", RUNS[run]
    command = [sys.executable, str(checkout / script), *words, "--nproc", processes, "--save-dir", out]
    done = subprocess.run(command, cwd=folder, env=environment(checkout), capture_output=True, text=True)
    print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}: {(done.stderr.strip() or done.stdout)[-2000:]}"}
    return read(Path(folder, out))


def read(folder: Path) -> dict[str, Any]:
    """The record of a finished run: numbers by step and name, results, tensors and other entries by file and name."""
    found: dict[str, Any] = {section: {} for section in SECTIONS}
    for path in sorted(folder.glob("*.jsonl")):
        if not path.stem.endswith("_events"):
            found["log"].update(numbers(path))
    for path in sorted(folder.glob("*.json")):
        if not path.stem.endswith("_settings"):
            found["results"].update(leaves(json.loads(path.read_text(encoding="utf-8")), path.name))
    for path in sorted(folder.glob("*.pth.tar")):
        for name, value in leaves(torch.load(path, weights_only=True), path.name):
            section = "tensors" if isinstance(value, torch.Tensor) else "entries"
            found[section][name] = digest(value) if section == "tensors" else value
    return found


def numbers(path: Path) -> Iterator[tuple[str, Any]]:
    """("log.jsonl step 7 loss", value) of every line; a name's second value at one step has a mark."""
    seen: set[str] = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        entries = json.loads(line)
        for name, value in leaves(entries, f"{path.name} step {entries.pop('step')}", " "):
            while name in seen:
                name += "'"
            seen.add(name)
            yield name, value


def leaves(value: Any, name: str, mark: str = ": ") -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in dictionaries and lists, but for what is LEFT_OUT."""
    if not isinstance(value, (dict, list, tuple)):
        yield name, value
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    within = name.rpartition("/")[2].rpartition(": ")[2]
    for key, item in items:
        if not {str(key), f"{within}.{key}"} & LEFT_OUT:
            yield from leaves(item, f"{name}{mark}{key}", "/")


def digest(tensor: torch.Tensor) -> str:
    """Type, shape and SHA-256 of the bytes."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data.tobytes()).hexdigest()}"


# ------------------------------------------------------------------------------------------------------ compare


def compare(args: argparse.Namespace) -> int:
    """Print one line a run; 1 where one differs."""
    before, after = (json.loads(p.read_text(encoding="utf-8"))["runs"] for p in (args.before, args.after))
    if args.only:
        wanted = chosen(args.only)
        before, after = ({name: runs[name] for name in wanted if name in runs} for runs in (before, after))
    differ = 0
    for name in {**before, **after}:
        found, told = differences(before.get(name), after.get(name))
        differ += bool(found)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        words = f"DIFFERS: {found[0]}{more}" if found else f"equal: {counts(before[name])}"
        print("; ".join([f"{name:18} {words}", *told]))
    print(f"{differ} of {len({**before, **after})} runs differ")
    return int(differ > 0 or not before)


def counts(run: dict[str, Any]) -> str:
    return ", ".join(f"{section} {len(run[section])}" for section in SECTIONS)


def differences(one: dict[str, Any] | None, other: dict[str, Any] | None) -> tuple[list[str], list[str]]:
    """What differs between the two records of a run, in the order of its steps, and what is only told."""
    if one is None or other is None:
        return [f"only {'AFTER' if one is None else 'BEFORE'} has this run"], []
    if bad := [f"{side}: {run['failed']}" for side, run in (("BEFORE", one), ("AFTER", other)) if "failed" in run]:
        return bad, []
    found, told = [], []
    for section in SECTIONS:
        a, b = one[section], other[section]
        found += [f"{n}: {a[n]} != {b[n]}" for n in a if n in b and not same(a[n], b[n])]
        for side, odd in (("BEFORE", [n for n in a if n not in b]), ("AFTER", [n for n in b if n not in a])):
            notes = [n for n in odd if section == "entries" and ": run/" in n]
            found += [f"only {side} has {n}" for n in odd if n not in notes]
            told += [f"only {side} has {', '.join(notes[:3])}" + ", .." * (len(notes) > 3)] if notes else []
    return found, told


def same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)  # nan


if __name__ == "__main__":
    sys.exit(main())
