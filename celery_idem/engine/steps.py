"""``self.step``: parts of a body that run once per intent, each with its result in the record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_idem.core import protocol
from celery_idem.core.errors import ConfigurationError, OutcomeUnknown, ResultUnavailable
from celery_idem.core.model import Answer, Happened, StepDone, StepOpen, StepsFull, Unknown
from celery_idem.core.results import Codec, NotStorable
from celery_idem.engine.claim import Hold, doubt_message, lease_lost

_NO_RESULT = b""
"""Stored instead of a step's result that could not be stored. No other payload is empty."""


def run_step(
    hold: Hold,
    codec: Codec,
    name: str,
    run: Callable[[], Any],
    ask: Callable[[], Answer] | None,
    patience: float,
    no_effect: Callable[[BaseException], bool] = lambda error: False,
) -> Any:
    """Run a step of the body once per intent.

    Args:
        codec: how the result is written.
        run: the function of the step.
        ask: asks the destination whether the step happened; None: it cannot be asked.
        patience: seconds to keep trying to record the result.
        no_effect: whether an exception proves that the step had no effect.

    Raises:
        LeaseLost: another execution took the intent over.
        OutcomeUnknown: the step began in an earlier attempt, and how it ended is unknown.
        ResultUnavailable: the step ended in an earlier attempt, and its result could not be stored.
        StoreError: the store did not answer.
    """
    _check(hold, name)
    decision = hold.begin_step(name)
    if isinstance(decision, StepDone):
        if decision.payload == _NO_RESULT:
            raise ResultUnavailable(
                f"{hold.key}: step {name!r} has run in an earlier attempt and does not run again, but its result "
                "could not be stored. Look it up at the destination, and give the body another step for that; or let "
                f"the step run AGAIN: `celery -A proj idem forget {hold.key!r} --steps`.",
                hold.key,
                f"the result of step {name!r} could not be stored",
            )
        return codec.decode(decision.payload, hold.key)
    if isinstance(decision, StepsFull):
        raise ConfigurationError(
            f"{hold.key}: step {name!r} was not begun. The record holds {decision.steps} finished steps, with results "
            f"of {decision.size} bytes, and it is written anew at each step: {protocol.MAX_STEPS} steps and "
            f"idem_max_result_bytes = {hold.policy.max_step_bytes} are the most. Give each part a task of "
            "its own (a group), or do many parts in one step whose destination knows which it has done.",
            hold.key,
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
            return _end(hold, codec, name, answer.result, patience)
        if isinstance(answer, Unknown):
            reason = f"step {left!r}: {answer.reason or 'the destination could not tell'}"
            hold.doubt(reason, patience)
            raise OutcomeUnknown(doubt_message(hold.key, reason), hold.key, reason)
        if hold.lost:  # asking may have taken too long
            raise lease_lost(hold.key)
    hold.step_running = name
    try:
        value = run()
    except BaseException as error:
        if no_effect(error):
            hold.end_step(name, None, patience)
        raise
    finally:
        hold.step_running = ""
    return _end(hold, codec, name, value, patience)


def _check(hold: Hold, name: str) -> None:
    if hold.step_running:
        raise ConfigurationError(
            f"{hold.key}: step {name!r} was begun inside step {hold.step_running!r}. Steps cannot be nested: "
            "begin it after the other has ended.",
            hold.key,
        )
    if name in hold.steps_begun:
        raise ConfigurationError(
            f"{hold.key}: two steps are called {name!r}. A step's name is what its result is kept under: give "
            'each its own, such as f"mail-{address}".',
            hold.key,
        )
    if not name or not isinstance(name, str):
        raise ConfigurationError(f"{hold.key}: a step needs a name.", hold.key)


def _end(hold: Hold, codec: Codec, name: str, value: Any, patience: float) -> Any:
    try:
        payload, shown = codec.kept(value, hold.key)
    except NotStorable as why:
        hold.end_step(name, _NO_RESULT, patience)  # the step has run, so no later attempt may run it again
        raise ConfigurationError(
            f"{hold.key}: the result of step {name!r} cannot be stored ({why}). The step has run; return "
            "something small and serializable from it, such as an id.",
            hold.key,
        ) from None
    hold.end_step(name, payload, patience)
    return shown
