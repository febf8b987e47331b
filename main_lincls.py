"""Train a linear classifier on frozen features (MoCo's protocol), or ask the features' nearest neighbours.

    python main_lincls.py --pretrained CHECKPOINT [flags] DIR        --help lists the flags

Reads top to bottom: data, model, optimizer, loop, save. In --save-dir: checkpoint.pth.tar, model_best.pth.tar,
lincls.jsonl and result.json (with --knn, --few-shot or --lr-find: knn, few_shot or lr_find, .jsonl and .json). Exit
codes: 0 done; 2 input that cannot be used; 3 the loss was not finite or a frozen tensor changed.
"""

import sys
from argparse import Namespace
from functools import partial
from typing import Any

import torch

from moco import checkpoint, data, distributed, fewshot, knn, lr_find, options, probe, probe_file, probe_report, seeding
from moco.encoder import build_encoder
from moco.meters import RunLog
from moco.pretrained import PUBLISHED, fill_backbone, read_backbone, settle

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
UPRIGHT = ("mnist5k",)  # a mirrored digit is another symbol


def worker(args: Namespace) -> int:
    """One process of a probe, from data to the result; returns the exit code."""
    device, world = distributed.device(), distributed.world_size()
    measure = "knn" if args.knn else "few_shot" if args.few_shot else ""  # what needs no training
    path = probe_file.resume_path(args.resume, args.save_dir, needed=args.evaluate and not measure)
    state = checkpoint.read(path) if path else {}
    seed = distributed.from_main(seeding.choose_seed(args.seed, state))

    # data
    settled = settle(args, path or args.pretrained)
    opening = partial(
        data.open_sources, args.dataset, args.data,
        download=args.download, val_path=args.val_data, channels=args.channels, cache=args.cache,
    )  # fmt: skip
    train, val = choose_images(args, distributed.first_on_node(opening, wait=bool(args.download or args.cache)))
    classes = probe.count_classes(train, args.num_classes)
    size, mean, std = settled.of(train)
    feed = probe.Feed(
        size=size,
        batch=args.batch_size * distributed.nodes(),
        seed=seed,
        workers=distributed.share_of_cores(args.workers),
        flip=args.dataset not in UPRIGHT,
        cached=args.features == "cached",
    )

    # model
    torch.manual_seed(seeding.key("init", seed) >> 1)
    encoder = build_encoder(args.arch, classes, stem=args.stem, size=feed.size, in_chans=train.channels)
    weights, words = {}, f"no --pretrained: random initialisation by seed {seed}, a baseline"
    if args.pretrained:
        reading = partial(read_backbone, encoder, args.pretrained, args.arch)
        weights, words = distributed.first_on_node(reading, wait=args.pretrained.startswith(PUBLISHED))
        fill_backbone(encoder, weights)
    model = probe.Probe(encoder, device, mean, std, seed, AMP[args.amp])

    # optimizer
    mode = measure or ("lr_find" if args.lr_find else "evaluate" if args.evaluate else "lincls")
    lrs = args.lrs if mode == "lincls" else probe_file.rates_of(state) or args.lrs
    heads = probe.make_heads(model, lrs, **options.head_settings(args))
    start = args.start_epoch
    if state and path:
        start = probe_file.load(model, heads, state, path, args.arch, weights, args.evaluate)
        words += f"; resumed {path} after epoch {start}"
    frozen = weights or model.frozen()
    origin = args.pretrained or path or "the random initialisation"

    views = f"; {feed.words}" if mode in ("lincls", "lr_find") else ""
    steps, others = -(-len(train) // feed.batch), 0 if val is train else len(val)
    with RunLog(args.save_dir, config=vars(args), resume_step=start * steps if state else None, name=mode) as log:
        log.line(f"{args.arch} at {feed.size} px: {words}{settled.words}")
        log.line(f"{len(train)} images to learn from and {others} held out, {classes} classes; {world} process(es) on "
                 f"{device.type}, {feed.batch} images a step in all, {feed.workers} loaders each{views}")  # fmt: skip
        result = {"mode": mode, "arch": args.arch, "pretrained": args.pretrained, "size": feed.size, "seed": seed,
                  "classes": classes, "train_images": len(train), "val_images": others}  # fmt: skip
        note = probe.bad_image_notes(log)
        if measure:
            values, asked, words = measure_frozen(args, model, train, val, probe.reading(model, feed, note), seed)
            log.scalars(0, values)
            probe.write_result({**result, **asked, **values}, args.save_dir, f"{measure}.json")
            log.line(words)
            return 0

        if args.lr_find:
            found = lr_find.sweep(heads[0], feed.of(model, train, note, training=True), args.lr_find_steps)
            lr_find.write(found, {**result, "suggestion": found.suggestion()}, args.save_dir)
            log.line(found.words())
            return 0

        # loop
        epochs, details = range(0 if args.evaluate else args.epochs)[start:], bool(args.per_class or args.confusion)
        held_out = feed.of(model, val, note)
        training = feed.of(model, train, note, training=True) if epochs else held_out
        rates = partial(probe.set_rates, epochs=args.epochs, milestones=args.schedule, **options.schedule_shape(args))
        if not epochs:
            probe.validate(heads, held_out, details)
        for epoch in epochs:
            probe.train_epoch(heads, training, epoch, log, args.print_freq, rates)
            probe.validate(heads, held_out, details and epoch == epochs[-1])
            model.check_frozen(frozen, origin)

            # save
            best = probe.note_best(heads)
            probe_file.save(
                model, heads, args.save_dir, epoch + 1, arch=args.arch, seed=seed, new_best=best,
                keep_every=args.save_ckpt_freq,
            )  # fmt: skip
            text = None if epoch == epochs[-1] else probe_report.words(heads)  # the last line comes after the result
            log.scalars((epoch + 1) * steps, probe_report.values(heads), epoch=epoch, text=text)
        result.update(features=args.features, epochs=epochs[-1] + 1 if epochs else start, **probe_report.result(heads))
        probe.write_result(result, args.save_dir, "result.json")
        probe_report.write_details(heads, train.classes or [], args.per_class, args.confusion and args.save_dir, log)
        log.line(probe_report.last_words(heads))
    return 0


def choose_images(args: Namespace, sources: data.Sources) -> tuple[data.Source, data.Source]:
    """Images to learn from and held-out ones; one source twice where the measure needs no more."""
    if args.few_shot:
        images = fewshot.pool(sources, args.few_shot_classes)
        return images, images
    return knn.labelled_sets(sources) if args.knn else probe.labelled_pair(sources, args.val_share)


def measure_frozen(
    args: Namespace, model: probe.Probe, train: data.Source, val: data.Source, how: knn.Reading, seed: int
) -> tuple[dict[str, float], dict[str, Any], str]:
    """k-NN or few-shot accuracy: numbers, settings and words."""
    if args.knn:
        return knn.measure(model.encoder, train, val, how, args.knn_k, args.knn_t)
    setting = fewshot.Setting(
        args.few_shot_way, tuple(args.few_shot_shots), args.few_shot_queries, args.few_shot_episodes, seed
    )
    return fewshot.measure(model.encoder, train, how, setting)


if __name__ == "__main__":
    sys.exit(distributed.launch(worker, options.parse_lincls()))
