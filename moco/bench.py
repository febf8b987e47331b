"""python -m moco.bench: where a run's time goes on this machine. The work is in moco/train/bench.py."""

from moco import signals


def main(argv: list[str] | None = None) -> int:
    from moco.cli import commands

    args = commands.parse_bench(argv)
    from moco import distributed
    from moco.train import bench

    return distributed.launch(bench.worker, args)


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
