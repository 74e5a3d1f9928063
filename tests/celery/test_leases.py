"""Many leases in one process: one thread renews them, together, and none lapses."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from celery_idem.core.model import MICROSECONDS, Acquired, Fingerprint, Policy, Request
from celery_idem.engine import owners
from celery_idem.engine.lease import LOOKS_PER_LEASE, Renewer
from celery_idem.engine.ledger import Ledger
from celery_idem.stores.redis import RedisStore
from tests.celery.leases import LEASE, hold_many
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.redis, pytest.mark.slow]


class Counting(RedisStore):
    """Notes each exchange with the server: the thread, and how many commands went in it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.exchanges: list[tuple[str, int]] = []

    def _exchange(self, packed: bytes, replies: int) -> list[Any]:
        self.exchanges.append((threading.current_thread().name, replies))
        return super()._exchange(packed, replies)


def test_a_thousand_leases_are_one_round_trip_on_one_thread(redis_url: str) -> None:
    store = Counting(redis_url)
    ledger = Ledger(store)
    policy = Policy(int(LEASE * MICROSECONDS), 10**12, 10**12)
    claims = []
    renewer = Renewer()
    for n in range(1000):
        decision, claim = ledger.claim(f"k{n}", Request(owners.mint(), "task", Fingerprint(), policy))
        assert isinstance(decision, Acquired)
        assert claim is not None
        claims.append(claim)
        renewer.watch(claim)
    began = max(entry.now for entry in ledger.list())
    store.exchanges.clear()
    watched = time.monotonic()

    def for_three_leases() -> bool:
        return min(entry.changed_at for entry in ledger.list()) > began + 3 * LEASE

    wait_for(for_three_leases, 80.0, "every lease to be renewed for three times its length", LEASE / 4)
    renewals = [(thread, replies) for thread, replies in store.exchanges if thread == "celery_idem leases"]
    watched = time.monotonic() - watched
    # A thread that got no turn for a whole lease catches up at its next look.
    wait_for(lambda: not any(claim.lost for claim in claims), 80.0, "every claim to be trusted")
    assert {entry.record.state.name for entry in ledger.list()} == {"RUNNING"}
    for claim in claims:
        renewer.unwatch(claim)
    # Whole batches, but for a few that were claimed while the thread looked: those stay one look apart from the others.
    assert sum(replies > 0.9 * len(claims) for _, replies in renewals) >= 3
    # However slow the machine is: no more exchanges than looks in that time, and one that was under way.
    assert len(renewals) <= watched * LOOKS_PER_LEASE / LEASE + 2


def test_a_real_worker_keeps_all_its_leases(start_redis: Any, tmp_path: Path) -> None:
    broker: RedisServer = start_redis()
    store: RedisServer = start_redis()
    number = 300
    cost = hold_many("gevent", number, broker, store, tmp_path)
    assert cost.states == {"running": number}
    assert cost.oldest < LEASE
    assert cost.renewers == 1
    assert cost.lost == 0
    assert cost.effects == {1: number}
    # Each lease at most once per look.
    assert cost.commands <= number * (LOOKS_PER_LEASE * cost.seconds / LEASE + 1)
