"""Train a linear classifier on frozen features (MoCo's protocol), or ask the features' nearest neighbours.

    python main_lincls.py --pretrained CHECKPOINT [flags] DIR        --help lists the flags

Reads top to bottom: data, model, optimizer, resume, then measure, find a rate, or train and report. In --save-dir:
checkpoint.pth.tar, model_best.pth.tar, lincls.jsonl and result.json (with --evaluate, --knn, --few-shot or --lr-find:
evaluate, knn, few_shot or lr_find, .jsonl and .json). Exit codes: 0 done, or stopped by --max-minutes or SIGUSR1 with a
checkpoint; 2 input that cannot be used; 3 the loss was not finite or a frozen tensor changed; 143 SIGTERM, with a
checkpoint.
"""

import sys
from argparse import Namespace
from functools import partial
from typing import Any

if __name__ == "__main__":  # a wrong flag is answered before torch is imported; spawned children are not __main__
    from moco.cli import parse_lincls

    ARGS = parse_lincls()

import torch

from moco import data, distributed, seeding
from moco.cli.common import few_shot_config
from moco.cli.flag_classes import LINCLS, probing
from moco.cli.training import optimizer_config, schedule_config
from moco.data import Source
from moco.eval import fewshot, knn, linear, linear_checkpoint, linear_fit, linear_report, lr_find
from moco.eval.features import EvalData, bad_image_notes
from moco.models.encoder import build_encoder
from moco.train.plan import Progress, count_epochs
from moco.train.resume import DONE, about_run, begin_run, changes, describe_resume
from moco.train.runlog import RunLog
from moco.weights.read import load_backbone
from moco.weights.settings import Settled, settle_from_file

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MEASURES = ("knn", "few_shot")  # what needs no training
MODES = (*MEASURES, "lr_find", "evaluate")  # else a classifier is trained


