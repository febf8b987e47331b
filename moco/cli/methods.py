"""What --method implies, the flags of the two families of models, and the models that they come to. No torch here."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from moco.cli.common import SWITCH, add_sync_bn
from moco.cli.parser import Parser, at_least, finite, positive, share
from moco.cli.training import check_warm
from moco.config import InBatchConfig, MoCHiConfig, MoCoConfig, MoCoV3Config, NegativesConfig, SynCoConfig
from moco.data.registry import dataset_of
from moco.errors import UserError
from moco.methods.registry import ALIASES, FAMILIES, METHODS

TYPES = ("mixup", "interpolation", "extrapolation", "noise", "perturbation", "adversarial")
SYNCO_KINDS = {
    "n1": "interpolation", "n2": "extrapolation", "n3": "mixup", "n4": "noise", "n5": "perturbation",
    "n6": "adversarial",
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------ flags


def add_moco(p: Parser) -> None:
    """The method, the queue and the key encoder."""
    add = p.group("method")
    add("--method", type=_method_name, choices=METHODS, help="default: moco, or what --n1..--n6 (synco) or --mochi "
        "imply; simclr, supcon, hcl, dcl: in-batch negatives; moco_v3: keys of the batch; supcon with --moco-k: a "
        "queue of keys and labels, with synthetic negatives if --mochi or --n1..--n6 ask for them")  # fmt: skip
    add("--moco-dim", default=128, type=at_least(1), help="feature dimension C (default: 128; moco_v3: 256)")
    add("--moco-mlp-dim", default=4096, type=at_least(1), help="moco_v3: hidden width of its MLP heads (default: 4096)")
    add("--moco-k", type=at_least(1), help="queue size K in keys (default: 65536; supcon: no queue)")
    add("--moco-m", default=0.999, type=share(ends="[]"), help="key encoder's momentum (default: 0.999; moco_v3: 0.99)")
    add("--moco-m-cos", action=SWITCH, default=True, help="moco_v3: raise the momentum to 1 over the run by half a "
        "cosine (default: on)")  # fmt: skip
    add("--moco-t", "--temp", default=0.07, type=positive, help="temperature T of the loss (default: 0.07; moco_v3: 1)")
    add("--mlp", action=SWITCH, help="use MoCo v2's MLP head (default: on for simclr, supcon, hcl, dcl)")
    add("--stop-grad-conv1", action=SWITCH, default=True, help="moco_v3: freeze a ViT's patch embedding at its random "
        "weights (default: on)")  # fmt: skip
    add("--symmetric", action=SWITCH, default=False, help="add the loss with the two views exchanged (default: off)")
    add("--bn-splits", type=at_least(1), metavar="S", help="number of parts of a process's batch that BatchNorm "
        "normalises separately (default: with one process 8, or what the batch allows; with several 1)")  # fmt: skip
    add("--shuffle-bn", action=SWITCH, default=True, help="MoCo's shuffled BatchNorm of the keys (default: on)")
    add("--mask-same-image", action=SWITCH, help="leave the queue's keys of the query's own image out of its negatives "
        "(default: on when the queue holds more than a tenth of the data set)")  # fmt: skip
    add("--head-impl", "--loss-impl", choices=("auto", "reference", "cpu", "triton"), default="auto",
        help="implementation of the loss; auto: triton (fused) on a GPU where it is right and not slower, else cpu "
        "(closed forms, for any device)")  # fmt: skip
    add("--head-precision", "--loss-precision", choices=("auto", "fp32", "tf32", "tf32x3", "bf16"), default="auto",
        help="precision of the loss's two matrix products with the queue, which are summed in fp32; auto: with triton "
        "tf32x3 (three products, as exact as fp32) or fp32, whichever is faster, bf16 on a CPU that is faster with it, "
        "else fp32")  # fmt: skip


def _method_name(text: str) -> str:
    return ALIASES.get(text.lower(), text.lower())


def add_batch(p: Parser) -> None:
    """The methods that compare the images of a batch."""
    add = p.group("method")
    add("--base-temperature", type=positive, metavar="T0", help="multiply the loss by T / T0 (default: T0 = 0.07, as "
        "in SupContrast, for simclr and supcon without a queue; supcon with a queue takes it)")  # fmt: skip
    add("--contrast-mode", choices=("all", "one"), default="all", help="anchors: all views, or the first of each image")
    add("--views", default=2, type=at_least(2), metavar="V", help="views per image, without a queue (default: 2)")
    add("--beta", default=1.0, type=at_least(0.0), metavar="B", help="hcl: weight of hardness, its beta (default: 1)")
    add("--tau-plus", default=0.1, type=share(), metavar="X", help="hcl: share of false negatives (default: 0.1)")
    add("--estimator", choices=("hard", "easy"), default="hard", help="hcl: easy weighs all negatives alike")
    add_sync_bn(p)


def add_negatives(p: Parser) -> None:
    """Synthetic negatives and their times."""
    add = p.group("negatives")
    add("--n-hard", default=1024, type=at_least(1), help="number of hardest negatives in the queue from which a "
        "query's synthetic ones are made (default: 1024)")  # fmt: skip
    for name, kind in SYNCO_KINDS.items():
        add(f"--{name}", type=at_least(0), help=f"SynCo: {kind} negatives per query (default: "
            f"{getattr(SynCoConfig, name)})")  # fmt: skip
    add("--sigma", default=0.01, type=at_least(0.0), help="SynCo: standard deviation of the noise (default: 0.01)")
    add("--delta", default=0.01, type=finite, help="SynCo: step size of the perturbation (default: 0.01)")
    add("--eta", default=0.01, type=finite, help="SynCo: step size of the adversarial negatives (default: 0.01)")
    add("--mochi", nargs=3, type=at_least(0), metavar=("N", "S", "S2"), help="MoCHi: for each query, mix the N hardest "
        "negatives into S of type 1 and S2 of type 2")  # fmt: skip
    add("--hard-start-epoch", "--warmup-epochs", default=10, type=at_least(0), metavar="E", help="first epoch, counted "
        "from 0, with synthetic negatives (default: 10)")  # fmt: skip
    add("--hard-stop-epoch", type=int, metavar="E", help="first epoch without them again (default: never)")
    add("--type-starts", default=[], nargs="*", metavar="KIND=E", help="a later first epoch for one kind, such as "
        "interpolation=20, or optimizer step, mixup=1000steps; kinds: " + " ".join(TYPES))  # fmt: skip
    add("--extrapolation", choices=("code", "paper"), default="code", help="extrapolate as SynCo's code or its paper "
        "does")  # fmt: skip


# ------------------------------------------------------------------------------------------------------ choices


def choose_method(args: argparse.Namespace, typed: dict[str, Any]) -> None:
    # A --method on the command line also overrides what a file's counts would imply.
    def asked(name: str) -> bool:
        return getattr(args, name) is not None and ("method" not in typed or name in typed)

    given = [name for name in SYNCO_KINDS if asked(name)]
    implied = "synco" if given else "mochi" if asked("mochi") else None
    if given and asked("mochi"):
        raise UserError("--mochi and SynCo's --n1..--n6 are two methods; give one of them.")
    if implied and args.method not in (None, "supcon", implied):
        raise UserError(f"--method {args.method} does not use --{[*given, 'mochi'][0]}; leave one of them out.")
    args.method = args.method or implied or "moco"
    method = METHODS[args.method]
    args.family = "queue" if asked("moco_k") and method.family == "batch" else method.family
    args.negatives = args.method if method.family == "queue" else implied or "moco"
    if args.negatives == "mochi":
        args.n_hard, args.s, args.s2 = args.mochi or (1024, 512, 256)
    for name in SYNCO_KINDS:
        if getattr(args, name) is None:
            setattr(args, name, getattr(SynCoConfig, name))


def choose_family(args: argparse.Namespace, typed: dict[str, Any], filed: frozenset[str]) -> None:
    """What follows from the method: whether there is a queue, and its defaults."""
    method, queue = METHODS[args.method], args.family == "queue"
    asked = set(typed) | (filed if "method" not in typed else frozenset[str]())
    if (queue and not (method.family == "queue" or method.queue)) or (not queue and "moco_k" in asked):
        raise UserError(f"--method {args.method} compares the images of a batch and has no queue; leave --moco-k out.")
    if args.negatives != "moco" and not queue:
        raise UserError("synthetic negatives are made from a queue; give --method supcon a --moco-k, such as 8192.")
    args.moco_k = args.moco_k if queue and args.moco_k is not None else 65536
    idle = {"aug"} if not dataset_of(args.dataset).mirrored or args.aug_plus else set[str]()
    idle |= {"base_temperature"} if queue else set[str]()
    for name in method.defaults.keys() - idle - typed.keys() - filed:
        setattr(args, name, method.defaults[name])
    args.mlp = bool(args.mlp)
    if args.warm and args.warm_steps:
        raise UserError("--warm counts epochs and --warm-steps steps; give one of them.")
    if args.warm is None:
        enough = args.epochs > args.warm_epochs and not (args.steps or args.warm_steps)
        args.warm = method.family == "batch" and args.batch_size > 256 and enough
    if args.rise and (args.warm or args.warm_steps):
        raise UserError("--rise-epochs and --warm are two warm-ups; give one of them.")
    _check_family(args, asked)


def _check_family(args: argparse.Namespace, asked: set[str]) -> None:
    queue = args.family == "queue"
    if args.sync_bn and queue:
        raise UserError("--syncBN is for the methods without a queue; with one, --shuffle-bn is used instead.")
    refused = set(FAMILIES[args.family].refuses)
    if queue and METHODS[args.method].queue:  # it has labels
        refused |= {"mask_same_image", "head_impl"}
    if "base_temperature" not in METHODS[args.method].defaults:  # the loss is not scaled, so the log must not say so
        refused.add("base_temperature")
    if idle := [name for name in sorted(refused & asked) if getattr(args, name)]:
        warm = " (--warmup-epochs), the start of synthetic negatives; a warm-up is --rise-epochs or --warm."
        more = warm if idle[0] == "hard_start_epoch" else "; leave one of them out."
        raise UserError(f"--method {args.method} does not use --{idle[0].replace('_', '-')}{more}")
    args.base_temperature = None if "base_temperature" in refused else args.base_temperature  # of a file's own method
    if args.contrast_mode == "one" and args.family != "batch":
        raise UserError("--contrast-mode one is for the methods without a queue, where a query is one view anyway.")
    if args.views > 2 and args.family != "batch":
        raise UserError("--views is for the methods without a queue; with one, an image gives a query and a key.")
    if not (args.auto and "warm_epochs" in args.left_open and args.epochs > 1) or args.steps:
        check_warm(args, 0 if args.steps else args.epochs, ", and no --steps; or leave them to --auto")


def read_type_starts(entries: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """First epochs and first steps by kind."""
    epochs: dict[str, int] = {}
    steps: dict[str, int] = {}
    for entry in entries:
        kind, _, start = entry.partition("=")
        number = start.removesuffix("steps")
        if kind not in TYPES or not number.isdecimal():
            raise UserError(f"--type-starts {entry}: write KIND=EPOCH or KIND=Nsteps, KIND one of {', '.join(TYPES)}.")
        if kind in epochs or kind in steps:
            raise UserError(f"--type-starts {entry}: {kind} has one start, in epochs or in steps; give it once.")
        (epochs if number == start else steps)[kind] = int(number)
    return epochs, steps


def check_type_starts(args: argparse.Namespace, typed: dict[str, Any]) -> None:
    """UserError for the start of a kind that is not drawn; a file's is dropped where other kinds are typed."""
    kinds = drawn(args)
    odd = [kind for kind in (*args.type_starts, *args.type_start_steps) if kind not in kinds]
    if odd and "type_starts" not in typed and typed.keys() & {"method", "mochi", *SYNCO_KINDS}:
        for kind in odd:
            args.type_starts.pop(kind, None)
            args.type_start_steps.pop(kind, None)
        args.notes.append(f"the file's --type-starts of {', '.join(odd)} is dropped: none is drawn")
    elif odd:
        raise UserError(f"--type-starts {odd[0]}: this run draws {', '.join(kinds) or 'no synthetic negatives'} and no "
                        f"{odd[0]}; leave it out.")  # fmt: skip


