"""The flags of every command and how they are read. No torch here: a wrong flag is answered before a second of
imports."""

from moco.cli.lincls import lincls_parser, parse_lincls
from moco.cli.pretrain import parse_pretrain, pretrain_parser
from moco.cli.semisup import parse_semisup, semisup_parser

__all__ = [
    "lincls_parser", "parse_lincls", "parse_pretrain", "parse_semisup", "pretrain_parser", "semisup_parser",
]  # fmt: skip
