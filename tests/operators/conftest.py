"""Fixtures: an application with a store, a destination and a command line for each test."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

from celery_idem import Ledger
from celery_idem.cli import idem
from celery_idem.integration import wiring
from tests.conftest import missing
from tests.operators.shop import app as shop

Idem = Callable[..., Result]


def use_store(app: Celery, url: str) -> None:
    """Give an application that was used before another store."""
    app.conf.idem_store = url
    wiring._ledgers.pop(app, None)
    for task in app.tasks.values():
        if getattr(task, "idem_declaration", None) is not None:
            type(task)._guard_made = None


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """The shop with an empty memory store, and a billing system that knows nothing."""
    path = tmp_path / "destination.json"
    path.write_text("{}")
    monkeypatch.setenv("IDEM_TEST_DESTINATION", str(path))
    use_store(shop, f"memory://{uuid.uuid4().hex}")
    yield shop
    use_store(shop, "memory://operators")


@pytest.fixture
def ledger(app: Celery) -> Ledger:
    return Ledger.from_app(app)


@pytest.fixture
def billing_knows(app: Celery, tmp_path: Path) -> Callable[..., None]:
    """`billing_knows(customer="inv-1")` sets what the destination answers."""

    def tell(**known: str) -> None:
        (tmp_path / "destination.json").write_text(json.dumps(known))

    return tell


def command_line(app: Celery) -> Idem:
    """Return a function: `idem("list", "--json")` runs `celery -A shop idem list --json`."""

    def run(*words: str, **options: Any) -> Result:
        result = CliRunner().invoke(idem, list(words), obj=CLIContext(app, True, "."), **options)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture(name="idem")
def _idem(app: Celery) -> Idem:
    return command_line(app)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium controlled by Selenium."""
    from tests.operators.browser import BrowserMissingError, chromium  # the other tests need no Selenium

    try:
        with chromium() as started:
            yield started
    except BrowserMissingError as error:
        missing(str(error))
