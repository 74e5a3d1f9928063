"""Each row of the table in docs/explanation/endings.md is a case that runs here with a real worker.

`CELERY_IDEM_WRITE_PAGES=1 pytest tests/celery/test_endings.py` rewrites the table.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from celery.result import AsyncResult

from celery_idem import Ledger
from tests.celery import endings
from tests.celery.conftest import SOON, Kind, Stage, start
from tests.support.effects import Effects
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for
from tests.support.workers import ROOT

PAGE = ROOT / "docs" / "explanation" / "endings.md"
BEGIN = "<!-- endings: written by `CELERY_IDEM_WRITE_PAGES=1 pytest tests/celery/test_endings.py` -->"
END = "<!-- end of endings -->"
HEAD = "| the body | recorded | the caller gets | a duplicate gets | effects |\n|---|---|---|---|---|"

RECORDED = {"scheduled": "scheduled", "released": "released", "in_doubt": "in doubt", "exited": "in doubt"}

OVER = {"succeeded", "failed", "released", "in_doubt"}
"""States in which no message is expected."""


@pytest.fixture(scope="module")
def rows(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The observed table row of each case. All cases run at the same time."""
    folder = tmp_path_factory.mktemp("endings")
    kind = Kind("prefork", "redis", True)
    stage = start(kind, redis.url, redis.url_for(1), folder, "tests.celery.endings:app")
    stage.app = endings.make(redis.url, redis.url_for(1), str(folder), stage.app.conf.task_default_queue, {})
    try:
        first = round_of_calls(stage, 1)
        before = {name: (stage.effects.count(name), recorded(stage, name)) for name in endings.CASES}
        again = round_of_calls(stage, 2)
        yield {name: row(stage, name, first[name], *before[name], again[name]) for name in endings.CASES}
    finally:
        stage.worker.kill()
        stage.app.close()


def round_of_calls(stage: Stage, number: int) -> dict[str, str]:
    results = {name: stage.app.tasks[name].delay(name) for name in endings.CASES}
    return {name: answer(stage, name, result, number) for name, result in results.items()}


def answer(stage: Stage, name: str, result: AsyncResult, number: int) -> str:
    """Return what the caller gets, after all parts of the case have ended."""
    told = "nothing"
    if endings.CASES[name].answers:
        value = result.get(timeout=SOON, propagate=False)
        told = f"`{type(value).__name__}`" if isinstance(value, BaseException) else f"`{shorter(value)}`"
    ledger = Ledger.from_app(stage.app)
    key = stage.app.tasks[name].intent_key(name)

    def over() -> bool:
        entry = ledger.get(key)
        attempts = entry.record.attempts if entry else 0
        came = attempts >= number or endings.CASES[name].answers
        return came and all(one.state in OVER for one in ledger.list(task=name))

    wait_for(over, SOON, lambda: f"{name}: {ledger.list(task=name)}")
    return told


def shorter(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 30 else text[:5] + "…"


def recorded(stage: Stage, name: str) -> str:
    """Return the states that the record of the call went through."""
    states: list[str] = []
    for event in Effects(stage.folder / "events.jsonl").of(stage.app.tasks[name].intent_key(name)):
        state = RECORDED.get(str(event["event"]), "")
        if event["event"] == "settled":
            state = "succeeded" if event["succeeded"] else "failed"
        if state and state not in states[-1:]:
            states.append(state)
    entry = Ledger.from_app(stage.app).get(stage.app.tasks[name].intent_key(name))
    last = entry.state.replace("_", " ") if entry else ""
    if last not in states[-1:]:
        states.append(last)  # the state after the reconcile function was called
    return " → ".join(states)


def row(stage: Stage, name: str, first: str, effects: int, states: str, again: str) -> str:
    more = stage.effects.count(name) - effects
    if more:
        again = "nothing; it runs again" if again == "nothing" else f"{again}; it runs again"
    elif again == first:
        again = "the same"
    total = f"{effects} + {more}" if more else str(effects)
    return f"| {endings.CASES[name].did} | {states} | {first} | {again} | {total} |"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="a row is about ExceptionGroup")
def test_the_page_shows_what_happens(rows: dict[str, str]) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page = "\n".join([f"{before}{BEGIN}\n", HEAD, *rows.values(), f"\n{END}{after}"])
    if os.environ.get("CELERY_IDEM_WRITE_PAGES") == "1":
        PAGE.write_text(page)
    assert PAGE.read_text() == page
