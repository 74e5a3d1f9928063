"""The same random operations on every store, and on the pure protocol over a plain variable: equal answers.

Leases are an hour, or nothing at all, so that the clocks of the stores do not matter. Owners are given, so
records must be equal but for what a clock says (fence, and the times of the notes).
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from celery_idem import codec, protocol
from celery_idem.errors import IdempotencyError
from celery_idem.intent import (
    Acquired,
    Ask,
    Busy,
    Done,
    Fingerprint,
    Happened,
    Note,
    NotHappened,
    Outcome,
    Policy,
    Record,
    Replay,
    Request,
    Unknown,
)
from celery_idem.ledger import Ledger
from celery_idem.stores import open_store

HOUR = 3_600_000_000
DAY = 24 * HOUR
owners = itertools.count(1)

POLICIES = st.builds(
    Policy,
    lease=st.sampled_from([0, HOUR]),
    result_ttl=st.just(DAY),
    failure_ttl=st.just(DAY),
    on_crash=st.sampled_from(["in_doubt", "resume", "rerun"]),
    asks=st.booleans(),
    max_attempts=st.sampled_from([1, 2]),
)
ANSWERS = st.sampled_from([Happened(1), NotHappened(), Unknown("no idea")])
OUTCOMES = st.sampled_from(
    [Outcome(True, b"j1"), Outcome(True, None, "too large"), Outcome(False, b'j{"args":[]}')]
)


def plain(record: Record | None) -> Any:
    """A record without what a clock says."""
    if record is None:
        return None
    notes = tuple(note._replace(at=0) for note in record.notes)
    return record._replace(fence=0, notes=notes)


def told(decision: Any) -> Any:
    """A decision without what a clock says."""
    if isinstance(decision, Busy):
        return ("Busy", decision.retry_after > 0)
    if isinstance(decision, (Acquired, Ask, Done)):
        return (type(decision).__name__, plain(decision.record))
    if isinstance(decision, Replay):
        return decision
    return (type(decision).__name__, *(plain(x) if isinstance(x, Record) else x for x in decision))


class Pure:
    """The protocol over a variable. The clock counts calls."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self.stamp = 0
        self.now = 1

    def _written(self, decision: Any, new: Record | None) -> Any:
        if new is not None:
            # As a store would give it back: a record that its bytes do not hold would be no record.
            self.stamp = max(self.now, self.stamp + 1)
            self.record = codec.unpack(codec.pack(new), self.stamp, "")
        return told(decision)

    def claim(self, request: Request) -> Any:
        self.now += 1
        if self.record is None:
            new = protocol.fresh(request)
            return self._written(Acquired(new), new)
        return self._written(*protocol.claim(self.record, self.stamp, self.now, request))

    def conclude(self, request: Request, outcome: Outcome | None, reason: str) -> Any:
        self.now += 1
        assert self.record is not None
        return self._written(*protocol.conclude(self.record, self.now, request, outcome, reason))

    def act(self, transition: Callable[[Record], Any]) -> Any:
        self.now += 1
        assert self.record is not None
        return self._written(*transition(self.record))


