"""python -m moco.demo, `make demo`: pretrain on 4,000 real digits and show it. The work is in moco/eval/demo.py."""

from moco import cli, signals


def main(argv: list[str] | None = None) -> int:
    from moco.cli import commands

    asked = commands.parse_demo(argv)
    settings = cli.parse_pretrain(["--save-dir", asked.save_dir])
    from moco.eval import demo

    return demo.run_demo(asked, settings)


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
