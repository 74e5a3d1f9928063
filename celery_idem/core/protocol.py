"""The state machine. Pure functions: they take values, and return a decision and the record to write.

Nothing here knows a clock, a store or Celery. ``now`` and ``stamp`` are the store's times, in microseconds. The caller
writes the returned record with a compare-and-set. When that fails, it calls again with the record that is there now.

Claim (rule numbers are those of ``docs/explanation/state-machine.md``):

===========  ===============================================  =========================
record       condition, first that holds                      decision, and new state
===========  ===============================================  =========================
absent       came too late, can ask                           Ask, IN_DOUBT          (15)
absent       came too late                                    InDoubt, IN_DOUBT      (15)
absent       otherwise                                        Acquired, RUNNING      (1)
any          fingerprint differs                              Mismatch               (2)
SUCCEEDED                                                     Replay                 (1)
CANCELLED                                                     Replay                 (1)
FAILED       has finished steps, failure_ttl is over          Acquired, RUNNING      (10)
FAILED       otherwise                                        Replay                 (1)
RELEASED                                                      Acquired, RUNNING      (1)
ACCEPTED                                                      Acquired, RUNNING     (12)
SCHEDULED    same task id, or past its deadline               Acquired, RUNNING      (1)
SCHEDULED    otherwise                                        Busy                   (1)
RUNNING      own owner (a lost reply)                         Acquired               (7)
RUNNING      owner carried by this message, asked to stop     Replay, CANCELLED      (13)
RUNNING      owner carried by this message                    Acquired, RUNNING      (7)
RUNNING      lease live                                       Busy                   (1)
RUNNING      lapsed, asked to stop, in one transaction        Replay, CANCELLED      (13)
RUNNING      lapsed, can ask                                  Ask, IN_DOUBT          (3)
RUNNING      lapsed, asked to stop                            InDoubt, IN_DOUBT      (13)
RUNNING      lapsed, on_crash in_doubt                        InDoubt, IN_DOUBT      (3)
RUNNING      lapsed, crashes reach max_attempts               InDoubt, IN_DOUBT      (8)
RUNNING      lapsed, resume, rerun or transaction             Acquired, RUNNING      (3)
IN_DOUBT     owner carried by this message, asked to stop     Replay, CANCELLED      (13)
IN_DOUBT     owner carried by this message                    Acquired, RUNNING      (7)
IN_DOUBT     own question (a lost reply)                      Ask                    (7)
IN_DOUBT     a worker asks under a live lease                 Busy                   (3)
IN_DOUBT     can ask                                          Ask, IN_DOUBT          (3)
IN_DOUBT     otherwise                                        InDoubt                (3)
===========  ===============================================  =========================

``Busy`` says whether the message has the record's task id. Then it is a redelivery or an early retry, and no duplicate.
A stamp in the future says that the store's clock went back. Then ``Busy`` notes the time of this claim in the record,
and the hold counts from there.

After the body, or between its steps, only the current owner may write, however late (4). The end of another body
that may have had an effect (settle, doubt, exit) is noted as a suspected second effect:

============  =============================  ==============================================
transition    from                           to
============  =============================  ==============================================
accept        absent, RELEASED               ACCEPTED                                    (12)
sent          ACCEPTED                       same, with another time to look at it       (12)
recover       RUNNING, SCHEDULED, ACCEPTED   same, lease over; not taken: IN_DOUBT         (11)
recover       IN_DOUBT, asked or given up    same, question over                           (11)
recover       SUCCEEDED, FAILED, CANCELLED   same: its answer is owed, or is not any more  (11)
answered      IN_DOUBT                       same, and recovery leaves it to a person      (11)
answered      SUCCEEDED, FAILED, CANCELLED   as told                                       (11)
revoked       ACCEPTED, SCHEDULED            RELEASED                                    (11)
settle        RUNNING, IN_DOUBT, absent      SUCCEEDED or FAILED
told          SUCCEEDED, FAILED, CANCELLED   same, and no answer is owed any more          (11)
committed     SUCCEEDED                      nothing: a transaction has settled it         (9)
schedule      RUNNING, IN_DOUBT              SCHEDULED until the retry's ETA and a grace (5); CANCELLED: asked to stop
release       RUNNING, IN_DOUBT              RELEASED (finished steps stay)              (5); CANCELLED: asked to stop
doubt         RUNNING, IN_DOUBT              IN_DOUBT                                    (5)
renew         RUNNING, own IN_DOUBT          same, new lease (a question is its asker's)
begin_step    RUNNING                        RUNNING with one more open step
end_step      RUNNING, IN_DOUBT              same, the step and its result added
exit          RUNNING                        IN_DOUBT; RUNNING, lease over, where a claim decides (5)
lapse         RUNNING, IN_DOUBT              same, lease over: its process is dead            (3)
died          RUNNING of a dead process      the same (says its parent)                      (3)
conclude      IN_DOUBT, own question         SUCCEEDED, RUNNING or IN_DOUBT              (3); CANCELLED: asked to stop
resolve       IN_DOUBT, lapsed RUNNING       SUCCEEDED or RELEASED (says a person)
cancel        open, not IN_DOUBT             CANCELLED; RUNNING, asked to stop (says a person) (13)
forget        any but a live RUNNING         RELEASED with its finished steps; else nothing is left (10)
============  =============================  ==============================================
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any

from celery_idem.core import digests
from celery_idem.core.model import (
    FINGERPRINT_ENTRY,
    FINGERPRINT_TAG,
    MICROSECONDS,
    NO_OWNER,
    Accepted,
    Acquired,
    Again,
    Ask,
    Busy,
    Coming,
    Decision,
    Done,
    Fingerprint,
    InDoubt,
    Late,
    Mismatch,
    Note,
    Noticed,
    Outcome,
    Policy,
    Publish,
    Raised,
    Record,
    Recovery,
    Refused,
    Replay,
    Request,
    Resolution,
    State,
    Step,
    StepDecision,
    StepDone,
    StepOpen,
    StepsFull,
    Tell,
    Verdict,
)

_RUNNING, _RELEASED, _SUCCEEDED, _FAILED = State.RUNNING, State.RELEASED, State.SUCCEEDED, State.FAILED
_IN_DOUBT, _ACCEPTED = State.IN_DOUBT, State.ACCEPTED
# For the functions that every task runs: before Python 3.12, looking up a member of an enum is slow.

STEP = 1_000_000
"""Microseconds that a store's clock may go back unnoticed: a lease then ends that much later. A larger step is no
adjustment: the clock was set, or another machine answers."""

GRACE = 1_000_000
"""Microseconds past its deadline after which recovery takes an open record. A holder that is a little late comes
first."""

OVERDUE = 10_000_000
"""Microseconds past its time after which ``submit`` publishes an accepted call again. Recovery has looked several
times by then, so perhaps no worker reads this store."""

PUBLISHED_WAIT = 20_000_000
"""Microseconds until recovery publishes a call for the second time. The third time comes after four times as long, and
so on: the queue may just be long, and each message makes it longer. Recovery also waits this long until it looks
whether the caller has an answer, of an intent in doubt, or of a settled one whose answer is owed."""

ELSEWHERE = 60_000_000
"""Microseconds that a call from another broker is left to the workers of that broker. After that, it has no workers, or
it has another address now."""

LONGEST_WAIT = 3_600_000_000
"""The longest time between two publications, in microseconds."""

JITTER = 1 << 24
"""Up to this many microseconds, 17 s, are added to the time between two publications, at random. So two processes that
take the same record write different values, and the store tells whose write it took."""

NEVER = 1 << 50
"""Microseconds, 35 years: recovery does not look at the record. Added to a stamp, this is still an exact number in a
sorted set of Redis, which has 53 bits."""

MAX_NOTES = 32
"""Lines of history in a record, of about 100 bytes each. Only a contested intent has any. Thirty-two are enough for ten
crashes, and ``max_attempts`` ends a loop of crashes."""

MAX_STEPS = 500
"""Steps of one intent. Each step writes the record twice, with the results of all steps before it. With results of 40
bytes, 500 steps send 20 MB to the store, and 4,000 sent 1.1 GB."""

LEAST_STEPS = 86_400_000_000
"""Finished steps of an action that is not done are kept for at least this many microseconds, even with a shorter
``result_ttl``: without them, the next attempt would charge twice. A day, the default ``result_ttl``."""

MAX_COUNT = 65_535
"""Attempts are kept in two bytes. The count of a task that retries for ever stops here."""

MAX_NAMED = 8
"""Steps that one line of history names. So many are enough to recognise the body."""

MAX_LATE = 1024
"""Bytes of a result that a note of a suspected second effect keeps. An operator needs an id to look for. A call beside
an outcome may have as many (see ``_for_people``)."""

MAX_CRASHES = 255
"""Crashes are kept in one byte. A larger ``max_attempts`` is refused (see ``integration/settings``)."""

ENDINGS: dict[Raised, State] = {
    Raised.RETRY: State.SCHEDULED,
    Raised.DOUBTFUL_RETRY: State.IN_DOUBT,
    Raised.REPLACED: State.SUCCEEDED,
    Raised.IGNORE: State.RELEASED,
    Raised.SAID_DONE: State.SUCCEEDED,
    Raised.SAID_FAILED: State.FAILED,
    Raised.REJECT: State.RELEASED,
    Raised.NO_EFFECT: State.RELEASED,
    Raised.AMBIGUOUS: State.IN_DOUBT,
    Raised.TIME_LIMIT: State.IN_DOUBT,
    Raised.EXIT: State.IN_DOUBT,
    Raised.ERROR: State.FAILED,
}
"""Rule 5: the state after an exception of the body."""


def ending(kind: Raised, policy: Policy) -> State:
    """Return the state after an exception of the body (rules 5 and 9).

    Rule 9: if all effects are in one transaction, and it did not settle the intent, there was no effect. ``exit``
    decides about an exit.
    """
    state = ENDINGS[kind]
    in_transaction = policy.on_crash == "transaction" and kind is not Raised.EXIT
    if state is State.IN_DOUBT and in_transaction:
        return State.SCHEDULED if kind is Raised.DOUBTFUL_RETRY else State.RELEASED
    return state


def replace(record: Record, **changes: Any) -> Record:
    """Return the record with some fields changed."""
    return record._replace(**changes)


def ttl(record: Record, policy: Policy) -> int | None:
    """Return how long a record is kept, in microseconds; None for evidence, which never expires."""
    state = record.state
    if state is _SUCCEEDED:
        return policy.result_ttl
    if state not in (_FAILED, _RELEASED, State.CANCELLED):
        return None
    if state is State.CANCELLED:  # the lease is the time until a pending retry, which must find this record
        return record.lease + (max(policy.result_ttl, LEAST_STEPS) if record.steps else policy.result_ttl)
    if not record.steps:
        return policy.failure_ttl if state is State.FAILED else policy.result_ttl
    steps = max(policy.result_ttl, LEAST_STEPS)
    return policy.failure_ttl + steps if state is State.FAILED else steps


def due(record: Record, policy: Policy | None = None) -> int | None:
    """Return when recovery looks at an open record, in microseconds after its stamp; None: it is not in the index.

    Recovery looks when the hold is over. A record in doubt which no worker asks about waits for a person: it is in the
    index, behind everything that recovery looks for. A settled record is in it while its answer is owed.
    """
    if record.outcome is not None:
        return None if record.recovery is None else record.recovery.wait
    state = record.state
    if (policy is not None and not policy.indexed) or state is _RELEASED:
        return None
    if state is _IN_DOUBT and not record.asking and record.recovery is None:
        return NEVER
    mark = record.noticed
    return _wait(record) if mark is None else _wait(record) + mark.at - mark.stamp


def due_again(record: Record) -> int | None:
    """As ``due``, for an index that is built from the records.

    A settled record without a call says that its answer is owed long after it was given, because only its entry in the
    index was taken out then.
    """
    return None if record.outcome is not None and not record.call else due(record)


def _wait(record: Record) -> int:
    """Return how many microseconds after its write recovery takes a record."""
    asked = record.asking and record.lease  # a question has a lease, also one that recovery caused
    if record.recovery is not None and not asked:
        return record.recovery.wait
    return record.lease if record.state is _ACCEPTED else record.lease + GRACE


def outlives(outcome: Outcome, policy: Policy) -> bool:
    """Whether an outcome is kept until recovery has looked whether its answer is owed."""
    return (policy.result_ttl if outcome.succeeded else policy.failure_ttl) >= 2 * PUBLISHED_WAIT


def final(record: Record) -> bool:
    """Whether the outcome will not change any more.

    A failure with finished steps is not final: it may run again after ``failure_ttl``.
    """
    return record.outcome is not None and not (record.state is State.FAILED and record.steps)


def supersedes(record: Record, other: Record) -> bool:
    """Whether ``record`` is the later of two copies of one intent.

    A final copy is never superseded. Otherwise the copy with the greater fence is later. With equal fences, an outcome
    is later than a doubt, and a doubt is later than a hold.
    """

    def rank(one: Record) -> tuple[int, int]:
        return one.fence, 2 if one.outcome is not None else one.state is State.IN_DOUBT

    return not final(other) and rank(record) > rank(other)


def trusted_for(lease: int) -> int:
    """Return how long a worker may trust a lease, counted from just before the call that took it.

    This is a tenth less than the lease, because the clocks of store and worker may run at different speeds, and because
    stopping takes time.
    """
    return lease - lease // 10


def fresh(request: Request) -> Record:
    """Return the record that an intent begins with. Its fence is the stamp that the store will give it."""
    return Record(
        state=_RUNNING,
        owner=request.owner,
        task_id=request.task_id,
        lease=request.policy.lease,
        fingerprint=request.fingerprint.packed,
        digests=request.digests,
        scope=request.scope,
        call=request.call,
        place=request.place,
    )


def untouched(record: Record) -> bool:
    """Whether an accepted action has no history. Then ``taken_up`` may replace its record without reading it."""
    return record.attempts == 0 and not (record.steps or record.notes)


def too_late(request: Request) -> bool:
    """Whether a message may be older than the record of what became of it (rule 15).

    Only ``result_ttl`` counts. A failed action may run again after ``failure_ttl``, so nothing is hidden when that
    record expires.
    """
    policy = request.policy
    return request.age > policy.result_ttl and policy.late == "in_doubt"


def absent(request: Request, now: int) -> tuple[Decision, Record]:
    """Decide on a claim that is too late (see ``too_late``) and finds no record."""
    new = replace(fresh(request), owner=NO_OWNER, attempts=0, fence=now, place="", reason=TOO_LATE)
    return _ask(new, now, request) if request.policy.asks else _put_in_doubt(new, TOO_LATE)


def taken_up(request: Request) -> Record:
    """Return the record of an execution that replaces the write which accepted its call. See ``untouched``."""
    assert request.accepted is not None
    return replace(fresh(request), fence=request.accepted.stamp + 1)


def accepted(request: Request, wait: int) -> Record:
    """Return the record of a call that is accepted and has not begun.

    Args:
        wait: microseconds until recovery publishes the call, unless a worker has claimed it.
    """
    return replace(fresh(request), state=State.ACCEPTED, attempts=0, lease=wait)


def accept(
    record: Record, stamp: int, now: int, request: Request, wait: int
) -> tuple[Decision | Accepted | None, Record | None]:
    """Accept a call (rule 12), or decide what its caller receives instead.

    Returns:
        ``Accepted``, which counts once the record is written; or what ``standing`` returns; or None: only a delivery
        can decide, so publish one.
    """
    told = standing(record, stamp, now, request.fingerprint, request.policy)
    if told is not None:
        return told, None
    if record.state is not State.RELEASED and record.outcome is None:
        return None, None
    _, new = _acquire(replace(record, outcome=None), now, request)
    new = replace(new, state=State.ACCEPTED, attempts=record.attempts, lease=wait)
    return Accepted(new), new


def sent(record: Record, owner: bytes, wait: int) -> Record | None:
    """Set when recovery looks at an accepted call. That depends on whether its message was sent.

    Args:
        wait: microseconds until then.
    """
    mine = record.state is State.ACCEPTED and record.owner == owner
    return replace(record, lease=wait) if mine else None


def differing(stored: bytes, fingerprint: Fingerprint) -> tuple[str, ...]:
    """Return the names of the parameters whose digests differ.

    Only parameters that both sides know are compared. A parameter that a newer release added does not change what the
    caller meant.
    """
    packed = fingerprint.packed
    if stored == packed or not stored or not packed:
        return ()
    tag, size = FINGERPRINT_TAG, FINGERPRINT_ENTRY
    known = {stored[i : i + tag]: stored[i + tag : i + size] for i in range(0, len(stored), size)}
    names = []
    for n, name in enumerate(fingerprint.names):
        entry = packed[n * size : (n + 1) * size]
        if known.get(entry[:tag], entry[tag:]) != entry[tag:]:
            names.append(name)
    return tuple(names)


def left(record: Record, stamp: int, now: int) -> int:
    """Return the microseconds until a hold is over, if its holder does not write again; 0 or less: it is over.

    A stamp in the future says that the store's clock went back. It does not say when the holder last wrote. Such a hold
    counts from the time at which a worker noticed this (``noticed``), and ends a whole lease later. A living holder has
    written by then, and each of its writes makes the mark void.
    """
    if not record.lease:
        return 0  # a process that knew has ended the hold, so no clock is needed
    return record.lease - _waited(record, stamp, now)


def _waited(record: Record, stamp: int, now: int) -> int:
    """Return the microseconds since a record was written, as far as the store's clock can tell."""
    if not _went_back(stamp, now):
        return now - stamp
    mark = _mark(record, stamp, now)
    return 0 if mark is None else now - mark.at


