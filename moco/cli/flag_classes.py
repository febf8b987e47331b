"""What becomes of each flag when a run is resumed with another value: refused, used and said, or of no importance.

No torch here. Every flag of the three mains is in one class (tests/train/test_resume.py). A checkpoint keeps the flags
of the first two, with what was chosen for those that were left open.
"""

from __future__ import annotations

import argparse
from typing import Any

from moco.cli.crops import local_crops
from moco.cli.lincls import lincls_parser
from moco.cli.parser import Parser, argv_of
from moco.cli.pretrain import pretrain_parser
from moco.cli.semisup import semisup_parser
from moco.config import Classes, Flags


def _flags(*texts: str) -> frozenset[str]:
    return frozenset(word for text in texts for word in text.split())


_LAUNCH = "--world-size --rank --dist-url --dist-backend --gpu --multiprocessing-distributed --nproc"
_FILES = "DIR --config --compat --dataset --download --cache --val-data --workers --save-dir --resume --print-freq"
_SAVE = "--report --max-minutes --stop-code --save-minutes --save-steps --hang-minutes --data-patience"
_SCHEDULE = "--epochs --schedule --lr-decay-rate --cos --min-lr --warm --warm-epochs --warm-from"
_FEW_SHOT = "--few-shot --few-shot-classes --few-shot-way --few-shot-shots --few-shot-queries --few-shot-episodes"

PRETRAIN = Classes(
    fixed=_flags(
        "--method --arch --stem --channels --mlp --moco-dim --moco-mlp-dim --moco-k",  # network, queue, the run's name
        "--opt --exclude-bias-norm --stop-grad-conv1",  # the optimizer's state and its groups
        "--control",  # a control is not to be taken for its method
    ) | {"synthetic negatives"},
    free=_flags(
        _SCHEDULE, "--steps --plateau --warm-steps --rise-epochs --lr --batch-size --accum --drop-last",
        "--wd --momentum --opt-betas --clip-grad --ema --ema-epoch",
        "--moco-m --moco-m-cos --moco-t --base-temperature --symmetric --contrast-mode --views --beta --tau-plus",
        "--estimator --local-crops --local-crop-size --local-crop-scale",
        "--n-hard --n1 --n2 --n3 --n4 --n5 --n6 --sigma --delta --eta --mochi --hard-start-epoch --hard-stop-epoch",
        "--type-starts --extrapolation --mask-same-image --bn-splits --shuffle-bn --sync-bn",
        "--size --levels --mean --std --aug --decode --aug-device --auto --pretrained",
        "--amp --head-impl --head-precision --compile --compile-mode --channels-last",  # the same but for rounding
    ),
    silent=_flags(
        _LAUNCH, _FILES, _SAVE, "--data-folder --trial --overwrite --seed --start-epoch --num-classes --aug-plus",
        "--crop-min --stats --lr-decay-epochs --recompute --save-every --keep --max-restarts --max-bad-steps",
        "--online-probe",
        "--max-bad-images --check-every --knn-every --retrieval-every --rankme-every --wandb --knn-k --knn-t",
    ),
    data=True,
)  # fmt: skip

# A probe's and a tuning's result is reported with its settings: a tuning's recipe cannot change under way, nor what a
# probe's features are; its rates may, as upstream's, and the log says so.
LINCLS = Classes(
    fixed=_flags("--arch --stem --channels --size --levels --mean --std --features --val-share --opt"),
    free=_flags(
        _SCHEDULE, "--lr --batch-size --wd --momentum --opt-betas --clip-grad --label-smoothing --amp",
    ),
    silent=_flags(
        _LAUNCH, _FILES, _SAVE, _FEW_SHOT, "--train-folder --start-epoch --seed --num-classes --lr-decay-epochs",
        "--save-freq --evaluate --pretrained --knn --knn-k --knn-t --save-ckpt-freq --per-class --confusion --lr-find",
        "--lr-find-steps --overwrite --max-bad-images",
    ),
    data=False,
)  # fmt: skip

