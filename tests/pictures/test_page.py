"""A page loads nothing, and no text of a user's gets out of its place."""

import json
import os
import re
from html.parser import HTMLParser

import pytest

from moco.pictures.page import page, text

ODD = ["<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "a&b'c\"", "\u2028",
       os.fsdecode(b"d\xf6g"), "\x1b[31m", "\u202egpj", "\N{BEER MUG}"]  # fmt: skip


class Parsed(HTMLParser):
    """The tags of a page, and the text of its data."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.data, self.inside = [], "", False
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = ("id", "data") in attrs

    def handle_data(self, data):
        self.data += data * self.inside

    def handle_endtag(self, tag):
        self.inside = False


def test_data_stay_data():
    made = page("t", data={"names": ODD, "values": (1.5, float("nan"), float("-inf")), ODD[0]: None})
    found = Parsed(made)
    assert found.tags == Parsed(page("t", data=1)).tags
    read = json.loads(found.data)
    assert read["names"][:4] == ODD[:4] and read["names"][-1] == ODD[-1]
    assert read["names"][4:7] == [r"d\udcf6g", r"\x1b[31m", r"\u202egpj"]
    assert read["values"] == [1.5, None, None]
    assert ODD[0] in read
    made.encode()  # no half of a surrogate pair, which no encoding has


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_a_name_stays_text(odd):
    made = page(odd, body=f'<p title="{text(odd)}">{text(odd)}</p>')
    assert Parsed(made).tags == [*Parsed(page("t")).tags, "p"]
    made.encode()


def test_it_loads_nothing():
    made = page("t", scripts=["grid.js"], styles=["grid.css"])
    assert "default-src 'none'; img-src data:" in made
    assert not re.search(r"https?:|url\(|@import|fetch\(|<iframe", made)
    assert made.index("--ground") < made.index("figcaption") < made.index("<body>") < made.index("use strict")


def test_a_script_that_would_end_its_element_is_refused(tmp_path):
    (tmp_path / "bad.js").write_text('const text = "</SCRIPT>";')
    with pytest.raises(AssertionError, match="would end its own element"):
        page("t", scripts=[str(tmp_path / "bad.js")])