def _went_back(stamp: int, now: int) -> bool:
    return now + STEP < stamp


def _mark(record: Record, stamp: int, now: int) -> Noticed | None:
    """Return the mark which says since when this write is known to have a stamp in the future."""
    mark = record.noticed
    return mark if mark is not None and mark.stamp == stamp and not _went_back(mark.at, now) else None


def noticed(record: Record, stamp: int, now: int) -> Record | None:
    """Return the record with a mark, if the store's clock went back; None: nothing to write.

    The mark has the stamp of its own write. While the old stamp is in the future, the next one is one more.
    """
    timed = record.lease or record.recovery
    if not timed or not _went_back(stamp, now) or _mark(record, stamp, now) is not None:
        return None
    note = Note(now, "clock", "went back", f"at least {(stamp - now) / MICROSECONDS:.0f} s in the store")
    return replace(_noted(record, note), noticed=Noticed(now, stamp + 1))


def lapsed(record: Record, stamp: int, now: int) -> bool:
    """Whether a body runs whose worker stopped renewing the lease."""
    return record.state is State.RUNNING and left(record, stamp, now) <= 0


def claim(record: Record, stamp: int, now: int, request: Request) -> tuple[Decision, Record | None]:
    """Decide on a claim of a record that exists. For an absent one see ``fresh`` and ``absent``.

    Args:
        record: what the store holds.
        stamp: the store's time when it was written.
        now: the store's time.

    Returns:
        The decision, and the record that must be written before it counts
        (None: nothing to write).
    """
    differs = differing(record.fingerprint, request.fingerprint)
    if differs:
        return Mismatch(differs), None
    if record.outcome is not None:
        if not final(record) and now >= stamp + request.policy.failure_ttl:
            return _acquire(replace(record, outcome=None), now, request)
        own = record.task_id == request.task_id
        varied = _varied(_given(record, stamp, now), request)
        return Replay(record.outcome, own, own and record.recovery is not None), varied
    remaining = left(record, stamp, now)
    if record.state is State.RUNNING:
        if record.owner == request.owner:
            return Acquired(record), None
        if record.owner in request.carried:
            return _take_up_again(record, now, request)
        if remaining > 0:
            return _busy(remaining, record, request, record.owner), noticed(record, stamp, now)
        return _claim_lapsed(record, stamp, now, request)
    if record.state is State.SCHEDULED:
        if record.task_id != request.task_id and remaining > 0:
            return Busy(remaining), noticed(record, stamp, now)
        return _acquire(record, now, request)
    if record.state is State.RELEASED:
        return _acquire(record, now, request)
    if record.state is State.ACCEPTED:
        decision, new = _acquire(record, now, request)
        # The call that claims may be another one than the accepted call. That one gets its answer by its own message.
        # If no message was sent, publish it now.
        not_sent = (
            not record.lease and record.recovery is None and request.task_id not in ("", record.task_id)
        )
        orphan = record.call if not_sent else b""
        return decision._replace(orphan=orphan), new
    return _claim_in_doubt(record, stamp, now, request)


