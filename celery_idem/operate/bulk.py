"""Carries out decisions about many intents: from a file of JSON lines, or one decision for a list of intents.

A line that fails does not stop the others. Several threads decide at once, because each decision waits for two round
trips to the store.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from difflib import get_close_matches
from math import isinf
from typing import Any, Literal, NamedTuple, TypeVar

from celery_idem.core.errors import IdempotencyError, StoreError
from celery_idem.core.model import Happened, NotHappened
from celery_idem.engine.entries import Entry
from celery_idem.integration.messages import BrokerError
from celery_idem.operate.operators import Operator, check_key

T = TypeVar("T")
R = TypeVar("R")

THREADS = 8
"""Decisions at once. A store 5 ms away takes a thousand in under two seconds, and is not overloaded."""

AHEAD = 4 * THREADS
"""Decisions that the threads receive before the first one is reported: enough to keep all threads busy."""

FIELDS = ("key", "happened", "not_happened", "run", "by", "evidence", "fence")
"""Fields of a line. Others are ignored, so that a decision can be added to a line of ``idem list --json``."""


MISSPELT = 0.75
"""Similarity (1: equal) from which an unknown field counts as a misspelt one: "evidense", "rerun"."""


class Decision(NamedTuple):
    """A person's decision about one intent.

    Attributes:
        run: publish the call again at once; only with ``NotHappened``.
        fence: see ``Ledger.resolve``.
    """

    key: str
    answer: Happened | NotHappened
    by: str
    evidence: str
    run: bool = False
    fence: int | None = None


class Line(NamedTuple):
    """One line of a file: its number, and its decision or what is wrong with it."""

    number: int
    decision: Decision | None
    wrong: str = ""


Verdict = Literal["settled", "already", "refused", "not_possible", "not_published", "invalid"]


class Decided(NamedTuple):
    """What became of one decision.

    Attributes:
        verdict: ``settled``; ``already`` (the same decision was made before); ``refused`` (the intent is not in doubt,
            was claimed again, or does not exist); ``not_possible`` (its record does not hold the call that should
            run); ``not_published`` (decided, and the broker did not take its call); ``invalid`` (the line is no
            decision).
        why: for people; for ``settled`` and ``already`` empty, or why callers do not get the value.
        entry: the intent as it is now; None if there is none, or if it was not read.
    """

    verdict: Verdict
    key: str
    why: str = ""
    entry: Entry | None = None

    @property
    def stands(self) -> bool:
        """Whether the decision is in the record, and nothing is left to do."""
        return self.verdict in ("settled", "already")


def read_decisions(lines: Iterable[bytes], by: str, evidence: str) -> Iterator[Line]:
    """Read decisions from JSON lines. ``by`` and ``evidence`` are for lines that have none."""
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            decision = _decision(line, by, evidence)
            first = seen.setdefault(decision.key, number)
            if first != number:
                raise ValueError(f"line {first} decides about the same intent")
            yield Line(number, decision)
        except (ValueError, IdempotencyError) as error:
            yield Line(number, None, str(error))


def _decision(line: bytes, by: str, evidence: str) -> Decision:
    try:
        form = strict_json(line.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(form, dict):
        raise ValueError("it is not a JSON object")
    for name in form:
        near = [] if name in FIELDS else get_close_matches(name, FIELDS, 1, MISSPELT)
        if near:
            raise ValueError(f"there is no field {name!r}. Do you mean {near[0]!r}?")
    key, run, fence = form.get("key"), form.get("run", False), form.get("fence")
    by, evidence = form.get("by", by), form.get("evidence", evidence)
    if not isinstance(key, str):
        raise ValueError('it has no "key"')
    check_key(key)
    if ("happened" in form) == ("not_happened" in form) or form.get("not_happened", True) is not True:
        raise ValueError('give one of "happened": RESULT and "not_happened": true')
    if not isinstance(run, bool) or (run and "happened" in form):
        raise ValueError('"run" is true or false, and goes with "not_happened" only')
    if not isinstance(by, str) or not by.strip():
        raise ValueError('"by" is the name of who decides')
    if not isinstance(evidence, str) or not evidence.strip():
        raise ValueError('"evidence" is missing: what was seen, and where')
    if fence is not None and (not isinstance(fence, int) or isinstance(fence, bool)):
        raise ValueError('"fence" is a whole number')
    answer = Happened(form["happened"]) if "happened" in form else NotHappened()
    return Decision(key, answer, by, evidence, run, fence)


def decide(operator: Operator, decision: Decision, dry_run: bool = False) -> Decided:
    """Carry out one decision. Raises ``StoreError``: the store does not answer."""
    key = decision.key
    verdict: Verdict = "settled"
    try:
        publish = operator.publisher_of(key) if decision.run else None
    except StoreError:
        raise
    except IdempotencyError as error:
        return Decided("not_possible", key, str(error))
    try:
        entry = operator.resolve(
            key, decision.answer, decision.by, decision.evidence, decision.fence, dry_run
        )
    except BrokerError as error:
        return Decided("not_published", key, str(error), operator.ledger_of(key).get(key))
    except IdempotencyError as error:
        if isinstance(error, StoreError) and not error.key:
            raise  # it is about the whole store, not about this key
        there = None if isinstance(error, StoreError) else operator.ledger_of(key).get(key)
        if there is None or not _decided_so(operator, there, decision):
            return Decided("refused", key, str(error), there)
        verdict, entry = "already", there
    if publish is not None and not dry_run:
        try:
            publish()  # if it was published before, this message is a duplicate
        except BrokerError as error:
            return Decided("not_published", key, str(error), entry)
    why, outcome = "", entry.record.outcome
    if outcome is not None and outcome.payload is None:
        why = f"callers learn that it happened, and do not get the value: {outcome.missing}"
    return Decided(verdict, key, why, entry)


def _decided_so(operator: Operator, entry: Entry, decision: Decision) -> bool:
    """Whether this decision was the last thing that happened to the intent."""
    notes, outcome = entry.record.notes, entry.record.outcome
    if not notes or (notes[-1].by, notes[-1].evidence) != (decision.by, decision.evidence):
        return False
    if isinstance(decision.answer, NotHappened):
        return entry.state == "released"
    return outcome == operator.ledger_of(entry.key).outcome_of(decision.answer.result, entry.key)


def decide_all(
    operator: Operator, lines: Iterable[Line], dry_run: bool = False
) -> Iterator[tuple[int, Decided]]:
    """Carry out the decisions of a file. Return each line's number and what became of it, in the file's order.

    Raises:
        StoreError: the store does not answer. What was decided by then is written; a second run goes on.
    """

    def one(line: Line) -> tuple[int, Decided]:
        if line.decision is None:
            return line.number, Decided("invalid", "", line.wrong)
        return line.number, decide(operator, line.decision, dry_run)

    return in_threads(one, lines)


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Return ``function(item)`` for each item, in their order, in bounded memory.

    When the caller stops, or a call raises, no further call begins.
    """
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="celery_idem bulk")
    begun: deque[Future[R]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) > AHEAD:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def strict_json(text: str) -> Any:
    """Return the value of a JSON text. What is settled with it cannot be changed, so nothing in it is guessed.

    Raises:
        ValueError: it is no JSON; or a number has no JSON form; or a field is given twice; or it is nested too deep.
    """
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_each_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _no_number(name: str) -> Any:
    raise ValueError(f"JSON has no {name}")


def _finite(text: str) -> float:
    number = float(text)
    if isinf(number):
        raise ValueError(f"{text} is too large")
    return number


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    form = dict(pairs)
    # A settled outcome cannot be changed, so do not guess which one was meant.
    if len(form) < len(pairs):
        raise ValueError("a field is given twice")
    return form
