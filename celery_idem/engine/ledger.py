"""The protocol over a store: claim, renew, settle, release, resolve, list, purge.

Each operation reads what stands there, asks ``protocol`` what it means, writes the
record it gives with a compare-and-set, and starts over when somebody was faster. The
first guess saves the read: a claim begins with *create if absent*, everything else
with the record as this execution last wrote it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from celery_idem.core import keys, protocol
from celery_idem.core.errors import IdempotencyError, StoreError
from celery_idem.core.model import (
    MICROSECONDS,
    Acquired,
    Answer,
    Ask,
    Busy,
    Decision,
    Done,
    Happened,
    Note,
    NotHappened,
    Outcome,
    Policy,
    Record,
    Refused,
    Request,
    State,
    Stored,
    Unknown,
    Verdict,
)
from celery_idem.core.record import pack
from celery_idem.core.results import Codec, NotStorable
from celery_idem.engine import clock, events
from celery_idem.engine.claim import Claim, age, lease_lost, renewed
from celery_idem.engine.entries import STATES, Entry, Tally, tallied
from celery_idem.engine.transitions import ROUNDS, Transitions, kept, known, present
from celery_idem.stores.base import Change, PartlyError, Reply, Store, elsewhere

SHADOW = "~shadow"
"""What the namespace of shadow records has behind it; a namespace itself ends before the colon."""

DAY = 86_400.0
"""Seconds; what ``result_ttl`` is where nobody said otherwise."""


REMEMBERED = 50_000
"""Keys, at least, that a listing remembers: 15 MB at most. Redis repeats a key within the part of its table that it
is about to merge, so soon; where a cluster moves slots the whole listing is repeated."""


def _each_once(found: Iterator[tuple[str, Stored]]) -> Iterator[tuple[str, Stored]]:
    recent: set[str] = set()
    older: set[str] = set()
    for key, stored in found:
        if key not in recent and key not in older:
            if len(recent) >= REMEMBERED:
                recent, older = set(), recent
            recent.add(key)
            yield key, stored


class Ledger(Transitions):
    """All intents of one namespace in one store.

    Args:
        store: where they are.
        namespace: applications with different namespaces do not see each other.
        codec: how results are written.
        result_ttl: seconds to keep an outcome that a person gives, by the task's name.
    """

    def __init__(
        self,
        store: Store,
        namespace: str = "idem",
        codec: Codec | None = None,
        result_ttl: Callable[[str], float] = lambda task: DAY,
    ) -> None:
        super().__init__(store, f"{namespace}:")
        self.result_ttl = result_ttl
        self._stepped = 0.0
        self.namespace = namespace
        self.codec = codec or Codec()

    def shadow(self) -> Ledger:
        """The same place, with records of its own that no claim here ever sees."""
        twin = Ledger(self.store, self.namespace, self.codec, self.result_ttl)
        twin._prefix = f"{self.namespace}{SHADOW}:"
        return twin

    # --- for an execution -----------------------------------------------------------

    def claim(self, key: str, request: Request) -> tuple[Decision, Claim | None]:
        """Claim an intent; the second part is there for ``Acquired`` and ``Ask``.

        Raises:
            StoreError: nobody knows whether the claim was written. The owner in
                ``request`` does: carry it along.
        """
        before = clock.elapsed()
        new = protocol.fresh(request)
        reply = self.store.create(self._prefix + key, pack(new))
        if reply.done:
            assert reply.stored is not None
            record = new._replace(fence=reply.stored.stamp)  # a first claim's fence is its creation
            return Acquired(record), Claim(key, request, reply.stored, record, before)

        def decide(record: Record, stamp: int, now: int) -> tuple[Decision, Record | None]:
            return protocol.claim(record, stamp, now, request)

        return self._decide(key, request, reply, decide, before)

    def conclude(self, claim: Claim, answer: Answer) -> tuple[Decision, Claim | None]:
        """Write what the destination answered to a question this claim (``Ask``) put."""
        outcome, reason = None, ""
        if isinstance(answer, Happened):
            outcome = self.outcome_of(answer.result)
        elif isinstance(answer, Unknown):
            reason = answer.reason or "the destination could not tell"

        def decide(record: Record, stamp: int, now: int) -> tuple[Decision, Record | None]:
            # The first guess is what this claim wrote itself: then nobody has asked the store for the time.
            return protocol.conclude(record, now or stamp, claim._request, outcome, reason)

        reply, held = self._last_seen(claim)
        return self._decide(claim.key, claim._request, reply, decide, clock.elapsed(), held)

    def settle(self, claim: Claim, outcome: Outcome, patience: float) -> Done | Refused:
        """Write how the body ended; ``Refused`` when somebody took over.

        Args:
            patience: seconds to keep trying while the store does not answer.

        Raises:
            StoreError: it did not answer for that long. The record stays as it is.
        """
        held = claim._seen[1]

        def decide(record: Record | None, stamp: int, now: int) -> tuple[Done | Refused, Record | None]:
            return protocol.settle(known(claim, record, stamp) if record is not None else None, held, outcome)

        return self.patient_transition(claim, decide, patience)

    def settle_within(self, claim: Claim, inside: Store, value: Any) -> None:
        """Write the outcome in a transaction of the author's own (``Store.inside``), to be committed by the author.

        Raises:
            LeaseLost: somebody took over: the transaction must roll back.
            ConfigurationError: the record is not in that database.
        """
        outcome, shown = self.kept(value)
        held = claim._seen[1]
        settle = present(lambda record: protocol.settle(record, held, outcome))
        there = Ledger(inside, self.namespace, self.codec)
        claim._end()
        reply, _ = self._last_seen(claim)
        done, _ = there._compare_and_set(claim.key, reply, settle, claim._request.policy)
        if isinstance(done, Done):
            claim._promised = (outcome, shown)
        elif done.record is None:
            raise elsewhere(self.store.url)
        elif done.record.owner == held.owner:
            raise IdempotencyError(
                f"{claim.key} has its outcome already: an execution settles once. Use one settle_in.",
                claim.key,
            )
        else:
            claim._taken_over = True
            raise lease_lost(claim)

    def committed(self, claim: Claim, patience: float) -> Done | Refused:
        """After ``settle_within``: what became of it. See ``protocol.committed``.

        Raises:
            StoreError: the store did not answer for ``patience`` seconds.
        """
        assert claim._promised is not None
        held, outcome, policy = claim._seen[1], claim._promised[0], claim._request.policy
        return self.patient_transition(
            claim,
            lambda record, stamp, now: protocol.committed(record, held, outcome, policy),
            patience,
            fresh=True,
        )

    def release(self, claim: Claim, patience: float) -> Done | Refused:
        """Nothing happened: anybody may claim the intent again."""

        def decide(record: Record | None, stamp: int, now: int) -> tuple[Done | Refused, Record | None]:
            if record is None:
                return Refused(None), None
            return protocol.release(known(claim, record, stamp), claim._request.owner)

        return self.patient_transition(claim, decide, patience)

    def let_go(self, key: str, request: Request) -> None:
        """Release a claim that may or may not have been written, and whose body did not run."""
        self.release(Claim.unguarded(key, request), 0.0)

    def schedule(self, claim: Claim, delay: float, patience: float, task_id: str = "") -> Done | Refused:
        """Keep the intent for the retry's task id ("": this one) for ``delay`` seconds, until it comes."""
        wait = int(delay * MICROSECONDS)
        return self.patient_transition(
            claim,
            kept(claim, lambda record: protocol.schedule(record, claim._request.owner, wait, task_id)),
            patience,
        )

    def doubt(self, claim: Claim, reason: str, patience: float) -> Done | Refused:
        """The body ended in a way that leaves the effect unknown."""
        return self.patient_transition(
            claim, kept(claim, lambda record: protocol.doubt(record, claim._request.owner, reason)), patience
        )

    def exited(self, claim: Claim, reason: str, patience: float) -> Done | Refused:
        """The process was told to exit while the body ran."""
        owner, policy = claim._request.owner, claim._request.policy
        return self.patient_transition(
            claim, kept(claim, lambda record: protocol.exited(record, owner, policy, reason)), patience
        )

    def renew(self, claims: Sequence[Claim]) -> None:
        """Renew the leases of running claims, in one round trip where the store can."""
        before = clock.elapsed()
        changes = []
        seen = []
        for claim in claims:
            stored, record = claim._seen
            assert stored is not None  # only claims that were written are watched
            seen.append(record)
            ttl = protocol.ttl(record, claim._request.policy)
            changes.append(Change(self._prefix + claim.key, stored, pack(record), ttl))
        failed: StoreError | None = None
        replies: Sequence[Reply | None]
        try:
            replies = self.store.replace_many(changes)
        except PartlyError as error:
            failed, replies = error, error.replies
        if replies[0] is not None and replies[0].done:
            self._compare_clocks(claims[0], replies[0], before)
        for claim, record, reply in zip(claims, seen, replies, strict=True):
            if reply is None:
                continue
            if reply.done:
                renewed(claim, record, reply, before)
                continue
            try:
                self._renew_again(claim, reply, before)
            except StoreError as error:
                if not error.key:
                    raise
                failed = (
                    error  # the store answered: with something that is no record. Others need not suffer.
                )
        if failed is not None:
            raise failed

    def _compare_clocks(self, claim: Claim, reply: Reply, before: float) -> None:
        """Between two writes of a claim as much time should have passed in the store as here."""
        old = claim._seen[0]
        assert old is not None
        assert reply.stored is not None
        there = reply.stored.stamp - old.stamp
        ahead = there - (clock.elapsed() - claim._written_at) * MICROSECONDS
        back = (before - claim._written_at) * MICROSECONDS if there == 1 else 0.0  # or more: 1 hides how much
        by = ahead if ahead > protocol.STEP else -back if back > protocol.STEP else 0.0
        if by and by * self._stepped <= 0:  # once, and not at every renewal until it is over
            events.emit("clock_stepped", claim.key, by=round(by / MICROSECONDS, 1), store=self.store.url)
        self._stepped = by

    def _renew_again(self, claim: Claim, reply: Reply, before: float) -> None:
        """The body itself wrote meanwhile (a step, the outcome), or somebody took over."""
        lost = reply.stored
        record = self._read(claim.key, lost) if lost is not None else None
        # The store has lost the record, or what was written to it lately.
        if lost is None or known(claim, record, lost.stamp) is not record:
            with claim._lock:  # an ending that begins meanwhile waits: it must not be undone
                held = claim._seen[1]
                if claim._ending or held.state is not State.RUNNING:
                    return
                name, value = self._prefix + claim.key, pack(held)
                reply = (
                    self.store.create(name, value) if lost is None else self.store.replace(name, lost, value)
                )
            if reply.done:
                renewed(claim, held, reply, before)
                return
            if reply.stored is None:
                return  # the next look creates it anew
            record = self._read(claim.key, reply.stored)
        assert record is not None
        assert reply.stored is not None
        decision, new = protocol.renew(record, claim._request.owner)
        if new is not None and record.noticed is not None:  # another's mark: answer with a sign of life, now
            reply = self.store.replace(self._prefix + claim.key, reply.stored, pack(new))
            if reply.done:
                renewed(claim, new, reply, before)
            return
        if isinstance(decision, Done):
            # Its own newer write moved the deadline already. The next look renews that one,
            # also where the reply to it got lost and the body's thread does not know it.
            renewed(claim, record, reply, before)
            return
        if record.owner != claim._request.owner and not claim._taken_over:
            claim._taken_over = True
            events.emit("lease_lost", claim.key, task_id=claim.task_id, fence=claim.fence)

    # --- for operators --------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        """One intent; None when nothing is stored under the key."""
        reply = self.store.read(self._prefix + key)
        if reply.stored is None:
            return None
        return Entry(key, self._read(key, reply.stored), reply.stored.stamp, reply.now)

    def look(self, key: str) -> Entry | None:
        """As ``get``, and cheaper where there is nothing, or an outcome: then the time does not matter."""
        stored = self.store.peek(self._prefix + key)
        if stored is None:
            return None
        record = self._read(key, stored)
        return Entry(key, record, stored.stamp, stored.stamp) if protocol.final(record) else self.get(key)

    def list(
        self, state: str | None = None, task: str | None = None, tick: Callable[[], object] | None = None
    ) -> Iterator[Entry]:
        """Intents, in no order and in bounded memory, each once.

        A server may name a key again while its table shrinks or its slots move; it is left out where it was
        among the latest ``REMEMBERED`` keys, which is where such repetitions are.

        Args:
            state: only those in this state (``"in_doubt"``, ``"lapsed"``, …).
            task: only those of this task.
            tick: called for every record that is read, wanted or not. What it raises ends the listing.

        Raises:
            IdempotencyError: there is no such state.
        """
        wanted = state.lower() if isinstance(state, str) else state
        if wanted is not None and wanted not in STATES:
            raise IdempotencyError(f"There is no state {state!r}. The states are {', '.join(STATES)}.")
        return self._list(wanted, task, tick)

    def _list(
        self, wanted: str | None, task: str | None, tick: Callable[[], object] | None
    ) -> Iterator[Entry]:
        prefix = f"{self._prefix}{task}:" if task else self._prefix
        now = self.store.read(self._prefix).now
        if wanted is None:
            found = self.store.scan(prefix)
        else:
            name = "RUNNING" if wanted == "lapsed" else wanted.upper()
            found = self.store.scan_states(prefix, bytes([s for s in State if s.name == name]))
        for stored_key, stored in _each_once(found):
            if tick is not None:
                tick()
            key = stored_key.removeprefix(self._prefix)
            try:
                entry = Entry(key, self._read(key, stored), stored.stamp, now)
            except StoreError:
                continue  # not a record of ours; `get` says so to whoever asks for it
            if (task is None or entry.task == task) and (wanted is None or entry.state == wanted):
                yield entry

    def stats(self) -> dict[tuple[str, str], Tally]:
        """How many intents stand in which state, by (task, state). Reads every record once, in bounded memory."""
        return tallied(self.list())

    def resolve(
        self,
        key: str,
        answer: Happened | NotHappened,
        *,
        by: str,
        evidence: str = "",
        fence: int | None = None,
        keep: float | None = None,
    ) -> Entry:
        """Settle an intent in doubt by hand. Audited in the record.

        Args:
            by: who decides.
            evidence: what they saw.
            fence: that of the record they looked at: evidence on one attempt says nothing of a
                later one. None: the attempt that stands there now.
            keep: seconds to keep the outcome; None: the task's ``result_ttl``.

        Raises:
            IdempotencyError: there is no such intent, somebody works on it right now, its
                outcome is known already, or its fence is another one.
        """
        if keep is None:
            keep = self.result_ttl(keys.task_of(key) or key)
        policy = Policy(lease=0, result_ttl=int(keep * MICROSECONDS), failure_ttl=int(keep * MICROSECONDS))
        outcome = self.outcome_of(answer.result) if isinstance(answer, Happened) else None
        what = "happened" if outcome is not None else "not happened"

        def decide(record: Record | None, stamp: int, now: int) -> tuple[Done | Refused, Record | None]:
            if record is None:
                return Refused(None), None
            return protocol.resolve(record, stamp, now, outcome, Note(now, by, what, evidence), fence)

        reply = self.store.read(self._prefix + key)
        if fence is None and reply.stored is not None:
            fence = self._read(
                key, reply.stored
            ).fence  # not of an attempt that begins while this decision is written
        done, reply = self._compare_and_set(key, reply, decide, policy)
        if isinstance(done, Refused):
            if done.record is None:
                raise IdempotencyError(f"There is no intent {key} in {self.store.url}.", key)
            if fence not in (None, done.record.fence):
                raise IdempotencyError(
                    f"{key} was taken up again since you looked at it (fence {fence} then, {done.record.fence} now). "
                    "Nothing was written. Look again: `idem show`, and the destination.",
                    key,
                )
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
        events.emit("resolved", key, by=by, what=what)
        return Entry(key, done.record, reply.stored.stamp, reply.stored.stamp)

    def forget(self, key: str, steps: bool = False) -> bool:
        """Let an intent run again, whatever its state: the next call with this key runs.

        Finished steps of an action that is not done stay, and with them the values of ``must_match``:
        the next call does not run those steps again. An execution under way keeps its hold: its next
        renewal or its outcome writes the record anew.

        Args:
            steps: forget finished steps too: they run again.

        Returns:
            False when there was none.
        """
        keep = int(self.result_ttl(keys.task_of(key) or key) * MICROSECONDS)
        reply = self.store.read(self._prefix + key)
        for _ in range(ROUNDS):
            stored = reply.stored
            if stored is None:
                return False
            left = None
            try:
                left = protocol.forget(self._read(key, stored), stored.stamp, reply.now, steps)
            except StoreError:  # no record: forgetting is what helps
                events.diagnose(logging.WARNING, "what was forgotten at %s was no record", key)
            value = stored.value if left is None else pack(left)
            ttl = 0 if left is None else protocol.ttl(left, Policy(0, result_ttl=keep, failure_ttl=keep))
            reply = self.store.replace(self._prefix + key, stored, value, ttl)
            if reply.done:
                events.emit("forgotten", key)
                return True
        raise StoreError(f"{key} changes all the time; nothing was removed. Try again.", key)

    def note_shadow(self, key: str, would: str, evidence: str, request: Request) -> None:
        """Note in a shadow record what a guard would have done to a call."""

        def decide(record: Record | None, stamp: int, now: int) -> tuple[None, Record | None]:
            if record is None:
                return None, None
            return None, protocol.shadowed(record, Note(now, request.task_id, would, evidence), request)

        self._compare_and_set(key, self.store.read(self._prefix + key), decide, request.policy)

    def purge(self, batch: int = 1000) -> int:
        """Delete what has expired, in batches; how many. Redis expires by itself: 0."""
        total = 0
        while True:
            gone = self.store.purge(batch)
            total += gone
            if gone < batch:
                return total

    def lapse(self, key: str, holder: bytes) -> None:
        """The process that minted this owner is known to be dead: end what it holds."""

        def decide(record: Record | None, stamp: int, now: int) -> tuple[None, Record | None]:
            return None, protocol.lapse(record, holder) if record is not None else None

        self._compare_and_set(key, self.store.read(self._prefix + key), decide, None)

    def died(
        self, key: str, owner_prefix: bytes, task_id: str, policy: Policy, again: int
    ) -> tuple[Verdict | None, Record | None]:
        """A process is known to be dead: end what it held. See ``protocol.died``.

        Returns:
            What to tell the caller of the message it was working on, and the record as it is now.
        """

        def decide(record: Record | None, stamp: int, now: int) -> tuple[Any, Record | None]:
            verdict, new = protocol.died(record, stamp, owner_prefix, task_id, policy, again)
            return (verdict, new or record), new

        reply = self.store.read(self._prefix + key)
        decided: tuple[Verdict | None, Record | None] = self._compare_and_set(key, reply, decide, policy)[0]
        return decided

    # --- inside ---------------------------------------------------------------------

    def outcome_of(self, value: Any) -> Outcome:
        """A value as an outcome; one without payload, and the reason, when it cannot be stored."""
        return self.kept(value)[0]

    def kept(self, value: Any) -> tuple[Outcome, Any]:
        """The same, and what every caller gets: what is stored, as it will be read."""
        try:
            payload, shown = self.codec.kept(value)
        except NotStorable as why:
            return Outcome(True, None, str(why)), value
        return Outcome(True, payload), shown

    def _decide(
        self,
        key: str,
        request: Request,
        reply: Reply,
        decide: Callable[[Record, int, int], tuple[Decision, Record | None]],
        before: float,
        held: Record | None = None,
    ) -> tuple[Decision, Claim | None]:
        """A decision on a record that is there; absent in between: claim it from the start.

        Args:
            held: the record as this execution last wrote it, where it knows something that must
                not get lost with the record (what a destination answered).
            before: the worker's time before the first call: a write whose reply got lost counts from there.
        """
        for _ in range(ROUNDS):
            stored = reply.stored
            if stored is not None:
                decision, new = decide(self._read(key, stored), stored.stamp, reply.now)
            elif held is not None:
                decision, new = decide(protocol.restored(None, held), 0, reply.now)
            else:
                return self.claim(key, request)
            if new is not None:
                before = clock.elapsed()
                value = pack(new)
                keep = protocol.ttl(new, request.policy)
                if stored is None:
                    reply = self.store.create(self._prefix + key, value, keep)
                else:
                    reply = self.store.replace(self._prefix + key, stored, value, keep)
                if not reply.done and (reply.stored is None or reply.stored.value != value):
                    continue
                assert reply.stored is not None
                if isinstance(decision, Busy):
                    _clock_went_back(key, new, self.store.url)
            if isinstance(decision, (Acquired, Ask)):
                assert reply.stored is not None
                since = before - age(reply)
                return decision, Claim(key, request, reply.stored, decision.record, since)
            return decision, None
        raise StoreError(f"{key} changes all the time; nothing was run. It will be tried again.", key)


def _clock_went_back(key: str, record: Record, store: str) -> None:
    assert record.noticed is not None
    by = (record.noticed.at - record.noticed.stamp) / MICROSECONDS
    events.emit("clock_stepped", key, by=round(by, 1), store=store)