def _busy(retry_after: int, record: Record, request: Request, holder: bytes = b"") -> Busy:
    return Busy(retry_after, holder, request.task_id != "" and record.task_id == request.task_id)


def standing(
    record: Record, stamp: int, now: int, fingerprint: Fingerprint, policy: Policy
) -> Decision | None:
    """Return what a claim would decide, if it would change nothing; None if it would act.

    A caller may receive this without a delivery: replay, busy, in doubt, mismatch. With None, a delivery has something
    to do: run, ask, or decide on a crash.
    """
    decision, new = claim(record, stamp, now, Request(NO_OWNER, "", fingerprint, policy))
    if record.state is State.ACCEPTED and isinstance(decision, Acquired):
        overdue = (record.lease or record.recovery) and _waited(record, stamp, now) > _wait(record) + OVERDUE
        return None if overdue else Busy(max(0, left(record, stamp, now)))
    return decision if new is None or isinstance(decision, Busy) else None


def _claim_in_doubt(record: Record, stamp: int, now: int, request: Request) -> tuple[Decision, Record | None]:
    remaining = left(record, stamp, now)
    if record.owner in request.carried:
        return _take_up_again(record, now, request)
    if record.asking:
        if record.asking == request.owner:
            return Ask(record), None
        if remaining > 0:
            return _busy(remaining, record, request, record.asking), noticed(record, stamp, now)
    if request.policy.asks:
        return _ask(_with_past(record, stamp), now, request)
    return InDoubt(record.reason), None


