"""The operator who settles the intents in doubt, after the monkey has stopped and all processes run again.

As a person would, it asks only the destination what happened.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import NamedTuple

import psutil

from celery_idem import Happened, IdempotencyError, Ledger, NotHappened
from celery_idem.engine.entries import Entry
from celery_idem.stores import open_store
from tests.chaos.destination import tell
from tests.chaos.plan import Intent, Plan
from tests.chaos.shop import answer
from tests.chaos.stage import Stage
from tests.support.waiting import wait_for
from tests.support.workers import ROOT

# How many intents are decided on the command line, which starts a process for each. The others use its Python API.
BY_COMMAND = 3

# Seconds until no worker runs anything. A body ends within one second and a lease lapses in two, but on a busy machine
# the workers first run what callers have sent again. If they are not done by then, something hangs.
QUIET_WITHIN = 600.0


class Settled(NamedTuple):
    """One decision of the operator."""

    key: str
    ref: str
    what: str
    reason: str


class Records:
    """The records in the store at the end."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.ledger = Ledger(open_store(stage.store.url_for(0)))

    def key(self, intent: Intent) -> str:
        """Return the idempotency key, derived from the task's declaration."""
        from tests.chaos.shop import app

        declaration = app.tasks[intent.task].idem_declaration
        assert declaration is not None
        bound = declaration.bind((), {"ref": intent.ref, "cents": intent.cents, "note": ""})
        return str(declaration.key(self.ledger.namespace, bound, None, None, intent.key or None))

    def all(self) -> dict[str, Entry]:
        return {entry.key: entry for entry in self.ledger.list()}

    def close(self) -> None:
        self.ledger.store.close()


def settle(stage: Stage, plan: Plan, records: Records) -> list[Settled]:
    """Decide every intent that is in doubt or lapsed, by what the destination says.

    An intent is skipped if its owner settles it between the look and the decision.
    """
    by_key = {records.key(intent): intent for intent in plan.intents()}
    wait_for(
        lambda: not _asleep(stage) and not any(map(_held, records.ledger.list())),
        QUIET_WITHIN,
        lambda: f"all executions to end: {[entry for entry in records.ledger.list() if _held(entry)][:5]}",
        every=0.25,
    )
    settled: list[Settled] = []
    for entry in records.all().values():
        if entry.state in ("in_doubt", "lapsed") and _counts(entry):
            decided = _decide(stage, records.ledger, entry, by_key.get(entry.key), len(settled))
            if decided is not None:
                settled.append(decided)
    return settled


def _asleep(stage: Stage) -> bool:
    """Return whether a process that its plan has frozen is still frozen."""
    for note in stage.folder.glob("frozen-*"):
        with contextlib.suppress(psutil.Error, ValueError):
            if psutil.Process(int(note.read_text())).status() == psutil.STATUS_STOPPED:
                return True
    return False


def _held(entry: Entry) -> bool:
    """Return whether a worker holds the intent, or a retry may still come."""
    return _counts(entry) and entry.state in ("running", "scheduled") and entry.retry_after > 0


def _counts(entry: Entry) -> bool:
    """Return whether the entry must be settled. The second links of chains have no effect and need not."""
    return entry.task != "chaos.after"


def _decide(stage: Stage, ledger: Ledger, entry: Entry, intent: Intent | None, number: int) -> Settled | None:
    """Decide one entry. Return None if its record has changed since it was read."""
    ref = intent.ref if intent is not None else entry.key
    parts = intent.parts if intent is not None else ("tick",)
    # As in `shop.reconcile`: asking also voids the requests of this execution that have not arrived yet.
    done: dict[str, int] = {}
    for part in parts:
        question = {"do": "ask", "ref": ref, "part": part, "void_below": entry.record.fence + 1}
        receipt = tell(stage.destination, question)["receipt"]
        if receipt is not None:
            done[part] = receipt
    now = ledger.get(entry.key)
    if now is None or now.changed_at != entry.changed_at:
        return None
    what = "happened"
    missing = [part for part in parts if part not in done]
    if missing and not set(done) <= {step.name for step in entry.record.steps}:
        # The open step has happened and a later one has not. A person does the later one by hand.
        for part in missing:
            request = {"do": "effect", "ref": ref, "part": part, "fence": 0, "key": "", "by": "operator"}
            done[part] = tell(stage.destination, request)["receipt"]
        what, missing = "happened, the rest by hand", []
    happened = None
    if missing or not done:
        what = "not happened"  # finished steps are kept
    elif intent is None:
        happened = Happened(done["tick"])
    else:
        happened = Happened(answer(ref, intent.cents, done))
    try:
        _resolve(stage, ledger, entry, happened, number)
    except IdempotencyError:
        now = ledger.get(entry.key)
        if now is None or now.changed_at == entry.changed_at:
            raise
        return None
    return Settled(entry.key, ref, what, entry.record.reason or entry.state)


def _resolve(stage: Stage, ledger: Ledger, entry: Entry, happened: Happened | None, number: int) -> None:
    if number >= BY_COMMAND:
        ledger.resolve(
            entry.key,
            happened or NotHappened(),
            by="operator",
            evidence="the destination's ledger",
            fence=entry.record.fence,
        )
        return
    words: list[str] = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "tests.chaos.shop:app",
        "idem",
        "resolve",
        entry.key,
    ]
    words += ["--by", "operator", "--evidence", "the destination's ledger", "--yes"]
    words += ["--happened", json.dumps(happened.result)] if happened else ["--not-happened"]
    words += ["--fence", str(entry.record.fence)]
    environment = stage.environment(stage.plan.brokers[0])
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise IdempotencyError(f"`idem resolve {entry.key}` failed: {done.stdout}{done.stderr}", entry.key)
