"""The thread that renews leases: one for all claims of a store, in batches, restarted after a fork.

A body learns from it when its lease is lost.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from celery_idem.core.errors import StoreError
from celery_idem.core.model import MICROSECONDS, Acquired, Done, Fingerprint, Outcome, Policy, Request
from celery_idem.engine import clock, events, lease, owners
from celery_idem.engine.claim import Hold
from celery_idem.engine.lease import Renewer
from celery_idem.engine.ledger import Ledger
from celery_idem.stores.base import Change, Reply
from celery_idem.stores.memory import MemoryStore
from celery_idem.testing import CrashingStore
from tests.support.waiting import wait_for

LEASE = MICROSECONDS
"""One second: much longer than a thread switch on a busy machine, and short to wait for."""

SOON = 20.0


class Counting(CrashingStore):
    """Records the size of every batch of renewals, and calls ``during`` once, in the middle of a batch."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.batches: list[int] = []
        self.during: Callable[[], object] | None = None

    def replace_many(self, changes: Sequence[Change]) -> list[Reply]:
        self.batches.append(len(changes))
        during, self.during = self.during, None
        if during is not None:
            during()
        return super().replace_many(changes)


def policy(lease: int = LEASE) -> Policy:
    return Policy(lease, 10**12, 10**12, "rerun")


def claimed(ledger: Ledger, key: str, lease: int = LEASE) -> Hold:
    decision, claim = ledger.claim(key, Request(owners.mint(), "task", Fingerprint(), policy(lease)))
    assert isinstance(decision, Acquired)
    assert claim is not None
    return claim


def stamp_of(ledger: Ledger, key: str) -> float:
    entry = ledger.get(key)
    assert entry is not None
    return entry.changed_at


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(Counting())


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "celery_idem leases"]


def test_no_thread_without_a_claim_and_one_for_all_of_a_store(ledger: Ledger) -> None:
    before = threads()  # these belong to earlier tests, and are about to end
    renewer = Renewer()
    assert not set(threads()) - set(before)
    other = Ledger(ledger.store, "another")
    claims = [(claimed(place, f"k{n}"), place) for n in range(10) for place in (ledger, other)]
    start = threading.Barrier(len(claims))

    def watch(claim: Hold, place: Ledger) -> None:
        start.wait(SOON)
        renewer.watch(claim)

    watchers = [threading.Thread(target=watch, args=pair) for pair in claims]
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.join(SOON)
    assert len(set(threads()) - set(before)) == 1
    for claim, _ in claims:
        renewer.unwatch(claim)


def test_claims_are_renewed_together_and_live_on(ledger: Ledger) -> None:
    renewer = Renewer()
    claims = [claimed(ledger, f"k{n}") for n in range(20)]
    began = [stamp_of(ledger, claim.key) for claim in claims]
    for claim in claims:
        renewer.watch(claim)
    wait_for(
        lambda: all(
            stamp_of(ledger, c.key) > b + 2 * LEASE / MICROSECONDS for c, b in zip(claims, began, strict=True)
        ),
        SOON,
        "every claim to be renewed for twice its lease",
    )
    store = ledger.store
    assert isinstance(store, Counting)
    assert max(store.batches) == len(claims)
    assert "replace" not in store.calls
    assert not any(claim.lost for claim in claims)
    for claim in claims:
        renewer.unwatch(claim)


def test_a_short_lease_after_a_long_one_is_not_missed(ledger: Ledger) -> None:
    """The thread is sleeping until the long lease is due when the short one is added."""
    renewer = Renewer()
    long, short = claimed(ledger, "long", 3600 * MICROSECONDS), claimed(ledger, "short")
    renewer.watch(long)
    began = stamp_of(ledger, "short")
    renewer.watch(short)
    wait_for(lambda: stamp_of(ledger, "short") > began, SOON, "the short lease to be renewed")
    assert not short.lost
    renewer.unwatch(long)
    renewer.unwatch(short)


