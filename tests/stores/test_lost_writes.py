"""A server has lost its latest writes: a replica that lagged became the master, or an old file was loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from celery_idem.core.errors import StoreError
from celery_idem.core.model import (
    MICROSECONDS,
    NO_FINGERPRINT,
    Acquired,
    Done,
    Policy,
    Record,
    Refused,
    Request,
    State,
)
from celery_idem.engine import owners
from celery_idem.engine.claim import Hold
from celery_idem.engine.lease import Renewals
from celery_idem.engine.ledger import Ledger
from celery_idem.stores import open_store
from celery_idem.stores.redis import RedisStore

pytestmark = pytest.mark.redis

DAY = 86_400 * MICROSECONDS
POLICY = Policy(30 * MICROSECONDS, DAY, DAY, on_crash="rerun")
KEY = "shop.pay:1"


@pytest.fixture
def store(redis_url: str) -> Iterator[RedisStore]:
    opened = open_store(redis_url)
    assert isinstance(opened, RedisStore)
    yield opened
    opened.close()


def claimed(ledger: Ledger, task: str = "first") -> Hold:
    decision, claim = ledger.claim(KEY, Request(owners.mint(), task, NO_FINGERPRINT, POLICY))
    assert isinstance(decision, Acquired)
    assert claim is not None
    return claim


def with_step(claim: Hold, name: str) -> None:
    assert isinstance(claim.begin_step(name), Done)
    claim.end_step(name, b"done", 0.0)


def stored(ledger: Ledger) -> Record:
    entry = ledger.get(KEY)
    assert entry is not None
    return entry.record


def test_a_holder_goes_on_renewing(store: RedisStore) -> None:
    ledger = Ledger(store)
    claim = claimed(ledger)
    before = store.execute("GET", f"idem:{KEY}")
    claim.renew()
    store.execute("SET", f"idem:{KEY}", before)

    claim.renew()

    now = store.read(f"idem:{KEY}").stored
    assert now is not None
    assert now == claim.written


def test_its_finished_steps_stay_finished(store: RedisStore) -> None:
    ledger = Ledger(store)
    claim = claimed(ledger)
    with_step(claim, "one")
    before = store.execute("GET", f"idem:{KEY}")
    with_step(claim, "two")
    store.execute("SET", f"idem:{KEY}", before)

    with_step(claim, "three")

    assert [step.name for step in stored(ledger).steps] == ["one", "two", "three"]


def test_a_released_claim_keeps_its_steps(store: RedisStore) -> None:
    ledger = Ledger(store)
    claim = claimed(ledger)
    before = store.execute("GET", f"idem:{KEY}")
    with_step(claim, "one")
    store.execute("SET", f"idem:{KEY}", before)

    claim.release(0.0)

    assert stored(ledger).state is State.RELEASED
    assert [step.name for step in stored(ledger).steps] == ["one"]


@pytest.mark.parametrize("next_write", ["renew", "settle"])
def test_a_retry_that_runs_keeps_its_hold(store: RedisStore, next_write: str) -> None:
    ledger = Ledger(store)
    claimed(ledger).schedule(60.0, 0.0)
    before = store.execute("GET", f"idem:{KEY}")
    claim = claimed(ledger)
    store.execute("SET", f"idem:{KEY}", before)

    if next_write == "renew":
        claim.renew()
        assert stored(ledger).owner == claim.owner
        assert not claim.lost
    else:
        assert isinstance(claim.settle(ledger.outcome_of(1, claim.key), 0.0), Done)
        assert stored(ledger).state is State.SUCCEEDED


def test_who_claimed_since_then_has_it(store: RedisStore) -> None:
    ledger = Ledger(store)
    claimed(ledger).release(0.0)
    before = store.execute("GET", f"idem:{KEY}")
    claim = claimed(ledger)
    store.execute("SET", f"idem:{KEY}", before)
    other = claimed(ledger, "second")

    claim.renew()

    assert claim.lost
    assert stored(ledger).owner == other.owner
    assert isinstance(claim.settle(ledger.outcome_of(1, claim.key), 0.0), Refused)


@pytest.mark.parametrize("strange", [("SET", "x"), ("RPUSH", "x")], ids=["text", "list"])
def test_one_key_that_holds_no_record_ends_nobody_elses_lease(
    store: RedisStore, strange: tuple[str, str]
) -> None:
    ledger = Ledger(store)
    claims = []
    for key in ("shop.pay:1", "shop.pay:2", "shop.pay:3"):
        _, claim = ledger.claim(key, Request(owners.mint(), "first", NO_FINGERPRINT, POLICY))
        assert claim is not None
        claims.append(claim)
    store.execute("DEL", "idem:shop.pay:2")
    command, value = strange
    store.execute(command, "idem:shop.pay:2", value)

    for _ in range(2):
        before = [claim.written for claim in claims]
        with pytest.raises(StoreError, match="not a record"):
            Renewals().renew(store, claims)
        after = [store.peek(f"idem:shop.pay:{n}") for n in (1, 3)]
        assert after == [claims[0].written, claims[2].written]
        assert after != [before[0], before[2]]
