"""Train a linear classifier on frozen features (MoCo's protocol), or ask the features' nearest neighbours.

    python main_lincls.py --pretrained CHECKPOINT [flags] DIR        --help lists the flags

Reads top to bottom: data, model, optimizer, resume, then measure, find a rate, or train and report. In --save-dir:
checkpoint.pth.tar, model_best.pth.tar, lincls.jsonl and result.json (with --evaluate, --knn, --few-shot or --lr-find:
evaluate, knn, few_shot or lr_find, .jsonl and .json). Exit codes: 0 done; 2 input that cannot be used; 3 the
loss was not finite or a frozen tensor changed; 75 (--stop-code) stopped by --max-minutes or SIGUSR1, 129 SIGHUP,
130 Ctrl-C, 143 SIGTERM, with a checkpoint.
"""

import sys
from argparse import Namespace
from functools import partial

if __name__ == "__main__":  # a wrong flag is answered before torch is imported; spawned children are not __main__
    from moco import signals

    signals.begin()
    from moco.cli import parse_lincls

    ARGS = parse_lincls()

from moco import data, distributed, seeding
from moco.cli.common import few_shot_config, image_options
from moco.cli.flag_classes import LINCLS, probing
from moco.cli.training import optimizer_config, schedule_config
from moco.config import ClassifierConfig
from moco.data import Source
from moco.doors import beside
from moco.errors import UserError
from moco.eval import fewshot, knn, linear, linear_checkpoint, linear_report, lr_find
from moco.eval.classifier import Classifier, backbone_of, begin_at, build_classifier, check_frozen
from moco.eval.details import Details
from moco.eval.features import EvalData, bad_image_notes
from moco.eval.linear_fit import ProbeFeatures, ProbeRun
from moco.report import write_page
from moco.train.checkpoint import reserve_run_folder
from moco.train.outage import Patience
from moco.train.plan import count_epochs
from moco.train.resume import DONE, about_run, begin_run, changes
from moco.train.runlog import RunLog
from moco.train.saving import Saver
from moco.weights.settings import Settled, settle_from_file

MEASURES = ("knn", "few_shot")  # what needs no training
MODES = (*MEASURES, "lr_find", "evaluate")  # else a classifier is trained