class Machine(RuleBasedStateMachine):
    """One intent, a growing list of claims, every store at once."""

    stores: dict[str, Any]

    @initialize()
    def begin(self) -> None:
        self.key = f"shop.charge:{uuid.uuid4().hex}"
        self.ledgers = {name: Ledger(store) for name, store in self.stores.items()}
        self.pure = Pure()
        self.claims: list[tuple[Request, dict[str, Any], Record]] = []
        self.questions: list[tuple[Request, dict[str, Any]]] = []

    def same(self, expected: Any, got: dict[str, Any]) -> None:
        for name, answer in got.items():
            assert answer == expected, name
        for name, ledger in self.ledgers.items():
            entry = ledger.get(self.key)
            assert plain(entry.record if entry else None) == plain(self.pure.record), name

    def keep(self, request: Request, expected: Any, got: dict[str, Any]) -> None:
        """Remember a hold that all stores gave."""
        held = {name: claim for name, (_, claim) in got.items()}
        self.same(expected, {name: told(decision) for name, (decision, _) in got.items()})
        if expected[0] == "Acquired":
            assert self.pure.record is not None
            self.claims.append((request, held, self.pure.record))
        elif expected[0] == "Ask":
            self.questions.append((request, held))

    @rule(
        policy=POLICIES,
        task=st.sampled_from(["t1", "t2"]),
        value=st.sampled_from([b"", b"1", b"1", b"2"]),
        carries=st.booleans(),
    )
    def claim(self, policy: Policy, task: str, value: bytes, carries: bool) -> None:
        fingerprint = Fingerprint(("cents",), b"cent" + value.ljust(8)) if value else Fingerprint()
        carried = tuple(request.owner for request, _, _ in self.claims[-1:]) if carries else ()
        owner = next(owners).to_bytes(12, "big")
        request = Request(owner, task, fingerprint, policy, carried)
        expected = self.pure.claim(request)
        self.keep(
            request, expected, {n: ledger.claim(self.key, request) for n, ledger in self.ledgers.items()}
        )

    @precondition(lambda self: self.questions)
    @rule(answer=ANSWERS, which=st.integers(0, 3))
    def conclude(self, answer: Any, which: int) -> None:
        request, held = self.questions[which % len(self.questions)]
        outcome = Outcome(True, b"j1") if isinstance(answer, Happened) else None
        reason = answer.reason if isinstance(answer, Unknown) else ""
        expected = self.pure.conclude(request, outcome, reason)
        self.keep(
            request, expected, {n: ledger.conclude(held[n], answer) for n, ledger in self.ledgers.items()}
        )

    def ends(
        self, which: int, pure: Callable[[Record, Request, Record], Any], real: Callable[[Ledger, Any], Any]
    ) -> None:
        request, held, mine = self.claims[which % len(self.claims)]
        expected = self.pure.act(lambda record: pure(record, request, mine))
        self.same(expected, {n: told(real(ledger, held[n])) for n, ledger in self.ledgers.items()})
        if expected[0] == "Done":  # an execution ends once; what it wrote last it answers from memory
            del self.claims[which % len(self.claims)]

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 3), outcome=OUTCOMES)
    def settle(self, which: int, outcome: Outcome) -> None:
        self.ends(
            which,
            lambda r, q, mine: protocol.settle(r, mine, outcome),
            lambda x, c: x.settle(c, outcome, 0.0),
        )

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 3))
    def release(self, which: int) -> None:
        self.ends(which, lambda r, q, mine: protocol.release(r, q.owner), lambda x, c: x.release(c, 0.0))

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 3), delay=st.sampled_from([0, 3600]))
    def schedule(self, which: int, delay: int) -> None:
        wait = delay * 1_000_000
        self.ends(
            which,
            lambda r, q, mine: protocol.schedule(r, q.owner, wait),
            lambda x, c: x.schedule(c, delay, 0.0),
        )

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 3))
    def doubt(self, which: int) -> None:
        self.ends(
            which, lambda r, q, mine: protocol.doubt(r, q.owner, "why"), lambda x, c: x.doubt(c, "why", 0.0)
        )

    @precondition(lambda self: self.pure.record is not None)
    @rule(happened=st.booleans())
    def resolve(self, happened: bool) -> None:
        outcome = Outcome(True, b"j1") if happened else None
        answer = Happened(1) if happened else NotHappened()
        note = Note(0, "me", "happened" if happened else "not happened", "seen")
        pure = self.pure
        expected = pure.act(lambda record: protocol.resolve(record, pure.stamp, pure.now, outcome, note))[0]
        got = {}
        for name, ledger in self.ledgers.items():
            try:
                ledger.resolve(self.key, answer, by="me", evidence="seen")
            except IdempotencyError:
                got[name] = "Refused"
            else:
                got[name] = "Done"
        self.same(expected, got)

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 3))
    def renew(self, which: int) -> None:
        """Changes nothing that can be seen but the time; a lost one must not either."""
        _, held, _ = self.claims[which % len(self.claims)]
        for name, ledger in self.ledgers.items():
            ledger.renew([held[name]])
        self.same(None, {})


@pytest.fixture
def stores(redis_url: str, postgres_url: str, tmp_path: Path) -> Iterator[dict[str, Any]]:
    urls = {
        "memory": "memory://",
        "redis": redis_url,
        "sqlite": f"sqlite:///{tmp_path}/idem.db",
        "postgres": postgres_url,
    }
    opened = {name: open_store(url) for name, url in urls.items()}
    yield opened
    for store in opened.values():
        store.close()


@pytest.mark.redis
@pytest.mark.postgres
def test_every_store_answers_as_the_pure_protocol(stores: dict[str, Any]) -> None:
    Machine.stores = stores
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
