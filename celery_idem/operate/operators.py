"""The operator API: list, inspect and settle the intents of an application.

The command line, the inbox and the metrics use it. A task may have its own store or namespace, so a key is looked up in
the ledger of the task that it names.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from celery.app.task import Context

from celery_idem.core import digests, keys
from celery_idem.core.errors import IdempotencyError, StoreError
from celery_idem.core.model import (
    MICROSECONDS,
    NO_FINGERPRINT,
    NO_OWNER,
    Acquired,
    Answer,
    Happened,
    InDoubt,
    Late,
    Note,
    NotHappened,
    Outcome,
    Policy,
    Replay,
    Request,
    State,
    Unknown,
)
from celery_idem.engine.entries import Entry, Tally, tallied
from celery_idem.engine.ledger import Ledger
from celery_idem.integration import describing, messages
from celery_idem.integration.declaring import options_of
from celery_idem.integration.delivery import Delivery, Guard
from celery_idem.integration.recovering import why_not
from celery_idem.integration.task import IdempotentTask
from celery_idem.integration.wiring import ledger_of

if TYPE_CHECKING:
    from celery import Celery


COMPARE = (
    "Compare at the destination: look for two effects with this key (where the body passes self.claim.key along), with "
    "the two results, or at the two times. If there are two, undo one there."
)
"""What to do about an effect that may have happened twice."""


class Which(NamedTuple):
    """A filter of intents. A field that is not given filters nothing.

    Attributes:
        state: one of ``entries.FILTERS``.
        scope: of the calls. A record has its digest only, so it must be the whole scope.
        older_than: seconds since the last write, at least.
        since, until: no last write before, or after, this time in seconds since the epoch.
        reason: part of the reason of the doubt, in any case of letters.
        suspect: only those whose effect may have happened twice.
    """

    state: str | None = None
    task: str | None = None
    scope: str | None = None
    older_than: float = 0.0
    since: float = 0.0
    until: float = math.inf
    reason: str = ""
    suspect: bool = False

    def fits(self, entry: Entry, namespace: str) -> bool:
        """Whether an intent in the right state passes the filter."""
        return (
            self.task in (None, entry.task)
            and entry.age >= self.older_than
            and self.since <= entry.changed_at <= self.until
            and self.reason.casefold() in entry.record.reason.casefold()
            and (not self.suspect or bool(entry.suspicions))
            and (self.scope is None or entry.record.scope == keys.scope_digest(namespace, self.scope))
        )


class Arguments(NamedTuple):
    """The arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Action(NamedTuple):
    """Which action an intent is, and where and when its latest attempt ran. For people: secret values are hidden.

    Attributes:
        line: one line: the author's own sentence, or the fields of the intent; "" if they are not known.
        intent: the fields of the intent as text, with scope, occurrence and caller's key.
        arguments: all arguments as text.
        why: why the arguments are not known; "" if they are.
        not_published: why the call cannot be published again; "" if it can.
        place: host and process of the latest attempt.
        began_at: when that attempt began, by the store's clock, in seconds since the epoch; None: not known.
        renewed_at: when its worker last wrote; None if that is not known, or it does not run.
    """

    line: str = ""
    intent: Mapping[str, str] = {}
    arguments: Mapping[str, str] = {}
    why: str = ""
    not_published: str = ""
    place: str = ""
    began_at: float | None = None
    renewed_at: float | None = None

    @property
    def attempt(self) -> str:
        """Where and when the latest attempt ran, in one line; "" if that is not known."""
        began = "" if self.began_at is None else f"began {iso(self.began_at)}"
        renewed = "" if self.renewed_at is None else f"last heard of {iso(self.renewed_at)}"
        return ", ".join(filter(None, (self.place, began, renewed)))


class Resolved(NamedTuple):
    """One decision about an intent, from its record.

    Attributes:
        at: seconds since the epoch.
        by: who decided; ``reconcile`` for the destination that was asked.
        what: a name of ``model.Resolution``, in lower case.
        action: which action it was about, in one line; "" if that is not known.
    """

    at: float
    key: str
    task: str
    by: str
    what: str
    evidence: str
    action: str = ""


