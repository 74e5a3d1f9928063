"""The site that `make docs` builds: its files, and how a browser shows it."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.docs.page import ROOT
from tests.operators.browser import chromium

pytest.importorskip("material", reason="the site needs the extra `docs`")

HEIGHT = 900

LONGEST_WORD = 22
"""Characters. The letters of a title are 16 pixels wide, and a phone has 390 pixels less the margins."""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Log nothing."""


class Loaded(HTMLParser):
    """A parser that collects the addresses that a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        names = {"src", "srcset", "data", "poster"} | ({"href"} if tag in ("link", "image", "use") else set())
        self.addresses += [given[name] or "" for name in names if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not shutil.which("chromedriver"):
        pytest.skip("no chromedriver in PATH")
    with chromium() as browser:
        yield browser


def pages(site: Path) -> list[str]:
    found = sorted(str(page.relative_to(site)) for page in site.rglob("*.html") if page.name != "404.html")
    assert {"index.html", "tutorial.html", "reference/settings.html", "adr/index.html"} <= set(found)
    return found


def wide(browser: Any, width: int) -> None:
    """Show the page at this width. A real window of the browser is never narrower than 500 pixels."""
    size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    foreign = {}
    for name in pages(site):
        parser = Loaded()
        parser.feed((site / name).read_text())
        assert parser.addresses, f"{name} loads nothing, not even a style sheet"
        if elsewhere := [url for url in parser.addresses if re.match(r"\s*(?:\w+:)?//", url)]:
            foreign[name] = elsewhere
    for sheet in site.rglob("*.css"):
        if elsewhere := re.findall(r"(?:@import|url\()\s*['\"]?((?:https?:)?//[^'\")]+)", sheet.read_text()):
            foreign[sheet.name] = elsewhere
    assert foreign == {}


def test_the_hooks_have_run(site: Path) -> None:
    commands = re.sub(r"<[^>]+>", "", (site / "reference/cli.html").read_text())
    assert "celery -A proj idem resolve" in commands
    decisions = {page.stem for page in (ROOT / "docs/adr").glob("0*.md")}
    assert {
        name for name in decisions if f"{name}.html" not in (site / "adr/index.html").read_text()
    } == set()


def may_be_wide(page: str) -> bool:
    """Return whether a page could be too wide: it has a table, code, an image or a long word.

    Other pages are left out, because a browser takes half a second for each page.
    """
    (article,) = re.findall(r"<article.*?</article>", page, re.DOTALL)
    words = re.sub(r"<[^>]+>", "", article).split()
    return bool(re.search(r"<(?:table|pre|img)\b", article)) or max(map(len, words)) > LONGEST_WORD


@pytest.mark.timeout(700)  # a busy machine takes ten times as long as an idle one
def test_no_page_is_wider_than_a_phone(site: Path, address: str, browser: Any) -> None:
    """No page is wider than 390 pixels or loads anything from another server."""
    wide(browser, 390)
    # Otherwise each page would build the index of all pages for its search.
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/search/search_index.json"]})
    too_wide, foreign = {}, set()
    looked_at = [name for name in pages(site) if may_be_wide((site / name).read_text())]
    assert 40 < len(looked_at) < len(pages(site))
    for name in looked_at:
        browser.get(f"{address}/{name}")
        width, loaded = browser.execute_script(
            "return [document.documentElement.scrollWidth,"
            " performance.getEntriesByType('resource').map(entry => entry.name)]"
        )
        foreign |= {url for url in loaded if not url.startswith((address, "data:", "blob:"))}
        if width > 390:
            too_wide[name] = width
    assert too_wide == {}
    assert foreign == set()


@pytest.mark.timeout(700)  # a busy machine takes ten times as long as an idle one
def test_no_title_in_the_menu_wraps(site: Path, address: str, browser: Any) -> None:
    """All titles in the menu fit in one line. A longer heading needs a short title in `docs/_site.py`."""
    wide(browser, 1280)
    seen, wrapped = 0, set()
    # One page of each folder is enough: all pages of a tab have the same tabs and menu.
    for name in ["index.html", "guarantees.html", *sorted(_first_of_each_folder(site))]:
        browser.get(f"{address}/{name}")
        lines = browser.execute_script(
            "return [...document.querySelectorAll('.md-tabs__link, .md-nav--primary .md-nav__link')]"
            ".filter(link => link.offsetParent && link.innerText.trim()).map(link => {"
            " const range = document.createRange(); range.selectNodeContents(link);"
            " const tops = [...range.getClientRects()].filter(box => box.width > 1).map(box => box.top);"
            " return [link.innerText.trim(), Math.max(...tops) - Math.min(...tops)]; })"
        )
        seen += len(lines)
        wrapped |= {title for title, spread in lines if spread > 12}
    assert seen > 40
    assert wrapped == set()


def _first_of_each_folder(site: Path) -> list[str]:
    return list({name.split("/")[0]: name for name in reversed(pages(site)) if "/" in name}.values())


def test_the_contents_stay_in_sight(address: str, browser: Any) -> None:
    wide(browser, 1280)
    browser.get(f"{address}/guarantees.html")
    browser.execute_script("window.scrollTo(0, document.documentElement.scrollHeight / 2)")
    top = browser.execute_script(
        "return document.querySelector('.md-sidebar--secondary').getBoundingClientRect().top"
    )
    assert 0 <= top < HEIGHT / 2
