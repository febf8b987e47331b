"""docs/faq.md: every question is answered with a command and with where it was asked, and its sentences are said."""

import ast
import re

import pytest
from conftest import ROOT

from moco import cli

TEXT = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
QUESTIONS, SENTENCES = TEXT.split("## By the sentence that you see\n")
PARSE = {"pretrain": cli.parse_pretrain, "lincls": cli.parse_lincls, "semisup": cli.parse_semisup}


def parts(text: str) -> dict[str, str]:
    return {part.split("\n")[0]: part for part in re.split(r"^### ", text, flags=re.M)[1:]}


@pytest.mark.parametrize("question", parts(QUESTIONS))
def test_a_question_has_an_answer_a_command_and_threads(question):
    text = parts(QUESTIONS)[question]
    assert len(text.split("\n\n", 2)[1]) > 80
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    assert lines
    for words in (re.sub("^[A-Z_]+=\\S+ ", "", line).split() for line in lines):
        assert words[0] in ("moco", "torchrun")
        if words[0] == "moco" and words[1] in PARSE:
            PARSE[words[1]](words[2:])
    assert "](https://github.com/" in text.partition("\nAsked in: ")[2]


def test_there_are_enough_and_links_name_their_thread():
    assert 30 <= len(parts(QUESTIONS)) <= 45
    links = re.findall(
        r"\[([\w.-]+/[\w.-]+)#(\d+)\]\(https://github.com/([\w.-]+/[\w.-]+)/(?:issues|pull)/(\d+)\)", TEXT
    )
    assert len(links) > 80
    assert [link for link in links if link[:2] != link[2:]] == []
    assert TEXT.count("https://github.com/") == len(links)


def said() -> str:
    """The constant parts of all strings of the package, a line each."""
    found = []
    for path in (ROOT / "moco").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_sentences_of_this_program_are_its():
    table = SENTENCES.split("### Errors of torch")[0]
    rows = re.findall(r"^\| `([^`]+)` \|", table, flags=re.M)
    assert len(rows) > 20
    all_of_them = said()
    pieces = {
        piece.strip() for row in rows for piece in row.removeprefix("warning: ").split("…") if len(piece.strip()) > 6
    }
    assert sorted(piece for piece in pieces if piece not in all_of_them) == []
