"""The pages that we write, in a real browser: playwright with the machine's own Chromium, and no network.

    python tests/support/browser.py        as root, installs Chromium by apt-get where there is none: `make test`

A test takes the fixture ``browse``: ``page = browse(path_or_html)`` is a playwright page that has loaded. At the test's
end whatever the page had to complain of fails it: console errors and warnings, exceptions, violations of its policy,
and each request for anything but the page itself. One browser serves all tests of a process.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
MISSING = "needs Chromium or Google Chrome: apt-get install chromium"
FLAGS = [
    "--no-sandbox",  # root cannot have one
    "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip


def executable() -> str | None:
    """The machine's browser; playwright's own download is never used."""
    found = [path for name in NAMES if (path := shutil.which(name))]
    return (found + [MAC] * os.path.exists(MAC) + [None])[0]


class Browse:
    """``browse(page)`` opens a file or an HTML text; ``problems`` are what the pages complained of, in their order."""

    def __init__(self, browser: Browser, folder: Path):
        self.browser, self.folder = browser, folder
        self.problems: list[str] = []
        self._contexts: list[BrowserContext] = []

    def __call__(
        self, page: Path | str, width: int = 1400, height: int = 1000, dark: bool = False, **more: Any
    ) -> Page:
        """The page after its load event.

        Args:
            page: a file, or the text of one.
            width, height: of the window, CSS pixels.
            dark: whether the reader prefers dark colours.
            more: further settings of playwright's ``new_context``, such as ``has_touch``.
        """
        if isinstance(page, str):
            path = self.folder / f"opened{len(self._contexts)}.html"
            path.write_text(page, encoding="utf-8")
        else:
            path = page
        address = path.resolve().as_uri()
        more = {"color_scheme": "dark" if dark else "light", "viewport": {"width": width, "height": height}, **more}
        context = self.browser.new_context(offline=True, **more)
        context.set_default_timeout(20_000)
        self._contexts.append(context)
        tab = context.new_page()
        tab.on("console", self._message)
        tab.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        tab.on("request", lambda request: self._request(request, address))
        tab.goto(address)
        return tab

    def _message(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            self.problems.append(f"console {message.type}: {message.text}")

    def _request(self, request: Request, address: str) -> None:
        if request.url.split("#")[0] != address and not request.url.startswith(("data:", "blob:")):
            self.problems.append(f"request: {request.url}")

    def close(self) -> None:
        """Close the pages. What they still had to say is in ``problems``."""
        for context in self._contexts:
            context.close()
        self._contexts = []


def data_of(page: str) -> Any:
    """What a page's scripts read: the ``data`` of :func:`moco.pictures.page.page`."""
    return json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])


@pytest.fixture(scope="session")
def browser() -> Iterator[tuple[Browser, asyncio.AbstractEventLoop]]:
    """One Chromium for the tests of this process, with a profile of its own."""
    path = executable()
    if path is None:
        assert "CI" not in os.environ, MISSING  # there a test that is left out would go unseen
        pytest.skip(MISSING)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        loop = asyncio.get_running_loop()  # playwright's
        yield browser, loop
        asyncio._set_running_loop(loop)
        browser.close()


@pytest.fixture
def browse(browser: tuple[Browser, asyncio.AbstractEventLoop], tmp_path: Path) -> Iterator[Browse]:
    """Open pages, which may complain of nothing."""
    pages = Browse(browser[0], tmp_path)
    asyncio._set_running_loop(browser[1])
    yield pages
    pages.close()
    asyncio._set_running_loop(None)  # between the tests of pages, others may call asyncio.run
    assert not pages.problems, "\n".join(pages.problems)


def main() -> int:
    """Install Chromium where no browser is found; never an error: without one the tests of pages are skipped."""
    if executable():
        return 0
    if os.geteuid() or not shutil.which("apt-get"):
        print(f"no browser is installed, so the tests of pages are skipped: each {MISSING}", file=sys.stderr)
        return 0
    print("installing Chromium, once: the tests of pages need a browser", flush=True)
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], install):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        if done.returncode:
            print(f"{' '.join(command)} failed: each test of a page {MISSING}\n{done.stdout}", file=sys.stderr)
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
