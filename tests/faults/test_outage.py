"""Calls that were accepted while the broker was down run once when it is back.

``OUTAGE=100000 OUTAGE_WORKERS=2 pytest tests/faults/test_outage.py`` runs it with more calls and workers.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import redis

from celery_idem.integration import recovering
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for

CALLS = int(os.environ.get("OUTAGE", "250"))
WORKERS = int(os.environ.get("OUTAGE_WORKERS", "1"))

PATIENCE = 60 + CALLS / 10
"""Seconds. The slowest machine runs ten calls a second."""

pytestmark = [pytest.mark.redis, pytest.mark.timeout(2 * PATIENCE)]


def test_all_are_published_oldest_first_at_a_bounded_rate_and_run_once(
    start_redis: Callable[..., RedisServer],
    start_worker: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker, store = start_redis(), start_redis()
    env = {"OUTAGE_BROKER": broker.url, "OUTAGE_STORE": store.url}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    module = importlib.import_module("tests.faults.outage")
    broker.stop()
    began = time.monotonic()
    receipts = module.act.submit_many([(number,) for number in range(CALLS)])
    took = time.monotonic() - began
    assert {(receipt.status, receipt.code) for receipt in receipts} == {("accepted", "not_sent")}
    numbers = {receipt.task_id: number for number, receipt in enumerate(receipts)}

    broker.restart()
    for _ in range(WORKERS):
        start_worker("tests.faults.outage:app", env=env)
    client = redis.Redis.from_url(store.url)
    wait_for(lambda: client.llen("effects") >= CALLS, PATIENCE)
    queue = redis.Redis.from_url(broker.url)
    wait_for(lambda: not queue.llen("outage") and not queue.hlen("unacked"), PATIENCE)
    effects = [int(one) for one in client.lrange("effects", 0, -1)]
    assert sorted(effects) == list(range(CALLS))

    published = [str(one, "ascii").split(" ") for one in client.lrange("recovered", 0, -1)]
    firsts = {task_id: float(at) for at, task_id in reversed(published)}
    assert firsts.keys() == numbers.keys()
    span = max(firsts.values()) - min(firsts.values())
    assert span >= (CALLS / WORKERS - 1) * recovering.PAUSE
    in_turn = [numbers[task_id] // 100 for task_id in sorted(firsts, key=firsts.__getitem__)]
    late = max(newest - one for newest, one in zip(accumulate(in_turn, max), in_turn, strict=True))
    print(
        f"{CALLS} accepted in {took:.1f} s; {WORKERS} worker(s) published them in {span:.1f} s, {CALLS / span:.0f} a "
        f"second, {len(published) - CALLS} of them again; {len(effects)} effects, {len(set(effects))} different; "
        f"the furthest out of turn was {late} hundreds late"
    )
    # A hundred calls are accepted at one moment. Several workers do not wait for each other.
    if WORKERS == 1:
        assert late == 0
        assert [number // 100 for number in effects] == in_turn
