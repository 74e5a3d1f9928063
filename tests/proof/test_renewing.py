"""The body's thread and the renewing thread write the same record. In no order of writes is the lease lost.

Each test forces one order: it calls one side from inside a store call of the other side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from celery_idem.core.errors import StoreError
from celery_idem.core.model import Acquired, Done, Fingerprint, Policy, Request, State, Stored
from celery_idem.engine import clock as workers_clock
from celery_idem.engine.claim import Hold
from celery_idem.engine.ledger import Ledger
from celery_idem.engine.steps import run_step
from celery_idem.stores.base import Reply
from celery_idem.stores.memory import MemoryStore

KEY = "shop.charge:0123456789abcdef0123456789abcdef"
LEASE = 1_000_000
POLICY = Policy(lease=LEASE, result_ttl=10**12, failure_ttl=10**12, on_crash="resume")


class Clock:
    """One clock for the store (microseconds) and the worker (seconds)."""

    def __init__(self) -> None:
        self.now = 1_000_000

    def __call__(self) -> int:
        return self.now

    def monotonic(self) -> float:
        return self.now / 1e6


class Hooked(MemoryStore):
    """A store that calls ``after`` once after the next replacement, and may lose the reply of that replacement."""

    after: Callable[[], None] | None = None
    lose = False

    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        reply = super().replace(key, old, value, ttl, due)
        hook, self.after = self.after, None
        if hook is not None:
            hook()
        if self.lose:
            self.lose = False
            raise StoreError("the reply got lost")
        return reply


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    times = Clock()
    monkeypatch.setattr(workers_clock, "elapsed", times.monotonic)
    return times


def begin(clock: Clock) -> tuple[Hooked, Ledger, Hold]:
    store = Hooked(clock)
    ledger = Ledger(store)
    decision, claim = ledger.claim(KEY, Request(b"owner-12-byt", "t1", Fingerprint(), POLICY))
    assert isinstance(decision, Acquired)
    assert claim is not None
    clock.now += 1000
    return store, ledger, claim


def deadline(ledger: Ledger) -> float:
    entry = ledger.get(KEY)
    assert entry is not None
    return entry.changed_at + entry.record.lease / 1e6


def assert_renewed(clock: Clock, ledger: Ledger, claim: Hold) -> None:
    """Assert that the next renewal moves the deadline, and that the worker trusts the claim for a shorter time."""
    clock.now += 1000
    claim.renew()
    assert deadline(ledger) == pytest.approx(clock.monotonic() + LEASE / 1e6)
    assert not claim.lost
    assert claim.trusted_until < deadline(ledger)


def test_a_step_that_overtakes_a_renewal_does_not_end_the_renewals(clock: Clock) -> None:
    store, ledger, claim = begin(clock)

    def step() -> None:
        clock.now += 1000
        assert run_step(claim, ledger.codec, "charge", lambda: "ch_1", None, 0.0) == "ch_1"

    store.after = step
    claim.renew()  # after its write, and before the claim notes it, the body runs a whole step

    entry = ledger.get(KEY)
    assert entry is not None
    assert [step.name for step in entry.record.steps] == ["charge"]
    assert_renewed(clock, ledger, claim)
    entry = ledger.get(KEY)
    assert entry is not None
    assert [step.name for step in entry.record.steps] == ["charge"], "a renewal wrote an older record back"


def test_a_renewal_that_overtakes_an_outcome_does_not_undo_it(clock: Clock) -> None:
    store, ledger, claim = begin(clock)
    store.after = claim.renew
    claim.settle(ledger.outcome_of("done", claim.key), 0.0)
    claim.renew()
    entry = ledger.get(KEY)
    assert entry is not None
    assert entry.record.state is State.SUCCEEDED


def test_nothing_is_renewed_beside_an_outcome_but_between_two_tries_of_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[bool] = []
    down = iter([True, False])

    class Away(Hooked):
        def replace(
            self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
        ) -> Reply:
            offered.append(claim.renewal() is not None)
            if next(down):
                raise StoreError("the store does not answer")
            return super().replace(key, old, value, ttl, due)

    class Pause:
        def wait(self, seconds: float) -> None:
            offered.append(claim.renewal() is not None)

    ledger = Ledger(Away(clock))
    _, claim = ledger.claim(KEY, Request(b"owner-12-byt", "t1", Fingerprint(), POLICY))
    assert claim is not None
    monkeypatch.setattr(threading, "Event", Pause)
    assert isinstance(claim.settle(ledger.outcome_of("done", claim.key), 1.0), Done)
    assert offered == [False, True, False]
    assert claim.renewal() is None


def test_a_renewal_whose_reply_got_lost_is_trusted_from_when_it_was_written(clock: Clock) -> None:
    store, ledger, claim = begin(clock)
    store.lose = True
    with pytest.raises(StoreError):
        claim.renew()
    written = deadline(ledger)
    clock.now += LEASE // 2
    claim.renew()  # meets its own earlier write
    assert claim.trusted_until < written
    assert_renewed(clock, ledger, claim)


def test_a_step_whose_reply_got_lost_does_not_end_the_renewals(clock: Clock) -> None:
    store, ledger, claim = begin(clock)
    store.lose = True
    with pytest.raises(StoreError):
        run_step(claim, ledger.codec, "charge", lambda: "ch_1", None, 0.0)
    clock.now += 1000
    claim.renew()
    assert_renewed(clock, ledger, claim)


def test_a_claim_whose_reply_got_lost_is_trusted_from_when_it_was_written(clock: Clock) -> None:
    """A client that resends the claim after a broken connection finds its own earlier claim."""

    class Resending(MemoryStore):
        def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
            super().create(key, value, ttl, due)
            clock.now += LEASE // 2  # reconnecting takes time
            return super().create(key, value, ttl, due)

    ledger = Ledger(Resending(clock))
    _, claim = ledger.claim(KEY, Request(b"owner-12-byt", "t1", Fingerprint(), POLICY))
    assert claim is not None
    assert claim.trusted_until < deadline(ledger)
