"""The code of every page runs in order, with a real server and real workers. See ``page.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.docs.page import ROOT, blocks
from tests.support.processes import Program
from tests.support.waiting import wait_for

# Seconds. The tutorial starts about twenty programs one after the other: in fifteen seconds, or 45 on a busy machine.
# Less than pytest's timeout, so that the output of the page is shown.
PATIENCE = 250.0

PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if any(not block.skip for block in blocks(page))
]


@pytest.mark.redis
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_says_is_what_happens(page: Path, redis_url: str, tmp_path: Path) -> None:
    # A Program ends everything that the page has started, also if the page hangs.
    run = Program(
        [sys.executable, "-m", "tests.docs.page", page, redis_url],
        log=tmp_path / "page.log",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        fork=True,
    )
    try:
        wait_for(lambda: not run.alive, PATIENCE, lambda: f"{page.name}\n{run.log_tail()}")
        assert run.exit_code == 0, f"{page.relative_to(ROOT)}\n{run.log_tail()}"
    finally:
        run.kill()


def test_the_readme_is_among_them() -> None:
    """The README and its blocks are found. Otherwise the test above could run nothing."""
    assert PAGES[0].name == "README.md"
    assert len(list(blocks(PAGES[0]))) >= 7


def test_no_page_has_two_versions_of_a_text() -> None:
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]:
        marks = [line for line in page.read_text().splitlines() if line.startswith(("<<<<<<< ", ">>>>>>> "))]
        assert marks == [], page