def _varied(record: Record, request: Request) -> Record | None:
    """Return the record with marks for the free arguments that differ in this replay; None: nothing new.

    The audit reads the marks. The outcome stays as it is, and is kept for another ``result_ttl``.
    """
    marked = digests.marked(record.digests, request.digests)
    return None if marked == record.digests else replace(record, digests=marked)


def _given(record: Record, stamp: int, now: int) -> Record:
    """Return a settled record that is written again. If its answer was given, it says so.

    Without a call, only the entry in the index was taken out when the answer was given. After the time at which
    recovery looks, another write must not put it back.
    """
    given = record.recovery is not None and not record.call and now - stamp > record.recovery.wait
    return replace(record, recovery=None) if given else record


def shadowed(record: Record, note: Note, request: Request) -> Record:
    """Return a shadow record with a note of what the guard would have done with this call."""
    marked = digests.marked(record.digests, request.digests)
    return _noted(replace(record, digests=marked), note)


def _acquire(record: Record, now: int, request: Request) -> tuple[Acquired, Record]:
    """Give the intent to a new owner. The finished steps of earlier attempts stay."""
    new = replace(
        record,
        state=State.RUNNING,
        owner=request.owner,
        task_id=request.task_id,
        fence=max(record.fence + 1, now),
        attempts=min(record.attempts + 1, MAX_COUNT),
        lease=request.policy.lease,
        fingerprint=request.fingerprint.packed or record.fingerprint,
        digests=request.digests or record.digests,
        asking=b"",
        reason="",
        noticed=None,
        call=request.call if request.task_id else record.call,  # an operator's question has no call
        place=request.place,
        recovery=None,
    )
    return Acquired(new), new


def _take_up_again(record: Record, now: int, request: Request) -> tuple[Decision, Record]:
    """Take up the claim of an execution whose body never ran (rule 7).

    The owner is a new one, so that a second copy of the message, with the old owner, cannot take it up too.
    """
    if stopping(record):
        return _stopped(record, request)
    _, new = _acquire(record, now, request)
    new = replace(new, attempts=record.attempts)
    return Acquired(new), new


def _claim_lapsed(record: Record, stamp: int, now: int, request: Request) -> tuple[Decision, Record]:
    """Decide on a claim after the lease lapsed without an outcome (rule 3)."""
    # The caller of the dead execution may still wait for an answer.
    orphan = record.call if request.task_id and record.task_id != request.task_id else b""
    if record.recovery is None:  # otherwise recovery has noted the past already
        record = _with_past(record, stamp)
    record = _one_more_crash(record)
    if stopping(record) and request.policy.on_crash == "transaction":
        return _stopped(record, request)
    decision: Ask | InDoubt | Acquired
    if request.policy.asks:
        decision, new = _ask(replace(record, reason=CRASHED), now, request)
    elif reason := _why_in_doubt(record, request.policy, CRASHED):
        decision, new = _put_in_doubt(record, reason)
    else:
        note = Note(now, request.owner.hex(), "took over", f"task {request.task_id}")
        decision, new = _acquire(_noted(record, note), now, request)
    return decision._replace(orphan=orphan), new


def _one_more_crash(record: Record) -> Record:
    return replace(record, crashes=min(record.crashes + 1, MAX_CRASHES))


def _why_in_doubt(record: Record, policy: Policy, reason: str) -> str:
    """Return why only a person can decide after this crash; "" if a claim can."""
    if policy.asks:
        return ""
    if policy.on_crash == "in_doubt" or (stopping(record) and policy.on_crash != "transaction"):
        return reason
    return TOO_MANY.format(record.crashes) if record.crashes >= policy.max_attempts else ""


NOT_TAKEN = "its call was published again {} times, and no worker took it"
NOT_ASKED = (
    "its call was published again {} times, and no worker that asked the destination received an answer"
)
CRASHED = "the worker stopped without reporting an outcome"
CRASHED_UNSEEN = "the worker stopped, and the store did not say whether it had begun"
TOO_LATE = "its message came again, so late that a record of what became of it may have expired"
TOO_MANY = "the worker stopped without reporting an outcome, {} times"


def _put_in_doubt(record: Record, reason: str) -> tuple[InDoubt, Record]:
    """Put an intent in doubt, and let recovery check that its caller was told.

    The process that writes this tells the caller. It may die before that. The caller of a direct call, which has no
    task id, receives the error itself.
    """
    check = Recovery(0, PUBLISHED_WAIT) if record.task_id else None
    new = replace(record, state=State.IN_DOUBT, lease=0, asking=b"", reason=reason, recovery=check)
    return InDoubt(reason, first=record.state is not State.IN_DOUBT), new


