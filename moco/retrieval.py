"""python -m moco.retrieval: retrieval and clustering metrics. The work is in moco/eval/retrieval.py."""

from moco import signals


def main(argv: list[str] | None = None) -> int:
    from moco.cli import commands

    args = commands.parse_retrieval(argv)
    from moco import distributed
    from moco.eval import retrieval

    return distributed.launch(retrieval.retrieval_worker, args)


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