def test_a_short_lease_that_comes_in_the_middle_of_a_look_is_not_missed(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread has looked at the watched claims, and would sleep for longer than the short lease lasts."""
    renewer = Renewer()
    length = 3 * MICROSECONDS
    elapsed = clock.elapsed
    monkeypatch.setattr(clock, "elapsed", lambda: elapsed() - 3600.0)
    long = claimed(ledger, "long", 60 * MICROSECONDS)  # due at once
    monkeypatch.undo()
    short = claimed(ledger, "short", length)
    store = ledger.store
    assert isinstance(store, Counting)
    store.during = lambda: renewer.watch(short)
    began = stamp_of(ledger, "short")
    renewer.watch(long)
    wait_for(lambda: stamp_of(ledger, "short") > began, SOON, "the short lease to be renewed")
    assert stamp_of(ledger, "short") < began + length / MICROSECONDS
    renewer.unwatch(long)
    renewer.unwatch(short)


def test_a_store_that_hangs_delays_no_other(ledger: Ledger) -> None:
    renewer = Renewer()
    hanging = Ledger(Counting())
    assert isinstance(hanging.store, Counting)
    began, go_on = threading.Event(), threading.Event()
    hanging.store.during = lambda: (began.set(), go_on.wait(3 * SOON))
    there, here = claimed(hanging, "k"), claimed(ledger, "k")
    try:
        renewer.watch(there)
        assert began.wait(SOON)
        renewer.watch(here)
        first = stamp_of(ledger, "k")
        wait_for(
            lambda: stamp_of(ledger, "k") > first + 2 * LEASE / MICROSECONDS, SOON, "renewals of the other"
        )
        assert there.lost
    finally:
        go_on.set()
        renewer.unwatch(there)
        renewer.unwatch(here)


def test_a_thread_without_claims_ends_and_the_next_claim_starts_another(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LONGEST_SLEEP", 0.0001)
    renewer = Renewer()
    claim = claimed(ledger, "k", 1)
    renewer.watch(claim)
    (keeper,) = renewer._keepers.values()
    renewer.unwatch(claim)
    for n in range(100):  # each claim comes at another moment of the thread's end
        wait_for(lambda: keeper._thread is None, SOON, "the thread to end", every=0.0)
        claim = claimed(ledger, f"k{n}", 1)
        renewer.watch(claim)
        assert keeper._thread is not None
        renewer.unwatch(claim)
    claim = claimed(ledger, "the last")
    renewer.watch(claim)
    began = stamp_of(ledger, claim.key)
    wait_for(lambda: stamp_of(ledger, claim.key) > began, SOON, "a renewal")
    renewer.unwatch(claim)


def test_nothing_is_kept_of_a_store_that_is_no_more() -> None:
    renewer = Renewer()
    place = Ledger(Counting())
    claim = claimed(place, "k")
    renewer.watch(claim)
    renewer.unwatch(claim)
    del place, claim
    wait_for(lambda: (gc.collect(), not renewer._keepers)[1], SOON, "its thread to be dropped")


def test_the_trust_in_a_lease_ends_while_the_machine_is_suspended(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = claimed(ledger, "k", 3600 * MICROSECONDS)
    assert not claim.lost
    elapsed = clock.elapsed
    monkeypatch.setattr(clock, "elapsed", lambda: elapsed() + 3600.0)
    assert claim.lost
    if sys.platform == "linux":
        monkeypatch.undo()
        before = time.clock_gettime(time.CLOCK_BOOTTIME)
        assert before <= clock.elapsed() <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_what_has_ended_is_renewed_no_more(ledger: Ledger) -> None:
    renewer = Renewer()
    ended, running = claimed(ledger, "ended"), claimed(ledger, "running")
    renewer.watch(ended)
    renewer.watch(running)
    assert isinstance(ended.settle(Outcome(True, b"j1"), 0.0), Done)
    renewer.unwatch(ended)
    settled, began = stamp_of(ledger, "ended"), stamp_of(ledger, "running")
    wait_for(
        lambda: stamp_of(ledger, "running") > began + LEASE / MICROSECONDS, SOON, "renewals of the other"
    )
    assert stamp_of(ledger, "ended") == settled
    renewer.unwatch(running)


def test_settling_while_it_is_renewed_keeps_the_outcome(ledger: Ledger) -> None:
    renewer = Renewer()
    for n in range(30):
        claim = claimed(ledger, f"k{n}", MICROSECONDS // 10)
        renewer.watch(claim)
        threading.Event().wait(0.01)  # a renewal may be under way now; the outcome must not depend on it
        assert isinstance(claim.settle(Outcome(True, b"j1"), 5.0), Done)
        renewer.unwatch(claim)
        entry = ledger.get(f"k{n}")
        assert entry is not None
        assert entry.state == "succeeded"


def test_a_store_that_fails_for_a_moment_costs_nothing(ledger: Ledger) -> None:
    store = ledger.store
    assert isinstance(store, Counting)
    renewer = Renewer()
    claim = claimed(ledger, "k", 2 * MICROSECONDS)
    store.crash("before replace_many", times=2)
    began = stamp_of(ledger, "k")
    renewer.watch(claim)
    wait_for(lambda: stamp_of(ledger, "k") > began, SOON, "a renewal after two that failed")
    assert not claim.lost
    renewer.unwatch(claim)


def test_a_lost_reply_to_a_renewal_costs_nothing(ledger: Ledger) -> None:
    store = ledger.store
    assert isinstance(store, Counting)
    renewer = Renewer()
    claim = claimed(ledger, "k", 2 * MICROSECONDS)
    store.crash("after replace_many")
    renewer.watch(claim)
    wait_for(lambda: len(store.batches) >= 3, SOON, "renewals after the one whose reply got lost")
    assert not claim.lost
    renewer.unwatch(claim)
    assert isinstance(claim.settle(Outcome(True, b"j1"), 0.0), Done)


def test_a_body_learns_that_nobody_could_renew(ledger: Ledger) -> None:
    store = ledger.store
    assert isinstance(store, Counting)
    renewer = Renewer()
    claim = claimed(ledger, "k")
    store.crash("before replace_many", times=10_000)
    renewer.watch(claim)
    assert not claim.lost
    wait_for(lambda: claim.lost, SOON, "the body to learn it")
    # No other worker has taken over, so the next renewal restores the claim.
    store.heal()
    wait_for(lambda: not claim.lost, SOON, "the next renewal, as no worker took over")
    renewer.unwatch(claim)


def test_a_body_learns_that_somebody_took_over(ledger: Ledger) -> None:
    seen: list[events.Event] = []
    stop = events.listen(seen.append, here=True)
    renewer = Renewer()
    claim = claimed(ledger, "k")
    wait_for(lambda: (entry := ledger.get("k")) and entry.state == "lapsed", SOON, "the lease to lapse")
    claimed(ledger, "k", 60 * MICROSECONDS)
    try:
        renewer.watch(claim)
        wait_for(lambda: claim.lost and "lease_lost" in [event.kind for event in seen], SOON, "the loss")
        renewer.unwatch(claim)
    finally:
        stop()
    assert [event.kind for event in seen if event.kind == "lease_lost"] == ["lease_lost"]


def test_a_forked_child_starts_a_thread_of_its_own(ledger: Ledger) -> None:
    renewer = Renewer()
    claim = claimed(ledger, "parent")
    renewer.watch(claim)
    child = os.fork()
    if child == 0:  # pragma: no cover
        status = 1
        with contextlib.suppress(BaseException):
            mine = claimed(ledger, "child")
            began = stamp_of(ledger, "child")
            parents = stamp_of(ledger, "parent")
            renewer.watch(mine)
            wait_for(lambda: stamp_of(ledger, "child") > began, SOON, "a renewal in the child")
            assert stamp_of(ledger, "parent") == parents  # the child does not renew its parent's claim
            status = 0
        os._exit(status)
    try:
        wait_for(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT), SOON, "the child")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        renewer.unwatch(claim)
    assert os.waitstatus_to_exitcode(status) == 0


def test_owners_differ_per_execution_and_name_their_process() -> None:
    minted = {owners.mint() for _ in range(1000)}
    assert len(minted) == 1000
    assert {len(owner) for owner in minted} == {12}
    assert {owner[:7] for owner in minted} == {owners.prefix(os.getpid())}
    assert owners.prefix(os.getpid()).startswith(owners.prefix(None))


@pytest.mark.parametrize(
    ("error", "again"),
    [(StoreError("away"), 1), (StoreError("no record", "a:key"), 0), (ValueError("a bug"), 0)],
)
def test_an_answer_that_cannot_be_noted_does_not_end_the_thread(error: Exception, again: int) -> None:
    """It also renews leases."""

    class Answered:
        key = "a:key"

        def told(self) -> None:
            raise error

    keeper = lease._Keeper(lambda: None)  # type: ignore[arg-type]
    keeper.given.append(Answered())  # type: ignore[arg-type]
    keeper.flush()
    assert len(keeper.given) == again