def worker(args: Namespace) -> int:
    """One process of a probe, from data to the result; returns the exit code."""
    mode = next((mode for mode in MODES if getattr(args, mode)), "lincls")
    trained, kind = mode == "lincls", {"lincls": "result"}.get(mode, mode)  # a fine-tuning writes result.json too
    path, state, seed = begin_run(args.resume, args.save_dir, args.seed, linear_checkpoint.CHECKPOINT, kind)

    # data
    train, val, settled, numbered = open_images(args, mode, path, state)
    (size, mean, std), batch = settled.of(train), args.batch_size * distributed.nodes()

    # model
    seeding.begin(seed)
    frozen = {"freeze": True, "channels_last": False}
    config = ClassifierConfig(args.arch, args.stem, pretrained=args.pretrained, amp=args.amp, **frozen)
    model, weights, read = build_classifier(config, train, size, mean, std, seed, bool(path))

    # optimizer
    lrs = linear_checkpoint.rates(state, args.lrs, args.epochs, training=trained)
    heads = linear.make_classifiers(model, lrs, optimizer_config(args, args.lr), args.label_smoothing)
    plan = count_epochs(-(-len(train) // batch), schedule_config(args, args.epochs))

    # resume
    about = about_run(probing(args, model.encoder.built, mean, std, batch), train)
    notes = changes(state, path, about, LINCLS, args.seed) if trained else []
    notes = [DONE] if trained and state.get("epoch", 0) >= args.epochs else notes
    run = {"seed": seed, "classes": train.classes, "batches": {"images": len(train), "images a batch": batch}, **about}
    if path:
        linear_checkpoint.load_probe(model, heads, state, path, args.arch, weights, run if trained else None)
    at, resumed = begin_at(state, path, seed, args.start_epoch)
    if trained:
        reserve_run_folder(args.save_dir, path, args.overwrite, *linear_checkpoint.PROBE_FILES)
    where, then = partial(at.where, plan.steps_per_epoch), beside("report", [args.save_dir]) if trained else None
    with RunLog(args.save_dir, vars(args), path, where, finished=at.epoch, name=mode) as log:
        log.at_end(write_page, args.save_dir, args.report, then=then)
        workers, flip = distributed.share_of_cores(args.workers), data.dataset_of(args.dataset).mirrored
        patience, most = Patience.of(args.data_patience, args.max_minutes, log.line, saves=trained), args.max_bad_images
        images = EvalData(size, batch, seed, workers, flip, bad_image_notes(log.line), patience=patience, most_bad=most)
        told = linear_report.describe_run(mode, train, val, images, args.features == "cached")
        summary = "; ".join(filter(None, [read, resumed, numbered])) + settled.summary
        log.line("\n".join([f"{args.arch} at {size} px: {summary}", *notes, told]))
        result = linear_report.begin_result(mode, args.arch, args.pretrained, train, val, images)
        features = partial(linear.probe_data, model, images, cached=args.features == "cached")
        if mode in MEASURES:
            measure(args, model, train, val, images, result, log)
        elif mode == "lr_find":
            lr_find.find_rate(heads[0], features(train, training=True), args.lr_find_steps, result, args.save_dir, log)
        else:
            saver = log.enter(Saver(args.save_dir, log.line, args.save_minutes, args.save_steps, patience=patience))
            save = partial(linear_checkpoint.save_probe, model, heads, saver, at, args.arch, run, args.save_ckpt_freq)
            origin, encoder = args.pretrained or path or "the random initialisation", model.encoder
            check = partial(check_frozen, encoder, weights or backbone_of(encoder), "must stay frozen", origin)
            return fit(args, ProbeRun(heads, plan, at, log, saver, save, check), features, train, val, result)
    return 0


def open_images(args: Namespace, mode: str, path: str | None, state: dict) -> tuple[Source, Source, Settled, str]:
    """Images to learn from, held-out ones, how they are seen, and what the log must say of their classes' numbers."""
    if mode == "evaluate" and not path:  # a classifier that nobody trained must not be evaluated by mistake
        raise UserError("--evaluate needs --resume with a classifier's checkpoint (--knn needs no classifier).")
    settled = settle_from_file(args, path or args.pretrained)
    sources = data.open_on_nodes(args.dataset, args.data, **image_options(args))
    pair = sources.train, sources.val
    numbered = data.number_as_in({} if mode in MEASURES else state, str(path), mode == "lincls", *pair)
    if mode == "few_shot":
        train = val = fewshot.pool(sources, args.few_shot_classes)
    else:
        train, val = knn.labelled_sets(sources) if mode == "knn" else linear.labelled_pair(sources, args.val_share)
    linear.check_sets(train, val, args.num_classes, args.max_bad_images)
    return train, val, settled, numbered


def measure(
    args: Namespace, model: Classifier, train: Source, val: Source, images: EvalData, result: dict, log: RunLog
) -> None:
    """k-NN or few-shot accuracy: a record, a result file and the last line."""
    extractor, details = model.extractor(images), Details.of(args, train, log.line)
    if args.knn:
        values, asked, text = knn.measure_knn(model.encoder, train, val, extractor, args.knn_k, args.knn_t, details)
    else:
        config = few_shot_config(args, images.seed)
        values, asked, text = fewshot.measure_few_shot(model.encoder, train, extractor, config)
    log.scalars(0, values)
    linear.write_result({**result, **asked, **values}, args.save_dir, f"{result['mode']}.json")
    log.line(text)


def fit(args: Namespace, probe: ProbeRun, features: ProbeFeatures, train: Source, val: Source, result: dict) -> int:
    """Train what epochs are left, or with --evaluate none, and report; returns the exit code."""
    end, details = probe.at.epoch if args.evaluate else args.epochs, Details.of(args, train, probe.log.line)
    if (code := probe.fit(features, train, val, end, bool(details))) is not None:
        return code
    result |= {"features": args.features, "epochs": probe.at.epoch, **linear_report.result(probe.heads), **probe.left}
    linear.write_result(result, args.save_dir, "evaluate.json" if args.evaluate else linear_checkpoint.RESULT)
    linear_report.write_details(probe.heads, details)
    probe.log.line(linear_report.describe_last(probe.heads))
    return 0


if __name__ == "__main__":
    sys.exit(distributed.launch(worker, ARGS))
