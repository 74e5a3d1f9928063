"""The state machine: answers of a destination, and decisions of a person."""

from __future__ import annotations

from typing import Any

from celery_idem.core import protocol
from celery_idem.core.model import (
    NO_OWNER,
    Acquired,
    Ask,
    Busy,
    Done,
    InDoubt,
    Outcome,
    Record,
    Refused,
    Replay,
    State,
)
from tests.support.records import (
    DEADLINE,
    LAPSED,
    LEASE,
    MAX_ATTEMPTS,
    NOTE,
    OTHER,
    OUTCOME,
    OWN,
    STAMP,
    a_request,
    held,
)


def asked(**changes: Any) -> Record:
    record = held(State.IN_DOUBT, owner=OTHER, asking=OWN, crashes=1, **changes)
    assert record is not None
    return record


def test_what_a_destination_answers() -> None:
    request = a_request(asks=True)
    decision, new = protocol.conclude(asked(), STAMP, request, OUTCOME, "")
    assert decision == Replay(OUTCOME)
    assert new is not None
    assert new.notes[-1].by == "reconcile"
    decision, new = protocol.conclude(asked(open_steps=("charge",)), STAMP, request, None, "")
    assert isinstance(decision, Acquired)
    assert new is not None
    assert (new.state, new.owner, new.open_steps) == (State.RUNNING, OWN, ())
    decision, new = protocol.conclude(asked(), STAMP, request, None, "it cannot tell")
    assert decision == InDoubt("it cannot tell")
    assert new is not None
    assert (new.asking, new.lease) == (b"", 0)


def test_a_destination_that_says_no_too_often_ends_in_doubt() -> None:
    decision, _ = protocol.conclude(
        asked()._replace(crashes=MAX_ATTEMPTS), STAMP, a_request(asks=True), None, ""
    )
    assert isinstance(decision, InDoubt)


def test_an_answer_to_a_question_that_somebody_else_took_over_runs_nothing() -> None:
    request = a_request(asks=True)
    taken_over = asked()._replace(asking=OTHER)
    decision, new = protocol.conclude(taken_over, STAMP, request, None, "")
    assert isinstance(decision, Busy)
    assert new is None
    decision, new = protocol.conclude(taken_over, STAMP, request, OUTCOME, "")
    assert decision == Replay(OUTCOME)  # evidence counts, whichever worker asked
    for state in (State.SUCCEEDED, State.FAILED):
        settled = held(state, owner=OTHER)
        assert settled is not None
        decision, new = protocol.conclude(settled, STAMP, request, None, "")
        assert isinstance(decision, Replay)
        assert new is None


def test_evidence_counts_against_a_person_who_said_it_did_not_happen() -> None:
    released = held(State.RELEASED, owner=NO_OWNER)
    assert released is not None
    decision, new = protocol.conclude(released, STAMP, a_request(asks=True), OUTCOME, "")
    assert decision == Replay(OUTCOME)
    assert new is not None
    decision, new = protocol.conclude(released, STAMP, a_request(asks=True), None, "")
    assert new is None


def test_a_question_does_not_silence_the_owner() -> None:
    record = held(State.RUNNING, owner=OTHER, lease=LEASE)
    assert record is not None
    decision, question = protocol.claim(record, STAMP, LAPSED, a_request(asks=True))
    assert isinstance(decision, Ask)
    assert question is not None
    decision, settled = protocol.settle(question, record, OUTCOME)
    assert isinstance(decision, Done)
    assert settled is not None


def test_a_person_resolves_what_is_in_doubt_and_it_is_written_down() -> None:
    for state in (State.IN_DOUBT, State.RUNNING):
        record = held(state, owner=OTHER)
        assert record is not None
        _, happened = protocol.resolve(record, STAMP, LAPSED, OUTCOME, NOTE)
        assert happened is not None
        assert (happened.state, happened.outcome, happened.owner) == (State.SUCCEEDED, OUTCOME, NO_OWNER)
        assert NOTE in happened.notes
        _, not_happened = protocol.resolve(record, STAMP, LAPSED, None, NOTE)
        assert not_happened is not None
        assert (not_happened.state, not_happened.crashes) == (State.RELEASED, 0)
        assert not_happened.fence > record.fence
        assert NOTE in not_happened.notes


def test_a_person_decides_on_the_attempt_they_looked_at() -> None:
    record = held(State.IN_DOUBT)
    assert record is not None
    for outcome in (OUTCOME, None):
        decision, new = protocol.resolve(record, STAMP, LAPSED, outcome, NOTE, record.fence - 1)
        assert isinstance(decision, Refused)
        assert new is None
        decision, new = protocol.resolve(record, STAMP, LAPSED, outcome, NOTE, record.fence)
        assert isinstance(decision, Done)


def test_nobody_resolves_over_a_live_lease() -> None:
    record = held(State.RUNNING)
    assert record is not None
    decision, new = protocol.resolve(record, STAMP, DEADLINE - 1, OUTCOME, NOTE)
    assert isinstance(decision, Refused)
    assert new is None


def test_a_late_owner_is_refused_once_a_person_has_decided() -> None:
    record = held(State.IN_DOUBT)
    assert record is not None
    for outcome in (OUTCOME, None):
        _, resolved = protocol.resolve(record, STAMP, LAPSED, outcome, NOTE)
        assert resolved is not None
        decision, new = protocol.settle(resolved, record, Outcome(True, b"j2"))
        assert isinstance(decision, Refused)
        assert new is None
