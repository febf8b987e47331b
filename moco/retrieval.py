"""python -m moco.retrieval: retrieval and clustering metrics. The work is in moco/eval/retrieval.py."""

from moco.cli import commands


def main(argv: list[str] | None = None) -> int:
    args = commands.parse_retrieval(argv)
    from moco import distributed
    from moco.eval import retrieval

    return distributed.launch(retrieval.retrieval_worker, args)


if __name__ == "__main__":
    raise SystemExit(main())
