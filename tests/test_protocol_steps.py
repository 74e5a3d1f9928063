"""The state machine: steps of a body."""

from __future__ import annotations

from celery_idem.core import protocol
from celery_idem.core.model import Done, State, StepDone, StepOpen
from tests.support.records import LEASE, OWN, a_request, held


def test_steps_run_once() -> None:
    record = held(State.RUNNING)
    assert record is not None
    policy = a_request(on_crash="resume").policy
    decision, begun = protocol.begin_step(record, OWN, "charge", policy)
    assert isinstance(decision, Done)
    assert begun is not None
    assert begun.open_steps == ("charge",)
    decision, _ = protocol.begin_step(begun, OWN, "charge", policy)
    assert isinstance(decision, StepOpen)
    decision, _ = protocol.begin_step(begun, OWN, "charge", a_request(on_crash="rerun").policy)
    assert isinstance(decision, Done)  # its destination is idempotent
    _, ended = protocol.end_step(begun, OWN, "charge", b"j1", LEASE)
    assert ended is not None
    assert ended.open_steps == ()
    decision, nothing = protocol.begin_step(ended, OWN, "charge", policy)
    assert decision == StepDone(b"j1")
    assert nothing is None
    _, without = protocol.end_step(begun, OWN, "charge", None, LEASE)  # it is known that nothing happened
    assert without is not None
    assert (without.steps, without.open_steps) == ((), ())


def test_a_step_whose_error_was_swallowed_stays_open() -> None:
    record = held(State.RUNNING)
    assert record is not None
    policy = a_request(on_crash="resume").policy
    _, charging = protocol.begin_step(record, OWN, "charge", policy)
    assert charging is not None
    decision, mailing = protocol.begin_step(charging, OWN, "mail", policy, {"charge"})
    assert isinstance(decision, Done)
    assert mailing is not None
    assert mailing.open_steps == ("charge", "mail")
    _, mailed = protocol.end_step(mailing, OWN, "mail", b"j1", LEASE)
    assert mailed is not None
    assert mailed.open_steps == ("charge",)
    decision, _ = protocol.begin_step(
        mailed, OWN, "charge", policy
    )  # the next attempt does not know whether it had an effect
    assert isinstance(decision, StepOpen)
    rerun = a_request(on_crash="rerun").policy
    _, again = protocol.begin_step(mailed, OWN, "log", rerun)
    assert again is not None
    assert again.open_steps == ("log",)
