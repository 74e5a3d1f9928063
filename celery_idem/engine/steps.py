"""``self.step``: parts of a body that run once per intent, each with its result in the record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_idem.core import protocol
from celery_idem.core.errors import ConfigurationError, OutcomeUnknown, ResultUnavailable, StoreError
from celery_idem.core.model import (
    Answer,
    Done,
    Happened,
    Record,
    Refused,
    StepDone,
    StepOpen,
    StepsFull,
    Unknown,
)
from celery_idem.core.results import NotStorable
from celery_idem.engine.claim import Claim, doubt_message, lease_lost
from celery_idem.engine.ledger import Ledger
from celery_idem.engine.transitions import kept

_NO_RESULT = b""
"""In the place of a step's result that could not be stored: no payload is empty."""


def run_step(
    ledger: Ledger,
    claim: Claim,
    name: str,
    run: Callable[[], Any],
    ask: Callable[[], Answer] | None,
    patience: float,
    no_effect: Callable[[BaseException], bool] = lambda error: False,
) -> Any:
    """Run a part of the body once per intent.

    Args:
        run: the part.
        ask: asks the destination whether the part happened; None: nobody can.
        patience: seconds to keep trying to record its result.
        no_effect: whether an exception proves that the part did not happen.

    Raises:
        LeaseLost: somebody took the intent over.
        OutcomeUnknown: the part began in an earlier attempt, and nobody knows how it ended.
        ResultUnavailable: it ended in an earlier attempt, and its result could not be stored.
    """
    begun = frozenset(claim._steps_seen)
    _check_step(claim, name)

    def begin(record: Record, stamp: int, now: int) -> tuple[Any, Record | None]:
        return protocol.begin_step(record, claim._request.owner, name, claim._request.policy, begun)

    try:
        decision = ledger.transition(claim, begin)
    except StoreError:
        claim._step_unrecorded = True
        raise
    if isinstance(decision, StepDone):
        if decision.payload == _NO_RESULT:
            raise ResultUnavailable(
                f"{claim.key}: step {name!r} has run in an earlier attempt and does not run again, but its result "
                "could not be stored. Look it up at the destination, and give the body another step for that; or let "
                f"the step run AGAIN: `celery -A proj idem forget {claim.key!r} --steps`.",
                claim.key,
                f"the result of step {name!r} could not be stored",
            )
        return ledger.codec.decode(decision.payload, claim.key)
    if isinstance(decision, StepsFull):
        raise ConfigurationError(
            f"{claim.key}: step {name!r} was not begun. The record holds {decision.steps} finished steps, with results "
            f"of {decision.size} bytes, and it is written anew at each step: {protocol.MAX_STEPS} steps and "
            f"idem_max_result_bytes = {claim._request.policy.max_step_bytes} are the most. Give each part a task of "
            "its own (a group), or do many parts in one step whose destination knows which it has done.",
            claim.key,
        )
    if isinstance(decision, StepOpen):
        open_steps = decision.record.open_steps
        left = name if name in open_steps else open_steps[0]
        answer: Answer = Unknown("the worker stopped inside this step")
        if left != name:
            answer = Unknown(f"the worker stopped inside this step, and this time {name!r} comes before it")
        elif ask is not None:
            answer = ask()
        if isinstance(answer, Happened):
            return _end_step(ledger, claim, name, answer.result, patience)
        if isinstance(answer, Unknown):
            reason = f"step {left!r}: {answer.reason or 'the destination could not tell'}"
            ledger.doubt(claim, reason, patience)
            raise OutcomeUnknown(doubt_message(claim.key, reason), claim.key, reason)
        if claim.lost:  # while the destination was asked
            raise lease_lost(claim)
    elif isinstance(decision, Refused):
        claim._taken_over = True
        raise lease_lost(claim)
    claim._step_running = name
    try:
        value = run()
    except BaseException as error:
        if no_effect(error):
            _close_step(ledger, claim, name, None, patience)
        raise
    finally:
        claim._step_running = ""
    return _end_step(ledger, claim, name, value, patience)


def _check_step(claim: Claim, name: str) -> None:
    if claim._step_running:
        raise ConfigurationError(
            f"{claim.key}: step {name!r} was begun inside step {claim._step_running!r}. Steps cannot be nested: "
            "begin it after the other has ended.",
            claim.key,
        )
    if name in claim._steps_seen:
        raise ConfigurationError(
            f"{claim.key}: two steps are called {name!r}. A step's name is what its result is kept under: give "
            'each its own, such as f"mail-{address}".',
            claim.key,
        )
    if not name or not isinstance(name, str):
        raise ConfigurationError(f"{claim.key}: a step needs a name.", claim.key)
    claim._steps_seen.add(name)


def _end_step(ledger: Ledger, claim: Claim, name: str, value: Any, patience: float) -> Any:
    try:
        payload, shown = ledger.codec.kept(value)
    except NotStorable as why:
        _close_step(
            ledger, claim, name, _NO_RESULT, patience
        )  # it has run: no later attempt may run it again
        raise ConfigurationError(
            f"{claim.key}: the result of step {name!r} cannot be stored ({why}). The step has run; return "
            "something small and serializable from it, such as an id.",
            claim.key,
        ) from None
    _close_step(ledger, claim, name, payload, patience)
    return shown


def _close_step(ledger: Ledger, claim: Claim, name: str, payload: bytes | None, patience: float) -> None:
    def end(record: Record) -> tuple[Done | Refused, Record | None]:
        return protocol.end_step(record, claim._request.owner, name, payload)

    try:
        done = ledger.patient_transition(claim, kept(claim, end), patience, ends=False)
    except StoreError:
        claim._step_unrecorded = True
        raise
    if isinstance(done, Refused):
        claim._taken_over = True
        raise lease_lost(claim)
