"""What mkdocs does not do by itself: pages from outside docs/, links that hold here and on GitHub, formulas.

A page's Markdown is written for who reads it in the repository. Here a link to another page leads to that page; any
other file that a page links to is copied into the site. Formulas become MathML, which needs no script.
"""

import html
import posixpath
import re
from pathlib import Path

import reference
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

TOP = Path(__file__).resolve().parents[2]
# Files outside docs/ that are pages, and what they are called in the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "detection/README.md": "detection.md",
    "moco/kernels/README.md": "kernels.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results/2026-11-28_h200/README.md": "h200.md",
}
ORIGINS = {name: path for path, name in PAGES.items()}
CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.M | re.S)
LINK = re.compile(r'(\]\(|<img [^>]*?src=")(?![a-z]+:|#)([^)#"\s]+)')
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def on_files(files, config):
    """Add the pages from outside docs/, those that reference.py writes, and what any page links to."""
    for path, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(TOP / path)))
    for name, write in reference.PAGES.items():
        files.append(File.generated(config, name, content=write()))
    for page in files.documentation_pages():
        origin = _origin(page.src_uri)
        for part in _prose(page.content_string):
            for _, target in LINK.findall(part):
                name = _name(origin, target)
                if name not in files.src_uris and (TOP / _path(origin, target)).is_file():
                    files.append(File.generated(config, name, abs_src_path=str(TOP / _path(origin, target))))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as the site has them."""
    here, origin = posixpath.dirname(page.file.src_uri), _origin(page.file.src_uri)

    def here_it_is(match):
        return match[1] + posixpath.relpath(_name(origin, match[2]), here or ".")

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(here_it_is, part) for part in parts[::2]]
    return "".join(parts)


def on_page_content(content, page, config, files):
    """Formulas as MathML."""
    return FORMULA.sub(lambda match: _formula(match[3], match[2] == "[", page.file.src_uri), content)


def _formula(tex: str, block: bool, where: str) -> str:
    tex = html.unescape(tex).strip()
    mathml = convert(tex, display="block" if block else "inline")
    if "\\" in re.sub(r"<annotation.*?</annotation>", "", mathml):
        raise PluginError(f"{where}: latex2mathml does not know a command of {tex}")
    return mathml


def _prose(markdown: str) -> list[str]:
    """What is no code."""
    return CODE.split(markdown)[::2]


def _origin(name: str) -> str:
    """The path in the repository of a page of the site."""
    return ORIGINS.get(name, f"docs/{name}")


def _path(origin: str, target: str) -> str:
    """The path in the repository of what a page there links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))


def _name(origin: str, target: str) -> str:
    """The path in the site of the same."""
    path = _path(origin, target)
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}")