def _noted(record: Record, note: Note) -> Record:
    """Return the record with one more line of history. If there are too many, the first and the latest lines stay."""
    notes = (*record.notes, note)
    if len(notes) > MAX_NOTES:
        notes = (notes[0], *notes[1 - MAX_NOTES :])
    return replace(record, notes=notes)


def _with_past(record: Record, stamp: int) -> Record:
    """Note the last holder of a contested record, and when it last wrote, before the record is overwritten."""
    what = "left in doubt" if record.state is State.IN_DOUBT else "last heard of"
    inside = "".join(f", inside step {name!r}" for name in record.open_steps)
    why = f", {record.reason}" if record.reason else ""
    where = f", {record.place}" if record.place else ""
    facts = f"attempt {record.attempts}, task {record.task_id}{where}{inside}{why}"
    return _noted(record, Note(stamp, record.owner.hex(), what, facts))


def _ask(record: Record, now: int, request: Request) -> tuple[Ask, Record]:
    """Give this execution the right to ask, which one worker has at a time.

    The owner stays, so that its late outcome is still accepted.
    """
    record = _noted(record, Note(now, request.owner.hex(), "asks the destination", ""))
    new = replace(
        record, state=State.IN_DOUBT, asking=request.owner, lease=request.policy.lease, noticed=None
    )
    return Ask(new, first=record.state is not State.IN_DOUBT), new


def conclude(
    record: Record, now: int, request: Request, answer: Outcome | None, reason: str, owed: bytes | None = None
) -> tuple[Decision, Record | None]:
    """Decide on an intent by the destination's answer.

    Args:
        answer: the outcome, if the effect happened; None if it did not, or if that is unknown.
        reason: why it is unknown; "" if the effect did not happen.
        owed: as for ``settle``.

    Returns:
        As ``claim``. If another worker has taken over the question, or the owner has ended meanwhile, the answer
        does not count, and the record decides.
    """
    if record.outcome is not None:
        return Replay(record.outcome), None
    if answer is not None and record.state in (State.IN_DOUBT, State.RELEASED):
        # Evidence that it happened counts, whichever worker asked, and even if a person decided that it did not.
        note = Note(now, "reconcile", "happened", "", resolution=Resolution.HAPPENED)
        if not request.task_id:  # an operator asked, so the action's own caller has no answer yet
            owed = record.call or None
        elif request.task_id != record.task_id:
            owed = None
        new = _settled(_noted(record, note), answer, owed)
        return Replay(answer, owed=new.recovery is not None), new
    if record.state is not State.IN_DOUBT or record.asking != request.owner:
        if record.state is State.RUNNING and record.owner == request.owner:
            return Acquired(record), None
        if record.state is State.IN_DOUBT and not record.asking and reason:
            return InDoubt(record.reason), None
        return _busy(0, record, request), None
    if reason:
        return _put_in_doubt(_noted(record, Note(now, "reconcile", "cannot tell", reason)), reason)
    record = _noted(record, Note(now, "reconcile", "did not happen", "", resolution=Resolution.NOT_HAPPENED))
    record = replace(record, open_steps=())
    if stopping(record):
        return _stopped(record, request)
    if record.crashes >= request.policy.max_attempts:
        return _put_in_doubt(record, TOO_MANY.format(record.crashes))
    return _acquire(record, now, request)


def _settled(record: Record, outcome: Outcome, owed: bytes | None = None) -> Record:
    """Return the settled record: only what a replay, a late owner, or the attempt after a failure needs.

    Args:
        owed: as for ``settle``.
    """
    state = State.CANCELLED if outcome.cancelled else _SUCCEEDED if outcome.succeeded else _FAILED
    return Record(
        state=state,
        owner=record.owner,
        task_id=record.task_id,
        fence=record.fence,
        attempts=record.attempts,
        crashes=record.crashes,
        fingerprint=record.fingerprint,
        steps=() if outcome.succeeded else record.steps,
        notes=record.notes,
        digests=record.digests,
        scope=record.scope,
        call=owed or (_for_people(record) if record.notes else b""),
        place=record.place if record.notes else "",  # an operator may look for both attempts
        recovery=None if owed is None else Recovery(0, PUBLISHED_WAIT),
        outcome=outcome,
    )


def _for_people(record: Record) -> bytes:
    """Return the call to keep beside the outcome of a contested or decided intent, for people.

    A large call is dropped, because there may be many after an outage.
    """
    return record.call if record.notes and len(record.call) <= MAX_LATE else b""


def _let_run(record: Record, now: int) -> Record:
    """Return the record released by a person's decision. Finished steps stay."""
    return replace(
        record,
        state=State.RELEASED,
        owner=NO_OWNER,
        fence=max(record.fence + 1, now),
        crashes=0,
        lease=0,
        open_steps=(),
        asking=b"",
        reason="",
        outcome=None,
    )


def _holds(record: Record, owner: bytes) -> bool:
    """Whether no other execution took over (rule 4). A lapsed lease or a doubt do not matter."""
    return record.owner == owner and record.state in (_RUNNING, _IN_DOUBT)


def restored(record: Record | None, held: Record, older: bool = False) -> Record:
    """Return the record, or the holder's own copy if the store has lost its last write.

    The holder's next write (renewal, step, outcome) then writes it anew, unless another execution has begun from what
    the store had left.

    Args:
        older: the stored record is older than the holder's last write. Stamps only grow, so the store has lost its
            latest writes: a lagging replica took over, or a server was restarted.
    """
    if record is None:
        return held
    earlier = record.owner == held.owner or record.fence < held.fence
    return held if older and earlier and record.outcome is None else record


def settle(
    record: Record | None,
    held: Record,
    outcome: Outcome,
    suspect: bool = False,
    stamp: int = 0,
    now: int = 0,
    owed: bytes | None = None,
) -> tuple[Done | Refused, Record | None]:
    """Record how the body ended. If that is refused, note the suspected second effect in the record that is there.

    Args:
        record: what the store holds; None if it lost the record.
        held: the record as this execution last wrote it.
        suspect: note a refusal. False: a refusal undoes the body's effects (a transaction).
        stamp: the store's time when ``record`` was written.
        owed: not None: Celery answers the caller after this write. If its process dies before that, only recovery can
            see to it, by what is kept here: the packed call, to be published again; or b"", if the result is the whole
            answer. ``told`` says that it was given.
    """
    record = restored(record, held)
    if _holds(record, held.owner):
        new = _settled(record, outcome, owed)
        return Done(new), new
    if record.owner == held.owner and record.outcome == outcome:
        return Done(record), None
    return Refused(record), _suspected(record, held, outcome, stamp, now) if suspect else None