def worker(args: Namespace) -> int:
    """One process of a probe, from data to the result; returns the exit code."""
    mode = next((mode for mode in MODES if getattr(args, mode)), "lincls")
    trained = mode == "lincls"
    path, state, seed = begin_run(args.resume, args.save_dir, args.seed, linear_checkpoint.CHECKPOINT)
    linear_checkpoint.check_classifier(path, needed=mode == "evaluate")

    # data
    train, val, settled, numbered = open_images(args, mode, path, state)
    (size, mean, std), classes = settled.of(train), linear.count_classes(train, args.num_classes)
    batch = args.batch_size * distributed.nodes()

    # model
    torch.manual_seed(seeding.key("init", seed) >> 1)
    encoder = build_encoder(args.arch, classes, stem=args.stem, size=size, in_chans=train.channels)
    fresh = {}, "" if path else f"no --pretrained: random initialisation by seed {seed}, a baseline"
    weights, summary = load_backbone(encoder, args.pretrained, args.arch) if args.pretrained else fresh
    model = linear.Probe(encoder, distributed.device(), mean, std, seed, AMP[args.amp])

    # optimizer
    lrs = linear_checkpoint.rates(state, args.lrs, args.epochs, training=trained)
    heads = linear.make_classifiers(model, lrs, optimizer_config(args, args.lr), args.label_smoothing)
    plan = count_epochs(-(-len(train) // batch), schedule_config(args, args.epochs))
    at = Progress(seed, args.start_epoch)

    # resume
    about = about_run(probing(args, encoder.built, mean, std, batch), train)
    notes = compare(args, state, path, about) if trained else []
    run = {"seed": seed, "classes": train.classes, "batches": {"images": len(train), "images a batch": batch}, **about}
    if path:
        at = linear_checkpoint.load(model, heads, state, path, args.arch, weights, run if trained else None)
        summary = "; ".join(filter(None, [summary, describe_resume(path, at.epoch, at.batch), numbered]))
    if trained:
        linear_checkpoint.reserve_probe_folder(args.save_dir, path, args.overwrite)
    done = at.batches(plan.steps_per_epoch) if path else None
    with RunLog(args.save_dir, config=vars(args), resume_step=done, name=mode) as log:
        images = views(args, size, batch, seed, log)
        told = linear_report.describe_run(mode, train, val, images, args.features == "cached")
        log.line("\n".join([f"{args.arch} at {size} px: {summary}{settled.summary}", *notes, told]))
        result = linear_report.begin_result(mode, args.arch, args.pretrained, train, val, images)
        features = partial(linear.probe_data, model, images, cached=args.features == "cached")
        if mode in MEASURES:
            linear_report.write_measure(mode, measure(args, model, train, val, images), result, args.save_dir, log)
        elif mode == "lr_find":
            lr_find.find_rate(heads[0], features(train, training=True), args.lr_find_steps, result, args.save_dir, log)
        else:
            save = partial(linear_checkpoint.save, model, heads, args.save_dir, at, args.arch, run, args.save_ckpt_freq)
            frozen = weights or model.frozen(), args.pretrained or path or "the random initialisation"
            probe = linear_fit.ProbeRun(model, heads, plan, at, log, save, partial(model.check_frozen, *frozen))
            return fit(args, probe, features, train, val, result)
    return 0


def open_images(args: Namespace, mode: str, path: str | None, state: dict) -> tuple[Source, Source, Settled, str]:
    """Images to learn from, held-out ones, how they are seen, and what the log must say of their classes' numbers."""
    settled = settle_from_file(args, path or args.pretrained)
    settings = {"download": args.download, "val_path": args.val_data, "channels": args.channels, "cache": args.cache}
    sources = data.open_on_nodes(args.dataset, args.data, **settings)
    state = {} if mode in MEASURES else state
    numbered = data.number_as_in(state, str(path), mode == "lincls", sources.train, sources.val)
    return *linear.choose_images(mode, sources, args.val_share, args.few_shot_classes), settled, numbered


def compare(args: Namespace, state: dict, path: str | None, about: dict[str, Any]) -> list[str]:
    """What a resumed run has otherwise than its checkpoint's, for the log; of a finished one that it is finished."""
    notes = changes(state, path, about, LINCLS, args.seed)
    return [DONE] if state.get("epoch", 0) >= args.epochs else notes


def views(args: Namespace, size: int, batch: int, seed: int, log: RunLog) -> EvalData:
    """How the images are read, with the unreadable ones named in the log."""
    workers, flip = distributed.share_of_cores(args.workers), data.dataset_of(args.dataset).mirrored
    return EvalData(size, batch, seed, workers, flip, bad_image_notes(log.line))


def measure(
    args: Namespace, model: linear.Probe, train: Source, val: Source, images: EvalData
) -> tuple[dict[str, float], dict[str, Any], str]:
    """k-NN or few-shot accuracy: numbers, settings and words."""
    extractor = model.extractor(images)
    if args.knn:
        return knn.measure_knn(model.encoder, train, val, extractor, args.knn_k, args.knn_t)
    return fewshot.measure_few_shot(model.encoder, train, extractor, few_shot_config(args, images.seed))


def fit(
    args: Namespace, probe: linear_fit.ProbeRun, features: linear_fit.ProbeFeatures, train: Source, val: Source,
    result: dict[str, Any],
) -> int:  # fmt: skip
    """Train what epochs are left, or with --evaluate none, and report; returns the exit code."""
    end, details = probe.at.epoch if args.evaluate else args.epochs, bool(args.per_class or args.confusion)
    code = linear_fit.fit(probe, features, train, val, end, details, args.max_minutes)
    if code is not None:
        return code
    result |= {"features": args.features, "epochs": probe.at.epoch, **linear_report.result(probe.heads)}
    linear.write_result(result, args.save_dir, "evaluate.json" if args.evaluate else linear_checkpoint.RESULT)
    confusion = args.confusion and args.save_dir
    linear_report.write_details(probe.heads, train.classes or [], args.per_class, confusion, probe.log)
    probe.log.line(linear_report.describe_last(probe.heads))
    return 0


if __name__ == "__main__":
    sys.exit(distributed.launch(worker, ARGS))
