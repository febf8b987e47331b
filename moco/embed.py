"""python -m moco.embed: features, a picture of them and a page. The work is in moco/eval/embed.py."""

from moco.cli import commands


def main(argv: list[str] | None = None) -> int:
    args = commands.parse_embed(argv)
    from moco import distributed
    from moco.eval import embed

    return distributed.launch(embed.embed_worker, args)


if __name__ == "__main__":
    raise SystemExit(main())
