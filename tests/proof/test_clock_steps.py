"""The store's clock is set back or ahead: no live worker loses its claim, and no caller waits for ever."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from celery_idem.core.errors import IdempotencyError
from celery_idem.core.model import (
    MICROSECONDS,
    Acquired,
    Ask,
    Busy,
    Decision,
    Fingerprint,
    InDoubt,
    NotHappened,
    Policy,
    Request,
)
from celery_idem.engine import clock as workers_clock
from celery_idem.engine import events
from celery_idem.engine.claim import Hold
from celery_idem.engine.lease import LOOKS_PER_LEASE, Renewals
from celery_idem.engine.ledger import Ledger
from celery_idem.engine.steps import run_step
from celery_idem.stores.memory import MemoryStore

KEY = "shop.charge:0123456789abcdef0123456789abcdef"
LEASE = 30 * MICROSECONDS
HOUR = 3600 * MICROSECONDS
POLICY = Policy(lease=LEASE, result_ttl=10**12, failure_ttl=10**12, on_crash="rerun", max_attempts=255)


class Times:
    """The real time, and the store's clock, which may be set."""

    def __init__(self) -> None:
        self.real = 1_000_000 * HOUR
        self.off = 0

    def store(self) -> int:
        return self.real + self.off

    def elapsed(self) -> float:
        return self.real / MICROSECONDS


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    times = Times()
    monkeypatch.setattr(workers_clock, "elapsed", times.elapsed)
    return times


@pytest.fixture
def ledger(times: Times) -> Ledger:
    return Ledger(MemoryStore(times.store))


@pytest.fixture
def stepped() -> Iterator[list[float]]:
    """The steps in seconds that ``clock_stepped`` events reported."""
    seen: list[float] = []

    def hear(event: events.Event) -> None:
        if event.kind == "clock_stepped":
            seen.append(event.details["by"])

    stop = events.listen(hear, here=True)
    yield seen
    stop()


def ask(ledger: Ledger, name: bytes = b"b", policy: Policy = POLICY) -> tuple[Decision, Hold | None]:
    return ledger.claim(KEY, Request(name * 12, f"task-{name.decode()}", Fingerprint(), policy))


def held(ledger: Ledger) -> Hold:
    decision, claim = ask(ledger, b"a")
    assert isinstance(decision, Acquired)
    assert claim is not None
    return claim


def test_what_a_dead_worker_holds_is_decided_a_lease_after_the_clock_went_back(
    times: Times, ledger: Ledger, stepped: list[float]
) -> None:
    held(ledger)
    times.real += LEASE
    times.off -= HOUR
    decision, _ = ask(ledger)
    assert decision == Busy(LEASE, b"a" * 12)
    assert stepped == [LEASE / MICROSECONDS - 3600]
    entry = ledger.get(KEY)
    assert entry is not None
    assert (entry.state, entry.retry_after) == ("running", LEASE / MICROSECONDS)
    assert [note.by for note in entry.record.notes] == ["clock"]
    times.real += LEASE - 1
    assert ask(ledger)[0] == Busy(1, b"a" * 12)
    times.real += 1
    entry = ledger.get(KEY)
    assert entry is not None
    assert entry.state == "lapsed"
    assert isinstance(ask(ledger)[0], Acquired)
    assert len(stepped) == 1


@pytest.mark.parametrize("how", ["renewal", "step"])
def test_a_worker_that_lives_is_not_taken_for_dead(times: Times, ledger: Ledger, how: str) -> None:
    claim = held(ledger)
    times.off -= HOUR
    for n in range(10):
        assert ask(ledger)[0] == Busy(LEASE, b"a" * 12)
        times.real += LEASE // 3
        if how == "renewal":
            claim.renew()
        else:
            run_step(claim, ledger.codec, f"step {n}", lambda: 1, None, 0.0)
        times.real += LEASE * 7 // 12
        assert isinstance(ask(ledger)[0], Busy)
        assert not claim.lost or how == "step"
        times.real += LEASE // 12
        claim.renew()
        assert not claim.lost


def test_a_mark_is_answered_at_once_and_trusted_only_from_then(times: Times, ledger: Ledger) -> None:
    """A renewal does not take the mark of another process for its own earlier write."""
    claim = held(ledger)
    times.off -= HOUR
    ask(ledger)
    times.real += LEASE // 2
    claim.renew()
    entry = ledger.get(KEY)
    assert entry is not None
    assert entry.record.noticed is None
    assert claim.written is not None
    assert entry.changed_at == claim.written.stamp / MICROSECONDS


