"""Fine-tune a pretrained encoder on a share of the labels (1 %, 10 %, any), by Barlow Twins' and SynCo's protocol.

    python main_semisup.py --pretrained CHECKPOINT --train-percent 1 [flags] DIR        --help lists the flags

Reads top to bottom: data, model, optimizer, loop, save. In --save-dir: checkpoint_semisup.pth.tar,
model_best_semisup.pth.tar, semisup.jsonl and result.json. Exit codes: 0 done; 2 input that cannot be used;
3 training went wrong; 75 (--stop-code) stopped by --max-minutes or SIGUSR1, 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM, with a
checkpoint.
"""

import sys
from argparse import Namespace
from functools import partial

if __name__ == "__main__":  # a wrong flag is answered before torch is imported; spawned children are not __main__
    from moco import signals

    signals.begin()
    from moco.cli import parse_semisup

    ARGS = parse_semisup()

from moco import data, distributed, seeding
from moco.cli.common import few_shot_config, image_options
from moco.cli.flag_classes import SEMISUP, tuning
from moco.cli.semisup import classifier_config, objective_config, semisup_schedule, subset_config
from moco.cli.training import encoder_optimizer
from moco.data import Source
from moco.doors import beside
from moco.eval import finetune
from moco.eval import finetune_setup as setup
from moco.eval.classifier import backbone_of, begin_at, build_classifier
from moco.eval.details import Details
from moco.eval.features import EvalData, bad_image_notes
from moco.eval.finetune_loss import Objective
from moco.report import write_page
from moco.train.checkpoint import reserve_run_folder
from moco.train.outage import Patience
from moco.train.plan import count_epochs
from moco.train.resume import about_run, begin_run, changes
from moco.train.runlog import RunLog
from moco.train.saving import Saver
from moco.weights.settings import Settled, settle_from_file


def worker(args: Namespace) -> int:
    """One process of a run, from data to the result; returns its exit code."""
    kind = "evaluate" if args.evaluate else "result"  # of a probe too
    path, state, seed = begin_run(args.resume, args.save_dir, args.seed, finetune.CHECKPOINT, kind)
    seeding.begin(seed, asked=args.seed is not None)

    # data
    images, novel, settled, numbered = open_images(args, path, state)
    whole, epochs = images.whole, args.epochs or setup.epochs_for(args.train_percent or images.percent)

    # model
    (size, mean, std), batch = settled.of(whole), args.batch_size * distributed.nodes()
    model, weights, read = build_classifier(classifier_config(args), whole, size, mean, std, seed, bool(path))

    # optimizer
    config, objective = encoder_optimizer(args, args.lr_classifier), Objective(objective_config(args), model.classes)
    plan = count_epochs(-(-len(images.train) // batch), semisup_schedule(args, epochs))
    optimizer, lrs, scaler, ema = setup.prepare_tuning(model, config, args.lr_backbone, args.layer_decay, plan)

    # resume
    about = {**about_run(tuning(args, model, images, epochs, batch), whole), "classes": whole.classes}
    notes = [] if args.evaluate else changes(state, path, about, SEMISUP, args.seed)
    if path:
        finetune.load(state, path, args.arch, model, ema, None if args.evaluate else optimizer, scaler)
    at, resumed = begin_at(state, path, seed, args.start_epoch)
    if not args.evaluate:
        reserve_run_folder(args.save_dir, path, args.overwrite, *finetune.TUNING_FILES)
    mode, then = ("evaluate", None) if args.evaluate else ("semisup", beside("report", [args.save_dir]))
    with RunLog(args.save_dir, vars(args), path, partial(at.where, plan.batches), finished=at.epoch, name=mode) as log:
        log.at_end(write_page, args.save_dir, args.report, then=then)
        summary = "; ".join(filter(None, [read, resumed, numbered, *args.notes])) + settled.summary
        log.line(f"{args.arch} at {size} px, --weights {args.weights}: {summary}")
        log.line("\n".join([setup.describe_tuning(images, model, plan, batch, seed), *notes]))
        views, details = how_to_view(args, size, batch, seed, objective.views, log), Details.of(args, whole, log.line)
        training, selecting = setup.open_sets(images, views, model, log)
        tuner = finetune.Tuner(
            model, optimizer, scaler, plan, at, log, views.patience.stop, about, objective, lrs, ema,
            weights or backbone_of(model.encoder), args.arch, details=bool(details),
            saver=log.enter(Saver(args.save_dir, log.line, args.save_minutes, args.save_steps, None, views.patience)),
        )  # fmt: skip
        while not (tuner.finished() or args.evaluate or tuner.exit_code is not None):  # the loop
            tuner.run_epoch(training, selecting)
            tuner.end_epoch("val" if images.val else "test")
        if tuner.exit_code is not None:
            return tuner.exit_code
        result = {"mode": mode, "arch": args.arch, "pretrained": args.pretrained, "seed": seed, "origin": images.origin,
                  "train_images": len(images.train), "settings": {**vars(args), "epochs": epochs}}  # fmt: skip
        result |= setup.measure_novel(tuner, novel, views, few_shot_config(args, seed)) if novel else {}
        setup.write_report(tuner, selecting, images, views, result, args.save_dir, details)
    return 0


def open_images(args: Namespace, path: str | None, state: dict) -> tuple[setup.Images, Source | None, Settled, str]:
    """The images of a run and of few-shot episodes, how they are seen, and what the log must say of their classes'
    numbers."""
    settled = settle_from_file(args, path or args.pretrained)
    sources = data.open_on_nodes(args.dataset, args.data, **image_options(args))
    whole, test = setup.labelled_images(sources, test=not args.val_only)
    numbered = data.number_as_in(state, str(path), not args.evaluate, whole, test)
    images = setup.choose_labelled(whole, test, subset_config(args), args.evaluate)
    novel = setup.novel_images(sources, args.few_shot_data, args.few_shot_classes) if args.few_shot else None
    return images, novel, settled, numbered


def how_to_view(args: Namespace, size: int, batch: int, seed: int, count: int, log: RunLog) -> EvalData:
    """How the images are read, with ``count`` training views of each, and the unreadable ones named in the log."""
    workers, flip = distributed.share_of_cores(args.workers), data.dataset_of(args.dataset).mirrored
    preset = data.get_preset(args.aug) if args.aug else None
    patience = Patience.of(args.data_patience, args.max_minutes, log.line, saves=not args.evaluate)
    told = bad_image_notes(log.line)
    return EvalData(size, batch, seed, workers, flip, told, preset, args.aa, count, patience, args.max_bad_images)


if __name__ == "__main__":
    sys.exit(distributed.launch(worker, ARGS))
