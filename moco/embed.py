"""python -m moco.embed: features, a picture of them and a page. The work is in moco/eval/embed.py."""

from moco import signals


def main(argv: list[str] | None = None) -> int:
    from moco.cli import commands

    args = commands.parse_embed(argv)
    from moco import distributed
    from moco.eval import embed

    return distributed.launch(embed.embed_worker, args)


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
