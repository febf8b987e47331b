"""docs/migrating.md: its commands parse, and the flags that it says are here are."""

import re
from pathlib import Path

from moco import options

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "migrating.md").read_text(encoding="utf-8")
PARSE = {
    "main_pretrain.py": options.parse_pretrain, "main_lincls.py": options.parse_lincls,
    "main_semisup.py": options.parse_semisup,
}  # fmt: skip


def test_the_commands_parse():
    commands = [line.split() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
    assert len(commands) == 4
    for _, script, *words in commands:
        PARSE[script](words)


def test_flags_that_are_here_exist():
    parsers = (options.pretrain_parser, options.lincls_parser, options.semisup_parser, options.average_parser)
    known = {word for make in parsers for action in make()._actions for word in action.option_strings}
    rows = [line.split("|")[1:3] for line in TEXT.splitlines() if line.startswith("| `") or line.startswith("| SynCo")]
    assert len(rows) > 50
    for theirs, here in rows:
        flags = re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", here + (theirs if here.strip().startswith("same") else ""))
        missing = [flag for flag in flags if flag not in known and flag.replace("_", "-") not in known | {"-m"}]
        assert missing == [], theirs
