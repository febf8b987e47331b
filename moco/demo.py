"""python -m moco.demo, `make demo`: pretrain on 4,000 real digits and show it. The work is in moco/eval/demo.py."""

from moco import cli, report, signals
from moco.errors import tell


def main(argv: list[str] | None = None) -> int:
    from moco.cli import commands

    asked = commands.parse_demo(argv)
    settings = cli.parse_pretrain(["--save-dir", asked.save_dir])
    from moco.eval import demo

    code = demo.run_demo(asked, settings)
    if code == 0 and (path := report.write_page(asked.save_dir, below=True)):
        tell(f"Open {path} in a browser: the curves, the probes and the embedding on one page.")
    return code


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