SEMISUP = Classes(
    fixed=_flags(
        "--arch --stem --channels --size --levels --mean --std --weights --batch-size --update-freq",
        _SCHEDULE, "--lr-backbone --lr-classifier --wd --momentum --warmup-epochs --plateau --layer-decay --opt",
        "--opt-betas --clip-grad --exclude-bias-norm --ema --ema-epoch --sync-bn --drop-path",
        "--loss --alpha --temp --estimator --beta --smoothing --mixup --cutmix --reprob --aa --aug",
    ) - {"--cos"} | {"training images", "validation images"},
    free=_flags("--amp --channels-last"),  # the same but for rounding
    silent=_flags(
        "--per-class --confusion",
        _LAUNCH, _FILES, _SAVE, _FEW_SHOT, "--cos --few-shot-data --train-percent --train-files --subset-seed",
        "--val-share --val-only FILE --pretrained --lr --lr-decay-epochs --start-epoch --trial --overwrite --seed",
        "--evaluate --save-ckpt-freq --task --data-path --dist-eval --max-bad-images",
    ),
    data=False,
)  # fmt: skip


def dests(parser: Parser) -> dict[str, str]:
    """Where the settings have each flag, by its first long spelling, or by what the help calls an argument."""
    found: dict[str, str] = {}
    for action in parser.actions():
        longs = [word for word in action.option_strings if word.startswith("--")]
        found[longs[0] if longs else str(action.metavar)] = action.dest
    del found["--help"]
    return found


def pretraining(args: argparse.Namespace, built: Any, view: Any, batch: int, amp: Any) -> Flags:
    """The flags that a pretraining's checkpoint keeps.

    Args:
        built: what --size, --channels and --stem came to, see :func:`moco.models.encoder.build_encoder`.
        view: the same of --aug, --mean and --std.
        batch: images a step over all processes.
        amp: the encoder's arithmetic, a torch.dtype or None.
    """
    starts = {**args.type_starts, **{kind: f"{step}steps" for kind, step in args.type_start_steps.items()}}
    chosen = {
        "--aug": view.aug, "--batch-size": batch, "--amp": _arithmetic(amp), "synthetic negatives": args.negatives,
        "--type-starts": [f"{kind}={start}" for kind, start in starts.items()],
        "--mochi": [args.n_hard, args.s, args.s2] if args.negatives == "mochi" else None,
    }  # fmt: skip
    if args.local_crops:
        chosen["--local-crop-size"] = local_crops(args).beside(built["size"]).size
    return _kept(pretrain_parser(), PRETRAIN, args, _images(built, view.mean, view.std) | chosen)


def probing(args: argparse.Namespace, built: Any, mean: Any, std: Any, batch: int) -> Flags:
    """The flags that a probe's checkpoint keeps, see :func:`pretraining`."""
    chosen = {"--batch-size": batch, "--lr": sorted(args.lrs)}
    return _kept(lincls_parser(), LINCLS, args, _images(built, mean, std) | chosen)


def tuning(args: argparse.Namespace, model: Any, images: Any, epochs: int, batch: int) -> Flags:
    """The flags that a fine-tuning's checkpoint keeps, see :func:`pretraining`; model: moco.eval.classifier.Classifier,
    images: moco.eval.finetune_setup.Images."""
    chosen = {"--epochs": epochs, "--batch-size": batch, "--amp": _arithmetic(model.amp)}
    chosen |= {"training images": images.train.choice(), "validation images": images.val.choice() if images.val else ""}
    idle = _flags(
        "--warm-epochs --warm-from" * (not args.warm), "--lr-decay-rate" * (args.schedule is None),
        "--alpha --temp --estimator --beta" * (args.loss == "ce"),
    )  # fmt: skip
    kept = _kept(semisup_parser(), SEMISUP, args, _images(model.encoder.built, model.mean, model.std) | chosen)
    return {name: value for name, value in kept.items() if name not in idle}


_TOLD = ("--method", "--arch", "--lr", "--batch-size", "--epochs")


def command_of(flags: Flags) -> list[str]:
    """The words with which main_pretrain.py gets these flags; what is its default is left out, but for ``_TOLD``."""
    words: list[str] = []
    for action in pretrain_parser().actions():
        name = next((word for word in action.option_strings if word.startswith("--")), "")
        if name in flags and (flags[name] != action.default or name in _TOLD):
            words += argv_of(name, flags[name], action.option_strings)
    return words


def _images(built: Any, mean: Any, std: Any) -> Flags:
    return {**{f"--{name}": value for name, value in built.items()}, "--mean": list(mean), "--std": list(std)}


def _kept(parser: Parser, classes: Classes, args: argparse.Namespace, chosen: Flags) -> Flags:
    given = {name: getattr(args, dest) for name, dest in dests(parser).items() if hasattr(args, dest)}
    kept = classes.fixed | classes.free
    return {name: value for name, value in {**given, **chosen}.items() if name in kept}


def _arithmetic(amp: Any) -> str:
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(amp), "off")