def drawn(args: argparse.Namespace) -> dict[str, int]:
    """Synthetic negatives a query by kind, none of them 0."""
    counts = {"mixup": args.s, "interpolation": args.s2} if args.negatives == "mochi" else {}
    if args.negatives == "synco":
        counts = {kind: int(getattr(args, name)) for name, kind in SYNCO_KINDS.items()}
    return {kind: count for kind, count in counts.items() if count}


# ------------------------------------------------------------------------------------------------- typed settings


def negatives_config(args: argparse.Namespace) -> NegativesConfig:
    """Which synthetic negatives and when."""
    recipe = None
    if args.negatives == "mochi":
        recipe = MoCHiConfig(args.s, args.s2)
    elif args.negatives == "synco":
        counts = [int(getattr(args, name)) for name in SYNCO_KINDS]
        recipe = SynCoConfig(
            *counts, sigma=args.sigma, delta=args.delta, eta=args.eta, extrapolation=args.extrapolation
        )
    return NegativesConfig(
        args.negatives, recipe, args.hard_start_epoch, args.hard_stop_epoch, args.type_starts, args.type_start_steps,
        args.control,
    )  # fmt: skip


def model_config(args: argparse.Namespace) -> MoCoConfig | InBatchConfig | MoCoV3Config:
    """The model, all but the statistics of its channels."""
    if args.family == "momentum":
        config = MoCoV3Config(
            method=args.method, C=args.moco_dim, hidden=args.moco_mlp_dim, m=args.moco_m, m_cosine=args.moco_m_cos,
            freeze_patches=args.stop_grad_conv1,
        )  # fmt: skip
    elif args.family == "batch":
        config = InBatchConfig(
            base_temperature=args.base_temperature, method=args.method, contrast_mode=args.contrast_mode,
            views=args.views, local=args.local_crops, sync_bn=args.sync_bn, beta=args.beta, tau_plus=args.tau_plus,
            estimator=args.estimator,
        )  # fmt: skip
    else:
        config = MoCoConfig(
            base_temperature=args.base_temperature, C=args.moco_dim, K=args.moco_k, m=args.moco_m, n_hard=args.n_hard,
            symmetric=args.symmetric, shuffle=args.shuffle_bn, bn_splits=args.bn_splits,
            mask_same_image=args.mask_same_image, loss_impl=args.head_impl, loss_precision=args.head_precision,
            negatives=negatives_config(args),
        )  # fmt: skip
    return replace(config, T=args.moco_t, channels_last=args.channels_last, recompute=args.recompute)
