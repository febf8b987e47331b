"""python detection/train_net.py --config-file FILE [--num-gpus N] [--resume | --eval-only] [KEY VALUE ...]

The flags are detectron2's. KEY VALUE override the file, as in MODEL.WEIGHTS backbone.pkl SOLVER.IMS_PER_BATCH 8.
"""

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone without installing

from moco import signals

if __name__ == "__main__":
    signals.begin("stopped")

from moco import owner
from moco.errors import exit_code, tell

HERE = Path(__file__).resolve().parent


def main(argv: list[str]) -> int:
    """Train or evaluate; the exit code."""
    return exit_code(lambda: work(argv))


def work(argv: list[str]) -> None:
    """What :func:`main` does once detectron2 is known to be there."""
    from . import needs

    needs.check()
    train(parse(argv))


def parse(argv: list[str]) -> argparse.Namespace:
    """detectron2's flags, and one of ours."""
    import torch
    from detectron2.engine import default_argument_parser

    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument(
        "--no-scaling", action="store_true", help="do not scale rate and schedule with SOLVER.IMS_PER_BATCH"
    )
    # Upstream's default is one GPU; without any the default is the CPU.
    parser.set_defaults(num_gpus=min(1, torch.cuda.device_count()))
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> None:
    """Check all that can be checked, then start the processes."""
    from detectron2.engine import launch

    from . import recipe, trainer

    args.config_file = recipe.find_config(args.config_file)
    cfg, said = recipe.read_config(args.config_file, args.opts, args.num_gpus, scale=not args.no_scaling)
    for sentence in said:
        tell(sentence)
    try:
        if args.machine_rank == 0:
            owner.hold(cfg.OUTPUT_DIR, choose="OUTPUT_DIR")
        recipe.check_start(cfg, args.resume, args.eval_only)
        launch(
            trainer.work,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(cfg, args),
        )
    finally:
        owner.release()


if __name__ == "__main__":
    # as a module of its package, which is detection in a clone and moco_detection in a wheel
    sys.exit(importlib.import_module(f"{HERE.name}.train_net").main(sys.argv[1:]))