def _suspected(record: Record, held: Record, outcome: Outcome, stamp: int, now: int) -> Record | None:
    """Return the stored record with a note of an execution that ended late; None: noted already, or not contested.

    The note does not change what is going on: a pending retry keeps its time, and a live hold ends at most one lease
    later.
    """
    by = held.owner.hex()
    if record.owner == held.owner or any(note.late and note.by == by for note in record.notes):
        return None
    payload = outcome.payload or b""
    late = Late(
        held.task_id,
        held.fence,
        held.place,
        outcome.succeeded,
        payload if len(payload) <= MAX_LATE else b"",
        record.task_id,
        record.fence,
        "" if record.owner == NO_OWNER else record.place,
        stamp,
    )
    new = _noted(record, Note(now, by, "ended late", "the effect may have happened twice", late=late))
    new = replace(new, call=new.call or _for_people(replace(new, call=held.call)))
    if record.state is State.SCHEDULED:
        new = replace(new, lease=min(record.lease, max(0, left(record, stamp, now))))
    return new


def committed(
    record: Record | None, held: Record, outcome: Outcome, policy: Policy
) -> tuple[Done | Refused, Record | None]:
    """Decide whether a transaction that was to settle with ``outcome`` has committed (rule 9).

    ``Done`` with an outcome in its record: it committed. ``Done`` without one: it did not, and never will, once the
    returned record is written. That write makes it certain, because it waits for a commit that is still under way.
    """
    if record is None:
        promised = _settled(held, outcome)
        return (
            Refused(None) if ttl(promised, policy) else Done(promised)
        ), None  # with a TTL of 0 none is kept
    if record.owner != held.owner:
        return Refused(record), None
    if _holds(record, held.owner):
        return Done(record), record
    return (Done(record) if record.outcome is not None else Refused(record)), None


def schedule(
    record: Record, owner: bytes, delay: int, task_id: str = "", call: bytes = b""
) -> tuple[Done | Refused, Record | None]:
    """Keep the claim for the body's retry, for ``delay`` microseconds.

    Args:
        task_id: task id of the retry; "" for the record's own.
        call: call of the retry; empty for the record's own.
    """
    if _holds(record, owner):
        if stopping(record):
            new = _cancelled_ahead(replace(record, call=call or record.call), delay)
            return Done(new), new
        new = replace(
            record,
            state=State.SCHEDULED,
            lease=delay,
            asking=b"",
            reason="",
            call=call or record.call,
            recovery=None,  # it was about the attempt that ends here
        )
        if task_id:
            new = replace(new, task_id=task_id)
        return Done(new), new
    if record.owner == owner and record.state in (State.SCHEDULED, State.CANCELLED):
        return Done(record), None
    return Refused(record), None


def release(record: Record, owner: bytes, owed: bytes | None = None) -> tuple[Done | Refused, Record | None]:
    """Release an intent, after a body without an effect (but finished steps). Any caller may claim it again.

    Args:
        owed: for an intent that this cancels, as for ``settle``.
    """
    if _holds(record, owner):
        if stopping(record):
            new = _cancelled(record, owed)
            return Done(new), new
        new = replace(record, state=State.RELEASED, owner=NO_OWNER, lease=0, asking=b"", reason="")
        return Done(new), new
    if record.state is State.RELEASED or (record.owner == owner and record.state is State.CANCELLED):
        return Done(record), None
    return Refused(record), None


def doubt(
    record: Record,
    owner: bytes,
    reason: str,
    held: Record | None = None,
    stamp: int = 0,
    now: int = 0,
    retry: int = 0,
) -> tuple[Done | Refused, Record | None]:
    """Put an intent in doubt, after a body whose effect is unknown. A refusal is noted as in ``settle``.

    Args:
        held: the record as this execution last wrote it; None: note nothing.
        retry: microseconds until a published retry decides, or tells the caller; 0: there is no retry.
    """
    if not _holds(record, owner):
        noted = None if held is None else _suspected(record, held, Outcome(False, None), stamp, now)
        return Refused(record), noted
    if record.state is State.IN_DOUBT:
        return Done(record), None
    _, new = _put_in_doubt(_one_more_crash(record), reason)
    if retry:
        new = replace(new, recovery=Recovery(0, retry + PUBLISHED_WAIT))
    return Done(new), new


def renew(record: Record, owner: bytes, lease: int) -> tuple[Done | Refused, Record | None]:
    """Keep a running claim, or a question. The new stamp of this write moves the deadline.

    Args:
        lease: the new lease of a holder that was taken for dead (see ``_alive``).
    """
    asks = record.state is State.IN_DOUBT and record.asking == owner
    if asks or (record.state is State.RUNNING and record.owner == owner):
        new = record if record.noticed is None else replace(record, noticed=None)
        new = _alive(new, lease)
        return Done(new), new
    return Refused(record), None


def _alive(record: Record, lease: int) -> Record:
    """Return the record with a lease again, because its holder writes.

    Recovery, or the holder's parent process, had taken it for dead. Recovery's count of a question stays, because
    nothing else bounds how often a destination is asked.
    """
    runs = record.state is State.RUNNING
    if record.lease or not (runs or record.asking):
        return record
    return replace(record, lease=lease, recovery=None if runs else record.recovery)


def exit(  # noqa: A001  # the transition's name
    record: Record,
    owner: bytes,
    policy: Policy,
    reason: str,
    held: Record | None = None,
    stamp: int = 0,
    now: int = 0,
) -> tuple[Done | Refused, Record | None]:
    """Record that the process had to exit while the body ran.

    This counts as a crash, so the author's choice for crashes decides. If a claim can decide (by asking, resuming or
    running again), only the lease ends.
    """
    if record.state is not State.RUNNING or record.owner != owner:
        return doubt(record, owner, reason, held, stamp, now)
    _, new = _crash(record, policy, reason)
    return Done(new), new


def _crash(record: Record, policy: Policy, reason: str) -> tuple[InDoubt | Again, Record]:
    counted = _one_more_crash(record)
    why = _why_in_doubt(counted, policy, reason)
    if why:
        _, new = _put_in_doubt(counted, why)
        return InDoubt(why), new
    return Again(), replace(record, lease=0)  # the claim that decides counts the crash


def lapse(record: Record, holder: bytes) -> Record | None:
    """End the hold of an owner whose process is known to be dead.

    Returns:
        The record to write; None if the owner holds nothing.
    """
    runs = record.state is State.RUNNING and record.owner == holder
    asks = record.state is State.IN_DOUBT and record.asking == holder
    return replace(record, lease=0) if (runs or asks) and record.lease else None


