"""Records and requests for tests of the state machine, with distinct owners and times."""

from __future__ import annotations

from typing import Any, NamedTuple

from celery_idem.core.model import (
    Fingerprint,
    Note,
    Outcome,
    Policy,
    Record,
    Request,
    Resolution,
    State,
    Step,
)

OWN, CARRIED, OTHER = b"own---owner-", b"carry-owner-", b"other-owner-"
LEASE = 30_000_000
STAMP = 1_000_000_000
DEADLINE = STAMP + LEASE
MAX_ATTEMPTS = 3
OUTCOME = Outcome(True, b"j1")
ERROR = Outcome(False, b"j{}")
PRINT = Fingerprint(("cents",), b"tag.valuedig")
OTHER_PRINT = Fingerprint(("cents",), b"tag.VALUEDIG")
FENCE = 77
NOTE = Note(STAMP, "jo", "happened", "invoice 7")
LAPSED = DEADLINE
CANCELLED = Outcome(False, None, "cancelled by jo", cancelled=True)
ASKED_TO_STOP = Note(STAMP, "jo", "cancelled", "", resolution=Resolution.CANCELLED)
STEPS = (Step("charge", b"j1"),)
FAILURE_TTL = 2


class Meeting(NamedTuple):
    """The record that a claim finds, and the request."""

    state: State | None
    print: str
    owner: str
    same_task: bool
    now: int
    on_crash: str
    asks: bool
    crashes: int
    asking: str
    steps: bool = False
    stopping: bool = False
    late: bool = False

    @property
    def record(self) -> Record | None:
        if self.state is None:
            return None
        outcome = {State.SUCCEEDED: OUTCOME, State.FAILED: ERROR, State.CANCELLED: CANCELLED}.get(self.state)
        return Record(
            state=self.state,
            owner=OWNERS[self.owner],
            task_id="task" if self.same_task else "another task",
            fence=FENCE,
            attempts=2,
            crashes=self.crashes,
            lease=LEASE if outcome is None else 0,
            fingerprint=PRINTS[self.print].packed,
            asking=ASKING[self.asking],
            reason="because",
            steps=STEPS if self.steps else (),
            notes=(ASKED_TO_STOP,) if self.stopping else (),
            outcome=outcome,
        )

    @property
    def request(self) -> Request:
        policy = Policy(LEASE, 1, FAILURE_TTL, self.on_crash, self.asks, MAX_ATTEMPTS)  # type: ignore[arg-type]
        age = policy.result_ttl + 1 if self.late else 0
        return Request(OWN, "task", PRINT, policy, (b"first-owner-", CARRIED), age=age)


OWNERS = {"own": OWN, "carried": CARRIED, "other": OTHER}
PRINTS = {"same": PRINT, "none": Fingerprint(), "differs": OTHER_PRINT}
ASKING = {"nobody": b"", "own": OWN, "other": OTHER}


def held(state: State | None, **changes: Any) -> Record | None:
    met = Meeting(state, "same", "own", True, STAMP, "in_doubt", False, 0, "nobody")
    return met.record._replace(**changes) if met.record is not None else None


def a_request(owner: bytes = OWN, **policy: Any) -> Request:
    return Request(
        owner,
        "task",
        PRINT,
        Policy(**{"lease": LEASE, "result_ttl": 1, "failure_ttl": FAILURE_TTL, **policy}),
    )
