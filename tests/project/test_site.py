"""The documentation as a site: it is built strictly and without network, loads nothing from elsewhere, and every link
and anchor of every page leads somewhere."""

import re
import socket
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import ROOT
from mkdocs.commands.build import build
from mkdocs.config import load_config
from support import programs

import moco

LOADS = {"script": "src", "img": "src", "source": "src", "iframe": "src", "object": "data", "link": "href"}
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.I)


class Page(HTMLParser):
    """What a page loads, what it links to and which anchors it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: list[str] = []
        self.texts: list[str] = []  # of paragraphs and list items, as they are shown
        self.titles = 0
        self.code = 0
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        have = {name: value or "" for name, value in attrs}
        self.anchors += [have["id"]] if "id" in have else []
        self.titles += tag == "h1"
        self.code += tag in ("pre", "code", "script", "style")
        if tag in ("p", "li", "td"):
            self.texts.append("")
        if tag in LOADS and LOADS[tag] in have and have.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.loads.append(have[LOADS[tag]])
        if tag == "a" and "href" in have:
            self.links.append(have["href"])

    def handle_endtag(self, tag):
        self.code -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data):
        if self.texts and not self.code:
            self.texts[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site's folder, built while no connection can be made."""
    folder = tmp_path_factory.mktemp("site")

    def refuse(*_):
        raise AssertionError("the build opens a connection")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.chdir(ROOT)
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def test_a_page_loads_nothing_from_elsewhere(site, pages):
    loads = {(name, target) for name, page in pages.items() for target in page.loads}
    assert len(loads) > len(pages)
    assert {(name, target) for name, target in loads if ELSEWHERE.match(target)} == set()
    here = {(name, target) for name, target in loads if not target.startswith("/") or name != "404.html"}
    assert [x for x in sorted(here) if not (site / x[0]).parent.joinpath(unquote(x[1])).exists()] == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"(?:@import|url\(\s*[\"']?)\s*(?:https?:)?//[^)]*", styles) == []
    assert [name for name, page in pages.items() if 'class="mermaid"' in page.text] == []  # its script is elsewhere


def test_links_and_anchors_lead_somewhere(site, pages):
    broken = []
    for name, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if name == "404.html" or ELSEWHERE.match(link):
                continue
            path = (site / name).parent.joinpath(unquote(target)).resolve() if target else site / name
            path = path / "index.html" if path.is_dir() else path
            other = pages.get(path.relative_to(site.resolve() if target else site).as_posix())
            if not path.is_file() or (anchor and other and unquote(anchor) not in other.anchors):
                broken.append((name, link))
    assert broken == []
    assert sum(len(page.links) for page in pages.values()) > 500


def test_a_page_has_one_title_and_its_markdown_is_read_as_on_github(pages):
    assert [name for name, page in pages.items() if page.titles != 1] == []
    # A list or table that does not begin after an empty line stays words here, and is a list on GitHub; a formula that
    # was not read keeps its dollars, or what stood in their place.
    stays = re.compile(r"^\s*(?:[-*] |\d+\. |\| )|```|\$[^$]+\$|\\[(\[]", re.M)
    assert [(name, text[:80]) for name, page in pages.items() for text in page.texts if stays.search(text)] == []


def test_the_reference_has_every_flag_and_every_public_name(pages):
    known = set().union(*(programs.long_flags(programs.parser_of(name)) for name in programs.NAMES))
    shown = set(re.findall(r"<code>(?:-\w )?(--[\w-]+)", pages["flags.html"].text))
    assert len(known) > 180
    assert {word for word in known - shown if not word.startswith("--no-")} == {"--help"}
    titles = re.findall(r'class="doc doc-heading">\s*(?:<[^>]*>\s*)*moco\.(\w+)', pages["api.html"].text)
    assert sorted({*titles} & {*moco.__all__}) == sorted(moco.__all__)
    assert "(default: 0.07" in pages["flags.html"].text
