"""All intents of a namespace: claims, and the operations of operators and recovery.

An execution that has claimed an intent writes its record through its ``Hold``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from itertools import islice
from random import randrange
from typing import Any, Literal

from celery_idem.core import keys, protocol, sealing
from celery_idem.core.errors import ConfigurationError, IdempotencyError, StoreError
from celery_idem.core.model import (
    MICROSECONDS,
    Accepted,
    Acquired,
    Ask,
    Busy,
    Decision,
    Done,
    Happened,
    Note,
    NotHappened,
    Outcome,
    Policy,
    Publish,
    Record,
    Refused,
    Request,
    Resolution,
    State,
    Stored,
    Tell,
    Verdict,
    Would,
)
from celery_idem.core.record import pack, unpack
from celery_idem.core.results import Codec, NotStorable
from celery_idem.engine import clock, events
from celery_idem.engine.claim import Hold, age
from celery_idem.engine.compare_and_set import DELETED, Decide, change
from celery_idem.engine.entries import FILTERS, OPEN, Entry, Tally, states, tallied
from celery_idem.stores.base import Announcement, Change, Creation, Mark, NoIndexError, Reply, Store

SHADOW = "~shadow"
"""Suffix of the namespace of shadow records."""

DAY = 86_400.0
"""Seconds: the default of ``result_ttl``."""


REMEMBERED = 50_000
"""Keys that a list remembers at least, to return each once. They take 15 MB at most. Redis repeats a key soon, while it
merges parts of its table. When a cluster moves slots, the whole list is repeated."""


MARKS = 100
"""Corrections of the index that a list collects before it writes them."""


def _nothing() -> None:
    pass


def _each_once(found: Iterator[Entry]) -> Iterator[Entry]:
    recent: set[str] = set()
    older: set[str] = set()
    for entry in found:
        if entry.key not in recent and entry.key not in older:
            if len(recent) >= REMEMBERED:
                recent, older = set(), recent
            recent.add(entry.key)
            yield entry


Resealed = Literal["current", "resealed", "running"]
"""What became of a record: it was sealed with the newest key before, or is now, or its execution will write it."""


Teller = Callable[[str, bytes], Callable[[], object] | None]
"""From a key and a packed call to a function that publishes it; None if it cannot be published."""


class Ledger:
    """All intents of one namespace in one store.

    Args:
        store: store of the records.
        namespace: applications with different namespaces do not see each other.
        codec: how results are written.
        result_ttl: from a task's name to the seconds for which an outcome is kept that a person gives.
    """

    def __init__(
        self,
        store: Store,
        namespace: str = "idem",
        codec: Codec | None = None,
        result_ttl: Callable[[str], float] = lambda task: DAY,
    ) -> None:
        self.store = store
        self.namespace = namespace
        self._prefix = f"{namespace}:"
        self._is_shadow = False
        self.result_ttl = result_ttl
        self.codec = codec or Codec()
        self.teller: Teller = lambda key, call: None
        """Answers the caller of an intent that a person decided."""

    def shadow(self) -> Ledger:
        """Return the ledger of shadow records, which no claim of this ledger can see."""
        twin = Ledger(self.store, self.namespace, self.codec, self.result_ttl)
        twin._prefix = f"{self.namespace}{SHADOW}:"
        twin._is_shadow = True
        return twin

    def inside(self, connection: Any) -> Ledger:
        """Return the same ledger in the transaction of the author's connection.

        Raises:
            ConfigurationError: that database does not have the records, or no transaction is open.
        """
        return Ledger(self.store.inside(connection, first=True), self.namespace, self.codec, self.result_ttl)

    # --- for an execution -----------------------------------------------------------

    def claim(
        self, key: str, request: Request, also: Announcement | None = None
    ) -> tuple[Decision, Hold | None]:
        """Claim an intent. With ``Acquired`` and ``Ask``, there is a hold.

        Args:
            also: what to write and publish in the same step. The hold's ``announced`` says whether that was done.

        Raises:
            StoreError: it is unknown whether the claim was written. A later claim that carries the owner of
                ``request`` finds out.
        """
        new, name = protocol.fresh(request), self._prefix + key
        before, late, announced = clock.elapsed(), False, False
        if request.accepted is not None:
            new = protocol.taken_up(request)
        if request.age and protocol.too_late(request):
            late = True
            reply = self.store.read(name)._replace(done=False)  # it wrote nothing
        elif also is not None:
            reply, announced = self.store.announce(_first(name, new, request), also)
        elif request.accepted is not None:
            reply = self.store.replace(
                name, request.accepted, pack(new), None, protocol.due(new, request.policy)
            )
        else:
            reply = self.store.create(name, pack(new), None, protocol.due(new, request.policy))
        if reply.done:
            assert reply.stored is not None
            # The fence of a first claim is the stamp of its creation.
            record = new._replace(fence=new.fence or reply.stored.stamp)
            hold = Hold(self.store, name, key, request, reply.stored, record, before)
            if announced:
                hold.announced = True
            return Acquired(record), hold

        def decide(record: Record | None, stamp: int, now: int) -> tuple[Decision, Record | None]:
            if record is not None:
                return protocol.claim(record, stamp, now, request)
            return protocol.absent(request, now) if late else (Acquired(new), new)

        decision: Decision
        decision, reply, before = change(
            self.store, name, key, decide, request.policy, reply, before=before, check=self._check(key)
        )
        stored = reply.stored
        if isinstance(decision, (Acquired, Ask)):
            assert stored is not None
            # It may have been deleted meanwhile, and created here: then the fence is again that stamp.
            record = (
                decision.record if decision.record.fence else decision.record._replace(fence=stored.stamp)
            )
            since = before if reply.done else before - age(reply)
            return decision._replace(record=record), Hold(
                self.store, name, key, request, stored, record, since
            )
        if isinstance(decision, Busy) and reply.done:
            assert stored is not None
            _clock_went_back(key, _read(key, stored), self.store.url)
        return decision, None

    def accept(self, key: str, request: Request, wait: int) -> tuple[Decision | Accepted | None, Entry]:
        """Accept a call before it is published, or return what is known of its intent. See ``protocol.accept``.

        Args:
            wait: microseconds until recovery publishes it, unless a worker has claimed it.

        Returns:
            The decision, and the stored record.

        Raises:
            StoreError: it is unknown whether the call was accepted.
        """
        new, item = self._accepting(key, request, wait)
        return self._accepted(key, request, wait, new, self.store.create(*item))

    def accept_many(
        self, calls: Sequence[tuple[str, Request, int]]
    ) -> list[tuple[Decision | Accepted | None, Entry] | StoreError]:
        """As ``accept`` for each call, with one write for all new ones.

        Args:
            calls: key, request and ``wait`` of each.

        Returns:
            What ``accept`` returns or raises, in order.

        Raises:
            StoreError: it is unknown which of them were accepted.
        """
        firsts = {key: self._accepting(key, request, wait) for key, request, wait in reversed(calls)}
        replies = dict(
            zip(firsts, self.store.create_many([item for _, item in firsts.values()]), strict=True)
        )
        answers: list[tuple[Decision | Accepted | None, Entry] | StoreError] = []
        for key, request, wait in calls:
            new, _ = firsts[key]
            reply = replies[key]
            if isinstance(reply, StoreError):
                answers.append(reply)
                continue
            if new.owner != request.owner:  # an earlier call is the same action
                new = protocol.accepted(request, wait)
                reply = reply._replace(done=False)
            try:
                answers.append(self._accepted(key, request, wait, new, reply))
            except StoreError as error:
                answers.append(error)
        return answers

    def _accepting(self, key: str, request: Request, wait: int) -> tuple[Record, Creation]:
        new = protocol.accepted(request, wait)
        return new, Creation(self._prefix + key, pack(new), None, protocol.due(new, request.policy))

    def _accepted(
        self, key: str, request: Request, wait: int, new: Record, reply: Reply
    ) -> tuple[Decision | Accepted | None, Entry]:
        """Decide after the try to create ``new``."""
        decision: Decision | Accepted | None = Accepted(new)
        if not reply.done:

            def decide(record: Record | None, stamp: int, now: int) -> tuple[Any, Record | None]:
                if record is None:
                    return Accepted(new), new
                if record.owner == request.owner:  # the reply to the first write was lost
                    return Accepted(record), None
                return protocol.accept(record, stamp, now, request, wait)

            decision, reply, _ = change(
                self.store, self._prefix + key, key, decide, request.policy, reply, check=self._check(key)
            )
        assert reply.stored is not None
        record = decision.record if isinstance(decision, Accepted) else _read(key, reply.stored)
        return decision, Entry(key, record, reply.stored.stamp, reply.now)

    def sent(self, key: str, owner: bytes, wait: int) -> None:
        """Set when recovery looks at an accepted call, once it is known whether its message was sent."""
        self._write(key, lambda record: protocol.sent(record, owner, wait))

    def withdraw(self, key: str, owner: bytes) -> None:
        """Delete the record of an accepted call that was not published, and cannot be."""

        def delete(record: Record) -> Record | None:
            return DELETED if record.owner == owner and record.state is State.ACCEPTED else None

        self._write(key, delete, Policy(0, 0, 0))

    def unwritten(self, key: str, request: Request) -> Hold:
        """Return a hold that may not be in the store.

        It is for a body that runs without a store, and to release a claim whose reply was lost.
        """
        name, fresh = self._prefix + key, protocol.fresh(request)
        return Hold(self.store, name, key, request, None, fresh, math.inf)

    # --- for operators --------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        """Return one intent; None if nothing is stored under the key."""
        reply = self.store.read(self._prefix + key)
        if reply.stored is None:
            return None
        return Entry(key, _read(key, reply.stored), reply.stored.stamp, reply.now)

    def look(self, key: str) -> Entry | None:
        """As ``get``, and cheaper if there is nothing, or an outcome, because then the store's time does not matter."""
        stored = self.store.peek(self._prefix + key)
        if stored is None:
            return None
        record = _read(key, stored)
        return Entry(key, record, stored.stamp, stored.stamp) if protocol.final(record) else self.get(key)

    def list(
        self, state: str | None = None, task: str | None = None, tick: Callable[[], object] | None = None
    ) -> Iterator[Entry]:
        """Return intents, in no order and in bounded memory, each once.

        A server may return a key twice while its table shrinks or its slots move. The second one is left out if the key
        is among the latest ``REMEMBERED`` ones, as such repetitions are.

        Args:
            state: only those in this state (``"in_doubt"``, ``"lapsed"``, …), or in a group of states: ``"waiting"``
                for a person, or ``"open"`` for a worker or a person. Open states are read from the index. Any other
                list reads every record.
            task: only those of this task.
            tick: called for every record that is read, wanted or not. An exception of it ends the list.

        Raises:
            IdempotencyError: there is no such state.
        """
        wanted = state.lower() if isinstance(state, str) else state
        if wanted is not None and wanted not in FILTERS:
            raise IdempotencyError(f"There is no state {state!r}. The states are {', '.join(FILTERS)}.")
        return self._list(wanted, task, tick or _nothing)

    def _list(self, wanted: str | None, task: str | None, tick: Callable[[], object]) -> Iterator[Entry]:
        prefix = f"{self._prefix}{task}:" if task else self._prefix
        now = self.store.read(self._prefix).now
        among = () if wanted is None else states(wanted)
        if among and set(among) <= set(OPEN) and not self._is_shadow:
            found = self._open(prefix, now, tick)
        else:
            found = self._scan(prefix, now, tick)
        for entry in _each_once(found):
            if (task is None or entry.task == task) and (wanted is None or entry.state in among):
                yield entry

    def _scan(self, prefix: str, now: int, tick: Callable[[], object]) -> Iterator[Entry]:
        for name, stored in self.store.scan(prefix):
            tick()
            entry = self._entry(name, stored, now)
            if entry is not None:
                yield entry

    def _entry(self, name: str, stored: Stored, now: int) -> Entry | None:
        """Return an entry; None for a value that is no record, or of a newer version. ``get`` raises for those."""
        key = name.removeprefix(self._prefix)
        try:
            return Entry(key, _read(key, stored), stored.stamp, now)
        except StoreError:
            return None

    def stats(self, state: str | None = None) -> dict[tuple[str, str], Tally]:
        """Return counts of intents by (task, state), in bounded memory. See ``list``."""
        return tallied(self.list(state))

    # --- the index of what is open ------------------------------------------------------

    def reindex(self, tick: Callable[[], object] | None = None) -> int:
        """Rebuild the index of what is open from the records. Return the number of open ones. Reads every record.

        Args:
            tick: called for every record that is read.

        Raises:
            StoreError: the store did not answer, or does not let this user write.
        """
        return sum(1 for _ in self._rebuilt(self._prefix, 0, tick or _nothing, strict=True))

    def _open(self, prefix: str, now: int, tick: Callable[[], object]) -> Iterator[Entry]:
        """Return open intents, the earliest due first. A missing index is rebuilt, and they come in no order."""
        try:
            for entry in self._listed(prefix, now):
                tick()
                yield entry
        except NoIndexError:
            yield from self._rebuilt(prefix, now, tick)

    def _listed(self, prefix: str, now: int, before: int | None = None) -> Iterator[Entry]:
        """Return open intents by the index. The records decide, and wrong entries of the index are corrected.

        Args:
            before: only those that are due by this time.
        """
        marks = []
        for name, at, stored in self.store.open(prefix, before):
            stamp, due = 0, None
            if stored is not None:
                entry = self._entry(name, stored, now)
                if entry is None:
                    continue  # it may be of a newer version, and another worker needs the index's entry
                stamp, due = stored.stamp, protocol.due(entry.record)
                if due is not None and (before is None or stamp + due <= before):
                    yield entry
            if due is None or stamp + due != at:
                marks.append(Mark(name, stamp, due))
            if len(marks) >= MARKS:
                self._mark(marks)
                marks = []
        self._mark(marks)

    def _rebuilt(
        self, prefix: str, now: int, tick: Callable[[], object], strict: bool = False
    ) -> Iterator[Entry]:
        """Return open intents from a scan of all records, and build the index meanwhile.

        Args:
            strict: raise if the index cannot be written. Otherwise a user who may only read gets the intents.
        """
        writes = True
        for name, stored in self.store.scan(self._prefix):
            tick()
            entry = self._entry(name, stored, now)
            due = None if entry is None else protocol.due_again(entry.record)
            if entry is not None and due is not None:
                writes = writes and self._mark([Mark(name, stored.stamp, due)], strict)
                if name.startswith(prefix):
                    yield entry
        if writes:
            with nullcontext() if strict else suppress(StoreError):
                self.store.indexed(self._prefix)

    def _mark(self, marks: Sequence[Mark], strict: bool = False) -> bool:
        try:
            self.store.mark(marks)
        except StoreError:
            if strict:
                raise
            return False
        return True

    # --- decisions of operators ---------------------------------------------------------

    def resolve(
        self,
        key: str,
        answer: Happened | NotHappened,
        *,
        by: str,
        evidence: str = "",
        fence: int | None = None,
        keep: float | None = None,
        dry_run: bool = False,
    ) -> Entry:
        """Settle an intent in doubt by a person's decision. The record keeps the decision.

        If it happened, the original caller gets that answer too, although it was told that the effect is unknown. Its
        call is published once more, as a duplicate. If this is interrupted before that, repeat the same decision.

        Args:
            by: who decides.
            evidence: what they saw.
            fence: fence of the record that they looked at, because evidence about one attempt says nothing about a
                later one. None: the attempt that is stored now.
            keep: seconds to keep the outcome; None: the task's ``result_ttl``.
            dry_run: write nothing; return what it would be, or raise.

        Raises:
            IdempotencyError: there is no such intent, an execution holds it, its outcome is known, or its fence is
                another one.
        """
        if keep is None:
            keep = self.result_ttl(keys.task_of(key) or key)
        policy = Policy(lease=0, result_ttl=int(keep * MICROSECONDS), failure_ttl=int(keep * MICROSECONDS))
        outcome = self.outcome_of(answer.result, key) if isinstance(answer, Happened) else None
        tell: Callable[[], object] | None = None
        resolution = Resolution.NOT_HAPPENED if outcome is None else Resolution.HAPPENED
        what = "happened" if outcome is not None else "not happened"

        def decide(record: Record | None, stamp: int, now: int) -> tuple[Done | Refused, Record | None]:
            nonlocal fence, tell
            if record is None:
                return Refused(None), None
            if fence is None:
                # Fixed here, because another attempt may begin while this decision is written.
                fence = record.fence
            note = Note(now, by, what, evidence, resolution=resolution)
            tell = self.teller(key, record.call) if outcome is not None and record.call else None
            done, new = protocol.resolve(record, stamp, now, outcome, note, fence, tell is not None)
            return done, None if dry_run else new

        # A decision that writes no value needs no seal key, so that a person can decide although the key is lost.
        done, reply = self._change(key, decide, policy, check=outcome is not None)
        if isinstance(done, Refused):
            if done.record is None:
                raise self._no_intent(key)
            repeated = outcome is not None and done.record.outcome == outcome and not dry_run
            if repeated and tell is not None and done.record.recovery is not None:
                self.tell(key, tell, policy)  # it was decided before, and perhaps interrupted before this
            if fence not in (None, done.record.fence):
                raise _taken_up(key, fence, done.record)
            mark = done.record.noticed
            if mark is not None and reply.stored is not None and mark.stamp == reply.stored.stamp:
                _clock_went_back(key, done.record, self.store.url)
                raise IdempotencyError(
                    f"The clock of {self.store.url} went back after {key} was last written, so whether its worker "
                    f"lives is not known yet. Try again in {done.record.lease / MICROSECONDS:g} s: a worker that lives "
                    "has renewed its lease by then.",
                    key,
                )
            raise IdempotencyError(
                f"{key} is {done.record.state.name.lower()}, not in doubt, so there is nothing to resolve. Look at "
                "it with `idem show`; `idem forget` removes it.",
                key,
            )
        assert reply.stored is not None
        if not dry_run:
            events.emit("resolved", key, by=by, what=what)
            if tell is not None:
                self.tell(key, tell, policy)
        return Entry(key, done.record, reply.stored.stamp, reply.stored.stamp)

    def tell(self, key: str, publish: Callable[[], object], policy: Policy) -> None:
        """Publish the call of an intent that a person decided, so that its caller gets the outcome.

        Raises:
            IdempotencyError: the broker did not take the message. The outcome stays, and recovery publishes it later.
        """
        publish()
        self._write(key, protocol.published, policy)

    def told(self, key: str, policy: Policy) -> None:
        """Note that the caller of a settled intent has its answer."""
        self._write(key, protocol.told, policy)

    def cancel(self, key: str, *, by: str, evidence: str = "", fence: int | None = None) -> Entry:
        """Cancel an action, by a person's decision. The record keeps the decision.

        An action that has not begun will not run, and its callers receive ``Cancelled``. A body that runs is asked to
        stop (``self.claim.cancelled``). Only its end tells whether it had its effect by then.

        Args:
            by: who cancels.
            evidence: why.
            fence: as for ``resolve``.

        Returns:
            The intent as it is now: ``cancelled``, or still ``running``.

        Raises:
            IdempotencyError: there is no such intent, it is in doubt, its outcome is known, or its fence is another
                one.
        """
        keep = int(self.result_ttl(keys.task_of(key) or key) * MICROSECONDS)
        policy = Policy(lease=0, result_ttl=keep, failure_ttl=keep)

        def decide(record: Record | None, stamp: int, now: int) -> tuple[Done | Refused, Record | None]:
            if record is None or record.state is State.CANCELLED:
                return Refused(record), None
            note = Note(now, by, "cancelled", evidence, resolution=Resolution.CANCELLED)
            return protocol.cancel(record, stamp, now, note, fence)

        done, reply = self._change(key, decide, policy)
        if done.record is None:
            raise self._no_intent(key)
        assert reply.stored is not None
        entry = Entry(key, done.record, reply.stored.stamp, reply.now or reply.stored.stamp)
        if isinstance(done, Done) or done.record.state is State.CANCELLED:
            if reply.done:
                events.emit(
                    "resolved", key, by=by, what="cancelled" if done.record.outcome else "asked to stop"
                )
            return entry
        if fence not in (None, done.record.fence):
            raise _taken_up(key, fence, done.record)
        if done.record.outcome is not None:
            raise IdempotencyError(f"{key} is {entry.state} already: there is nothing to cancel.", key)
        raise IdempotencyError(
            f"{key} is {entry.state}: whether it took effect is not known, so it cannot be cancelled. Look at the "
            "destination, then `idem resolve` it.",
            key,
        )

    def _no_intent(self, key: str) -> IdempotencyError:
        return IdempotencyError(f"There is no intent {key} in {self.store.url}.", key)

    def forget(self, key: str, steps: bool = False, fence: int | None = None, by: str = "") -> bool:
        """Let an intent run again, in whatever state it is: the next call with this key runs.

        Finished steps of an action that is not done stay, with the values of ``must_match``, so the next call does not
        run those steps again. An execution under way keeps its hold: its next renewal or its outcome restores the
        record.

        Args:
            steps: forget finished steps too, so that they run again.
            fence: fence of the record that the person looked at; None: the one that is stored now.
            by: who decides. Only the event has it, because there is no record then.

        Returns:
            False if there was no record.

        Raises:
            IdempotencyError: its fence is another one.
        """
        keep = int(self.result_ttl(keys.task_of(key) or key) * MICROSECONDS)

        def decide(record: Record | None, stamp: int, now: int) -> tuple[bool, Record | None]:
            if record is not None and fence not in (None, record.fence):
                raise _taken_up(key, fence, record)
            if record is not None:
                return True, protocol.forget(record, stamp, now, steps) or DELETED
            if stamp:  # the value is no record, and deleting it helps
                events.diagnose(logging.WARNING, "what was forgotten at %s was no record", key)
                return True, DELETED
            return False, None

        found: bool = self._change(key, decide, Policy(0, result_ttl=keep, failure_ttl=keep), lenient=True)[0]
        if found:
            events.emit("forgotten", key, by=by)
        return found

    def note_shadow(
        self, key: str, would: Would, reason: str, differs: tuple[str, ...], request: Request
    ) -> None:
        """Note in a shadow record what the guard would have done with a call."""

        def decide(record: Record | None, stamp: int, now: int) -> tuple[None, Record | None]:
            if record is None:
                return None, None
            what = would.name.lower()
            note = Note(now, request.task_id, what, reason or ", ".join(differs), would, differs)
            return None, protocol.shadowed(record, note, request)

        self._change(key, decide, request.policy)

    def reseal(self, entry: Entry, policy: Policy, dry_run: bool = False, lost: bool = False) -> Resealed:
        """Seal an intent's record with the newest key.

        Args:
            entry: the intent as it was read.
            policy: says how long an outcome is kept.
            dry_run: write nothing.
            lost: see ``sealing.resealed``.

        Raises:
            StoreError: the store did not answer. If the error names a key: this process does not have the record's
                seal key.
        """
        seal = self.codec.seal
        if seal is None:
            raise ConfigurationError("idem_seal_keys is not set, so there is no key to seal with.")
        key, newest = entry.key, {seal.newest}
        verdict: Resealed = "current"
        if sealing.sealed_with(entry.record) <= newest:
            return verdict

        def decide(record: Record | None, stamp: int, now: int) -> tuple[Refused, Record | None]:
            nonlocal verdict
            verdict = "current"
            if record is None or sealing.sealed_with(record) <= newest:
                return Refused(record), None
            new = protocol.rewritten(sealing.resealed(record, seal, key, lost), stamp, now)
            verdict = "running" if new is None else "resealed"
            return Refused(new), None if dry_run else new  # Refused, so that the record does not live longer

        self._change(key, decide, policy)
        return verdict

    def purge(self, batch: int = 1000) -> int:
        """Delete expired records, in batches, and return their number. Redis does that itself: 0."""
        total = 0
        while True:
            deleted = self.store.purge(batch)
            total += deleted
            if deleted < batch:
                return total

    def lapse(self, key: str, holder: bytes) -> None:
        """End the hold of an owner whose process is known to be dead."""
        self._write(key, lambda record: protocol.lapse(record, holder))

    def revoked(self, key: str, task_id: str, policy: Policy) -> None:
        """Note that Celery has dropped the message of this task. See ``protocol.revoked``."""
        self._write(key, lambda record: protocol.revoked(record, task_id), policy)

    def died(
        self, key: str, owner_prefix: bytes, task_id: str, policy: Policy, again: int
    ) -> tuple[Verdict | None, Record | None]:
        """End the hold of a dead process. See ``protocol.died``.

        Returns:
            What to do with the message that it was working on, and the record as it is now.
        """

        def decide(record: Record | None, stamp: int, now: int) -> tuple[Any, Record | None]:
            verdict, new = protocol.died(record, stamp, owner_prefix, task_id, policy, again)
            return (verdict, new or record), new

        decided: tuple[Verdict | None, Record | None] = self._change(key, decide, policy)[0]
        return decided

    # --- for recovery -----------------------------------------------------------------

    def overdue(self, limit: int | None = None) -> Iterator[Entry]:
        """Return open intents that recovery has to look at now, the longest overdue first. ``limit`` None: all."""
        now = self.store.read(self._prefix).now
        try:
            yield from islice(_each_once(self._listed(self._prefix, now, now)), limit)
        except NoIndexError:
            self.reindex()
            yield from islice(_each_once(self._listed(self._prefix, now, now)), limit)

    def recover(
        self,
        key: str,
        publishable: Callable[[Record], bool],
        policy: Policy,
        elsewhere: Callable[[Record], bool] = lambda record: False,
    ) -> Publish | Tell | None:
        """Take an overdue intent, so that only this process publishes its call, or tells its caller.

        See ``protocol.recover``.

        Raises:
            StoreError: the store did not answer. If the error names a key: this process cannot read the record.
        """
        jitter = randrange(protocol.JITTER)  # noqa: S311  # tells two processes apart

        def decide(
            record: Record | None, stamp: int, now: int
        ) -> tuple[Publish | Tell | None, Record | None]:
            if record is None:
                return None, None
            can = publishable(record)
            return protocol.recover(record, stamp, now, can, policy, jitter, elsewhere(record))

        taken: Publish | Tell | None = self._change(key, decide, policy, check=True)[0]
        if isinstance(taken, Tell) and taken.first:
            events.emit("in_doubt", key, task_id=taken.record.task_id, reason=taken.record.reason)
        return taken

    def answered(self, key: str, taken: Tell | Publish, policy: Policy) -> None:
        """Note that the caller of an intent, which ``recover`` returned, has an answer."""
        self._write(key, lambda record: protocol.answered(record, taken.record), policy)

    def not_published(self, key: str, taken: Publish) -> None:
        """Note that the broker did not take the call of an intent that ``recover`` has taken."""
        self._write(key, lambda record: protocol.not_published(record, taken.record))

    def _change(
        self, key: str, decide: Decide, policy: Policy | None, lenient: bool = False, check: bool = False
    ) -> tuple[Any, Reply]:
        checked = self._check(key) if check else None
        name = self._prefix + key
        decision, reply, _ = change(self.store, name, key, decide, policy, lenient=lenient, check=checked)
        return decision, reply

    def _write(self, key: str, new: Callable[[Record], Record | None], policy: Policy | None = None) -> None:
        """Replace a record by ``new`` of it, unless that is None, or there is no record."""
        self._change(key, lambda record, stamp, now: (None, record and new(record)), policy)

    def _check(self, key: str) -> Callable[[Record], object]:
        """Return a check that refuses a record whose seal key this process does not have."""
        return lambda record: sealing.check(self.codec.seal, record, key)

    # --- values -----------------------------------------------------------------------

    def outcome_of(self, value: Any, key: str) -> Outcome:
        """Return a value as an outcome. If it cannot be stored, the outcome has the reason instead of a payload."""
        return self.encode(value, key)[0]

    def encode(self, value: Any, key: str) -> tuple[Outcome, Any]:
        """Return a value as an outcome, and the value that every caller gets: the stored one, as it will be read."""
        try:
            payload, shown = self.codec.kept(value, key)
        except NotStorable as why:
            return Outcome(True, None, str(why)), value
        return Outcome(True, payload), shown


def _first(name: str, new: Record, request: Request) -> Change | Creation:
    """Return the write of a claim that has read nothing."""
    value, due, old = pack(new), protocol.due(new, request.policy), request.accepted
    return Creation(name, value, None, due) if old is None else Change(name, old, value, None, due)


def _read(key: str, stored: Stored) -> Record:
    return unpack(stored.value, stored.stamp, key)


def _taken_up(key: str, fence: int | None, record: Record) -> IdempotencyError:
    return IdempotencyError(
        f"{key} has changed since you looked at it: a call took it up again, or somebody decided (fence {fence} then, "
        f"{record.fence} now). Nothing was written. Look again: `idem show`, and the destination.",
        key,
    )


def _clock_went_back(key: str, record: Record, store: str) -> None:
    assert record.noticed is not None
    by = (record.noticed.at - record.noticed.stamp) / MICROSECONDS
    events.emit("clock_stepped", key, by=round(by, 1), store=store)
