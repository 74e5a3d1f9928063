"""One thread renews all leases of a process together, and none lapses."""

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
    """A store that records the thread and the number of commands of each exchange with the server."""

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
    _, first = ledger.claim("first", Request(owners.mint(), "task", Fingerprint(), policy))
    assert first is not None
    first.release(0.0)  # the scripts are loaded into the server now
    assert ledger.forget("first")
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
    # If the thread did not run for a whole lease, it renews at its next look.
    wait_for(lambda: not any(claim.lost for claim in claims), 80.0, "every claim to be trusted")
    assert {entry.record.state.name for entry in ledger.list()} == {"RUNNING"}
    for claim in claims:
        renewer.unwatch(claim)
    # Claims made between two looks are renewed together, so there are a few large batches.
    assert sum(replies for _, replies in renewals) > len(claims) / 4 * len(renewals)
    # Also on a slow machine there are no more exchanges than looks, and one that had begun before.
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
    # Each lease is renewed at most once per look.
    assert cost.commands <= number * (LOOKS_PER_LEASE * cost.seconds / LEASE + 1)