class Asked(NamedTuple):
    """The result of asking a destination.

    Attributes:
        verdict: ``happened`` or ``not_happened`` (settled, except in a dry run), ``unknown`` (the destination could
            not tell) or ``skipped`` (it was not asked).
        why: one sentence for a person.
    """

    verdict: Literal["happened", "not_happened", "unknown", "skipped"]
    why: str


@dataclass(frozen=True)
class Operator:
    """What an operator can do with the intents of one application."""

    app: Celery

    # --- tasks and ledgers ------------------------------------------------------------

    def tasks(self) -> dict[str, IdempotentTask]:
        """Return the guarded tasks by name, a renamed one under its former names too."""
        return {
            name: task
            for name, task in sorted(self.app.tasks.items())
            if isinstance(task, IdempotentTask) and task.idem_declaration is not None
        }

    def task_of(self, key: str) -> IdempotentTask | None:
        """Return the task that a key names, or None if this application does not have it."""
        return self._guarded(keys.task_of(key) or "")

    def _guarded(self, name: str) -> IdempotentTask | None:
        task = self.app.tasks.get(name)
        return task if isinstance(task, IdempotentTask) and task.idem_declaration is not None else None

    def ledger_of(self, key: str) -> Ledger:
        """Return the ledger that has the record of a key."""
        task = self.task_of(key)
        return ledger_of(self.app) if task is None else task.guard.ledger

    def ledgers(self) -> list[Ledger]:
        """Return the ledgers of all tasks, each once."""
        found: dict[tuple[int, str], Ledger] = {}
        tasks = self.tasks().values()
        for ledger in [task.guard.ledger for task in tasks] or [ledger_of(self.app)]:
            found.setdefault((id(ledger.store), ledger.namespace), ledger)
        return list(found.values())

    def no_task(self, name: str) -> str:
        """Return the message about a task that is not guarded in this application."""
        return f"This application has no guarded task {name}. It has: {', '.join(self.tasks()) or 'none'}."

    # --- reading ----------------------------------------------------------------------

    def list(
        self, state: str | None = None, task: str | None = None, tick: Callable[[], object] | None = None
    ) -> Iterator[Entry]:
        """As ``select``, by two fields of ``Which``."""
        return self.select(Which(state, task), tick)

    def select(self, which: Which, tick: Callable[[], object] | None = None) -> Iterator[Entry]:
        """Return intents, in no order and in bounded memory. ``tick``: see ``Ledger.list``."""
        which = self.as_in_keys(which)
        for ledger in self.ledgers():
            for entry in ledger.list(which.state, which.task, tick):
                if which.fits(entry, ledger.namespace):
                    yield entry

    def as_in_keys(self, which: Which) -> Which:
        """Return the filter with the name in the task's keys, which is the task's first name."""
        task = self._guarded(which.task or "")
        return which if task is None else which._replace(task=task.guard.declaration.task)

    def fits(self, entry: Entry, which: Which) -> bool:
        """Whether an intent in the right state passes a filter of ``as_in_keys``."""
        return which.fits(entry, self.ledger_of(entry.key).namespace)

    def find(self, key: str) -> Entry:
        """Return the intent with a key, or with the only key that begins so.

        Raises:
            IdempotencyError: there is none, or there are several.
        """
        check_key(key)
        entry = self.ledger_of(key).get(key)
        if entry is not None:
            return entry
        if keys.task_of(key) is None:  # not a whole key
            found = self._beginning_with(key)
            if len(found) == 1:
                return next(iter(found.values()))
            if found:
                raise IdempotencyError(
                    f"Several intents begin with {key!r}, such as {' and '.join(sorted(found))}. Give more of the key."
                )
        places = ", ".join(f"{ledger.store.url} (namespace {ledger.namespace})" for ledger in self.ledgers())
        raise IdempotencyError(
            f"There is no intent {key} in {places}. It may have expired after its result_ttl, or it never ran. "
            "`idem list` shows all intents.",
            key,
        )

    def _beginning_with(self, start: str) -> dict[str, Entry]:
        """Return at most two intents whose keys begin with ``start``: two are enough to make it ambiguous."""
        found: dict[str, Entry] = {}  # by key, because a scan may return one twice
        for ledger in self.ledgers():
            for stored_key, _ in ledger.store.scan(f"{ledger.namespace}:{start}"):
                key = stored_key.partition(":")[2]
                entry = None if key in found else ledger.get(key)
                if entry is not None:
                    found[key] = entry
                    if len(found) > 1:
                        return found
        return found

    def stats(self, state: str | None = None) -> dict[tuple[str, str], Tally]:
        """Return counts by (task, state) over all ledgers. ``state`` is one of ``entries.FILTERS``."""
        return tallied(self.list(state))

    def reindex(self, tick: Callable[[], object] | None = None) -> int:
        """See ``Ledger.reindex``; over all ledgers."""
        return sum(ledger.reindex(tick) for ledger in self.ledgers())

    def reseal(self, entry: Entry, dry_run: bool = False, lost: bool = False) -> str:
        """See ``Ledger.reseal``. Returns ``locked`` if this process does not have the record's seal key.

        Raises:
            StoreError: the store did not answer.
        """
        task, ledger = self.task_of(entry.key), self.ledger_of(entry.key)
        keep = int(ledger.result_ttl(entry.task) * MICROSECONDS)
        policy = Policy(0, keep, keep) if task is None else task.guard.options.policy
        try:
            return ledger.reseal(entry, policy, dry_run, lost)
        except StoreError as error:
            if not error.key:
                raise
            return "locked"

    # --- deciding ---------------------------------------------------------------------

    def resolve(
        self,
        key: str,
        answer: Happened | NotHappened,
        by: str,
        evidence: str,
        fence: int | None = None,
        dry_run: bool = False,
    ) -> Entry:
        """See ``Ledger.resolve``."""
        ledger = self.ledger_of(key)
        return ledger.resolve(key, answer, by=by, evidence=evidence, fence=fence, dry_run=dry_run)

    def publisher_of(self, key: str) -> Callable[[], object]:
        """Return a function that publishes an intent's call from its record, to be called after its release.

        Raises:
            IdempotencyError: there is no record, or it does not hold the whole call.
        """
        entry = self.ledger_of(key).get(key)
        call, why = None, "there is no record"
        if entry is not None:
            call, why = messages.call_in(self.app, key, entry.record.call)
        if entry is None or call is None or not call.publishable:
            why = why if entry is None else why_not(self.app, key, entry.record)
            raise IdempotencyError(
                f"{key} cannot be run again from its record: {why}. Decide that it did not happen, then repeat the "
                "call.",
                key,
            )
        publish = messages.publisher(self.app, key, entry.record.call)
        assert publish is not None
        return publish

    def cancel(self, key: str, by: str, evidence: str, fence: int | None = None) -> Entry:
        """See ``Ledger.cancel``."""
        return self.ledger_of(key).cancel(key, by=by, evidence=evidence, fence=fence)

    def forget(self, key: str, steps: bool = False, fence: int | None = None, by: str = "") -> bool:
        """See ``Ledger.forget``."""
        return self.ledger_of(key).forget(key, steps, fence, by)

    def purge(self) -> int:
        """See ``Ledger.purge``; each store once."""
        stores = {id(ledger.store): ledger for ledger in self.ledgers()}
        return sum(ledger.purge() for ledger in stores.values())

    def ask(
        self,
        entry: Entry,
        arguments: Arguments | None = None,
        *,
        without_arguments: bool = False,
        dry_run: bool = False,
    ) -> Asked:
        """Run the task's ``reconcile`` as a redelivery would. Never runs the body.

        Args:
            arguments: arguments of the call, if the caller knows them.
            without_arguments: call ``reconcile`` without arguments if they are unknown. This is only right if it uses
                nothing but ``task.claim.key``: one that looks for invoice None finds nothing and answers "not
                happened".
            dry_run: ask the destination and write nothing.
        """
        task = self.task_of(entry.key)
        if task is None:
            return Asked("skipped", f"this application has no task {entry.task}")
        guard = task.guard
        if guard.ask is None:
            return Asked("skipped", f"{entry.task} declares no reconcile=")
        known, why = (arguments, "") if arguments else self.arguments_of(entry)
        if known is None and not without_arguments:
            return Asked("skipped", f"its arguments are not known: {why}. Give them in a file")
        if known is not None and not _fit(task, known):
            return Asked("skipped", f"its arguments do not fit the signature of {entry.task}")
        if known is not None and _of_another_call(guard, entry, known):
            return Asked("skipped", "its arguments are those of another call: their digests differ")
        known = known or Arguments((), {})
        request = Context(id=entry.record.task_id, args=known.args, kwargs=known.kwargs, headers={})
        delivery = Delivery(guard, task, request, known.args, known.kwargs, entry.key, NO_FINGERPRINT)
        if dry_run:
            return _would(guard, delivery)
        try:
            decision = guard.runner.inquire(delivery)
        except StoreError as error:
            if not error.key:
                raise
            return Asked("skipped", str(error))  # sealed with a key that this process does not have
        if isinstance(decision, Replay) and decision.outcome.cancelled:
            return Asked("not_happened", "the destination says it did not happen, and it is cancelled")
        if isinstance(decision, Replay):
            publish = messages.publisher(self.app, entry.key, entry.record.call)
            if publish is not None:
                try:
                    guard.ledger.tell(entry.key, publish, guard.options.policy)
                except messages.BrokerError as error:
                    return Asked("happened", f"the destination says it happened. {error}")
            return Asked("happened", "the destination says it happened: settled for every caller")
        if isinstance(decision, Acquired):
            return Asked("not_happened", "the destination says it did not happen: the next delivery runs it")
        if isinstance(decision, InDoubt):
            return Asked("unknown", decision.reason)
        return Asked("skipped", "another worker is running it now")

    def arguments_of(self, entry: Entry) -> tuple[Arguments | None, str]:
        """Return the call's arguments, from its record or from Celery's result backend (``result_extended``).

        If neither has all of them, return None and why the record does not.
        """
        call, why = messages.call_in(self.app, entry.key, entry.record.call)
        if call is not None and call.hidden:
            why = messages.NO_SECRETS
        elif call is not None:
            try:
                args, kwargs, _ = messages.arguments(self.app, call)
                return Arguments(tuple(args or ()), dict(kwargs or {})), ""
            except Exception as error:  # of any serializer
                why = f"its call cannot be read ({type(error).__name__})"
        return self._kept_by_backend(entry), why

    def _kept_by_backend(self, entry: Entry) -> Arguments | None:
        try:
            result = self.app.AsyncResult(entry.record.task_id)
            args, kwargs = result.args, result.kwargs
        except Exception:  # no backend, or it does not answer
            return None
        if not isinstance(args, (list, tuple, type(None))) or not isinstance(kwargs, (dict, type(None))):
            return None
        if args is None and kwargs is None:
            return None
        return Arguments(tuple(args or ()), dict(kwargs or {}))

    # --- showing ----------------------------------------------------------------------

    def action(self, entry: Entry) -> Action:
        """Return which action an intent is, from the call in its record. It never raises."""
        record, task = entry.record, self.task_of(entry.key)
        call, why = messages.call_in(self.app, entry.key, record.call)
        said = describing.Said()
        if record.outcome is not None and not record.call:
            why = "it is settled"
        elif call is not None and task is None:
            why = "this application does not have the task, which says what is secret"
        elif call is not None and task is not None:
            try:
                args, kwargs, _ = messages.arguments(self.app, call)
                describe = options_of(type(task)).describe
                said = describing.said(task.guard.declaration, describe, args, kwargs, call.headers)
            except Exception as error:  # of any serializer
                why = f"its call cannot be read ({type(error).__name__})"
        lives = record.state is State.RUNNING and record.lease and record.recovery is None
        began = record.attempts and record.state is not State.RELEASED  # a person's decision has a fence too
        return Action(
            said.line,
            {**said.intent, **said.labels},
            said.arguments,
            why,
            "" if record.outcome is not None else why_not(self.app, entry.key, record),
            record.place,
            record.fence / MICROSECONDS if began else None,
            entry.changed_at if lives else None,
        )

    def decisions(self, entry: Entry) -> Iterator[Resolved]:
        """Return the decisions that an intent's record keeps."""
        decided = [note for note in entry.record.notes if note.resolution is not None]
        action = self.action(entry).line if decided else ""
        for note in decided:
            what = str(note.resolution and note.resolution.name.lower())
            yield Resolved(note.at / 1e6, entry.key, entry.task, note.by, what, note.evidence, action)

    def describe(self, entry: Entry) -> dict[str, Any]:
        """Return an intent as JSON values. Times are ISO 8601 in UTC, durations are seconds."""
        record, action = entry.record, self.action(entry)
        return {
            "key": entry.key,
            "task": entry.task,
            "state": entry.state,
            "action": action.line,
            "intent": dict(action.intent),
            "arguments": dict(action.arguments),
            "arguments_unknown": action.why,
            "not_published": action.not_published,
            "place": action.place,
            "began_at": None if action.began_at is None else iso(action.began_at),
            "renewed_at": None if action.renewed_at is None else iso(action.renewed_at),
            "changed_at": iso(entry.changed_at),
            "age": round(entry.age, 3),
            "attempts": record.attempts,
            "crashes": record.crashes,
            "fence": record.fence,
            "task_id": record.task_id,
            "owner": "" if record.owner == NO_OWNER else record.owner.hex(),
            "lease_left": round(max(0.0, entry.retry_after), 3)
            if record.lease and record.outcome is None
            else 0.0,
            "reason": record.reason,
            "steps": [step.name for step in record.steps],
            "open_steps": list(record.open_steps),
            "result": self.result_of(entry),
            "notes": [
                {
                    "at": iso(note.at / 1e6),
                    "by": note.by,
                    "what": note.what,
                    "evidence": note.evidence,
                    "decided": None if note.resolution is None else note.resolution.name.lower(),
                }
                for note in record.notes
            ],
            "suspicions": [self._suspicion(entry, note, note.late) for note in record.notes if note.late],
        }

    def _suspicion(self, entry: Entry, note: Note, late: Late) -> dict[str, Any]:
        """Return both attempts of an effect that may have happened twice: the one that ended late, and what stood."""
        ended = Outcome(late.succeeded, late.payload)
        same = entry.record.fence == late.stood_fence
        return {
            "late": {
                "task_id": late.task_id,
                "place": late.place,
                "claimed_at": iso(late.fence / 1e6) if late.fence else None,
                "ended_at": iso(note.at / 1e6),
                "result": self._shown(entry, ended) if late.payload else None,
            },
            "stood": {
                "task_id": late.stood_task_id,
                "place": late.stood_place,
                "claimed_at": iso(late.stood_fence / 1e6),
                "ended_at": iso(late.stood_at / 1e6) if same and entry.record.outcome is not None else None,
                "result": self.result_of(entry) if same else None,
            },
        }

    def result_of(self, entry: Entry) -> str | None:
        """Return the outcome as text, or None if there is none.

        A task with ``secret`` parameters may return them, so its results are not shown.
        """
        return None if entry.record.outcome is None else self._shown(entry, entry.record.outcome)

    def _shown(self, entry: Entry, outcome: Outcome) -> str:
        if outcome.payload is None:
            if outcome.replaced_by:
                return f"that of task {outcome.replaced_by}, which replaced this one"
            return outcome.missing if outcome.cancelled else f"not stored: {outcome.missing}"
        task = self.task_of(entry.key)
        if task is None or (task.idem_declaration is not None and task.idem_declaration.secret):
            why = (
                "this application does not have the task"
                if task is None
                else "the task has secret parameters"
            )
            return f"{len(outcome.payload)} bytes, not shown: {why}"
        codec = task.guard.ledger.codec
        try:
            if outcome.succeeded:
                return json.dumps(codec.decode(outcome.payload, entry.key), default=str, ensure_ascii=False)
            error = codec.decode_error(outcome.payload, entry.key)
            return f"{type(error).__name__}: {error}"
        except StoreError as error:
            return str(error)


