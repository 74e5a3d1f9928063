"""The state machine agrees with the two tables in its docstring: neither can change without the other.

The tables are parsed. Each condition has a predicate here, found by the words of the condition. Every
combination that a claim can meet is tried, and the first row that holds must give the result.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest

from celery_idem.core import protocol
from celery_idem.core.model import (
    NO_OWNER,
    Accepted,
    Acquired,
    Ask,
    Busy,
    Done,
    Fingerprint,
    Mismatch,
    Note,
    OnCrash,
    Policy,
    Publish,
    Raised,
    Record,
    Recovery,
    Refused,
    Replay,
    Request,
    State,
    Stored,
    Tell,
)
from tests.support.records import (
    ASKED_TO_STOP,
    ASKING,
    CANCELLED,
    DEADLINE,
    ERROR,
    FAILURE_TTL,
    FENCE,
    LAPSED,
    LEASE,
    MAX_ATTEMPTS,
    NOTE,
    OTHER,
    OUTCOME,
    OWN,
    OWNERS,
    PRINT,
    PRINTS,
    STAMP,
    STEPS,
    Meeting,
    a_request,
    held,
)


def tables() -> list[list[list[str]]]:
    """The tables of the docstring: rows of stripped cells, without the header rows."""
    found: list[list[list[str]]] = []
    columns: list[tuple[int, int | None]] = []
    rules = 0
    for line in (protocol.__doc__ or "").splitlines():
        if re.fullmatch(r"=+( +=+)+", line):
            rules = rules % 3 + 1
            if rules == 1:
                starts = [match.start() for match in re.finditer(r"=+", line)]
                columns = list(zip(starts, [*starts[1:], None], strict=True))
                found.append([])
        elif rules == 2:
            found[-1].append([line[start:end].strip() for start, end in columns])
    return found


CLAIM, TRANSITIONS = tables()


def states_in(text: str) -> set[State]:
    return {State[name] for name in re.findall(r"[A-Z_]{4,}", text)}


# --- claim -------------------------------------------------------------------------------------------


def meetings() -> Iterator[Meeting]:
    for asks, late in itertools.product((True, False), repeat=2):
        yield Meeting(None, "none", "other", True, STAMP, "in_doubt", asks, 0, "nobody", late=late)
    for now, print_ in itertools.product((STAMP, STAMP + FAILURE_TTL - 1, STAMP + FAILURE_TTL), PRINTS):
        yield Meeting(State.FAILED, print_, "other", False, now, "in_doubt", True, 0, "nobody", steps=True)
    for state, owner, now, on_crash, asks in itertools.product(
        (State.RUNNING, State.IN_DOUBT),
        ("carried", "other"),
        (DEADLINE - 1, DEADLINE),
        get_args(OnCrash),
        (True, False),
    ):
        yield Meeting(state, "same", owner, True, now, on_crash, asks, 0, "nobody", stopping=True)
    yield from itertools.starmap(
        Meeting,
        itertools.product(
            State,
            PRINTS,
            OWNERS,
            (True, False),
            (STAMP, DEADLINE - 1, DEADLINE, DEADLINE + LEASE),
            get_args(OnCrash),
            (True, False),
            (0, MAX_ATTEMPTS - 1),
            ASKING,
        ),
    )


def live(met: Meeting) -> bool:
    return met.now < DEADLINE


CONDITIONS: dict[str, Callable[[Meeting], bool]] = {
    "": lambda met: True,
    "otherwise": lambda met: True,
    "fingerprint differs": lambda met: met.print == "differs",
    "has finished steps, failure_ttl is over": lambda met: met.steps and met.now >= STAMP + FAILURE_TTL,
    "same task id, or past its deadline": lambda met: met.same_task or not live(met),
    "own owner (a lost reply)": lambda met: met.owner == "own",
    "owner carried by this message, asked to stop": lambda met: met.owner == "carried" and met.stopping,
    "owner carried by this message": lambda met: met.owner == "carried",
    "lease live": live,
    "lapsed, can ask": lambda met: met.asks,
    "lapsed, asked to stop, in one transaction": lambda met: met.stopping and met.on_crash == "transaction",
    "lapsed, asked to stop": lambda met: met.stopping,
    "lapsed, on_crash in_doubt": lambda met: met.on_crash == "in_doubt",
    "lapsed, crashes reach max_attempts": lambda met: met.crashes + 1 >= MAX_ATTEMPTS,
    "lapsed, resume, rerun or transaction": lambda met: met.on_crash in ("resume", "rerun", "transaction"),
    "own question (a lost reply)": lambda met: met.asking == "own",
    "a worker asks under a live lease": lambda met: met.asking != "nobody" and live(met),
    "can ask": lambda met: met.asks,
    "came too late, can ask": lambda met: met.late and met.asks,
    "came too late": lambda met: met.late,
}
"""Conditions by their words in the table. The first row that holds counts, so none repeats those above it."""


def row_of(met: Meeting) -> int:
    for n, (state, condition, _) in enumerate(CLAIM):
        if state == "absent":
            fits = met.state is None
        else:
            fits = met.state is not None and (state == "any" or State[state] is met.state)
        if fits and CONDITIONS[condition](met):
            return n
    raise AssertionError(f"no row for {met}")


def test_every_condition_of_the_table_is_known_here_and_none_is_left_over() -> None:
    assert {condition for _, condition, _ in CLAIM} == set(CONDITIONS)
    assert {state for state, _, _ in CLAIM} == {"absent", "any", *(state.name for state in State)}


def test_every_claim_ends_as_its_row_says() -> None:
    used = set()
    for met in meetings():
        row = row_of(met)
        used.add(row)
        decision_name, _, rest = CLAIM[row][2].partition(",")
        decision_name = decision_name.split()[0]
        states = states_in(rest)
        if met.record is None:  # an absent record is created, and its creator holds the claim
            late = protocol.too_late(met.request)
            decision, new = (
                protocol.absent(met.request, met.now) if late else (None, protocol.fresh(met.request))
            )
            name = type(decision).__name__ if decision is not None else "Acquired"
        else:
            decision, new = protocol.claim(met.record, STAMP, met.now, met.request)
            name = type(decision).__name__
        assert name == decision_name, (met, CLAIM[row])
        if new is None:
            assert not states, (met, CLAIM[row])
        else:
            assert states == {new.state}, (met, CLAIM[row])
    assert used == set(range(len(CLAIM))), "a row that nothing can meet"


def test_what_counts_as_too_late() -> None:
    """A message older than `result_ttl` is too late, unless `late="run"`. `failure_ttl` does not count."""
    met = Meeting(None, "none", "other", True, STAMP, "in_doubt", False, 0, "nobody")
    policy = met.request.policy._replace(result_ttl=10, failure_ttl=0)
    ages = {age: protocol.too_late(met.request._replace(age=age, policy=policy)) for age in (0, 1, 10, 11)}
    assert ages == {0: False, 1: False, 10: False, 11: True}
    assert not protocol.too_late(met.request._replace(age=11, policy=policy._replace(late="run")))


def test_a_new_owner_always_gets_a_larger_fence_and_nothing_else_moves_it_back() -> None:
    for met in meetings():
        record = met.record
        if record is None:
            continue
        for fence in (FENCE, STAMP + 10 * LEASE):  # the second: a store whose clock was set back
            old = record._replace(fence=fence)
            decision, new = protocol.claim(old, STAMP, met.now, met.request)
            if new is None:
                continue
            assert new.fence >= old.fence
            if isinstance(decision, Acquired):
                assert new.fence > old.fence
                assert new.fence >= met.now
                assert (new.owner, new.task_id, new.lease) == (OWN, "task", LEASE)
                assert new.asking == b""
                assert new.outcome is None


def test_attempts_count_executions_and_crashes_those_without_a_word() -> None:
    def claimed(state: State, owner: str = "other") -> Record:
        met = Meeting(state, "same", owner, True, DEADLINE, "rerun", False, 0, "nobody")
        assert met.record is not None
        _, new = protocol.claim(met.record, STAMP, met.now, met.request)
        assert new is not None
        return new

    assert (claimed(State.RELEASED).attempts, claimed(State.RELEASED).crashes) == (3, 0)
    assert (claimed(State.SCHEDULED).attempts, claimed(State.SCHEDULED).crashes) == (3, 0)
    assert (claimed(State.RUNNING).attempts, claimed(State.RUNNING).crashes) == (3, 1)
    # A claim whose body never ran does not count as an attempt.
    assert (claimed(State.RUNNING, "carried").attempts, claimed(State.RUNNING, "carried").crashes) == (2, 0)


def test_a_busy_answer_says_how_long_and_whose_message_it_is() -> None:
    for same_task in (False, True):
        met = Meeting(State.RUNNING, "same", "other", same_task, DEADLINE - 5, "rerun", False, 0, "nobody")
        assert met.record is not None
        decision, _ = protocol.claim(met.record, STAMP, met.now, met.request)
        assert decision == Busy(5, met.record.owner, own=same_task)


def test_an_author_who_has_all_in_a_transaction_is_retried_whatever_the_error_says() -> None:
    kinds = (Raised.RETRY, Raised.DOUBTFUL_RETRY, Raised.AMBIGUOUS)
    policies = [a_request(on_crash=on_crash).policy for on_crash in ("in_doubt", "resume", "rerun")]
    for policy in policies:
        endings = [protocol.ending(kind, policy) for kind in kinds]
        assert endings == [State.SCHEDULED, State.IN_DOUBT, State.IN_DOUBT]
    endings = [protocol.ending(kind, a_request(on_crash="transaction").policy) for kind in kinds]
    assert endings == [State.SCHEDULED, State.SCHEDULED, State.RELEASED]


def test_the_fingerprint_comes_before_the_state_and_shows_names_only() -> None:
    for state in State:
        met = Meeting(state, "differs", "own", True, DEADLINE, "rerun", True, 0, "own")
        assert met.record is not None
        decision, new = protocol.claim(met.record, STAMP, met.now, met.request)
        assert decision == Mismatch(("cents",))
        assert new is None


def test_a_parameter_that_only_one_release_knows_is_no_difference() -> None:
    def entry(name: str, value: str) -> bytes:
        return name[:4].ljust(4).encode() + value[:8].ljust(8).encode()

    stored = entry("a", "1") + entry("b", "2")
    assert protocol.differing(stored, Fingerprint(("a", "c"), entry("a", "1") + entry("c", "3"))) == ()
    assert protocol.differing(stored, Fingerprint(("a", "b"), entry("a", "1") + entry("b", "3"))) == ("b",)
    assert protocol.differing(b"", Fingerprint(("a",), entry("a", "1"))) == ()
    assert protocol.differing(stored, Fingerprint()) == ()


def test_a_takeover_keeps_what_earlier_attempts_proved() -> None:
    record = Record(
        State.RUNNING,
        OTHER,
        fence=FENCE,
        lease=LEASE,
        fingerprint=PRINT.packed,
        steps=(protocol.Step("charge", b"j1"),),
        open_steps=("mail",),
        notes=(Note(1, "me", "x", "y"),),
    )
    policy = Policy(LEASE, 1, 2, "resume")
    _, new = protocol.claim(record, STAMP, DEADLINE, Request(OWN, "task", Fingerprint(), policy))
    assert new is not None
    assert (new.steps, new.open_steps) == (record.steps, ("mail",))
    assert new.fingerprint == PRINT.packed  # also against a claim that brought none
    assert set(record.notes) <= set(new.notes)


def test_counters_do_not_run_over() -> None:
    policy = Policy(LEASE, 1, 2, "rerun", max_attempts=protocol.MAX_CRASHES + 1)
    full = Record(
        State.RUNNING, OTHER, attempts=protocol.MAX_COUNT, crashes=protocol.MAX_CRASHES, lease=LEASE
    )
    _, new = protocol.claim(full, STAMP, DEADLINE, Request(OWN, "task", Fingerprint(), policy))
    assert new is not None
    assert (new.attempts, new.crashes) == (protocol.MAX_COUNT, protocol.MAX_CRASHES)


def test_standing_is_what_a_claim_would_be_told_and_nothing_where_it_would_act() -> None:
    for met in meetings():
        if met.record is None or met.owner == "own" or met.asking == "own" or met.owner == "carried":
            continue  # a caller has no owner
        if met.same_task and met.state is State.SCHEDULED:
            continue  # nor a task id
        if met.state is State.ACCEPTED:
            continue  # it happens without a caller, see the next test
        told = protocol.standing(met.record, STAMP, met.now, PRINT, met.request.policy)
        decision, new = protocol.claim(met.record, STAMP, met.now, met.request)
        if isinstance(decision, (Busy, protocol.Replay)):
            decision = decision._replace(own=False)
        assert told == (decision if new is None else None), met


def test_what_is_accepted_happens_without_its_callers() -> None:
    record = held(State.ACCEPTED)
    assert record is not None
    for now in (STAMP, LAPSED):  # recovery publishes it, no caller has to
        told = protocol.standing(record, STAMP, now, PRINT, a_request().policy)
        assert isinstance(told, Busy)
        assert protocol.accept(record, STAMP, now, a_request(), LEASE) == (told, None)
    forgotten = LAPSED + protocol.OVERDUE + 1  # it was not recovered: the next call publishes a message
    assert protocol.accept(record, STAMP, forgotten, a_request(), LEASE) == (None, None)


def test_a_worker_takes_an_accepted_call_up_without_reading_it() -> None:
    request = a_request()._replace(accepted=Stored(OTHER, STAMP), call=b"the message")
    new = protocol.taken_up(request)
    assert (new.state, new.fence, new.attempts, new.call) == (State.RUNNING, STAMP + 1, 1, b"the message")


def test_the_workers_of_the_broker_that_it_came_from_recover_first() -> None:
    record = held(State.RUNNING)
    assert record is not None
    policy = a_request().policy
    overdue = LAPSED + protocol.GRACE
    assert isinstance(protocol.recover(record, STAMP, overdue, True, policy)[0], Publish)
    assert protocol.recover(record, STAMP, overdue, True, policy, elsewhere=True) == (None, None)
    later = overdue + protocol.ELSEWHERE  # by then that broker counts as one without workers
    assert isinstance(protocol.recover(record, STAMP, later, True, policy, elsewhere=True)[0], Publish)


def test_what_recovery_gives_up_is_told_until_that_is_known() -> None:
    policy = a_request().policy
    record = held(State.RUNNING, lease=0, recovery=Recovery(policy.max_attempts, 0))
    assert record is not None
    tell, new = protocol.recover(record, STAMP, STAMP, True, policy)
    assert isinstance(tell, Tell)
    assert new is not None
    assert (tell.first, new.state, protocol.due(new)) == (True, State.IN_DOUBT, protocol.PUBLISHED_WAIT)
    later = STAMP + protocol.PUBLISHED_WAIT  # the process that had to report it may be dead
    assert protocol.recover(new, STAMP, later - 1, True, policy) == (None, None)
    again, newer = protocol.recover(new, STAMP, later, False, policy)
    assert isinstance(again, Tell)
    assert newer is not None
    assert (again.first, newer._replace(recovery=None)) == (False, new._replace(recovery=None))
    told = protocol.answered(newer, again.record)
    assert told is not None
    assert protocol.due(told) == protocol.NEVER
    assert protocol.answered(newer, tell.record) is None  # another process has taken over the report


def test_an_owed_answer_is_given_until_that_is_known() -> None:
    policy = a_request().policy
    mine = held(State.RUNNING, owner=OWN, call=b"its call")
    assert mine is not None
    settled = protocol.settle(mine, mine, OUTCOME)[1]
    assert settled is not None
    assert protocol.due(settled) is None  # nothing is owed
    for owed, publishable in ((b"", False), (b"its call", True)):
        record = protocol.settle(mine, mine, OUTCOME, owed=owed)[1]
        assert record is not None
        assert (record.call, protocol.due(record)) == (owed, protocol.PUBLISHED_WAIT)
        assert protocol.recover(record, STAMP, STAMP + protocol.PUBLISHED_WAIT - 1, publishable, policy) == (
            None,
            None,
        )
        then, new = protocol.recover(record, STAMP, STAMP + protocol.PUBLISHED_WAIT, publishable, policy)
        assert isinstance(then, Publish if publishable else Tell)
        assert new is not None
        assert new._replace(recovery=None) == record._replace(recovery=None)
        assert protocol.answered(new, then.record) == protocol.told(record) == settled
    # The fourth publication would come after about half an hour.
    record = record._replace(recovery=Recovery(policy.max_attempts, 0))
    assert protocol.recover(record, STAMP, STAMP, True, policy) == (None, settled)
    # The record of a contested intent keeps a short call for people.
    noted = protocol.settle(mine._replace(notes=(NOTE,)), mine, OUTCOME, owed=b"its call")[1]
    assert noted is not None
    told = protocol.told(noted)
    assert told is not None
    assert (told.call, told.recovery) == (b"its call", None)


def test_an_index_that_is_rebuilt_has_no_answers_that_may_be_given() -> None:
    """Without a call, a settled record says that its answer is owed long after it was given."""
    mine = held(State.RUNNING, owner=OWN)
    assert mine is not None
    for owed, due in ((b"", None), (b"its call", protocol.PUBLISHED_WAIT)):
        record = protocol.settle(mine, mine, OUTCOME, owed=owed)[1]
        assert record is not None
        assert protocol.due_again(record) == due
        told = protocol.told(record)
        assert told is not None
        assert protocol.due_again(told) is None
    assert protocol.due_again(mine) == protocol.due(mine)


def test_a_failure_that_may_run_again_is_never_published_for_its_answer() -> None:
    """By the time that the delivery comes, it might run the body."""
    mine = held(State.RUNNING, owner=OWN, steps=STEPS)
    assert mine is not None
    record = protocol.settle(mine, mine, ERROR, owed=b"its call")[1]
    assert record is not None
    then, _ = protocol.recover(record, STAMP, STAMP + protocol.PUBLISHED_WAIT, True, a_request().policy)
    assert isinstance(then, Tell)


def test_the_answer_of_a_person_is_owed_too() -> None:
    call = {"call": b"its call", "task_id": "task"}
    doubt, retry = held(State.IN_DOUBT, **call), held(State.SCHEDULED, lease=LEASE, **call)
    assert doubt is not None
    assert retry is not None
    happened = protocol.resolve(doubt, STAMP, STAMP, OUTCOME, NOTE, None, True)[1]
    assert happened is not None
    assert (happened.call, protocol.due(happened)) == (b"its call", protocol.PUBLISHED_WAIT)
    cancelled = protocol.cancel(retry, STAMP, STAMP, ASKED_TO_STOP)[1]
    assert cancelled is not None  # its retry tells the caller, and may be lost
    assert (cancelled.call, protocol.due(cancelled)) == (b"its call", LEASE + protocol.LONGEST_WAIT)
    stopped = held(State.RUNNING, owner=OTHER, lease=0, notes=(ASKED_TO_STOP,), **call)
    assert stopped is not None
    replay, new = protocol.claim(stopped, STAMP, LAPSED, a_request(on_crash="transaction"))
    assert isinstance(replay, Replay)
    assert new is not None
    assert (replay.owed, new.state, protocol.due(new)) == (True, State.CANCELLED, protocol.PUBLISHED_WAIT)


def test_what_a_person_decided_is_published_again_only_if_its_message_is_lost() -> None:
    """Each message of it calls links again, so recovery does not hurry."""
    doubt = held(State.IN_DOUBT, call=b"its call")
    assert doubt is not None
    happened = protocol.resolve(doubt, STAMP, STAMP, OUTCOME, NOTE, None, True)[1]
    assert happened is not None
    sent = protocol.published(happened)
    assert sent is not None
    assert protocol.due(sent) == protocol.LONGEST_WAIT
    policy = a_request().policy
    for record in (happened, sent):
        then, new = protocol.recover(record, STAMP, STAMP + protocol.LONGEST_WAIT, True, policy)
        assert isinstance(then, Publish)
        assert new is not None
        wait = protocol.due(new)
        assert wait is not None
        assert wait >= protocol.LONGEST_WAIT
    told = protocol.told(sent)
    assert told is not None
    assert protocol.published(told) is None


def test_a_debt_that_was_paid_does_not_come_back_with_another_write() -> None:
    """Only its entry in the index was taken out then."""
    mine = held(State.RUNNING, owner=OWN, digests=b"\1\2" + bytes(8))
    assert mine is not None
    for owed, still in ((b"", False), (b"its call", True)):
        record = protocol.settle(mine, mine, OUTCOME, owed=owed)[1]
        assert record is not None
        for late in (0, 1):
            now = STAMP + protocol.PUBLISHED_WAIT + late
            sealed = protocol.rewritten(record, STAMP, now)
            request = a_request()._replace(digests=b"\1\2" + b"another!")
            _, varied = protocol.claim(record, STAMP, now, request)
            for new in (sealed, varied):
                assert new is not None
                assert (new.recovery is not None) == (still or not late)


def test_a_question_whose_asker_died_is_published_again_and_not_for_ever() -> None:
    record = held(State.IN_DOUBT, asking=b"asker -01...", lease=LEASE)
    assert record is not None
    now = LAPSED + protocol.GRACE
    for tries in range(a_request().policy.max_attempts):
        request = a_request(b"asker %03d..." % tries, asks=True)
        assert protocol.due(record) == LEASE + protocol.GRACE
        assert protocol.recover(record, STAMP, now - 1, True, request.policy) == (None, None)
        publish, taken = protocol.recover(record, STAMP, now, True, request.policy)
        assert isinstance(publish, Publish)
        assert taken is not None
        assert (taken.lease, taken.recovery is not None and taken.recovery.tries) == (0, tries + 1)
        ask, asked = protocol.claim(taken, STAMP, STAMP, request)
        assert isinstance(ask, Ask)
        assert asked is not None
        _, record = protocol.renew(asked._replace(lease=0), request.owner, LEASE)  # it was alive after all
        assert record is not None
        assert record == asked
    tell, given_up = protocol.recover(record, STAMP, now, True, request.policy)
    assert isinstance(tell, Tell)
    assert given_up is not None
    assert (tell.first, given_up.asking) == (True, b"")
    assert isinstance(protocol.claim(given_up, STAMP, STAMP, request)[0], Ask)  # the next caller may ask


def test_finished_steps_are_not_replaced_unread() -> None:
    released = held(State.RELEASED, steps=STEPS)
    assert released is not None
    decision, new = protocol.accept(released, STAMP, STAMP, a_request(), LEASE)
    assert isinstance(decision, Accepted)
    assert new is not None
    assert new.steps == STEPS
    assert not protocol.untouched(new)
    assert protocol.untouched(protocol.accepted(a_request(), LEASE))


def test_another_call_that_is_quicker_has_the_accepted_one_answered() -> None:
    record = held(State.ACCEPTED)
    assert record is not None
    record = record._replace(call=b"accepted", task_id="another", attempts=0)
    decision, _ = protocol.claim(record, STAMP, STAMP, a_request())
    assert isinstance(decision, Acquired)
    assert decision.orphan == b""  # its own message will deliver the answer
    record = record._replace(lease=0)  # the broker did not accept that message
    decision, new = protocol.claim(record, STAMP, STAMP, a_request())
    assert isinstance(decision, Acquired)
    assert new is not None
    assert (decision.orphan, new.attempts) == (b"accepted", 1)
    decision, _ = protocol.claim(record._replace(task_id="task"), STAMP, STAMP, a_request())
    assert isinstance(decision, Acquired)
    assert decision.orphan == b""


# --- after the body ------------------------------------------------------------------------------------


Result = tuple[Any, Record | None]


def committed(record: Record | None, keep: int = 1) -> Result:
    policy = a_request().policy._replace(result_ttl=keep)
    return protocol.committed(record, Record(State.RUNNING, OWN), OUTCOME, policy)


def asked_to_stop(record: Record) -> Record:
    return record._replace(notes=(ASKED_TO_STOP,)) if record.outcome is None else record


GIVEN_UP = Recovery(1, LEASE)


def held_with(recovery: Recovery) -> Record:
    record = held(State.IN_DOUBT)
    assert record is not None
    return record._replace(recovery=recovery)


APPLY: dict[str, list[Callable[[Record], Result]]] = {
    "accept": [lambda r: protocol.accept(r, STAMP, STAMP, a_request(), LEASE)],
    "sent": [lambda r: (None, protocol.sent(r, OWN, 0))],
    "recover": [
        lambda r: protocol.recover(r, STAMP, LAPSED + protocol.GRACE, True, a_request().policy),
        lambda r: protocol.recover(r, STAMP, LAPSED + protocol.GRACE, False, a_request().policy),
    ],
    "answered": [lambda r: (None, protocol.answered(r._replace(recovery=GIVEN_UP), held_with(GIVEN_UP)))],
    "revoked": [lambda r: (None, protocol.revoked(r, "task"))],
    "settle": [
        lambda r: protocol.settle(r, r._replace(owner=OWN), OUTCOME),
        lambda r: protocol.settle(r, r._replace(owner=OWN), ERROR),
    ],
    "told": [lambda r: (None, protocol.told(r))],
    "committed": [committed],
    "schedule": [
        lambda r: protocol.schedule(r, OWN, 5),
        lambda r: protocol.schedule(asked_to_stop(r), OWN, 5),
    ],
    "release": [lambda r: protocol.release(r, OWN), lambda r: protocol.release(asked_to_stop(r), OWN)],
    "doubt": [lambda r: protocol.doubt(r, OWN, "why")],
    "renew": [lambda r: protocol.renew(r, OWN, LEASE)],
    "begin_step": [lambda r: protocol.begin_step(r, OWN, "charge", a_request().policy)],
    "end_step": [lambda r: protocol.end_step(r, OWN, "charge", b"j1", LEASE)],
    "exit": [
        lambda r: protocol.exit(r, OWN, a_request().policy, "why"),
        lambda r: protocol.exit(r, OWN, a_request(on_crash="rerun").policy, "why"),
    ],
    "lapse": [lambda r: (None, protocol.lapse(r, OWN))],
    "died": [
        lambda r: protocol.died(r, STAMP, OWN[:7], "task", a_request().policy, 0),
        lambda r: protocol.died(r, STAMP, OWN[:7], "task", a_request(on_crash="rerun").policy, 0),
    ],
    "conclude": [
        lambda r: protocol.conclude(r, STAMP, a_request(asks=True), OUTCOME, ""),
        lambda r: protocol.conclude(r, STAMP, a_request(asks=True), None, ""),
        lambda r: protocol.conclude(r, STAMP, a_request(asks=True), None, "it cannot tell"),
        lambda r: protocol.conclude(asked_to_stop(r), STAMP, a_request(asks=True), None, ""),
    ],
    "resolve": [
        lambda r: protocol.resolve(r, STAMP, LAPSED, OUTCOME, NOTE),
        lambda r: protocol.resolve(r, STAMP, LAPSED, None, NOTE),
    ],
    "cancel": [lambda r: protocol.cancel(r, STAMP, STAMP, ASKED_TO_STOP)],
    "forget": [
        lambda r: (None, protocol.forget(r, STAMP, LAPSED, False)),
        lambda r: (None, protocol.forget(r, STAMP, LAPSED, True)),
    ],
}
"""Each transition by its name in the table, with every variant of its arguments."""

TO: dict[str, str] = {}
FROM: dict[str, set[State]] = {}
for row_name, row_from, row_to in TRANSITIONS:  # a transition may have several rows
    TO.setdefault(row_name, row_to)
    FROM.setdefault(row_name, set()).update(states_in(row_from))


def reached_by(name: str, record: Record) -> set[State]:
    """The states that all variants of a transition write for this record."""
    return {new.state for new in (apply(record)[1] for apply in APPLY[name]) if new is not None}


def test_every_transition_of_the_table_is_known_here_and_none_is_left_over() -> None:
    assert list(TO) == list(APPLY)
    for name in APPLY:
        assert callable(getattr(protocol, name))


@pytest.mark.parametrize("name", sorted(APPLY.keys() - {"committed", "cancel", "forget"}))
def test_a_transition_goes_where_its_row_says_and_from_nowhere_else(name: str) -> None:
    to = TO["exit"] if TO[name].startswith("the same") else TO[name]
    expected = states_in(to)
    reached = set()
    for state in State:
        asked = name in ("conclude", "lapse", "renew", "recover") and state is State.IN_DOUBT
        asking = OWN if asked else b""
        record = held(state, asking=asking)
        assert record is not None
        if state.settled:
            record = record._replace(recovery=Recovery(0, LEASE), call=b"call")
        there = reached_by(name, record)
        if name == "exit" and state is State.IN_DOUBT:
            there = set()  # the record is in doubt already: nothing to write
        if name == "conclude" and state is State.RELEASED:
            there = set()  # tested by itself: evidence outweighs a person's "not happened"
        assert bool(there) == (state in FROM[name] and not said_already(name, state)), (state, there)
        if to.startswith("same"):
            assert there <= {state}
        reached |= there
    if not to.startswith("same"):
        assert reached == expected


def test_whether_a_transaction_settled_it_is_found_out_by_writing() -> None:
    """Row "committed": if the transaction settled the intent, nothing is written. If it did not, the record is
    written again unchanged, so that a commit still under way fails."""
    assert (FROM["committed"], TO["committed"].split(":")[0]) == ({State.SUCCEEDED}, "nothing")
    for state in State:
        for owner in (OWN, OTHER):
            record = held(state, owner=owner)
            assert record is not None
            decision, new = committed(record)
            if owner == OTHER or state in (State.RELEASED, State.SCHEDULED, State.ACCEPTED):
                assert isinstance(decision, Refused)
            else:
                assert isinstance(decision, Done)
            assert new == (record if owner == OWN and state in (State.RUNNING, State.IN_DOUBT) else None)
    assert committed(None) == (Refused(None), None)
    decision, new = committed(None, keep=0)  # then an absent record means that it was settled
    assert isinstance(decision, Done)
    assert (decision.record.outcome, new) == (OUTCOME, None)


def test_what_has_not_begun_is_cancelled_and_what_runs_is_asked_to_stop() -> None:
    """Row "cancel": the answer says only what is known."""
    for state in State:
        record = held(state, steps=STEPS, open_steps=("mail",))
        assert record is not None
        for now in (STAMP, LAPSED):
            decision, new = protocol.cancel(record, STAMP, now, ASKED_TO_STOP)
            lapsed = state is State.RUNNING and now == LAPSED
            if state.settled or state is State.IN_DOUBT or lapsed:
                assert (type(decision), new) == (Refused, None)
            elif state is State.RUNNING:
                assert isinstance(decision, Done)
                assert new == record._replace(notes=(ASKED_TO_STOP,))
                assert protocol.stopping(new)
                # A second write would look like a sign of life.
                assert protocol.cancel(new, STAMP, now, ASKED_TO_STOP)[1] is None
            else:
                assert new is not None
                assert new.outcome is not None
                assert (new.state, new.steps, new.call) == (State.CANCELLED, STEPS, b"")
                for said in (
                    "cancelled by jo",
                    "done before: step 'charge'",
                    "not known how it ended: step 'mail'",
                ):
                    assert said in new.outcome.missing
        other_attempt = protocol.cancel(record, STAMP, STAMP, ASKED_TO_STOP, fence=FENCE + 1)
        assert (type(other_attempt[0]), other_attempt[1]) == (Refused, None)


def test_the_wish_to_stop_is_about_one_attempt() -> None:
    record = held(State.RUNNING, notes=(ASKED_TO_STOP,))
    assert record is not None
    assert protocol.stopping(record)
    _, let_run = protocol.resolve(record, STAMP, LAPSED, None, NOTE)
    assert let_run is not None
    assert not protocol.stopping(let_run)
    ahead = record._replace(fence=STAMP + 5, notes=())  # the store's clock went back since it was claimed
    _, asked = protocol.cancel(ahead, STAMP, STAMP, ASKED_TO_STOP)
    assert asked is not None
    assert protocol.stopping(asked)


def test_a_write_that_changes_nothing_is_no_sign_of_life() -> None:
    for state in (State.SCHEDULED, State.ACCEPTED):
        record = Record(state, owner=OWN, lease=100, recovery=Recovery(1, 70))
        new = protocol.rewritten(record, STAMP, STAMP + 30)
        assert new == record._replace(lease=70, recovery=Recovery(1, 40))
        late = protocol.rewritten(record, STAMP, STAMP + 300)
        assert late == record._replace(lease=1, recovery=Recovery(1, 1))  # overdue, but not 0
    for record in (Record(State.IN_DOUBT), Record(State.SUCCEEDED, outcome=OUTCOME)):
        assert protocol.rewritten(record, STAMP, STAMP + 30) == record
    for held_by_another in (Record(State.RUNNING, lease=100), Record(State.IN_DOUBT, lease=100, asking=OWN)):
        assert protocol.rewritten(held_by_another, STAMP, STAMP + 300) is None


def test_a_cancelled_action_is_known_for_longer_than_its_retry_takes_to_come() -> None:
    policy = a_request().policy
    waiting = held(State.SCHEDULED, lease=1000 * LEASE)
    assert waiting is not None
    _, new = protocol.cancel(waiting, STAMP, STAMP, ASKED_TO_STOP)
    assert new is not None
    kept = protocol.ttl(new, policy)
    assert kept is not None
    assert kept > 1000 * LEASE
    assert protocol.claim(new, STAMP, STAMP + 1000 * LEASE, a_request())[0] == protocol.Replay(CANCELLED)


def test_forgetting_keeps_finished_steps_unless_told() -> None:
    """Row "forget"."""
    for state in State:
        record = held(state, steps=STEPS, open_steps=("mail",), crashes=2)
        assert record is not None
        assert protocol.forget(record, STAMP, LAPSED, True) is None
        assert protocol.forget(record._replace(steps=()), STAMP, LAPSED, False) is None
        if state is State.RUNNING:
            assert protocol.forget(record, STAMP, LAPSED - 1, False) is None  # its holder writes it again
        new = protocol.forget(record, STAMP, LAPSED, False)
        assert new is not None
        assert {new.state} == states_in(TO["forget"])
        assert (new.steps, new.open_steps, new.owner, new.crashes, new.outcome) == (
            STEPS,
            (),
            NO_OWNER,
            0,
            None,
        )
        assert new.fingerprint == record.fingerprint
        assert new.fence > record.fence
        assert new.notes[-1].evidence == "finished steps stay: 'charge'"


def test_steps_outlive_a_failure() -> None:
    record = held(State.RUNNING, steps=STEPS, open_steps=("mail",))
    assert record is not None
    _, failed = protocol.settle(record, record, ERROR)
    assert failed is not None
    assert (failed.steps, failed.open_steps) == (STEPS, ())
    request = a_request(OTHER)
    assert protocol.claim(failed, STAMP, STAMP + FAILURE_TTL - 1, request)[0] == protocol.Replay(ERROR)
    decision, again = protocol.claim(failed, STAMP, STAMP + FAILURE_TTL, request)
    assert isinstance(decision, Acquired)
    assert again is not None
    assert (again.state, again.steps, again.outcome) == (State.RUNNING, STEPS, None)
    kept = protocol.ttl(failed, request.policy)
    assert kept is not None
    assert kept > request.policy.failure_ttl
    never = a_request(result_ttl=0, failure_ttl=0).policy
    assert protocol.ttl(failed, never) == protocol.ttl(held(State.RELEASED, steps=STEPS), never)  # type: ignore[arg-type]
    assert protocol.ttl(failed, never) == protocol.LEAST_STEPS
    assert protocol.ttl(failed._replace(steps=()), never) == 0
    # A copy of the failure is older than the attempt that came after it.
    assert protocol.supersedes(again, failed)
    assert not protocol.supersedes(again, failed._replace(steps=()))


def said_already(name: str, state: State) -> bool:
    return name == "doubt" and state is State.IN_DOUBT


OWNERS_ONLY = ["settle", "schedule", "release", "doubt", "renew", "begin_step", "end_step", "exit"]


@pytest.mark.parametrize("name", OWNERS_ONLY)
@pytest.mark.parametrize("state", State)
def test_a_stale_owner_is_refused(name: str, state: State) -> None:
    record = held(state, owner=OTHER)
    assert record is not None
    for apply in APPLY[name]:
        decision, new = apply(record)
        assert new is None
        if not (name == "release" and state is State.RELEASED):  # already released
            assert isinstance(decision, Refused)


@pytest.mark.parametrize("name", ["settle", "schedule", "release", "end_step"])
@pytest.mark.parametrize("state", [State.RUNNING, State.IN_DOUBT])
def test_the_owner_is_heard_however_late(name: str, state: State) -> None:
    record = held(state, lease=0, asking=OTHER if state is State.IN_DOUBT else b"")
    assert record is not None
    for apply in APPLY[name]:
        decision, new = apply(record)
        assert isinstance(decision, Done)
        assert new is not None
        assert decision.record == new


@pytest.mark.parametrize("name", ["settle", "schedule", "release", "doubt", "end_step"])
def test_a_write_whose_reply_was_lost_is_done(name: str) -> None:
    record = held(State.RUNNING)
    assert record is not None
    for apply in APPLY[name]:
        _, new = apply(record)
        assert new is not None
        again, nothing = apply(new)
        assert isinstance(again, Done), name
        assert nothing is None


def test_a_settled_outcome_never_changes() -> None:
    for state in (State.SUCCEEDED, State.FAILED, State.CANCELLED):
        record = held(state)
        assert record is not None
        for name, ways in APPLY.items():
            for apply in ways:
                _, new = apply(record)
                assert new is None or new == record, name
    record = held(State.SUCCEEDED)
    decision, new = protocol.settle(record, record, ERROR)  # type: ignore[arg-type]
    assert isinstance(decision, Refused)
    assert new is None


def test_settling_a_record_that_the_store_lost_writes_it_again() -> None:
    mine = held(State.RUNNING, steps=(protocol.Step("charge", b"j1"),))
    assert mine is not None
    decision, new = protocol.settle(None, mine, OUTCOME)
    assert isinstance(decision, Done)
    assert new is not None
    assert (new.state, new.outcome, new.owner, new.fingerprint) == (
        State.SUCCEEDED,
        OUTCOME,
        OWN,
        PRINT.packed,
    )


def test_a_settled_record_carries_nothing_that_no_replay_needs() -> None:
    record = held(State.IN_DOUBT, steps=(protocol.Step("charge", b"j1"),), open_steps=("mail",), asking=OTHER)
    assert record is not None
    _, new = protocol.settle(record, record, OUTCOME)
    assert new is not None
    assert (new.steps, new.open_steps, new.asking, new.reason, new.lease) == ((), (), b"", "", 0)
    assert new.fingerprint == PRINT.packed


def test_release_keeps_finished_steps_and_forgets_the_owner() -> None:
    record = held(State.RUNNING, steps=(protocol.Step("charge", b"j1"),))
    assert record is not None
    _, new = protocol.release(record, OWN)
    assert new is not None
    assert (new.owner, new.steps, new.lease) == (NO_OWNER, record.steps, 0)


def test_fences_grow_across_release_resolution_and_schedule() -> None:
    request, now = a_request(OTHER), STAMP
    record = protocol.fresh(a_request())._replace(fence=FENCE)
    fences = [record.fence]
    for end in (
        lambda r: protocol.release(r, r.owner),
        lambda r: protocol.schedule(r, r.owner, 0),
        lambda r: protocol.resolve(r, 0, LAPSED, None, NOTE),
    ):
        _, ended = end(record)
        assert ended is not None
        _, taken = protocol.claim(ended, STAMP, now, request)
        assert taken is not None
        fences.append(taken.fence)
        record, request = taken, a_request(OWN if request.owner == OTHER else OTHER)
    assert fences == sorted(set(fences))


# --- policy -----------------------------------------------------------------------------------------------------


def test_every_way_a_body_can_end_has_an_ending() -> None:
    assert set(protocol.ENDINGS) == set(Raised)
    assert protocol.ENDINGS[Raised.ERROR] is State.FAILED
    assert protocol.ENDINGS[Raised.RETRY] is State.SCHEDULED
    for kind in (Raised.IGNORE, Raised.REJECT, Raised.NO_EFFECT):
        assert protocol.ENDINGS[kind] is State.RELEASED
    for kind in (Raised.AMBIGUOUS, Raised.TIME_LIMIT, Raised.EXIT):
        assert protocol.ENDINGS[kind] is State.IN_DOUBT


def test_evidence_does_not_expire() -> None:
    policy = Policy(LEASE, result_ttl=1, failure_ttl=2)
    kept = {state: protocol.ttl(Record(state), policy) for state in State}
    assert kept == {
        State.RUNNING: None,
        State.SCHEDULED: None,
        State.IN_DOUBT: None,
        State.ACCEPTED: None,
        State.RELEASED: 1,
        State.SUCCEEDED: 1,
        State.FAILED: 2,
        State.CANCELLED: 1,
    }


def test_a_worker_trusts_its_lease_less_a_margin() -> None:
    assert 0 < protocol.trusted_for(LEASE) < LEASE
