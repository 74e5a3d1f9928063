"""Mutants of the protocol, each with one broken rule. The proof is only worth something if it notices them all.

A mutant replaces functions of `celery_idem.core.protocol`, or in a few cases of the ledger or the runner. It names
the scenario that catches it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from celery_idem.core import protocol
from celery_idem.core.errors import IdempotencyError
from celery_idem.core.model import (
    NO_OWNER,
    Acquired,
    Again,
    Busy,
    Done,
    InDoubt,
    NotHappened,
    Outcome,
    Raised,
    Record,
    Refused,
    Replay,
    Request,
    State,
    Tell,
)
from celery_idem.core.record import unpack
from celery_idem.engine import runner as runner_module
from celery_idem.engine.ledger import Ledger

_claim = protocol.claim
_claim_in_doubt = protocol._claim_in_doubt
_claim_lapsed = protocol._claim_lapsed
_acquire = protocol._acquire
_conclude = protocol.conclude
_resolve = protocol.resolve
_begin_step = protocol.begin_step
_end_step = protocol.end_step
_died = protocol.died
_ttl = protocol.ttl
_settle = protocol.settle
_holds = protocol._holds
_committed = protocol.committed
_exit = protocol.exit
_why_in_doubt = protocol._why_in_doubt


class Mutant(NamedTuple):
    """A broken rule: the functions that are replaced, and the scenario that must notice it."""

    name: str
    caught_by: str
    changes: dict[str, Any]
    place: Any = protocol


@contextlib.contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    saved = {name: getattr(mutant.place, name) for name in mutant.changes}
    for name, value in mutant.changes.items():
        setattr(mutant.place, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(mutant.place, name, value)


# --- rules 1 and 2: claims ------------------------------------------------------------


def replay_runs_again(record: Record, stamp: int, now: int, request: Request) -> Any:
    if record.outcome is not None:
        return _acquire(record._replace(outcome=None), now, request)
    return _claim(record, stamp, now, request)


def lease_ignored(record: Record, stamp: int, now: int, request: Request) -> Any:
    return _claim(record, stamp - record.lease, now, request)


def state_before_fingerprint(record: Record, stamp: int, now: int, request: Request) -> Any:
    if record.outcome is not None:
        return Replay(record.outcome), None
    return _claim(record, stamp, now, request)


def scheduled_for_anybody(record: Record, stamp: int, now: int, request: Request) -> Any:
    if record.state is State.SCHEDULED:
        return _acquire(record, now, request)
    return _claim(record, stamp, now, request)


def scheduled_for_nobody(record: Record, stamp: int, now: int, request: Request) -> Any:
    if record.state is State.SCHEDULED:
        return Busy(1), None
    return _claim(record, stamp, now, request)


def released_for_nobody(record: Record, stamp: int, now: int, request: Request) -> Any:
    if record.state is State.RELEASED:
        return Busy(1), None
    return _claim(record, stamp, now, request)


def released_takes_another_value(record: Record, stamp: int, now: int, request: Request) -> Any:
    if record.state is State.RELEASED:
        return _acquire(record, now, request)
    return _claim(record, stamp, now, request)


def own_owner_forgotten(record: Record, stamp: int, now: int, request: Request) -> Any:
    """Ignore a carried owner while the record is RUNNING."""
    if record.state is State.RUNNING:
        request = _without(request)
    return _claim(record, stamp, now, request)


def _without(request: Request) -> Request:
    return request._replace(carried=())


def carried_forgotten_in_doubt(record: Record, stamp: int, now: int, request: Request) -> Any:
    return _claim_in_doubt(record, stamp, now, _without(request))


def carried_not_minted_anew(record: Record, now: int, request: Request) -> Any:
    return Acquired(record), record._replace(state=State.RUNNING, lease=request.policy.lease)


def fence_stands_still(record: Record, now: int, request: Request) -> Any:
    _, new = _acquire(record, now, request)
    new = new._replace(fence=record.fence)
    return Acquired(new), new


def acquired_keeps_no_steps(record: Record, now: int, request: Request) -> Any:
    _, new = _acquire(record, now, request)
    new = new._replace(steps=())
    return Acquired(new), new


# --- rule 3: crashes ------------------------------------------------------------------


def crash_reruns(record: Record, stamp: int, now: int, request: Request) -> Any:
    return _acquire(protocol._one_more_crash(record), now, request)


def crash_does_not_count(record: Record) -> Record:
    return record


def max_attempts_ignored(record: Record, policy: Any, reason: str) -> str:
    if policy.asks:
        return ""
    return reason if policy.on_crash == "in_doubt" else ""


def asked_by_many(record: Record, stamp: int, now: int, request: Request) -> Any:
    return _claim_in_doubt(record._replace(asking=b""), stamp, now, request)


def doubt_reruns(record: Record, stamp: int, now: int, request: Request) -> Any:
    if not record.asking and not request.policy.asks:
        return _acquire(record, now, request)
    return _claim_in_doubt(record, stamp, now, request)


def any_answer_concludes(record: Record, now: int, request: Request, answer: Any, reason: str) -> Any:
    if record.state is State.IN_DOUBT:
        record = record._replace(asking=request.owner)
    return _conclude(record, now, request, answer, reason)


def an_old_answer_concludes(record: Record, now: int, request: Request, answer: Any, reason: str) -> Any:
    if record.outcome is None and answer is None and not reason:
        return _acquire(record, now, request)
    return _conclude(record, now, request, answer, reason)


def happened_runs(record: Record, now: int, request: Request, answer: Any, reason: str) -> Any:
    return _conclude(record, now, request, None, reason)


def unknown_runs(record: Record, now: int, request: Request, answer: Any, reason: str) -> Any:
    return _conclude(record, now, request, answer, "")


def conclude_overwrites(record: Record, now: int, request: Request, answer: Any, reason: str) -> Any:
    if record.outcome is not None and answer is None:
        return _acquire(record._replace(outcome=None), now, request)
    return _conclude(record, now, request, answer, reason)


def conclude_forgets_max_attempts(
    record: Record, now: int, request: Request, answer: Any, reason: str
) -> Any:
    return _conclude(record._replace(crashes=0), now, request, answer, reason)


# --- rule 4: only the owner may write -------------------------------------------------


def anybody_settles(record: Record | None, held: Record, outcome: Any, *where: Any, owed: Any = None) -> Any:
    if record is not None and record.outcome is None:
        new = protocol._settled(record, outcome)
        return Done(new), new
    return _settle(record, held, outcome, *where, owed=owed)


def settled_twice(record: Record | None, held: Record, outcome: Any, *where: Any) -> Any:
    if record is not None and record.owner == held.owner:
        new = protocol._settled(record, outcome)
        return Done(new), new
    return _settle(record, held, outcome, *where)


def late_owner_refused(record: Record, owner: bytes) -> bool:
    return record.owner == owner and record.state is State.RUNNING


def settled_is_held(record: Record, owner: bytes) -> bool:
    return record.owner == owner


def anybody_releases(record: Record, owner: bytes, owed: Any = None) -> Any:
    if record.outcome is not None:
        return Refused(record), None
    new = record._replace(state=State.RELEASED, owner=NO_OWNER, lease=0, asking=b"", reason="")
    return Done(new), new


def anybody_schedules(record: Record, owner: bytes, delay: int, *retry: Any) -> Any:
    if record.outcome is not None:
        return Refused(record), None
    new = record._replace(state=State.SCHEDULED, lease=delay, asking=b"", reason="")
    return Done(new), new


def anybody_doubts(record: Record, owner: bytes, reason: str, *noted: Any) -> Any:
    if record.outcome is not None:
        return Refused(record), None
    _, new = protocol._put_in_doubt(record, reason)
    return Done(new), new


def anybody_ends_a_step(record: Record, owner: bytes, name: str, payload: Any, lease: int) -> Any:
    return _end_step(record, record.owner, name, payload, lease)


def a_stale_owner_begins_a_step(record: Record, owner: bytes, name: str, policy: Any, begun: Any = ()) -> Any:
    return _begin_step(record._replace(state=State.RUNNING), record.owner, name, policy, begun)


# --- rules 5 and 6, steps, people, time -----------------------------------------------


def an_open_step_runs_again(record: Record, owner: bytes, name: str, policy: Any, begun: Any = ()) -> Any:
    return _begin_step(record._replace(open_steps=()), owner, name, policy, begun)


def an_open_step_is_overwritten(record: Record, owner: bytes, name: str, policy: Any, begun: Any = ()) -> Any:
    if name not in record.open_steps:
        record = record._replace(open_steps=())
    return _begin_step(record, owner, name, policy, begun)


def a_finished_step_runs_again(record: Record, owner: bytes, name: str, policy: Any, begun: Any = ()) -> Any:
    return _begin_step(record._replace(steps=()), owner, name, policy, begun)


def a_finished_step_is_not_kept(record: Record, owner: bytes, name: str, payload: Any, lease: int) -> Any:
    return _end_step(record, owner, name, None, lease)


def a_step_without_effect_stays_open(
    record: Record, owner: bytes, name: str, payload: Any, lease: int
) -> Any:
    done, new = _end_step(record, owner, name, payload, lease)
    return (
        (done, new._replace(open_steps=(*new.open_steps, name)))
        if new is not None and payload is None
        else (done, new)
    )


def a_person_overwrites(record: Record, stamp: int, now: int, *decision: Any) -> Any:
    return _resolve(record._replace(state=State.IN_DOUBT, outcome=None), stamp, now, *decision)


def a_person_takes_a_live_claim(record: Record, stamp: int, now: int, *decision: Any) -> Any:
    return _resolve(record, stamp - record.lease, now, *decision)


def any_death_ends_a_claim(
    record: Any, stamp: int, prefix: bytes, task_id: str, policy: Any, again: int
) -> Any:
    held = record is not None and record.state is State.RUNNING
    return _died(
        record,
        stamp,
        record.owner[:7] if held else prefix,
        record.task_id if held else task_id,
        policy,
        again,
    )


def evidence_expires(record: Record, policy: Any) -> int | None:
    return _ttl(record, policy) or policy.lease


def trusted_beyond_the_lease(lease: int) -> int:
    return 2 * lease


def _ends(kind: Raised, state: State) -> dict[str, Any]:
    return {"ENDINGS": {**protocol.ENDINGS, kind: state}}


# --- rules of the ledger and the runner -------------------------------------------------


def claim_is_not_carried(self: Any, job: Any, error: Any, carried: Any) -> None:
    _store_is_down(self, job, error, ())


def every_owner_is_carried(self: Ledger, key: str, request: Request, *also: Any) -> Any:
    """Let every delivery take up a running claim."""
    entry = self.get(key)
    owners = (entry.record.owner,) if entry is not None else ()
    return _ledger_claim(self, key, request._replace(carried=(*request.carried, *owners)))


def claim_is_not_released(self: Any, job: Any, request: Any) -> None:
    """Leave an interrupted claim as it is."""


def only_the_last_claim_is_released(self: Any, job: Any, request: Any) -> None:
    _release(self, job, _without(request))


def interrupted_in_the_middle(settle: Any, patience: float) -> Any:
    """Do not write an outcome again after an interruption."""
    return settle(patience, False)


def a_commit_is_believed(record: Record | None, held: Record, *promised: Any) -> Any:
    """Take every transaction for committed."""
    if record is not None and record.owner == held.owner and record.outcome is None:
        return Done(record._replace(outcome=Outcome(True, b"j1"))), None
    return _committed(record, held, *promised)


def a_commit_is_not_waited_for(*met: Any) -> Any:
    return _committed(*met)[0], None


def an_error_counts_after_the_commit(self: Any, job: Any, claim: Any, error: Any) -> bool:
    return error is None and bool(_runner_committed(self, job, claim, error))


def as_outside_of_a_transaction(kind: Raised, policy: Any) -> State:
    return protocol.ENDINGS[kind]


def a_transaction_that_crashed_is_in_doubt(record: Record, policy: Any, reason: str) -> str:
    return reason if policy.on_crash == "transaction" else _why_in_doubt(record, policy, reason)


def anybody_exits(record: Record, owner: bytes, policy: Any, reason: str, *noted: Any) -> Any:
    if record.outcome is not None:
        return Refused(record), None
    return _exit(record, record.owner, policy, reason)


def any_holder_lapses(record: Record, holder: bytes) -> Record | None:
    return record._replace(lease=0) if record.state is State.RUNNING and record.lease else None


def any_death_ends_a_question(
    record: Any, stamp: int, prefix: bytes, task_id: str, policy: Any, again: int
) -> Any:
    if record is not None and record.state is State.IN_DOUBT and record.asking:
        return Again(), record._replace(asking=b"", lease=0)
    return _died(record, stamp, prefix, task_id, policy, again)


def an_inquiry_without_an_answer_releases(self: Any, job: Any) -> Any:
    decision = _inquire(self, job)
    if isinstance(decision, InDoubt):
        with contextlib.suppress(IdempotencyError):
            self.ledger.resolve(job.key, NotHappened(), by="an inquiry")
    return decision


def an_inquiry_takes_the_jobs_place(self: Any, job: Any) -> Any:
    """Ask with the task id of the holder."""
    given = runner_module.Request
    runner_module.Request = lambda owner, task_id, *more: given(owner, job.task_id, *more)
    try:
        return _inquire(self, job)
    finally:
        runner_module.Request = given


def evidence_on_another_attempt_counts(
    record: Record, stamp: int, now: int, outcome: Any, note: Any, fence: Any = None, owed: Any = None
) -> Any:
    return _resolve(record, stamp, now, outcome, note, None, owed)


_store_is_down = runner_module.Runner._store_is_down
_ledger_claim = Ledger.claim
_release = runner_module.Runner._release
_inquire = runner_module.Runner.inquire
_runner_committed = runner_module.Runner._committed

# --- rules 11 and 12: recovery, and what is accepted ------------------------------------


def recovered_unwritten(self: Ledger, key: str, publishable: Any, policy: Any) -> Any:
    reply = self.store.read(f"{self.namespace}:{key}")
    if reply.stored is None:
        return None
    record = unpack(reply.stored.value, reply.stored.stamp, key)
    return _recover(record, reply.stored.stamp, reply.now, publishable(record), policy)[0]


def recovery_is_a_sign_of_life(
    record: Record, stamp: int, now: int, can: bool, policy: Any, *more: Any
) -> Any:
    taken, new = _recover(record, stamp, now, can, policy, *more)
    return taken, new._replace(lease=policy.lease) if taken is not None and new is not None else new


def recovery_takes_what_lives(record: Record, stamp: int, *more: Any) -> Any:
    return _recover(record, stamp - 10 * record.lease, *more)


def a_question_is_nobodys(record: Record, policy: Any = None) -> int | None:
    return protocol.NEVER if record.state is State.IN_DOUBT else _due(record, policy)


def given_up_in_silence(*given: Any) -> Any:
    taken, new = _recover(*given)
    return (None, new._replace(recovery=None)) if isinstance(taken, Tell) else (taken, new)


def told_or_not(record: Record, reason: str) -> Any:
    decision, new = _put_in_doubt(record, reason)
    return decision, new._replace(recovery=None)


def no_answer_is_owed(record: Record, outcome: Any, owed: Any = None) -> Any:
    return _settled(record, outcome)


def an_owed_answer_is_nobodys(record: Record, policy: Any = None) -> Any:
    return _due(record, policy) if record.outcome is None else None


def two_recoverers_write_the_same(*given: Any) -> Any:
    return _recover(*given[:5])


def a_retry_is_recovered_as_what_asked_for_it(record: Record, *retry: Any) -> Any:
    done, new = _schedule(record, *retry)
    return done, new._replace(recovery=record.recovery) if new is not None else None


def an_orphan_is_dropped(record: Record, *claim: Any) -> Any:
    decision, new = _claim_lapsed(record, *claim)
    return decision._replace(orphan=b""), new


def revoked_releases_what_runs(record: Record, task_id: str) -> Record | None:
    if record.task_id != task_id or record.outcome is not None:
        return None
    return record._replace(state=State.RELEASED, owner=NO_OWNER, lease=0)


def accepted_over_what_runs(record: Record, stamp: int, now: int, request: Request, wait: int) -> Any:
    if record.state is State.RUNNING and protocol.lapsed(record, stamp, now):
        record = record._replace(state=State.RELEASED)
    return _accept(record, stamp, now, request, wait)


def taken_up_uncompared(self: Ledger, key: str, request: Request, *also: Any) -> Any:
    if request.accepted is not None:
        stored = self.store.read(f"{self.namespace}:{key}").stored
        request = request._replace(accepted=stored)
    return _ledger_claim(self, key, request)


def too_late_runs(request: Request, now: int) -> Any:
    new = protocol.fresh(request)
    return Acquired(new), new


_recover = protocol.recover
_due = protocol.due
_settled = protocol._settled
_put_in_doubt = protocol._put_in_doubt
_schedule = protocol.schedule
_accept = protocol.accept

MUTANTS = (
    Mutant("1: a settled intent runs again", "in doubt: crash", {"claim": replay_runs_again}),
    Mutant("1: the lease is ignored", "in doubt: crash", {"claim": lease_ignored}),
    Mutant("1: a retry that is not due is anybody's", "ends: a retry", {"claim": scheduled_for_anybody}),
    Mutant("1: a retry is nobody's", "ends: a retry", {"claim": scheduled_for_nobody}),
    Mutant("1: a released intent is nobody's", "ends: no effect", {"claim": released_for_nobody}),
    Mutant("1: the fence stands still", "in doubt: silent store", {"_acquire": fence_stands_still}),
    Mutant("2: the fingerprint is ignored", "another value", {"differing": lambda stored, fingerprint: ()}),
    Mutant(
        "2: the state counts before the fingerprint", "another value", {"claim": state_before_fingerprint}
    ),
    Mutant(
        "2: a released intent takes another value", "another value", {"claim": released_takes_another_value}
    ),
    Mutant("3: a crash runs again under in_doubt", "in doubt: crash", {"_claim_lapsed": crash_reruns}),
    Mutant("3: an intent in doubt runs again", "in doubt: crash", {"_claim_in_doubt": doubt_reruns}),
    Mutant("3: many ask at once", "reconcile: crash", {"_claim_in_doubt": asked_by_many}),
    Mutant("3: the asking token does not count", "reconcile: crash", {"conclude": any_answer_concludes}),
    Mutant("3: an old answer counts", "reconcile: crash", {"conclude": an_old_answer_concludes}),
    Mutant("3: evidence that it happened is ignored", "reconcile: crash", {"conclude": happened_runs}),
    Mutant("3: an unknown answer runs", "reconcile: cannot tell", {"conclude": unknown_runs}),
    Mutant("3: an answer overwrites an outcome", "reconcile: crash", {"conclude": conclude_overwrites}),
    Mutant("4: anybody settles", "rerun: crash loop", {"settle": anybody_settles}),
    Mutant("4: an owner settles twice", "reconcile: late errors", {"settle": settled_twice}),
    Mutant("4: an owner whose lease lapsed is not heard", "in doubt: crash", {"_holds": late_owner_refused}),
    Mutant("4: a settled intent is still held", "reconcile: late errors", {"_holds": settled_is_held}),
    Mutant("4: anybody releases", "ends: late, without effect", {"release": anybody_releases}),
    Mutant("4: anybody schedules", "ends: late, without effect", {"schedule": anybody_schedules}),
    Mutant("4: anybody puts in doubt", "ends: ambiguous", {"doubt": anybody_doubts}),
    Mutant(
        "4: a lease is trusted beyond its end", "resume: crash", {"trusted_for": trusted_beyond_the_lease}
    ),
    Mutant("5: an ambiguous end releases", "ends: ambiguous", _ends(Raised.AMBIGUOUS, State.RELEASED)),
    Mutant("5: a retry releases", "ends: a retry", _ends(Raised.RETRY, State.RELEASED)),
    Mutant("5: an error releases", "ends: an error", _ends(Raised.ERROR, State.RELEASED)),
    Mutant("5: no effect is a failure", "ends: no effect", _ends(Raised.NO_EFFECT, State.FAILED)),
    Mutant(
        "7: a carried owner is not minted anew",
        "copies of one message",
        {"_take_up_again": carried_not_minted_anew},
    ),
    Mutant("7: a carried owner is forgotten", "in doubt: silent store", {"claim": own_owner_forgotten}),
    Mutant(
        "7: a carried owner is forgotten in doubt",
        "in doubt: silent store",
        {"_claim_in_doubt": carried_forgotten_in_doubt},
    ),
    Mutant(
        "7: nothing is carried",
        "in doubt: silent store",
        {"_store_is_down": claim_is_not_carried},
        runner_module.Runner,
    ),
    Mutant("7: every owner is taken up", "in doubt: crash", {"claim": every_owner_is_carried}, Ledger),
    Mutant("8: crashes are not counted", "rerun: crash loop", {"_one_more_crash": crash_does_not_count}),
    Mutant("8: max_attempts is ignored", "rerun: crash loop", {"_why_in_doubt": max_attempts_ignored}),
    Mutant(
        "8: an answer forgets max_attempts",
        "reconcile: crash loop",
        {"conclude": conclude_forgets_max_attempts},
    ),
    Mutant("steps: an open step runs again", "resume: crash", {"begin_step": an_open_step_runs_again}),
    Mutant(
        "steps: an open step is overwritten",
        "resume: steps in another order",
        {"begin_step": an_open_step_is_overwritten},
    ),
    Mutant("steps: a finished step runs again", "resume: crash", {"begin_step": a_finished_step_runs_again}),
    Mutant("steps: a finished step is not kept", "resume: crash", {"end_step": a_finished_step_is_not_kept}),
    Mutant(
        "steps: without effect, still open",
        "ends: a step without effect",
        {"end_step": a_step_without_effect_stays_open},
    ),
    Mutant("steps: anybody ends one", "resume: crash", {"end_step": anybody_ends_a_step}),
    Mutant("steps: a stale owner begins one", "resume: crash", {"begin_step": a_stale_owner_begins_a_step}),
    Mutant("steps: a new owner forgets them", "resume: crash", {"_acquire": acquired_keeps_no_steps}),
    Mutant("people: one overwrites an outcome", "operator", {"resolve": a_person_overwrites}),
    Mutant("people: one takes a live claim", "operator", {"resolve": a_person_takes_a_live_claim}),
    Mutant(
        "parent: any death ends a claim", "the worker reports a dead child", {"died": any_death_ends_a_claim}
    ),
    Mutant(
        "parent: any death ends a question", "deaths reported: reconcile", {"died": any_death_ends_a_question}
    ),
    Mutant("one worker: whoever holds it is dead", "deaths seen", {"lapse": any_holder_lapses}),
    Mutant("5: an exit releases", "exits: in doubt", _ends(Raised.EXIT, State.RELEASED)),
    Mutant("5: an exit that is no owner's counts", "exits: rerun", {"exit": anybody_exits}),
    Mutant("5: a soft time limit releases", "limits: in doubt", _ends(Raised.TIME_LIMIT, State.RELEASED)),
    Mutant(
        "5: an outcome is not written again",
        "limits: in doubt",
        {"_despite_interruption": interrupted_in_the_middle},
        runner_module,
    ),
    Mutant(
        "7: an interrupted claim stays",
        "limits: in doubt",
        {"_release": claim_is_not_released},
        runner_module.Runner,
    ),
    Mutant(
        "7: a carried claim stays when interrupted",
        "limits: silent store",
        {"_release": only_the_last_claim_is_released},
        runner_module.Runner,
    ),
    Mutant("9: anybody commits", "transaction: crash", {"settle": anybody_settles}),
    Mutant("9: a commit is believed", "transaction: failed commit", {"committed": a_commit_is_believed}),
    Mutant(
        "9: a commit is not waited for", "transaction: lost commit", {"committed": a_commit_is_not_waited_for}
    ),
    Mutant(
        "9: an error counts after the commit",
        "transaction: ends",
        {"_committed": an_error_counts_after_the_commit},
        runner_module.Runner,
    ),
    Mutant("9: no commit, and in doubt", "transaction: ends", {"ending": as_outside_of_a_transaction}),
    Mutant(
        "9: a crash is in doubt",
        "transaction: crash",
        {"_why_in_doubt": a_transaction_that_crashed_is_in_doubt},
    ),
    Mutant(
        "people: an inquiry without an answer releases",
        "inquiry: cannot tell",
        {"inquire": an_inquiry_without_an_answer_releases},
        runner_module.Runner,
    ),
    Mutant(
        "people: an inquiry takes a retry's place",
        "inquiry against a retry",
        {"inquire": an_inquiry_takes_the_jobs_place},
        runner_module.Runner,
    ),
    Mutant(
        "people: evidence on another attempt counts",
        "two operators who take time",
        {"resolve": evidence_on_another_attempt_counts},
    ),
    Mutant("11: recovery does not write first", "recovery: crash", {"recover": recovered_unwritten}, Ledger),
    Mutant("11: recovery is a sign of life", "recovery: crash", {"recover": recovery_is_a_sign_of_life}),
    Mutant("11: recovery takes what lives", "recovery: renewals", {"recover": recovery_takes_what_lives}),
    Mutant("11: two write the same", "recovery: crash", {"recover": two_recoverers_write_the_same}),
    Mutant("11: a question is nobody's", "recovery: askers die", {"due": a_question_is_nobodys}),
    Mutant("11: a doubt is told or not", "recovery: dies twice", {"_put_in_doubt": told_or_not}),
    Mutant("11: nor by the living", "recovery: an ambiguous end", {"_put_in_doubt": told_or_not}),
    Mutant("11: no answer is owed", "recovery: crash", {"_settled": no_answer_is_owed}),
    Mutant("11: nor that of a question", "recovery: reconcile", {"_settled": no_answer_is_owed}),
    Mutant("11: an owed answer is nobody's", "recovery: rerun", {"due": an_owed_answer_is_nobodys}),
    Mutant("11: given up in silence", "recovery: given up", {"recover": given_up_in_silence}),
    Mutant(
        "11: a renewal is no sign of life", "recovery: renewals", {"_alive": lambda record, lease: record}
    ),
    Mutant("11: nor is a step", "recovery: resume", {"_alive": lambda record, lease: record}),
    Mutant(
        "11: a retry keeps what recovery noted",
        "recovery: a retry is lost",
        {"schedule": a_retry_is_recovered_as_what_asked_for_it},
    ),
    Mutant(
        "11: a publication that failed counts",
        "recovery: a retry is lost",
        {"not_published": lambda record, taken: None},
    ),
    Mutant(
        "11: an orphan is dropped", "recovery: crash, called again", {"_claim_lapsed": an_orphan_is_dropped}
    ),
    Mutant(
        "11: a revoked copy releases what runs",
        "revoked: a copy runs",
        {"revoked": revoked_releases_what_runs},
    ),
    Mutant("12: accepted over what runs", "accepted: called meanwhile", {"accept": accepted_over_what_runs}),
    Mutant("12: taken up uncompared", "accepted: called meanwhile", {"claim": taken_up_uncompared}, Ledger),
    Mutant("15: too late runs", "late: in doubt", {"absent": too_late_runs}),
    Mutant("15: too late runs, unasked", "late: reconcile", {"absent": too_late_runs}),
    Mutant("15: an accepted call that is too late runs", "late: accepted", {"absent": too_late_runs}),
    Mutant("15: nothing is too late", "late: a retry", {"too_late": lambda request: False}),
    Mutant("time: evidence expires", "in doubt: crash", {"ttl": evidence_expires}),
)
