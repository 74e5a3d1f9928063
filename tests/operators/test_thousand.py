"""An incident: of 1,000 intents 40 are in doubt. They are settled by command line and by browser."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from selenium import webdriver
from selenium.webdriver.common.by import By

from celery_idem import Ledger
from celery_idem.adapters.inbox import inbox
from tests.operators import thousand
from tests.operators.browser import served
from tests.operators.conftest import Idem, use_store
from tests.support.waiting import wait_for

TOKEN = "a token of the right length"


@pytest.fixture(
    params=[
        pytest.param("redis", marks=pytest.mark.redis),
        pytest.param("postgres", marks=pytest.mark.postgres),
    ]
)
def store(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def incident(app: Celery, store: str, billing_knows: Callable[..., None]) -> list[str]:
    use_store(app, store)
    billing_knows(**thousand.destination())
    return thousand.fill(app)


def states(app: Celery) -> Counter[str]:
    return Counter(entry.state for entry in Ledger.from_app(app).list())


def test_by_command_line(app: Celery, idem: Idem, incident: list[str], tmp_path: Path) -> None:
    assert states(app)["in_doubt"] == thousand.IN_DOUBT
    given = str(thousand.arguments(tmp_path / "arguments.jsonl"))
    dry = json.loads(idem("reconcile", "--json", "--dry-run", "--arguments", given).output.splitlines()[-1])
    assert dry["summary"] == {"happened": 20, "not_happened": 20, "unknown": 0, "skipped": 0}
    assert states(app)["in_doubt"] == thousand.IN_DOUBT

    # Thirty are settled by asking, in two runs, the rest by hand, as if their destination did not answer.
    for _ in range(2):
        assert idem("reconcile", "--yes", "--limit", "15", "--arguments", given).exit_code == 0
    left = [
        json.loads(line)["key"] for line in idem("list", "--json", "--state", "in_doubt").output.splitlines()
    ]
    assert len(left) == 10
    for key in left:
        settled = idem(
            "resolve", key, "--happened", '"by hand"', "--evidence", "saw it", "--by", "ann", "--yes"
        )
        assert settled.exit_code == 0, settled.output
    after = states(app)
    assert after["in_doubt"] == after["lapsed"] == 0
    assert sum(after.values()) == thousand.INTENTS
    assert after["running"] == 10  # running intents were not changed


def says(browser: webdriver.Chrome, text: str) -> bool:
    """Whether the page's heading has the text. If not, load it again: a busy machine does not read all at once."""
    found = text in browser.find_element(By.TAG_NAME, "h1").text
    if not found:
        browser.refresh()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("store", [pytest.param("redis", marks=pytest.mark.redis)], indirect=True)
def test_by_browser(app: Celery, incident: list[str], browser: webdriver.Chrome) -> None:
    """An operator settles eight intents in the browser. The others stay in doubt."""
    with served(inbox(app, token=TOKEN)) as address:
        sign_in(browser, address)
        wait_for(lambda: says(browser, "40 intents wait"), message="the page to have read all records")
        for n in range(8):
            browser.find_element(By.CSS_SELECTOR, ".doubtful a").click()
            settle(browser, happened=n % 2 == 0)
        wait_for(lambda: says(browser, "32 intents wait"), message="the eight to be gone")
    after = states(app)
    assert after["in_doubt"] == 32
    assert after["released"] == 4
    assert sum(after.values()) == thousand.INTENTS
    entries = [Ledger.from_app(app).get(key) for key in incident]
    assert [note.by for entry in entries if entry for note in entry.record.notes].count("ann") == 8


def sign_in(browser: Any, address: str) -> None:
    browser.delete_all_cookies()
    browser.get(address)
    browser.find_element(By.ID, "name").send_keys("ann")
    browser.find_element(By.ID, "token").send_keys(TOKEN + "\n")
    browser.find_element(By.CSS_SELECTOR, ".find")  # the overview is there


def settle(browser: Any, happened: bool) -> None:
    if happened:
        result = browser.find_element(By.ID, "result")
        result.clear()
        result.send_keys('"inv_7"')
        browser.find_element(By.ID, "evidence-yes").send_keys("saw it in billing")
        browser.find_element(By.CSS_SELECTOR, "button.yes").click()
    else:
        browser.find_element(By.ID, "evidence-no").send_keys("not there, and no request is under way")
        browser.find_element(By.CSS_SELECTOR, "button.no").click()
    said = browser.find_element(By.CSS_SELECTOR, ".done").text
    assert ("is succeeded now" if happened else "is released now") in said
