"""python -m detection.run CHECKPOINT --task voc|coco: from a pretraining checkpoint to AP, mean and spread over trials.

Converts the checkpoint, trains and evaluates detectors that differ in their seed alone, each by train_net.py in a
process of its own, and writes into --out: backbone.pkl, trial_N/ (detectron2's files and results.json), summary.json,
table.md and pictures/. The same command continues: finished trials are not run again, a trial that was cut is resumed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone without installing

from moco import signals

if __name__ == "__main__":
    signals.begin("stopped")

from moco import doors
from moco.cli.common import encoder_file
from moco.cli.parser import Parser
from moco.errors import TrainingError, UserError, exit_code, tell
from moco.files import read_json, write_json

HERE = Path(__file__).resolve().parent
SCHEDULES = {"voc": ("24k", "12k"), "coco": ("1x", "2x")}  # the first is the default
NAMES = {"voc": "pascal_voc_R_50_{}_{}", "coco": "coco_R_50_{}_{}"}
METHODS = ("moco", "mochi", "synco", "synco_lr0.01")
TRAIN_NET = HERE / "train_net.py"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    text = "Fine-tune detectors from a pretraining checkpoint and report AP: mean and standard deviation over trials."
    parser = Parser(doors.typed("detection"), text, allow_abbrev=True)
    parser.add_argument(
        "checkpoint",
        type=encoder_file,
        help="the folder of a run, or a checkpoint of this project or of nine others",
    )
    parser.add_argument("--task", choices=SCHEDULES, required=True, help="Pascal VOC or COCO")
    parser.add_argument("--schedule", help="length of training; voc: 24k (default) or 12k; coco: 1x (default) or 2x")
    parser.add_argument(
        "--backbone", choices=("C4", "FPN"), default="C4", help="detector's backbone; FPN: for coco at 1x (default: C4)"
    )
    parser.add_argument(
        "--method", choices=METHODS, default="moco", help="method whose config is used; only synco_lr0.01 differs"
    )
    parser.add_argument("--config-file", help="config file, instead of the four flags above")
    parser.add_argument(
        "--trials", type=int, default=5, help="number of trials (default: 5, as in the published tables)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first trial; each next trial adds 1")
    parser.add_argument("--num-gpus", type=int, help="number of GPUs (default: 1, or 0, the CPU, where there is none)")
    parser.add_argument(
        "--pictures", type=int, default=4, help="number of test images to draw predictions on (default: 4)"
    )
    parser.add_argument("--out", help="folder to write to (default: output/detection_TASK)")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs of detectron2, such as SOLVER.BASE_LR 0.01")
    return parser.parse_intermixed_args(argv)  # KEY VALUE may stand behind the flags


def config_name(task: str, schedule: str | None, backbone: str, method: str) -> str:
    """The config's path relative to detection/.

    Raises:
        UserError: a combination without a published recipe.
    """
    schedule = schedule or SCHEDULES[task][0]
    name = f"configs/{NAMES[task].format(backbone, schedule)}_{method}.yaml"
    if not (HERE / name).is_file():
        raise UserError(
            f"there is no recipe for --task {task} --schedule {schedule} --backbone {backbone} --method {method}; "
            "voc has 24k and 12k with C4, coco 1x and 2x with C4 and 1x with FPN (no synco_lr0.01 with FPN)."
        )
    return name


def main(argv: list[str]) -> int:
    """Run; the exit code."""
    from . import needs

    args = parse(argv)

    def work() -> None:
        needs.check()
        config = args.config_file or config_name(args.task, args.schedule, args.backbone, args.method)
        out = Path(args.out or f"output/detection_{args.task}")
        tell(run(args.checkpoint, config, out, args.trials, args.seed, args.num_gpus, args.pictures, args.opts))

    try:
        return exit_code(work)
    except TrainingError as error:
        tell(f"error: {error}", error=True)
        return 1


def run(
    checkpoint: str,
    config: str,
    out: Path,
    trials: int,
    seed: int,
    num_gpus: int | None,
    pictures: int,
    opts: list[str],
) -> str:
    """Convert, run what is not done, and report; the Markdown table.

    Raises:
        UserError: bad input, or ``out`` holds results of other settings.
        TrainingError: a trial ended with an error; those before it are kept.
    """
    import torch

    from moco.weights.detectron2_names import convert, pixels_of, write_pickle

    from . import pictures as drawing
    from . import recipe, report, trainer

    if trials < 1:
        raise UserError(f"--trials {trials} runs nothing; give 1 or more.")
    tensors = convert(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    weights = str(out / "backbone.pkl")
    depth = 101 if "res4.22.conv1.weight" in tensors else 50
    pixels = pixels_of(checkpoint)
    argv = ["MODEL.RESNETS.DEPTH", str(depth), *pixels, *opts, "MODEL.WEIGHTS", weights]
    gpus = torch.cuda.device_count()
    if num_gpus is None and gpus > 1:
        tell(f"1 of this machine's {gpus} GPUs is used; for all of them add --num-gpus {gpus}", error=True)
    num_gpus = min(1, gpus) if num_gpus is None else num_gpus
    file = recipe.find_config(config)
    cfg, said = recipe.read_config(file, argv, num_gpus)
    said += [f"images are normalised as {checkpoint} was trained: {' '.join(pixels)}"] * bool(pixels)
    _claim(out, {"weights": _digest(tensors), "settings": _settings(cfg), "seed": seed})
    write_pickle(tensors, weights)
    recipe.check_start(cfg, resume=False, eval_only=False)

    found = []
    for number in range(trials):
        folder = out / f"trial_{number}"
        if not (folder / trainer.RESULTS).is_file():
            tell(f"trial {number + 1} of {trials}: seed {seed + number}, {folder}", *said)
            _train(folder, file, num_gpus, [*argv, "SEED", str(seed + number), "OUTPUT_DIR", str(folder)])
        found.append(read_json(str(folder / trainer.RESULTS)))

    try:
        figures = report.summary(found)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"a {trainer.RESULTS} below {out} is damaged ({error!r}); remove it to train that trial again."
        ) from error
    published = Path(file).stem if not opts else ""  # changed settings are no longer the published recipe
    table = report.table(figures, Path(checkpoint).name, trials, published)
    about = {"checkpoint": checkpoint, "config": config, "opts": opts, "published": report.published(published)}
    write_json({**about, **figures}, str(out / "summary.json"), "--out")
    (out / "table.md").write_text(table, encoding="utf-8")
    if pictures > 0:
        final = [*argv, "MODEL.WEIGHTS", str(out / "trial_0" / "model_final.pth")]
        drawing.draw(recipe.read_config(file, final, num_gpus)[0], str(out / "pictures"), pictures)
    return table


def _train(folder: Path, config: str, num_gpus: int, argv: list[str]) -> None:
    flags = ["--config-file", config, "--num-gpus", str(num_gpus)]
    if (folder / "last_checkpoint").is_file():
        flags.append("--resume")
    command = [sys.executable, str(TRAIN_NET), *flags, *argv]
    code = signals.call(command)
    if signals.noted():
        raise SystemExit(code or signals.code())
    if code:
        raise TrainingError(
            f"the trial in {folder} ended with code {code}, see its log.txt; it was: {shlex.join(command)}"
        )


def _claim(out: Path, claim: dict[str, Any]) -> None:
    """Say in ``out`` whose results it holds, or refuse a folder that holds others'."""
    path = out / "claim.json"
    if path.is_file() and read_json(str(path)) != claim:
        raise UserError(f"{out} holds results of another checkpoint or of other settings; give another --out.")
    write_json(claim, str(path), "--out")


def _settings(cfg: Any) -> str:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""  # a path; what it holds has a digest of its own
    return hashlib.sha256(cfg.dump().encode()).hexdigest()


def _digest(tensors: dict[str, Any]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].float().contiguous().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    # as a module of its package, which is detection in a clone and moco_detection in a wheel
    sys.exit(importlib.import_module(f"{HERE.name}.run").main(sys.argv[1:]))
