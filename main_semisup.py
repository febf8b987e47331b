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

if __name__ == "__main__":  # a wrong flag is answered before torch is imported; spawned children are not __main__
    from moco.cli import parse_semisup

    ARGS = parse_semisup()

import torch

from moco import cli, data, distributed, seeding
from moco.cli.common import few_shot_config
from moco.cli.flag_classes import SEMISUP, tuning
from moco.cli.objective import objective_config
from moco.cli.semisup import semisup_optimizer, semisup_schedule
from moco.data.sources import subset
from moco.eval import fewshot, finetune, linear
from moco.eval.features import EvalData, FeatureExtractor, bad_image_notes
from moco.eval.finetune_loss import Objective
from moco.models.ema import moving_average
from moco.models.encoder import build_encoder, strided_point
from moco.train import pretraining
from moco.train.optimizers import build_optimizer, no_decay_for_bias_and_norm
from moco.train.plan import Progress, count_epochs
from moco.train.resume import about_run, begin_run, changes, describe_resume
from moco.train.runlog import RunLog
from moco.train.stop import StopRequest
from moco.weights.read import PUBLISHED, fill_backbone, read_backbone, settle_from_file


def worker(args: Namespace) -> int:
    """One process of a run, from data to the result; returns its exit code."""
    path, state, seed = begin_run(args.resume, args.save_dir, args.seed, finetune.CHECKPOINT)
    seeding.begin(seed, asked=args.seed is not None)

    # data
    settled = settle_from_file(args, path or args.pretrained)
    settings = {"download": args.download, "val_path": args.val_data, "channels": args.channels, "cache": args.cache}
    sources = data.open_on_nodes(args.dataset, args.data, **settings)
    whole, test = finetune.labelled_images(sources, test=not args.val_only)
    numbered = data.number_as_in(state, str(path), not args.evaluate, whole, test)
    choosing = partial(
        subset.choose_subset, whole, args.train_percent, args.train_files, args.val_share, args.subset_seed,
        cache=os.path.join(torch.hub.get_dir(), "imagenet_subsets"),
    )  # fmt: skip
    train, val, origin = distributed.first_on_node(choosing, wait=True)  # it may fetch a list
    epochs = args.epochs or finetune.epochs_for(args.train_percent or 100.0 * len(train) / len(whole))
    novel = finetune.novel_images(sources, args.few_shot_data, args.few_shot_classes) if args.few_shot else None

    # model
    (size, mean, std), classes = settled.of(whole), len(whole.classes or ())
    shape = {"stem": args.stem, "size": size, "in_chans": whole.channels, "drop_path": args.drop_path}
    encoder = build_encoder(args.arch, classes, **shape)
    summary = "" if path else f"no --pretrained: random initialisation by seed {seed}, a baseline"
    if args.pretrained:
        reading = partial(read_backbone, encoder, args.pretrained, args.arch)
        weights, summary = distributed.first_on_node(reading, wait=args.pretrained.startswith(PUBLISHED))
        fill_backbone(encoder, weights)
    on_cpu = distributed.device().type == "cpu"
    broken = strided_point(encoder, whole.channels, size) if on_cpu and args.weights == "finetune" else ""
    amp = pretraining.pick_amp(args.amp, distributed.device(), broken)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = finetune.Classifier(encoder, mean, std, seed, args.weights == "freeze", amp, args.sync_bn)
    model.to(distributed.device()).to(memory_format=layout)

    # optimizer
    groups = model.groups(args.lr_classifier, args.lr_backbone, args.weight_decay, args.layer_decay)
    own = semisup_optimizer(args)
    optimizer = build_optimizer(own, no_decay_for_bias_and_norm(groups, own.exclude_bias_norm))
    lrs = [group["lr"] for group in optimizer.param_groups]
    objective = Objective(objective_config(args), classes)
    scaler = torch.amp.GradScaler(distributed.device().type, enabled=amp is torch.float16)
    batch = args.batch_size * distributed.nodes()
    about = about_run(tuning(args, encoder.built, mean, std, epochs, batch, amp, train, val), whole)
    notes = [] if args.evaluate else changes(state, path, about, SEMISUP, args.seed)
    progress, steps = Progress(seed, args.start_epoch), -(-len(train) // batch)
    plan = count_epochs(steps, semisup_schedule(args, epochs))
    ema = moving_average(model, own.ema, own.ema_epoch, plan.steps_per_epoch)
    frozen = model.backbone()
    if path:
        finetune.load(state, path, args.arch, model, ema, None if args.evaluate else optimizer, scaler)
        progress = finetune.progress_of(state, seed)
        frozen = frozen if args.pretrained else model.backbone()
        summary = "; ".join(filter(None, [summary, describe_resume(path, progress.epoch, progress.batch), numbered]))
    mode, val, score = ("evaluate", None, None) if args.evaluate else ("semisup", val, None)
    if not args.evaluate:
        distributed.first_on_node(partial(finetune.reserve_run_folder, args.save_dir, path, args.overwrite), wait=True)
    resume_step = progress.batches(steps) if path else None
    with RunLog(args.save_dir, config=vars(args), resume_step=resume_step, name=mode) as log:
        summary = "; ".join([summary, *args.notes]) + settled.summary
        log.line(f"{args.arch} at {size} px, --weights {args.weights}: {summary}")
        log.line(finetune.describe_images(args.evaluate, train, whole, origin, val, test))
        summary = f"{epochs} epochs of {steps} steps, " * (not args.evaluate) + distributed.processes()
        log.line("\n".join([f"{summary}, batch {batch}, amp {amp or 'off'}, seed {seed}", *notes]))
        workers, flip = distributed.share_of_cores(args.workers), data.dataset_of(args.dataset).mirrored
        note, preset = bad_image_notes(log.line), data.get_preset(args.aug) if args.aug else None
        images = EvalData(size, batch, seed, workers, flip, note, preset, args.aa, objective.views)
        training, selecting = images.of(train, training=True), images.of(val or test or train)
        finetune.check_batch(model, training.sampler)
        wrapped, stop = distributed.wrap(model), StopRequest(args.max_minutes)
        tuner = finetune.Tuner(
            model, wrapped, optimizer, scaler, plan, progress, log, stop, about, objective, lrs, ema, whole.classes
        )
        # loop
        if not val and not args.evaluate:
            log.line(finetune.CHOSEN_ON_TEST)
        while not (tuner.finished() or args.evaluate or tuner.exit_code is not None):
            score = tuner.run_epoch(training, selecting, frozen)
            tuner.save(args.save_dir, args.arch)
            tuner.report_epoch(score, "val" if val else "test")
        if tuner.exit_code is not None:
            return tuner.exit_code
        score = score or finetune.evaluate(tuner.evaluated, selecting)
        final = score if not val else finetune.evaluate(tuner.evaluated, images.of(test)) if test else None
        result = {"mode": mode, "arch": args.arch, "pretrained": args.pretrained, "seed": seed, "origin": origin,
                  "train_images": len(train)}  # fmt: skip
        result |= tuner.result(score if val else None, final)
        if novel:
            setting = few_shot_config(args, seed)
            extractor = FeatureExtractor(images, distributed.device(), mean, std, amp)
            values, asked, summary = fewshot.measure_few_shot(tuner.evaluated.encoder, novel, extractor, setting)
            result |= values | {"few_shot": asked}
            log.line(summary)
        name = "evaluate.json" if args.evaluate else finetune.RESULT
        linear.write_result({**result, "settings": {**vars(args), "epochs": epochs}}, args.save_dir, name)
        log.line(finetune.last_line(score if val else None, final))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command moco-semisup; its exit code."""
    return distributed.launch(worker, cli.parse_semisup(argv))


if __name__ == "__main__":
    sys.exit(distributed.launch(worker, ARGS))
