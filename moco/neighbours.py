"""python -m moco.neighbours: images beside their nearest ones. The work is in moco/eval/neighbours.py."""

from moco import signals


def main(argv: list[str] | None = None) -> int:
    from moco.cli import looking

    args = looking.parse_neighbours(argv)
    from moco import distributed
    from moco.eval import neighbours

    return distributed.launch(neighbours.neighbours_worker, args)


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
