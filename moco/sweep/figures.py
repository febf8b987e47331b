"""What a sweep may select on and report: the names of the figures that each entry point writes, and of which images.

Its writers are pretraining.Trainer.report and between_epochs.report (log.jsonl of main_pretrain.py),
main_lincls.py with linear_report.result, main_semisup.py with finetune.Tuner.result (result.json).
tests/sweep/test_sweep.py runs every mode and compares the list with what is written. Of a
script that is not ours nothing is known.
"""

from __future__ import annotations

from argparse import Namespace

from moco.methods.registry import FAMILIES, METHODS

TRAINING, PART, NOTHING = "the training images", "the held-out part of the training images", ""
Figures = dict[str, str]  # name -> images, NOTHING where none were measured


def of(main: str, args: Namespace, row: bool = False) -> Figures:
    """Of a run of one of our mains with these flags; empty where it writes no file that a sweep reads.

    row: of one value in a run of many, see spec.Trial.row.
    """
    return {"pretrain": _pretrain, "lincls": _lincls_row if row else _lincls, "semisup": _semisup}[main](args)


def _all(names: str, images: str) -> Figures:
    return dict.fromkeys(names.split(), images)


def _held_out(args: Namespace) -> str:
    return f"the held-out images of {args.val_data or args.data or args.dataset}"


def _pretrain(args: Namespace) -> Figures:
    found = _all("step epoch time lr images_per_second wait_share eta_seconds", NOTHING)
    found |= _all("loss top1 top5 hardest grad_norm loss_ratio alignment uniformity feature_std", TRAINING)
    found |= _all(FAMILIES[args.family].figure, TRAINING)
    if args.family == "queue" and not METHODS[args.method].supervised:
        found |= _all("false_negatives", TRAINING)  # where they have labels
    names = ["knn", *(f"knn_{k}" for k in args.knn_k if len(args.knn_k) > 1)] if args.knn_every else []
    if args.retrieval_every:
        from moco.eval.retrieval import MEASURES  # with torch, which a wrong flag does not wait for

        names += [f"{where}/{name}" for where in ("features", "head") for name in MEASURES]
    if args.online_probe is not False:  # where the images have labels
        found["online_acc1"] = TRAINING
        names += ["online_val_acc1"] if names else []
    ranked = args.knn_every if args.rankme_every is None else args.rankme_every
    found |= _all("rankme rankme_head", TRAINING) if ranked else {}
    return found | dict.fromkeys(names, _held_out(args)) | (_all("finished_epochs", NOTHING) if names or ranked else {})


def _lincls(args: Namespace) -> Figures:
    if args.knn or args.few_shot or args.lr_find:  # they have files of their own
        return {}
    found = _all("size seed classes train_images val_images unreadable train_unreadable epochs lr", NOTHING)
    return found | _all("acc1 acc5 best_acc1", PART if args.val_share else _held_out(args))


def _lincls_row(args: Namespace) -> Figures:
    """A row of per_lr."""
    measured = _all("acc1 acc5 best_acc1 val_loss", PART if args.val_share else _held_out(args))
    return _lincls(args) and _all("lr", NOTHING) | measured


def _semisup(args: Namespace) -> Figures:
    if args.evaluate:  # evaluate.json
        return {}
    found = _all("seed train_images val_images test_images unreadable train_unreadable epochs best_epoch", NOTHING)
    if args.val_share:
        found |= _all("val_acc1 val_acc5 val_loss best_val_acc1", PART)
    else:
        found |= _all("best_acc1", _held_out(args))
    if not args.val_only:
        found |= _all("acc1 acc5 loss", _held_out(args))
    shots = args.few_shot_shots if args.few_shot else []
    novel = f"the images of {args.few_shot_data}" if args.few_shot_data else _held_out(args)
    return found | {f"{name}_{n}shot": novel for n in shots for name in ("acc", "ci95")}