def died(
    record: Record | None, stamp: int, owner_prefix: bytes, task_id: str, policy: Policy, again: int
) -> tuple[Verdict | None, Record | None]:
    """Decide what becomes of the message that a dead process was working on.

    Args:
        record: what the store holds; None for nothing.
        stamp: the store's time when the record was written.
        owner_prefix: the part of an owner that names the process (see ``owners``).
        task_id: task id of the message. Another copy of the message may run in a live process.
        again: how many times this message was already delivered again after a death.

    Returns:
        What to do with the message (None: leave it to Celery), and the record to write (None: that process held
        nothing).
    """
    verdict: Verdict = Again()
    new: Record | None = None
    if record is not None:
        mine = record.owner.startswith(owner_prefix) and record.task_id == task_id
        if record.state is State.SCHEDULED and record.task_id == task_id:
            return Coming(), None
        if record.state is State.RUNNING and mine:
            verdict, new = _crash(record, policy, CRASHED)
            if isinstance(verdict, InDoubt):
                new = replace(new, notes=_with_past(record, stamp).notes)
        elif record.state is State.IN_DOUBT and not policy.asks:
            verdict = InDoubt(record.reason)
        elif record.state is State.IN_DOUBT and record.asking.startswith(owner_prefix):
            new = replace(record, lease=0)
    if isinstance(verdict, Again) and again >= policy.max_attempts:
        doubtful = record is not None and record.state is State.IN_DOUBT
        return InDoubt(record.reason) if record is not None and doubtful else None, new
    return verdict, new


def died_unseen(policy: Policy) -> Verdict:
    """As ``died``, if the store does not answer: what the process held is unknown."""
    if policy.asks or policy.on_crash != "in_doubt":
        return Again()
    return InDoubt(CRASHED_UNSEEN)


def recover(
    record: Record,
    stamp: int,
    now: int,
    publishable: bool,
    policy: Policy,
    jitter: int = 0,
    elsewhere: bool = False,
) -> tuple[Publish | Tell | None, Record | None]:
    """Decide whether an open record is overdue, and what to do then (rule 11).

    An overdue call is published again, and its delivery decides what becomes of it, as any other delivery. There is
    one exception. An action that had begun is given up, in doubt, after ``max_attempts`` publications that no worker
    took, or after which no worker received an answer of the destination. The caller of what is in doubt is told, again
    and again, until ``answered``. So is the caller of a settled intent to whom an answer is owed; or, if its record
    has the call, that is published: the delivery finds the outcome, and Celery does all that comes after it.

    Args:
        publishable: the record holds its whole call, and the author has not set ``recover=False``.
        elsewhere: the message came from another broker than this worker's, and workers there come first.
        jitter: microseconds more until the next publication, different for each process that tries.

    Returns:
        What to do once the record is written, and that record (None: nothing to write).
    """
    given_up = record.state is State.IN_DOUBT and not record.asking
    settled = record.outcome is not None
    # By the time that its delivery comes, a failure that is not final may run again.
    publishable = publishable and (not settled or final(record))
    if record.state is State.RELEASED or ((given_up or settled) and record.recovery is None):
        return None, None
    tries = 0 if record.recovery is None else record.recovery.tries
    if _waited(record, stamp, now) < _wait(record) + (ELSEWHERE if elsewhere else 0):
        return None, None if settled else noticed(record, stamp, now)
    if settled and publishable and tries >= policy.max_attempts:
        return None, told(record)
    if record.recovery is None and record.state is State.RUNNING:
        record = _with_past(record, stamp)
    # This write gives the record a new stamp, which is no sign of life.
    ended = record if settled else replace(record, lease=0)
    if not (publishable or given_up or settled):
        return None, replace(ended, recovery=Recovery(0, NEVER))
    has_begun = record.state is not State.ACCEPTED
    first = has_begun and not (given_up or settled) and tries >= policy.max_attempts
    if first:
        _, ended = _put_in_doubt(record, (NOT_ASKED if record.asking else NOT_TAKEN).format(tries))
        tries = 0
    # After eight tries it is past the longest. A settled intent waits that long at once: the queue may be long, and
    # each message of it calls links again.
    pause = (
        LONGEST_WAIT if settled and publishable else min(PUBLISHED_WAIT << 2 * min(tries, 8), LONGEST_WAIT)
    )
    new = replace(ended, recovery=Recovery(min(tries + 1, MAX_CRASHES), pause + jitter))
    return Tell(new, first) if first or given_up or not publishable else Publish(new), new


def answered(record: Record, taken: Record) -> Record | None:
    """Note that a caller has its answer, so that recovery need not look again. What is in doubt is left to a person.

    Args:
        taken: the record as recovery wrote it.
    """
    if record.outcome is not None:
        return told(record)
    same = record.state is State.IN_DOUBT and not record.asking and record.recovery == taken.recovery
    return replace(record, recovery=None) if same else None


def revoked(record: Record, task_id: str) -> Record | None:
    """Publish a call no more: Celery has dropped its message, because the task was revoked or had expired.

    What was accepted, or waits for its retry, is released. What had begun stays as it is until the next call.

    Args:
        task_id: task id of that message.

    Returns:
        The record to write; None: nothing.
    """
    if record.task_id != task_id:
        return None
    if record.state in (State.ACCEPTED, State.SCHEDULED):
        return replace(record, state=State.RELEASED, owner=NO_OWNER, lease=0, recovery=None)
    if record.recovery is not None and (record.state is State.RUNNING or record.asking):
        return replace(record, recovery=Recovery(record.recovery.tries, NEVER))
    return None


def not_published(record: Record, taken: Record) -> Record | None:
    """Take back recovery's last try, because the broker did not take the message. The next one comes soon.

    Args:
        taken: the record as recovery wrote it.
    """
    if record.recovery is None or record.recovery != taken.recovery or record.state is not taken.state:
        return None
    return replace(record, recovery=Recovery(record.recovery.tries - 1, GRACE))


def begin_step(
    record: Record, owner: bytes, name: str, policy: Policy, begun: Collection[str] = ()
) -> tuple[StepDecision, Record | None]:
    """Decide whether a step may run. ``Done``: yes, once the returned record is written.

    While a step of an earlier attempt is open, no other step may begin (except with ``rerun``), because it is unknown
    how that one ended. A step that this execution left open (its body swallowed the error) stays open beside the new
    one. So if this attempt dies, the next one does not simply run it again.

    Args:
        begun: steps that this execution began. Its body knows how those ended.
    """
    for step in record.steps:
        if step.name == name:
            return StepDone(step.payload), None
    if record.state is not State.RUNNING or record.owner != owner:
        return Refused(record), None
    own = tuple(step for step in record.open_steps if step in begun)
    if own != record.open_steps and policy.on_crash != "rerun":
        return StepOpen(record), None
    size = sum(len(step.payload) for step in record.steps)
    if len(record.steps) >= MAX_STEPS or size >= policy.max_step_bytes:
        return StepsFull(len(record.steps), size), None
    new = _alive(replace(record, open_steps=(*own, name)), policy.lease)
    return Done(new), new


