"""Fine-tune a pretrained encoder on a share of the labels (1 %, 10 %, any), by Barlow Twins' and SynCo's protocol.

    python main_semisup.py --pretrained CHECKPOINT --train-percent 1 [flags] DIR        --help lists the flags

Reads top to bottom: data, model, optimizer, loop, save. In --save-dir: checkpoint_semisup.pth.tar,
model_best_semisup.pth.tar, semisup.jsonl and result.json. Exit codes: 0 done, or stopped by --max-minutes or SIGUSR1
with a checkpoint; 2 input that cannot be used; 3 training went wrong; 143 SIGTERM, with a checkpoint.
"""

import os
import sys
from argparse import Namespace
from functools import partial

import torch

from moco import checkpoint, data, distributed, engine, finetune, options, probe, seeding
from moco.data import subset
from moco.encoder import build_encoder, strided_point
from moco.meters import RunLog
from moco.pretrained import PUBLISHED, fill_backbone, read_backbone

UPRIGHT = ("mnist5k",)  # a mirrored digit is another symbol


def worker(args: Namespace) -> int:
    """One process of a run, from data to the result; returns its exit code."""
    path = distributed.from_main(finetune.resume_path(args.resume, args.save_dir))
    state = checkpoint.read(path) if path else None
    seed = distributed.from_main(seeding.choose_seed(args.seed, state))
    torch.manual_seed(seeding.key("init", seed) >> 1)
    torch.backends.cudnn.deterministic = args.seed is not None
    torch.backends.cudnn.benchmark = args.seed is None

    # data
    opening = partial(
        data.open_sources, args.dataset, args.data,
        download=args.download, val_path=args.val_data, channels=args.channels,
    )  # fmt: skip
    sources = distributed.first_on_node(opening, wait=args.download)
    whole, test = finetune.labelled_images(sources, test=not args.val_only)
    choosing = partial(
        subset.choose, whole, args.train_percent, args.train_files, args.val_share, args.subset_seed,
        cache=os.path.join(torch.hub.get_dir(), "imagenet_subsets"),
    )  # fmt: skip
    train, val, origin = distributed.first_on_node(choosing, wait=True)  # it may fetch a list
    share = 100.0 * len(train) / len(whole)
    epochs = args.epochs or finetune.epochs_for(args.train_percent or share)

    # model
    size = args.size or whole.native_size or 224
    mean, std = data.channel_statistics(args.dataset, whole.channels, args.mean, args.std)
    encoder = build_encoder(args.arch, len(whole.classes or ()), stem=args.stem, size=size, in_chans=whole.channels)
    words = f"no --pretrained: random initialisation by seed {seed}, a baseline"
    if args.pretrained:
        reading = partial(read_backbone, encoder, args.pretrained, args.arch)
        weights, words = distributed.first_on_node(reading, wait=args.pretrained.startswith(PUBLISHED))
        fill_backbone(encoder, weights)
    on_cpu = distributed.device().type == "cpu"
    broken = strided_point(encoder, whole.channels, size) if on_cpu and args.weights == "finetune" else ""
    amp = engine.pick_amp(args.amp, distributed.device(), broken)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = finetune.Classifier(encoder, mean, std, seed, args.weights == "freeze", amp)
    model.to(distributed.device()).to(memory_format=layout)

    # optimizer
    groups = model.groups(args.lr_classifier, args.lr_backbone)
    optimizer = torch.optim.SGD(groups, momentum=args.momentum, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(distributed.device().type, enabled=amp is torch.float16)
    batch = args.batch_size * distributed.nodes()
    settings = {
        "--weights": args.weights, "--lr-backbone": args.lr_backbone, "--lr-classifier": args.lr_classifier,
        "--wd": args.weight_decay, "--momentum": args.momentum, "--epochs": epochs, "--batch-size": batch,
        "--size": size, "training images": train.fingerprint(), "validation images": val.fingerprint() if val else "",
    }  # fmt: skip
    progress = finetune.Progress(seed, args.start_epoch)
    tuner = finetune.Tuner(
        model, distributed.wrap(model), optimizer, scaler, epochs, progress, settings, args.print_freq
    )
    frozen = model.backbone()
    if state and path:
        tuner.load(state, path, args.arch, weights_only=args.evaluate)
        frozen = frozen if args.pretrained else model.backbone()
        words += f"; resumed {path} after epoch {progress.epoch} and {progress.batch} steps"
    mode, val = ("evaluate", None) if args.evaluate else ("semisup", val)
    if not args.evaluate:
        distributed.first_on_node(partial(finetune.claim, args.save_dir, path, args.overwrite), wait=True)

    steps = -(-len(train) // batch)
    resume_step = progress.epoch * steps + progress.batch if path else None
    with RunLog(args.save_dir, config=vars(args), resume_step=resume_step, name=mode) as log:
        log.line(f"{args.arch} at {size} px, --weights {args.weights}: {words}")
        log.line(f"{len(train)} of {len(whole)} images ({share:.4g} %) to train on, {origin}; {len(val or ())} to "
                 f"validate on, {len(test or ())} to test on")  # fmt: skip
        log.line(f"{epochs} epochs of {steps} steps, {distributed.words()}, batch {batch}, amp {amp or 'off'}, "
                 f"seed {seed}")  # fmt: skip
        feed = finetune.Feed(
            size, batch, seed, distributed.share_of_cores(args.workers), args.dataset not in UPRIGHT,
            probe.bad_image_notes(log),
        )  # fmt: skip
        training, selecting = feed.of(train, training=True), feed.of(val or test or train)
        finetune.check_batch(model, training.sampler)
        stop = engine.StopRequest(args.max_minutes)

        # loop
        if not val and not args.evaluate:
            log.line("each epoch is evaluated on the test images: the best one is chosen on them, the last one is not "
                     "(--val-share holds training images out to choose on)")  # fmt: skip
        score = None
        while progress.epoch < epochs and not args.evaluate:
            code = tuner.train_epoch(training, log, stop)
            if code is not None:
                tuner.save(args.save_dir, args.arch)
                log.line(f"stopped after {progress.batch} of {steps} steps of epoch {progress.epoch}: --resume auto")
                return code
            score = finetune.evaluate(model, selecting)
            tuner.check_frozen(frozen)

            # save
            tuner.save(args.save_dir, args.arch, is_best=tuner.close_epoch(score))
            tuner.report_epoch(log, score, "val" if val else "test", steps)
        score = score or finetune.evaluate(model, selecting)
        final = score if not val else finetune.evaluate(model, feed.of(test)) if test else None
        result = {"mode": mode, "arch": args.arch, "pretrained": args.pretrained, "seed": seed, "origin": origin,
                  "train_images": len(train), "val_images": len(val or ()), "test_images": len(test or ())}  # fmt: skip
        result |= tuner.result(score if val else None, final)
        name = "evaluate.json" if args.evaluate else finetune.RESULT
        probe.write_result({**result, "settings": {**vars(args), "epochs": epochs}}, args.save_dir, name)
        log.line(finetune.last_line(score if val else None, final))
    return 0


if __name__ == "__main__":
    sys.exit(distributed.launch(worker, options.parse_semisup()))