def test_a_person_is_refused_for_a_lease_and_not_for_an_hour(
    times: Times, ledger: Ledger, stepped: list[float]
) -> None:
    held(ledger)
    times.real += 2 * LEASE
    times.off -= HOUR
    with pytest.raises(IdempotencyError, match=r"went back after .* Try again in 30 s"):
        ledger.resolve(KEY, NotHappened(), by="anna")
    assert len(stepped) == 1
    times.real += LEASE
    assert ledger.resolve(KEY, NotHappened(), by="anna").state == "released"


def test_a_retry_that_never_comes_and_a_question_that_was_dropped(times: Times, ledger: Ledger) -> None:
    held(ledger).schedule(60.0, 0.0)
    times.off -= HOUR
    assert ask(ledger)[0] == Busy(2 * LEASE)
    times.real += 2 * LEASE
    decision, claim = ask(ledger)
    assert isinstance(decision, Acquired)
    assert claim is not None
    claim.doubt("why", 0.0)
    asks = POLICY._replace(asks=True)
    assert isinstance(ask(ledger, b"c", asks)[0], Ask)
    times.off -= HOUR
    assert ask(ledger, b"d", asks)[0] == Busy(LEASE, b"c" * 12)
    times.real += LEASE
    decision, claim = ask(ledger, b"d", asks)
    assert isinstance(decision, Ask)
    assert claim is not None
    assert isinstance(claim.conclude(None, "no")[0], InDoubt)


def test_an_asker_whose_renewal_lost_its_reply_goes_on_asking(times: Times, ledger: Ledger) -> None:
    held(ledger).doubt("why", 0.0)
    _, claim = ask(ledger, b"c", POLICY._replace(asks=True))
    assert claim is not None
    times.real += LEASE // 3
    offered = claim.renewal()
    assert offered is not None
    ledger.store.replace(*offered)  # its reply is lost
    times.real += LEASE // 3
    claim.renew()
    claim.renew()
    assert not claim.lost
    entry = ledger.get(KEY)
    assert entry is not None
    assert entry.age == 0.0


def test_a_hold_that_somebody_ended_needs_no_clock(times: Times, ledger: Ledger) -> None:
    held(ledger)
    ledger.lapse(KEY, b"a" * 12)
    times.off -= HOUR
    assert isinstance(ask(ledger)[0], Acquired)


def test_a_second_step_back_begins_the_count_anew(times: Times, ledger: Ledger) -> None:
    held(ledger)
    times.off -= HOUR
    ask(ledger)
    times.real += LEASE // 2
    times.off -= HOUR
    assert ask(ledger)[0] == Busy(LEASE, b"a" * 12)
    times.real += LEASE
    assert isinstance(ask(ledger)[0], Acquired)


def test_a_renewal_tells_of_a_clock_that_stepped(times: Times, ledger: Ledger, stepped: list[float]) -> None:
    claim, renewals = held(ledger), Renewals()
    for off in (0, 10, 0, 10, -3600, 0, 0, 0):
        times.real += LEASE // 3
        times.off += off * MICROSECONDS
        renewals.renew(ledger.store, [claim])
    assert stepped == [10.0, 10.0, -10.0]


def test_nobody_takes_over_from_a_holder_that_renews(
    times: Times, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps back of any length and steps ahead of up to half a lease are tolerated, as the guarantees page says."""
    monkeypatch.setattr(events, "emit", lambda kind, key, **details: None)
    chance = random.Random(7)
    claim, lives, stepped_at, took_over = held(ledger), True, 0, 0
    for n in range(3_000):
        times.real += LEASE // 12
        if chance.random() < 0.05:
            times.off -= chance.randrange(HOUR)
        elif chance.random() < 0.1 and times.real - stepped_at > LEASE:
            times.off += chance.randrange(LEASE // 2)
            stepped_at = times.real
        decision, other = ledger.claim(KEY, Request(b"%012d" % n, f"t{n}", Fingerprint(), POLICY))
        if isinstance(decision, Acquired):
            assert other is not None
            assert not lives
            claim, lives = other, True
            took_over += 1
        if lives and times.elapsed() - claim.written_at >= LEASE / MICROSECONDS / LOOKS_PER_LEASE:
            claim.renew()
            assert not claim.lost
            lives = chance.random() < 0.98
    assert took_over > 5
