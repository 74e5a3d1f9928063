"""What a worker logs at INFO, as text and as JSON, and which events Sentry receives."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from celery_idem.engine import events
from tests.operators import logged
from tests.operators.conftest import use_store
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

pytestmark = pytest.mark.redis

FILES = {"sentry_sdk": "LOGGED_SENTRY", "pythonjsonlogger": "LOGGED_JSON"}


class Seen(NamedTuple):
    """The calls that a worker executed, and its logs.

    Attributes:
        calls: task, argument, id and answer of each call of a guarded task.
        lines: of the log since the worker was ready, without tracebacks.
        log: the whole log.
        json: the same lines, as python-json-logger writes them.
        sentry: the events that Sentry would receive.
    """

    calls: list[tuple[str, int, str, Any]]
    lines: list[str]
    log: str
    json: list[dict[str, Any]]
    sentry: list[dict[str, Any]]

    def of(self, task_id: str) -> list[str]:
        return [line for line in self.lines if task_id in line]


@pytest.fixture(scope="module")
def seen(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Two hundred calls, most of them duplicates, and two calls of a task without a guard."""
    folder, url = tmp_path_factory.mktemp("logged"), redis_server.url
    logged.app.conf.update(broker_url=url, result_backend=url)
    use_store(logged.app, url)
    env = {"IDEM_TEST_REDIS": url}
    env |= {variable: str(folder / variable) for package, variable in FILES.items() if find_spec(package)}
    with CeleryWorker("tests.operators.logged", folder, concurrency=4, env=env, name="w1") as worker:
        sent: list[tuple[str, int, Any]] = []

        def call(task: Any, whats: range, times: int = 1, **kwargs: Any) -> None:
            sent.extend((task.name, what, task.delay(what, **kwargs)) for what in whats for _ in range(times))

        call(logged.slow, range(3), times=3)
        call(logged.impatient, range(1), times=3)
        call(logged.decline, range(8), times=3)
        call(logged.expected, range(2), times=2)
        call(logged.unsure, range(8), times=3)
        call(logged.pay, range(60), times=2)
        call(logged.ordinary, range(2))
        _answers(sent)
        call(logged.pay, range(5), cents=6)  # another value
        call(logged.pay, range(5))
        answers = _answers(sent)
        log = wait_for(lambda: _complete(worker.log_text(), len(sent)), message=worker.log_tail)
        worker.kill()
    return Seen(
        [(name, what, one.id, answers[one.id]) for name, what, one in sent if name != "logged.ordinary"],
        [line for line in log.partition(" ready.\n")[2].splitlines() if line.startswith("[20")],
        log,
        *(
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            for path in (folder / "LOGGED_JSON", folder / "LOGGED_SENTRY")
        ),
    )


def _complete(log: str, calls: int) -> str | None:
    """Return the log if it has Celery's last line about each call."""
    ends = re.findall(r"\] (?:succeeded in|raised (?:un)?expected)", log)
    return log if len(ends) == calls else None


def _answers(sent: list[tuple[str, int, Any]]) -> dict[str, Any]:
    return {one.id: one.get(timeout=60, propagate=False) for _, _, one in sent}


def test_a_worker_at_info_says_little_and_shows_no_traceback_of_an_answer(seen: Seen) -> None:
    assert len(seen.calls) > 190
    assert Counter(type(answer).__name__ for *_, answer in seen.calls) == {
        "str": 9 + 1 + 120 + 5,
        "InProgress": 2,
        "FingerprintMismatch": 5,
        "ValueError": 24,
        "KeyError": 4,
        "OutcomeUnknown": 24,
    }
    assert len(seen.lines) <= 3 * len(seen.calls)
    assert max(len(seen.of(task_id)) for _, _, task_id, _ in seen.calls) <= 4  # of a call that waited
    # A failure or a new doubt is logged once for each intent, with its traceback.
    errors = [line for line in seen.lines if "ERROR/" in line]
    assert len(errors) == 8 + 8 + 2
    assert sum("in_doubt logged.unsure:" in line for line in errors) == 8
    assert sum("raised unexpected: ValueError('declined" in line for line in errors) == 8
    assert seen.log.count("Traceback (most recent call last)") == len(errors)
    assert seen.log.count("raised unexpected") == 8 + 2


def test_the_log_says_which_task_and_where(seen: Seen) -> None:
    ours = [
        line for line in seen.lines if re.search(r": (INFO|WARNING|ERROR)/[^]]+\] \w+ logged\.\w+:", line)
    ]
    said = Counter(re.sub(r"^.*?\] (\w+) .*$", r"\1", line) for line in ours)
    waits = [line.partition("[task_id=")[2].split()[0] for line in ours if "] waiting " in line]
    # Once for each call that waits. How many do depends on the machine: any call may meet its first one under way.
    assert 0 < len(waits) == len(set(waits))
    assert said["replayed"] == 6 + 16 + 2 + 60 + 5
    assert (said["mismatch"], said["in_doubt"], said["still_in_doubt"]) == (5, 8, 16)
    ids = {task_id for _, _, task_id, _ in seen.calls}
    for line in ours:
        found = re.search(r"\[task_id=(\S+) .*worker=w1@localhost host=\S+ pid=\d+\]$", line)
        assert found, line
        assert found[1] in ids


def test_the_log_as_json(seen: Seen) -> None:
    pytest.importorskip("pythonjsonlogger")
    for row in seen.json:
        if row.get("idem_event"):
            assert row["idem_key"].startswith(row["idem_task"] + ":")
            assert row["idem_task_id"] == row["idem_details"]["task_id"]
            assert (row["idem_worker"], type(row["idem_pid"])) == ("w1@localhost", int)
            assert row["idem_host"]
    assert Counter(row.get("idem_event") for row in seen.json)["still_in_doubt"] == 16


def test_sentry_gets_what_failed_once_for_each_intent(seen: Seen) -> None:
    pytest.importorskip("sentry_sdk")
    texts = Counter(
        (event.get("logentry") or {}).get("message", "").partition(" ")[0]
        + ":"
        + event["exception"]["values"][-1]["value"]
        for event in seen.sentry
    )
    expected = [f":declined {n}" for n in range(8)] + [f":ordinary {n}" for n in range(2)]
    assert texts == Counter(expected + [f"in_doubt:no answer about {n}" for n in range(8)])


def test_a_file_loses_no_line_to_half_a_surrogate_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "worker.log"
    handler = logging.FileHandler(log, encoding="utf-8")
    logger = logging.getLogger("celery_idem")
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "propagate", False)  # xdist cannot send what pytest would capture
    try:
        for text in ("cut \ud83d", "whole"):
            details = {"task_id": "t1", "reason": text, "action": text}
            events.emit("in_doubt", "shop.pay:1", cause=TimeoutError(text), **details)
    finally:
        logger.removeHandler(handler)
        handler.close()
    lines = [line for line in log.read_text().splitlines() if "in_doubt shop.pay:1" in line]
    assert len(lines) == 2
    assert "cut \\ud83d" in lines[0]
    assert "TimeoutError: whole" in log.read_text()
