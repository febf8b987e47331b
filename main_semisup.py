"""Fine-tune a pretrained encoder on a share of the labels (1 %, 10 %, any), by Barlow Twins' and SynCo's protocol.

    python main_semisup.py --pretrained CHECKPOINT --train-percent 1 [flags] DIR        --help lists the flags

Reads top to bottom: data, model, optimizer, loop, save. In --save-dir: checkpoint_semisup.pth.tar,
model_best_semisup.pth.tar, semisup.jsonl and result.json. Exit codes: 0 done, or stopped by --max-minutes or SIGUSR1
with a checkpoint; 2 input that cannot be used; 3 training went wrong; 143 SIGTERM, with a checkpoint.
"""

import sys
from argparse import Namespace

if __name__ == "__main__":  # a wrong flag is answered before torch is imported; spawned children are not __main__
    from moco.cli import parse_semisup

    ARGS = parse_semisup()

from moco import data, distributed, seeding
from moco.cli.common import few_shot_config
from moco.cli.flag_classes import SEMISUP, tuning
from moco.cli.objective import objective_config
from moco.cli.semisup import classifier_config, semisup_schedule, subset_config
from moco.cli.training import encoder_optimizer
from moco.eval import finetune
from moco.eval import finetune_setup as setup
from moco.eval.features import EvalData, bad_image_notes
from moco.eval.finetune_loss import Objective
from moco.train.plan import count_epochs
from moco.train.resume import about_run, begin_run, changes
from moco.train.runlog import RunLog
from moco.train.stop import StopRequest
from moco.weights.settings import settle_from_file


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
    images = setup.choose_labelled(whole, test, subset_config(args), args.evaluate)
    epochs = args.epochs or finetune.epochs_for(args.train_percent or images.percent)
    novel = finetune.novel_images(sources, args.few_shot_data, args.few_shot_classes) if args.few_shot else None

    # model
    (size, mean, std), batch = settled.of(whole), args.batch_size * distributed.nodes()
    model, read = setup.build_classifier(classifier_config(args), whole, size, mean, std, seed, bool(path))

    # optimizer
    optimizer, objective = encoder_optimizer(args, args.lr_classifier), Objective(objective_config(args), model.classes)
    plan = count_epochs(-(-len(images.train) // batch), semisup_schedule(args, epochs))
    parts = setup.build_parts(model, optimizer, args.lr_backbone, args.layer_decay, plan, seed, args.start_epoch)
    about = about_run(tuning(args, model, images, epochs, batch), whole)
    notes = [] if args.evaluate else changes(state, path, about, SEMISUP, args.seed)
    resumed = parts.resume(state, path, args.arch, args.evaluate, bool(args.pretrained)) if path else ""
    finetune.reserve_run_folder(args.save_dir, path, args.overwrite, args.evaluate)
    mode, score, step = "evaluate" if args.evaluate else "semisup", None, parts.position if path else None
    with RunLog(args.save_dir, config=vars(args), resume_step=step, name=mode) as log:
        summary = "; ".join(filter(None, [read, resumed, numbered, *args.notes])) + settled.summary
        log.line(f"{args.arch} at {size} px, --weights {args.weights}: {summary}\n{images.describe()}")
        log.line("\n".join([parts.describe(batch, args.evaluate), *notes]))
        workers, flip = distributed.share_of_cores(args.workers), data.dataset_of(args.dataset).mirrored
        note, preset = bad_image_notes(log.line), data.get_preset(args.aug) if args.aug else None
        views = EvalData(size, batch, seed, workers, flip, note, preset, args.aa, objective.views)
        training, selecting = setup.open_sets(images, views, model, log)
        tuner = parts.tuner(log, StopRequest(args.max_minutes), about, objective, whole.classes)
        # loop
        while not (tuner.finished() or args.evaluate or tuner.exit_code is not None):
            score = tuner.run_epoch(training, selecting, parts.frozen)
            tuner.save(args.save_dir, args.arch)
            tuner.report_epoch(score, "val" if images.val else "test")
        if tuner.exit_code is not None:
            return tuner.exit_code
        scores = setup.last_scores(tuner, score, selecting, images, views)
        result = {"mode": mode, "arch": args.arch, "pretrained": args.pretrained, "seed": seed, "origin": images.origin,
                  "train_images": len(images.train), **tuner.result(*scores)}  # fmt: skip
        result |= setup.measure_novel(tuner, novel, views, few_shot_config(args, seed)) if novel else {}
        setup.write_report(log, scores, {**result, "settings": {**vars(args), "epochs": epochs}}, args.save_dir)
    return 0


if __name__ == "__main__":
    sys.exit(distributed.launch(worker, ARGS))
