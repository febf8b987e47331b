"""Train a linear classifier on frozen features (MoCo's protocol), or ask the features' nearest neighbours.

    python main_lincls.py --pretrained CHECKPOINT [flags] DIR        --help lists the flags

Reads top to bottom: data, model, optimizer, loop, save. In --save-dir: checkpoint.pth.tar, model_best.pth.tar,
lincls.jsonl and result.json (with --evaluate, --knn, --few-shot or --lr-find: evaluate, knn, few_shot or lr_find,
.jsonl and .json). Exit codes: 0 done, or stopped by --max-minutes or SIGUSR1 with a checkpoint; 2 input that cannot be
used; 3 the loss was not finite or a frozen tensor changed; 143 SIGTERM, with a checkpoint.
"""

import sys
from argparse import Namespace
from functools import partial
from typing import Any

if __name__ == "__main__":  # a wrong flag is answered before torch is imported; spawned children are not __main__
    from moco.cli import parse_lincls

    ARGS = parse_lincls()

import torch

from moco import cli, data, distributed, seeding
from moco.cli.flag_classes import LINCLS, probing
from moco.cli.lincls import few_shot_config, lincls_schedule, optimizer_config
from moco.eval import fewshot, knn, linear, linear_checkpoint, linear_report, lr_find
from moco.eval.features import EvalData, FeatureExtractor, bad_image_notes
from moco.models.encoder import build_encoder
from moco.train.plan import Progress, count_epochs
from moco.train.resume import DONE, about_run, begin_run, changes, describe_resume, describe_stop
from moco.train.runlog import RunLog
from moco.train.stop import StopRequest
from moco.weights.read import load_pretrained, settle_from_file

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def worker(args: Namespace) -> int:
    """One process of a probe, from data to the result; returns the exit code."""
    device, world = distributed.device(), distributed.world_size()
    measure = "knn" if args.knn else "few_shot" if args.few_shot else ""  # what needs no training
    mode = measure or ("lr_find" if args.lr_find else "evaluate" if args.evaluate else "lincls")
    path, state, seed = begin_run(args.resume, args.save_dir, args.seed, linear_checkpoint.CHECKPOINT)
    linear_checkpoint.check_classifier(path, needed=args.evaluate and not measure)

    # data
    settled = settle_from_file(args, path or args.pretrained)
    settings = {"download": args.download, "val_path": args.val_data, "channels": args.channels, "cache": args.cache}
    sources = data.open_on_nodes(args.dataset, args.data, **settings)
    numbered = data.number_as_in({} if measure else state, str(path), mode == "lincls", sources.train, sources.val)
    train, val = linear.choose_images(measure, sources, args.val_share, args.few_shot_classes)
    classes = linear.count_classes(train, args.num_classes)
    size, mean, std = settled.of(train)
    workers, flip = distributed.share_of_cores(args.workers), data.dataset_of(args.dataset).mirrored
    batch, cached = args.batch_size * distributed.nodes(), args.features == "cached"

    # model
    torch.manual_seed(seeding.key("init", seed) >> 1)
    encoder = build_encoder(args.arch, classes, stem=args.stem, size=size, in_chans=train.channels)
    weights, summary = {}, "" if path else f"no --pretrained: random initialisation by seed {seed}, a baseline"
    if args.pretrained:
        weights, summary = load_pretrained(encoder, args.pretrained, args.arch)
    model = linear.Probe(encoder, device, mean, std, seed, AMP[args.amp])

    # optimizer
    lrs = linear_checkpoint.rates(state, args.lrs, args.epochs, training=mode == "lincls")
    heads = linear.make_classifiers(model, lrs, optimizer_config(args, args.lr), args.label_smoothing)
    about = about_run(probing(args, encoder.built, mean, std, batch), train)
    notes = changes(state, path, about, LINCLS, args.seed) if mode == "lincls" else []
    notes = [DONE] if mode == "lincls" and state.get("epoch", 0) >= args.epochs else notes
    run = {"seed": seed, "classes": train.classes, "batches": {"images": len(train), "images a batch": batch}, **about}
    loading = partial(linear_checkpoint.load, model, heads, state, arch=args.arch, weights=weights)
    at = loading(path, run=run if mode == "lincls" else None) if path else Progress(seed, args.start_epoch)
    resumed = describe_resume(path, at.epoch, at.batch) if path else ""
    summary = "; ".join(filter(None, [summary, resumed, numbered]))
    frozen = weights or model.frozen()
    if mode == "lincls":
        reserving = partial(linear_checkpoint.reserve_run_folder, args.save_dir, path, args.overwrite)
        distributed.first_on_node(reserving, wait=True)
    views = f"; {linear.describe_features(cached)}" if mode in ("lincls", "lr_find") else ""
    plan = count_epochs(-(-len(train) // batch), lincls_schedule(args))
    resume_step = at.batches(plan.steps_per_epoch) if path else None
    with RunLog(args.save_dir, config=vars(args), resume_step=resume_step, name=mode) as log:
        log.line("\n".join([f"{args.arch} at {size} px: {summary}{settled.summary}", *notes]))
        log.line(f"{linear_report.describe_images(train, val, mode)}, {classes} classes; {world} process(es) on "
                 f"{device.type}, {batch} images a step in all, {workers} loaders each{views}")  # fmt: skip
        result = {"mode": mode, "arch": args.arch, "pretrained": args.pretrained, "size": size, "seed": seed,
                  "classes": classes, "train_images": len(train), "val_images": len(val)}  # fmt: skip
        images = EvalData(size, batch, seed, workers, flip, bad_image_notes(log.line))
        features = partial(linear.probe_data, model, images, cached=cached)
        if measure:
            extractor = FeatureExtractor(images, device, mean, std, model.amp)
            values, asked, summary = measure_frozen(args, model, train, val, extractor, seed)
            log.scalars(0, values)
            linear.write_result({**result, **asked, **values}, args.save_dir, f"{measure}.json")
            log.line(summary)
            return 0
        if args.lr_find:
            found = lr_find.sweep(heads[0], features(train, training=True), args.lr_find_steps)
            lr_find.write_sweep(found, result, args.save_dir)
            log.line(found.summary())
            return 0
        # loop
        end, details = at.epoch if args.evaluate else args.epochs, bool(args.per_class or args.confusion)
        stop = StopRequest(args.max_minutes) if at.epoch < end else None
        held_out = features(val)
        training = features(train, training=True) if at.epoch < end else held_out
        save = partial(linear_checkpoint.save, model, heads, args.save_dir, at, arch=args.arch, run=run)
        if at.epoch >= end:
            linear.validate(heads, held_out, details)
        while at.epoch < end:
            code = linear.train_epoch(heads, training, plan, at, log, stop)
            if code is not None:
                save()
                log.line(describe_stop(at.epoch, at.batch, plan.steps_per_epoch))
                return code
            linear.validate(heads, held_out, details and at.epoch == end - 1)
            model.check_frozen(frozen, args.pretrained or path or "the random initialisation")
            # save
            at.close_epoch()
            save(new_best=linear.note_best(heads), keep_every=args.save_ckpt_freq)
            text = None if at.epoch == end else linear_report.summary(heads)  # the last line comes after the result
            log.scalars(at.batches(plan.steps_per_epoch), linear_report.values(heads), epoch=at.epoch - 1, text=text)
        result.update(features=args.features, epochs=at.epoch, **linear_report.result(heads))
        linear.write_result(result, args.save_dir, "evaluate.json" if args.evaluate else linear_checkpoint.RESULT)
        linear_report.write_details(heads, train.classes or [], args.per_class, args.confusion and args.save_dir, log)
        log.line(linear_report.describe_last(heads))
    return 0


def measure_frozen(
    args: Namespace, model: linear.Probe, train: data.Source, val: data.Source, extractor: FeatureExtractor, seed: int
) -> tuple[dict[str, float], dict[str, Any], str]:
    """k-NN or few-shot accuracy: numbers, settings and words."""
    if args.knn:
        return knn.measure_knn(model.encoder, train, val, extractor, args.knn_k, args.knn_t)
    return fewshot.measure_few_shot(model.encoder, train, extractor, few_shot_config(args, seed))


def main(argv: list[str] | None = None) -> int:
    """The command moco-lincls; its exit code."""
    return distributed.launch(worker, cli.parse_lincls(argv))


if __name__ == "__main__":
    sys.exit(distributed.launch(worker, ARGS))
