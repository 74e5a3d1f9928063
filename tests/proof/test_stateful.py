"""The same random operations have the same results on every store and on the pure protocol over a plain variable.

Leases are an hour or zero, so that the clocks of the stores do not matter. The tests choose the owners, so the records
must be equal except for what comes from a clock: the fence and the times of the notes.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
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

from celery_idem.core import protocol
from celery_idem.core.errors import IdempotencyError, LeaseLost
from celery_idem.core.model import (
    Acquired,
    Again,
    Ask,
    Busy,
    Coming,
    Done,
    Fingerprint,
    Happened,
    Late,
    Note,
    NotHappened,
    Outcome,
    Policy,
    Record,
    Replay,
    Request,
    Resolution,
    State,
    Unknown,
)
from celery_idem.core.record import pack, unpack
from celery_idem.engine.claim import Hold
from celery_idem.engine.ledger import Ledger
from celery_idem.stores import open_store
from tests.conftest import running
from tests.stores.servers import Cluster, Watched

HOUR = 3_600_000_000
DAY = 24 * HOUR
owners = itertools.count(1)
PROCESS = 7
"""Bytes of an owner that name its process (see `celery_idem.engine.owners`). Here each owner has another process."""

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
    """Return a record without what comes from a clock."""
    if record is None:
        return None
    notes = tuple(note._replace(at=0, late=timeless(note.late)) for note in record.notes)
    lease = bool(record.lease) if record.state is State.SCHEDULED else record.lease  # what is left of it
    return record._replace(fence=0, lease=lease, notes=notes)


def timeless(late: Late | None) -> Late | None:
    return None if late is None else late._replace(fence=0, stood_fence=0, stood_at=0)


def step(hold: Hold, act: Callable[[], Any]) -> Any:
    """Begin or end a step, and return the result. It is "lost" if the step is refused with LeaseLost."""
    try:
        decision = act()
    except LeaseLost:
        return "lost"
    return told(Done(hold.record) if decision is None else decision)


def lost(expected: Any) -> Any:
    return "lost" if expected[0] == "Refused" else expected


def told(decision: Any) -> Any:
    """Return a decision without what comes from a clock."""
    if decision is None:
        return None
    if isinstance(decision, Busy):
        return ("Busy", decision.retry_after > 0)
    if isinstance(decision, (Acquired, Ask, Done)):
        return (type(decision).__name__, plain(decision.record))
    if isinstance(decision, Replay):
        return decision
    if isinstance(decision, (Again, Coming)):  # they say nothing else
        return (type(decision).__name__,)
    return (type(decision).__name__, *(plain(x) if isinstance(x, Record) else x for x in decision))


class Pure:
    """The pure protocol over a variable. Its clock counts calls."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self.stamp = 0
        self.now = 1

    def _written(self, decision: Any, new: Record | None) -> Any:
        if new is not None:
            # Packed and unpacked, as a store returns it.
            self.stamp = max(self.now, self.stamp + 1)
            self.record = unpack(pack(new), self.stamp, "")
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
    """One intent and a growing list of claims, on all stores at once."""

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
        """Remember the claim or the question that all stores granted."""
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
        owner = next(owners).to_bytes(PROCESS, "big") + bytes(12 - PROCESS)
        request = Request(owner, task, fingerprint, policy, carried)
        expected = self.pure.claim(request)
        self.keep(
            request, expected, {n: ledger.claim(self.key, request) for n, ledger in self.ledgers.items()}
        )

    @precondition(lambda self: self.questions)
    @rule(answer=ANSWERS, which=st.integers(0, 3))
    def conclude(self, answer: Any, which: int) -> None:
        # Only once: a second call would find its own result in the store, and take it for a write with a lost reply.
        request, held = self.questions.pop(which % len(self.questions))
        outcome = Outcome(True, b"j1") if isinstance(answer, Happened) else None
        reason = answer.reason if isinstance(answer, Unknown) else ""
        expected = self.pure.conclude(request, outcome, reason)
        self.keep(request, expected, {n: held[n].conclude(outcome, reason) for n in self.ledgers})

    def ends(
        self, which: int, pure: Callable[[Record, Request, Record], Any], real: Callable[[Any], Any]
    ) -> None:
        request, held, mine = self.claims[which % len(self.claims)]
        expected = self.pure.act(lambda record: pure(record, request, mine))
        self.same(expected, {n: told(real(held[n])) for n in self.ledgers})
        if expected[0] == "Done":  # an execution ends once; afterwards the claim answers from memory
            del self.claims[which % len(self.claims)]

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 3), outcome=OUTCOMES)
    def settle(self, which: int, outcome: Outcome) -> None:
        self.ends(
            which,
            lambda r, q, mine: protocol.settle(r, mine, outcome, True, self.pure.stamp, self.pure.now),
            lambda hold: hold.settle(outcome, 0.0),
        )

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 3))
    def release(self, which: int) -> None:
        self.ends(which, lambda r, q, mine: protocol.release(r, q.owner), lambda hold: hold.release(0.0))

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 3), delay=st.sampled_from([0, 3600]))
    def schedule(self, which: int, delay: int) -> None:
        wait = delay * 1_000_000
        self.ends(
            which,
            lambda r, q, mine: protocol.schedule(r, q.owner, wait),
            lambda hold: hold.schedule(delay, 0.0),
        )

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 3))
    def doubt(self, which: int) -> None:
        self.ends(
            which,
            lambda r, q, mine: protocol.doubt(r, q.owner, "why", mine, self.pure.stamp, self.pure.now),
            lambda hold: hold.doubt("why", 0.0),
        )

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 3))
    def exit(self, which: int) -> None:
        self.ends(
            which,
            lambda r, q, mine: protocol.exit(
                r, q.owner, q.policy, "told to", mine, self.pure.stamp, self.pure.now
            ),
            lambda hold: hold.exit("told to", 0.0),
        )

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 3), name=st.sampled_from(["charge", "mail"]))
    def begin_step(self, which: int, name: str) -> None:
        request, held, _ = self.claims[which % len(self.claims)]

        def begin(record: Record) -> Any:
            return protocol.begin_step(record, request.owner, name, request.policy, begun)

        begun = held["memory"].steps_begun
        expected = self.pure.act(begin)
        self.same(lost(expected), {n: step(held[n], partial(held[n].begin_step, name)) for n in self.ledgers})

    @precondition(lambda self: self.claims)
    @rule(
        which=st.integers(0, 3),
        name=st.sampled_from(["charge", "mail"]),
        payload=st.sampled_from([b"j1", None]),
    )
    def end_step(self, which: int, name: str, payload: bytes | None) -> None:
        request, held, _ = self.claims[which % len(self.claims)]

        def end(record: Record) -> Any:
            return protocol.end_step(record, request.owner, name, payload, request.policy.lease)

        self.same(
            lost(self.pure.act(end)),
            {n: step(held[n], partial(held[n].end_step, name, payload, 0.0)) for n in self.ledgers},
        )

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 3), again=st.integers(0, 2))
    def died(self, which: int, again: int) -> None:
        """The main process reports that the process of a claim is dead."""
        q, _, _ = self.claims[which % len(self.claims)]
        prefix, pure = q.owner[:PROCESS], self.pure
        expected = pure.act(lambda r: protocol.died(r, pure.stamp, prefix, q.task_id, q.policy, again))
        got = {n: x.died(self.key, prefix, q.task_id, q.policy, again) for n, x in self.ledgers.items()}
        self.same(expected, {name: told(verdict) for name, (verdict, _) in got.items()})

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 3))
    def lapse(self, which: int) -> None:
        """A delivery sees that the process of a claim is dead."""
        owner = self.claims[which % len(self.claims)][0].owner
        self.pure.act(lambda record: (None, protocol.lapse(record, owner)))
        for ledger in self.ledgers.values():
            ledger.lapse(self.key, owner)
        self.same(None, {})

    @precondition(lambda self: self.pure.record is not None)
    @rule(happened=st.booleans(), attempt=st.sampled_from(["any", "this", "an earlier one"]))
    def resolve(self, happened: bool, attempt: str) -> None:
        outcome = Outcome(True, b"j1") if happened else None
        answer = Happened(1) if happened else NotHappened()
        decided = Resolution.HAPPENED if happened else Resolution.NOT_HAPPENED
        note = Note(0, "me", "happened" if happened else "not happened", "seen", resolution=decided)
        pure = self.pure

        def fence(record: Record) -> int | None:
            return None if attempt == "any" else record.fence - (attempt != "this")

        expected = pure.act(
            lambda record: protocol.resolve(record, pure.stamp, pure.now, outcome, note, fence(record))
        )[0]
        got = {}
        for name, ledger in self.ledgers.items():
            entry = ledger.get(self.key)
            assert entry is not None
            try:
                ledger.resolve(self.key, answer, by="me", evidence="seen", fence=fence(entry.record))
            except IdempotencyError:
                got[name] = "Refused"
            else:
                got[name] = "Done"
        self.same(expected, got)

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 3))
    def renew(self, which: int) -> None:
        """A renewal changes only the time, unless the holder was taken for dead. A lost claim changes nothing."""
        request, held, _ = self.claims[which % len(self.claims)]
        self.pure.act(lambda record: protocol.renew(record, request.owner, request.policy.lease))
        for name in self.ledgers:
            held[name].renew()
        self.same(None, {})


@pytest.fixture
def stores(redis_url: str, valkey_url: str, postgres_url: str, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """One store of every kind."""
    with ExitStack() as ends:
        sentinels = ends.enter_context(running(lambda: Watched(tmp_path / "sentinels")))
        cluster = ends.enter_context(running(lambda: Cluster(tmp_path / "cluster")))
        urls = {
            "memory": f"memory://{tmp_path}",
            "redis": redis_url,
            "valkey": valkey_url,
            "sentinel": sentinels.url,
            "cluster": cluster.url,
            "sqlite": f"sqlite:///{tmp_path}/idem.db",
            "postgres": postgres_url,
        }
        opened = {name: open_store(url) for name, url in urls.items()}
        for store in opened.values():
            ends.callback(store.close)
        yield opened


@pytest.mark.valkey
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