class Oldest:
    """Keeps the entries that have been unchanged for longest, in bounded memory.

    Args:
        limit: number of entries to keep.

    Attributes:
        total: number of entries added.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._heap: list[tuple[float, int, Entry]] = []  # the youngest of them first
        self.total = 0

    def add(self, entry: Entry) -> None:
        self.total += 1
        item = (-entry.changed_at, self.total, entry)  # with the total in between, entries are never compared
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, item)
        elif self._heap and item > self._heap[0]:
            heapq.heapreplace(self._heap, item)

    def entries(self) -> list[Entry]:
        """Return the entries, the oldest first."""
        return [entry for _, _, entry in sorted(self._heap, key=lambda item: -item[0])]


def iso(seconds: float) -> str:
    """Return a time in seconds since the epoch as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def duration(seconds: float) -> str:
    """Return seconds in a short form: ``45s``, ``12m``, ``3h 5m``, ``2d 4h``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600}h"


def check_key(key: str) -> None:
    """Refuse what cannot be a key. Raises ``IdempotencyError``: it is empty, or not valid text."""
    if not key:
        raise IdempotencyError("The key is empty. Give a key, or the beginning of one.")
    if "\0" in key or key != key.encode("utf-8", "replace").decode():
        raise IdempotencyError(f"{key!a} is not valid text, so no intent has that key. Copy it again.")


def read_arguments(lines: Iterable[bytes]) -> dict[str, Arguments]:
    """Return arguments by key from JSON lines ``{"key": …, "args": […], "kwargs": {…}}``.

    Raises:
        IdempotencyError: a line has another form.
    """
    known = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            form: Any = json.loads(line.decode("utf-8-sig"))
            if not isinstance(form, dict) or "key" not in form:
                raise ValueError('it is not an object with a "key"')
            args, kwargs = form.get("args"), form.get("kwargs")
            keys.check_call(str(form["key"]), args, kwargs)
            known[str(form["key"])] = Arguments(tuple(args or ()), dict(kwargs or {}))
        except (ValueError, TypeError, RecursionError) as error:
            why = "it is nested too deep" if isinstance(error, RecursionError) else error
            raise IdempotencyError(
                f'Line {number} is not {{"key": …, "args": […], "kwargs": {{…}}}}: {why}.'
            ) from None
    return known


def _fit(task: IdempotentTask, arguments: Arguments) -> bool:
    """Whether the arguments fit the task's signature."""
    try:
        task.guard.declaration.bind(*arguments)
    except TypeError:
        return False
    return True


def _of_another_call(guard: Guard, entry: Entry, arguments: Arguments) -> bool:
    """Whether the record's digests show that these are the arguments of another intent.

    Free arguments do not count, because another call of the same intent may have other ones.
    """
    if guard.digester is None or not entry.record.digests:
        return False
    declaration = guard.declaration
    differ = digests.differing(entry.record.digests, guard.digester.of(*arguments))
    if declaration.fields is None:
        return bool(differ)
    return any(digests.tag_of(name) in differ for name in (*declaration.fields, *declaration.must_match))


def _would(guard: Guard, delivery: Delivery) -> Asked:
    request = Request(NO_OWNER, delivery.task_id, delivery.fingerprint, guard.options.policy)
    claim = guard.ledger.unwritten(delivery.key, request)
    answer: Answer = guard.runner.bounded(lambda: delivery.ask(claim), guard.options.ask_timeout)
    if isinstance(answer, Unknown):
        return Asked("unknown", answer.reason or "the destination could not tell")
    if isinstance(answer, Happened):
        return Asked("happened", "the destination says it happened")
    return Asked("not_happened", "the destination says it did not happen")
