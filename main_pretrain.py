"""Pretrain an image encoder by contrast: MoCo, MoCHi, SynCo, SupCon with a queue; SimCLR, SupCon, HCL, DCL without.

    python main_pretrain.py [flags] [DIR]        --help lists the flags; without DIR: the built-in demo

Reads in the order of a run: data, model, optimizer, resume, train, save. Exit codes: 0 done; 2 input that cannot
be used; 3 training went wrong; 75 (--stop-code) stopped by --max-minutes or SIGUSR1, 129 SIGHUP, 130 Ctrl-C, 143
SIGTERM, with a checkpoint.
"""

import sys
from argparse import Namespace
from functools import partial

if __name__ == "__main__":  # a wrong flag is answered before torch is imported; spawned children are not __main__
    from moco import signals

    signals.begin()
    from moco.cli import parse_pretrain

    ARGS = parse_pretrain()

from moco import data, distributed, seeding
from moco.cli.common import image_options
from moco.cli.flag_classes import PRETRAIN, pretraining
from moco.cli.pretrain import pretrain_config, what_next
from moco.eval import between_epochs
from moco.methods.registry import METHODS
from moco.report import write_page
from moco.train.checkpoint import reserve_run_folder, unpack
from moco.train.online_probe import begin_probe
from moco.train.outage import Patience
from moco.train.plan import Progress, batch_shape
from moco.train.pretraining import Trainer
from moco.train.resume import about_run, begin_run, changes, loss_choice_of
from moco.train.runlog import RunLog
from moco.train.saving import Saver
from moco.train.setup import (
    build_model,
    first_lines,
    open_batches,
    open_images,
    prepare_training,
    setting_of,
    with_statistics,
)


def worker(args: Namespace) -> int:
    """One process of a run; returns its exit code."""
    path, state, seed = begin_run(args.resume, args.save_dir, args.seed)
    seeding.begin(seed, asked=args.seed is not None)

    # data
    args, sources = open_images(args, path, state, image_options)
    images = sources.pretrain
    config = with_statistics(pretrain_config(args), args, images, state)
    labels = data.class_labels(images, args.method) if METHODS[args.method].supervised else None
    data.check_classes(images, args.num_classes)
    between_epochs.check(sources, config.validation)
    given = open_batches(sources, config.views, seed, args.batch_size, args.workers, args.drop_last)
    view, sampler, sizes = given.view, given.sampler, (len(images), given.sampler.batch // given.sampler.world)

    # model, optimizer and plan
    model, summary = build_model(config, view, seed, *sizes, labels, loss_choice_of(state))
    optimizer, scaler, plan, evaluated = prepare_training(model, config, view, sampler)

    # resume
    about = about_run(pretraining(args, model.encoder_q.built, view, sampler.batch, plan.amp), images, model.head)
    notes = [*args.notes, *changes(state, path, about, PRETRAIN, args.seed)]
    entries = unpack(state, path, model, optimizer, scaler, args.arch) if path else {"epoch": args.start_epoch}
    probe, said = begin_probe(model.encoder_q, images, args.online_probe, state, path)
    progress = Progress.resumed(entries, seed, batch_shape(sampler, args.accum), plan)
    reserve_run_folder(args.save_dir, path, args.overwrite)

    # train, save
    with RunLog(args.save_dir, vars(args), path, progress.where, finished=progress.epoch, wandb=args.wandb) as log:
        log.at_end(write_page, args.save_dir, args.report, then=what_next(args, sources.train))
        lines = first_lines(config, given, model, plan, progress, path, summary, [*notes, *said])
        log.line("the demo, as no DIR is given: " * args.demo + lines)
        patience = Patience.of(args.data_patience, args.max_minutes, log.line)
        trainer = Trainer(
            model, optimizer, scaler, plan, progress, log, patience.stop, args.save_dir, sampler,
            images, args.max_bad_images, about, args.arch, args.keep, setting_of(args, given, model, plan), probe,
            saver=log.enter(Saver(args.save_dir, log.line, args.save_minutes, args.save_steps, patience=patience)),
        )  # fmt: skip
        extractor = between_epochs.open_extractor(trainer, view, given.workers)
        measure = partial(between_epochs.report, trainer, evaluated, sources, extractor, seed, config.validation)
        between_epochs.catch_up(measure, trainer, path)
        while trainer.exit_code is None and not trainer.finished():
            trainer.run_epoch(given.batches, args.save_every)
            measure()
    return trainer.exit_code or 0


if __name__ == "__main__":
    sys.exit(distributed.launch(worker, ARGS))
