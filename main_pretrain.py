"""Pretrain an image encoder by contrast: MoCo, MoCHi, SynCo, SupCon with a queue; SimCLR, SupCon, HCL, DCL without.

    python main_pretrain.py [flags] [DIR]        --help lists the flags; without DIR: the built-in demo

Reads in the order of a run: data, model, optimizer, loop, save. Exit codes: 0 done, or stopped by --max-minutes or
SIGUSR1 with a checkpoint; 2 input that cannot be used; 3 training went wrong; 143 SIGTERM, with a checkpoint.
"""

import sys
from argparse import Namespace

if __name__ == "__main__":  # a wrong flag is answered before torch is imported; spawned children are not __main__
    from moco.cli import parse_pretrain

    ARGS = parse_pretrain()

import torch

from moco import cli, data, distributed, seeding
from moco.cli.flag_classes import PRETRAIN, pretraining
from moco.cli.pretrain import pretrain_config
from moco.eval import between_epochs
from moco.eval.features import EvalData, FeatureExtractor
from moco.methods import negatives
from moco.methods.registry import METHODS
from moco.models import ema
from moco.models.encoder import strided_point
from moco.train import checkpoint, optimizers
from moco.train import pretraining as engine
from moco.train.plan import Progress, batch_shape, make_plan
from moco.train.resume import DONE, about_run, begin_run, changes, loss_choice_of
from moco.train.runlog import RunLog
from moco.train.setup import build_model, view_settings
from moco.train.stop import StopRequest


def worker(args: Namespace) -> int:
    """One process of a run; returns its exit code."""
    path, state, seed = begin_run(args.resume, args.save_dir, args.seed)
    config = pretrain_config(args)
    seeding.begin(seed, asked=args.seed is not None)

    # data
    settings = {"download": args.download, "val_path": args.val_data, "channels": args.channels, "cache": args.cache}
    sources = data.open_on_nodes(args.dataset, args.data, **settings)
    images = sources.pretrain
    labels = data.class_labels(images, args.method) if METHODS[args.method].supervised else None
    data.check_classes(images, args.num_classes)
    between_epochs.check(sources, args.retrieval_every)
    view = view_settings(config.views, images)
    batch = args.batch_size * distributed.nodes()
    sampler = data.EpochSampler(
        len(images), batch, seed, distributed.world_size(), distributed.rank(), drop_last=args.drop_last
    )
    workers = distributed.share_of_cores(args.workers)
    batches = data.two_views(
        images, view.preset, view.size, seed, sampler, workers, args.aug_device, args.decode, distributed.device(),
        args.views,
    )  # fmt: skip

    # model
    each = batch // distributed.world_size()
    model, summary = build_model(config, view, seed, len(images), each, labels, loss_choice_of(state))

    # optimizer: over all parameters and in their order, as upstream's, so that its checkpoints resume here
    own = config.optimizer
    groups = optimizers.no_decay_for_bias_and_norm([{"params": list(model.parameters())}], own.exclude_bias_norm)
    optimizer = optimizers.build_optimizer(own, groups)
    on_cpu = distributed.device().type == "cpu"
    broken = strided_point(model.encoder_q, view.channels, view.size) if on_cpu else ""
    plan = make_plan(len(sampler), engine.pick_amp(args.amp, distributed.device(), broken), config.schedule)
    scaler = torch.amp.GradScaler(distributed.device().type, enabled=plan.amp is torch.float16)
    evaluated = ema.attach_ema(model, optimizer, own.ema, own.ema_epoch, plan.steps_per_epoch)
    done = args.start_epoch * plan.steps_per_epoch
    progress = Progress(seed, args.start_epoch, 0, done, done * args.accum)
    about = about_run(pretraining(args, model.encoder_q.built, view, batch, plan.amp), images, model.head)
    notes = changes(state, path, about, PRETRAIN, args.seed)
    if path:
        entries = checkpoint.unpack(state, path, model, optimizer, scaler, args.arch)
        progress = progress.resumed(entries, progress, batch_shape(sampler, args.accum), plan)
    checkpoint.reserve_run_folder(args.save_dir, path, args.overwrite)

    # loop
    resume_step = progress.step if path else None
    with RunLog(args.save_dir, wandb=args.wandb, config=vars(args), resume_step=resume_step) as log:
        what = "the demo, as no DIR is given: " * args.demo + f"{args.method}, {args.arch} at {view.size} px"
        log.line(f"{what}, {len(images)} images of {images.name}, seed {seed}")
        log.line(f"{distributed.processes()}, batch {batch}, {workers} loader workers each, amp {plan.amp or 'off'}")
        recipe = negatives.sentences(model.extra, plan.total_steps, plan.steps_per_epoch)
        for sentence in filter(None, (summary, *recipe, data.size_warning(images, view.size), *args.notes, *notes)):
            log.line(sentence)
        log.line(f"from epoch {progress.epoch}, step {progress.step} of {plan.total_steps}" + f" ({path})" * bool(path))
        stop = StopRequest(args.max_minutes)
        trainer = engine.Trainer(
            model, distributed.wrap(model), optimizer, scaler, plan, progress, log, stop, args.save_dir, sampler,
            images, args.max_bad_images, about,
        )  # fmt: skip
        if sources.val is None or not args.knn_every:
            log.line(f"no k-NN accuracy: {sources.no_pair or 'switched off by --knn-every 0'}")
        if trainer.finished():
            log.line(DONE)
        images_to_score = EvalData(view.size, batch, workers=workers)
        extractor = FeatureExtractor(images_to_score, trainer.device, view.mean, view.std, plan.amp)
        while trainer.exit_code is None and not trainer.finished():
            trainer.run_epoch(batches)

            # save
            if trainer.due(args.save_every):
                trainer.save(args.arch, args.keep)
            if trainer.exit_code is None:
                between_epochs.report(trainer, evaluated, sources, extractor, seed, config.validation)
    return trainer.exit_code or 0


def main(argv: list[str] | None = None) -> int:
    """The command moco-pretrain; its exit code."""
    return distributed.launch(worker, cli.parse_pretrain(argv))


if __name__ == "__main__":
    sys.exit(distributed.launch(worker, ARGS))