def end_step(
    record: Record, owner: bytes, name: str, payload: bytes | None, lease: int
) -> tuple[Done | Refused, Record | None]:
    """Close a step with its encoded result, or with None if it had no effect. For ``lease`` see ``renew``."""
    if not _holds(record, owner):
        return Refused(record), None
    if any(step.name == name for step in record.steps):
        return Done(record), None
    steps = record.steps if payload is None else (*record.steps, Step(name, payload))
    still_open = tuple(step for step in record.open_steps if step != name)
    new = _alive(replace(record, steps=steps, open_steps=still_open), lease)
    return Done(new), new


def resolve(
    record: Record,
    stamp: int,
    now: int,
    outcome: Outcome | None,
    note: Note,
    fence: int | None = None,
    owed: bool = False,
) -> tuple[Done | Refused, Record | None]:
    """Record a person's decision: ``outcome`` if it happened, None if it did not.

    This is refused while an execution holds the intent, when the outcome is known (a settled outcome never changes),
    and when another attempt has begun since the person looked.

    Args:
        fence: fence of the record that the person looked at; None: decide about the record that is there.
        owed: for what happened, keep the call. Its delivery answers the caller, as recovery's would.
    """
    looked_at_another = fence is not None and fence != record.fence
    open_question = record.state is State.IN_DOUBT or lapsed(record, stamp, now)
    if looked_at_another or not open_question:
        new = noticed(record, stamp, now)
        return Refused(new or record), new
    record = _noted(_with_past(record, stamp), note)
    if outcome is None:
        new = _let_run(record, now)
        return Done(new), new
    new = replace(_settled(record, outcome, record.call if owed else None), owner=NO_OWNER)
    return Done(new), new


def published(record: Record) -> Record | None:
    """Note that the call of a decided intent was published, so that recovery does so only if its message is lost."""
    if record.outcome is None or record.recovery is None:
        return None
    return replace(record, recovery=Recovery(record.recovery.tries, LONGEST_WAIT))


def told(record: Record) -> Record | None:
    """Drop the call of a settled intent, because its caller has an answer. A short one is kept for people.

    Returns:
        The record to write; None: nothing.
    """
    if record.outcome is None:
        return None
    new = replace(record, call=_for_people(record), recovery=None)
    return None if new == record else new


def rewritten(record: Record, stamp: int, now: int) -> Record | None:
    """Return the record for a write that is no sign of life: its times count on from the write before.

    None: an execution holds it, or asks the destination, and will write it.
    """
    if record.state is State.RUNNING or record.asking:
        return None
    waited = _waited(record, stamp, now)
    record = record if record.outcome is None else _given(record, stamp, now)
    if record.recovery is not None:
        record = replace(
            record, recovery=record.recovery._replace(wait=max(1, record.recovery.wait - waited))
        )
    if record.lease and record.state in (State.SCHEDULED, State.ACCEPTED):
        record = replace(record, lease=max(1, record.lease - waited))
    return record


def stopping(record: Record) -> bool:
    """Whether a person asked the present attempt to stop."""
    return any(note.resolution is Resolution.CANCELLED and note.at >= record.fence for note in record.notes)


def cancel(
    record: Record, stamp: int, now: int, note: Note, fence: int | None = None
) -> tuple[Done | Refused, Record | None]:
    """Record that a person cancels an intent.

    What has not begun becomes CANCELLED. What runs is asked to stop, and goes on until it reads that: only its end
    tells whether it had its effect. This is refused in doubt, and when the outcome is known.

    Args:
        fence: as for ``resolve``.
    """
    if fence is not None and fence != record.fence:
        return Refused(record), None
    if record.state in (State.ACCEPTED, State.SCHEDULED, State.RELEASED):
        ahead = max(0, left(record, stamp, now))  # a pending retry has to find this record
        new = _cancelled_ahead(_noted(record, note), ahead)
        if record.state is State.ACCEPTED and not record.lease:  # no message of it was sent
            new = replace(new, recovery=new.recovery and Recovery(0, PUBLISHED_WAIT))
        return Done(new), new
    if record.state is not State.RUNNING or lapsed(record, stamp, now):
        return Refused(record), None
    if stopping(record):
        return Done(record), None  # another write would look like a sign of life
    new = _noted(record, note._replace(at=max(now, record.fence)))
    return Done(new), new


def _cancelled(record: Record, owed: bytes | None = None) -> Record:
    """Return the record of a cancelled intent. Its outcome says which steps are done, and which are unknown."""
    note = next(note for note in reversed(record.notes) if note.resolution is Resolution.CANCELLED)
    says = f"cancelled by {note.by}" + (f": {note.evidence}" if note.evidence else "")
    if record.steps:
        says += f"; done before: {_named(step.name for step in record.steps)}"
    if record.open_steps:
        says += f"; begun before, and not known how it ended: {_named(record.open_steps)}"
    return _settled(record, Outcome(False, None, says, cancelled=True), owed)


def _cancelled_ahead(record: Record, ahead: int) -> Record:
    """Return the record of a cancelled intent whose message is under way: it tells the caller, unless it is lost.

    Args:
        ahead: microseconds until the message may come.
    """
    if not record.call or record.state is State.RELEASED:
        return replace(_cancelled(record), lease=ahead)
    new = _cancelled(record, record.call)
    return replace(new, lease=ahead, recovery=Recovery(0, ahead + LONGEST_WAIT))


def _stopped(record: Record, request: Request) -> tuple[Replay, Record]:
    """Cancel an intent instead of running it, because a person asked the attempt before to stop."""
    owed = request.task_id != "" and request.task_id == record.task_id
    new = _cancelled(record, record.call if owed else None)
    assert new.outcome is not None
    return Replay(new.outcome, owed=owed), new


def _named(steps: Iterable[str]) -> str:
    return ", ".join(f"step {name!r}" for name in islice(steps, MAX_NAMED))


def forget(record: Record, stamp: int, now: int, steps: bool) -> Record | None:
    """Let an intent run again, by a person's decision. Return what stays of its record; None: nothing.

    Nothing stays of a record whose body runs: the holder's next write restores it with its steps.

    Args:
        steps: forget the finished steps too.
    """
    under_way = record.state is State.RUNNING and not lapsed(record, stamp, now)
    if steps or under_way or not record.steps:
        return None
    kept = "finished steps stay: " + ", ".join(repr(step.name) for step in record.steps[:MAX_NAMED])
    note = Note(now, "forget", "may run again", kept, resolution=Resolution.FORGOTTEN)
    return _let_run(_noted(record, note), now)
