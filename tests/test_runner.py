"""The runner without Celery: fake jobs run one after the other, over a store in memory that a test can break."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

from celery_idem import (
    ConfigurationError,
    FingerprintMismatch,
    Happened,
    IdempotencyError,
    LeaseLost,
    NotHappened,
    OutcomeUnknown,
    ResultUnavailable,
    Unknown,
)
from celery_idem.core import protocol
from celery_idem.core.model import MICROSECONDS, Acquired, Answer, Outcome, Policy, Raised, Request, State
from celery_idem.engine import events, owners
from celery_idem.engine.claim import Hold
from celery_idem.engine.runner import MAX_HANGING, Why
from celery_idem.engine.steps import run_step
from tests.support.jobs import KEY, LEASE, Bench, Ended, Failed, FakeJob, Left
from tests.support.waiting import wait_for

# --- once ------------------------------------------------------------------------------------


def test_the_body_runs_once_and_everybody_gets_its_value(bench: Bench) -> None:
    first, second = FakeJob({"a": (1, 2)}), FakeJob("other")
    assert bench.runner.run(first) == bench.runner.run(second) == {"a": [1, 2]}
    assert (first.ran, second.ran) == (1, 0)


def test_the_happy_path_is_two_round_trips_and_a_duplicate_one(bench: Bench) -> None:
    bench.run()
    assert bench.store.calls == ["create", "replace"]
    bench.run()
    assert bench.store.calls == ["create", "replace", "create"]


def test_a_failure_is_stored_and_raised_again(bench: Bench) -> None:
    for _ in range(2):
        job = FakeJob(Failed("no", 7))
        with pytest.raises(Failed) as caught:
            bench.runner.run(job)
        assert caught.value.args == ("no", 7)
    assert job.ran == 0
    assert bench.state is State.FAILED


def test_other_values_are_a_mismatch_whatever_the_state(bench: Bench) -> None:
    def meanwhile(claim: Hold) -> str:
        with pytest.raises(FingerprintMismatch):
            bench.run(must_match=b"6")
        return "done"

    bench.run(meanwhile, must_match=b"5")
    with pytest.raises(FingerprintMismatch) as caught:
        bench.run(must_match=b"6")
    assert caught.value.differs == ("cents",)
    assert bench.run(must_match=b"5") == "done"


def test_a_value_that_cannot_be_stored_is_done(bench: Bench) -> None:
    thing = object()
    assert bench.run(lambda claim: thing) is thing
    with pytest.raises(ResultUnavailable):
        bench.run()


def test_a_duplicate_comes_back(bench: Bench) -> None:
    def meanwhile(claim: Hold) -> str:
        duplicate = FakeJob("other", task_id="two")
        with pytest.raises(Left):
            bench.runner.run(duplicate)
        assert duplicate.came_back == [(30.0, (), Why.BUSY)]
        return "done"

    assert bench.run(meanwhile) == "done"
    assert bench.events[-1].kind == "settled"


# --- how a body ends (rule 5) ------------------------------------------------------------------

ENDS = {
    Raised.RETRY: State.SCHEDULED,
    Raised.DOUBTFUL_RETRY: State.IN_DOUBT,
    Raised.IGNORE: State.RELEASED,
    Raised.SAID_DONE: State.SUCCEEDED,
    Raised.SAID_FAILED: State.FAILED,
    Raised.REJECT: State.RELEASED,
    Raised.NO_EFFECT: State.RELEASED,
    Raised.AMBIGUOUS: State.IN_DOUBT,
    Raised.TIME_LIMIT: State.IN_DOUBT,
    Raised.EXIT: State.IN_DOUBT,
    Raised.ERROR: State.FAILED,
    Raised.REPLACED: State.SUCCEEDED,
}


def test_every_kind_is_in_the_table() -> None:
    assert set(ENDS) == set(Raised)


@pytest.mark.parametrize("kind", Raised)
def test_what_a_body_raises_takes_the_intent_where_rule_5_says(bench: Bench, kind: Raised) -> None:
    told = OutcomeUnknown if kind in (Raised.AMBIGUOUS, Raised.TIME_LIMIT) else Ended
    with pytest.raises(told) as caught:
        bench.run(Ended(kind))
    if told is Ended:
        assert caught.value.kind is kind
    assert bench.state is ENDS[kind]


def test_a_retry_belongs_to_its_task_id_until_its_time_is_over(bench: Bench) -> None:
    with pytest.raises(Ended):
        bench.run(Ended(Raised.RETRY))
    with pytest.raises(Left):
        bench.run(task_id="two")
    assert bench.run("the retry", task_id="one") == "the retry"
    assert bench.run(task_id="two") == "the retry"


def test_a_retry_that_never_comes_is_anybodys(bench: Bench) -> None:
    with pytest.raises(Ended):
        bench.run(Ended(Raised.RETRY))
    bench.clock.advance(6)
    assert bench.run("two", task_id="two") == "two"


def test_what_was_released_runs_again(bench: Bench) -> None:
    with pytest.raises(Ended):
        bench.run(Ended(Raised.NO_EFFECT))
    job = FakeJob()
    assert bench.runner.run(job) == "done"
    assert job.claims[0].attempt == 2


def test_a_replaced_body_is_answered_by_its_replacement(bench: Bench) -> None:
    with pytest.raises(Ended):
        bench.run(Ended(Raised.REPLACED), task_id="one")
    job = FakeJob(task_id="two")
    assert bench.runner.run(job) == "of one"
    assert job.ran == 0


# --- crashes, and the destination (rules 3 and 8) ----------------------------------------------------


def crashed(bench: Bench, **options: Any) -> None:
    """Leaves the claim of a worker that died in the body."""
    job = FakeJob(**options)
    request = Request(owners.mint(), job.task_id, job.fingerprint, job.options.policy)
    decision, _ = bench.ledger.claim(KEY, request)
    assert isinstance(decision, Acquired)
    bench.lapse()


def test_a_crash_is_in_doubt_and_stays_so(bench: Bench) -> None:
    crashed(bench)
    for _ in range(2):
        job = FakeJob()
        with pytest.raises(OutcomeUnknown, match="idem resolve"):
            bench.runner.run(job)
        assert job.ran == 0


@pytest.mark.parametrize("on_crash", ["resume", "rerun"])
def test_a_crash_runs_again_where_its_author_says_so_but_not_for_ever(bench: Bench, on_crash: str) -> None:
    for _ in range(Policy(1, 1, 1).max_attempts):
        crashed(bench, on_crash=on_crash)
    with pytest.raises(OutcomeUnknown, match="3 times"):
        bench.run(on_crash=on_crash)


def test_the_destination_is_asked(bench: Bench) -> None:
    crashed(bench, ask=NotHappened())
    job = FakeJob(ask=Happened({"id": 7}))
    assert bench.runner.run(job) == {"id": 7}
    assert job.ran == 0
    assert bench.run() == {"id": 7}


def test_the_body_runs_when_the_destination_says_no(bench: Bench) -> None:
    crashed(bench, ask=NotHappened())
    assert bench.run("now", ask=NotHappened()) == "now"


@pytest.mark.parametrize(
    "answer",
    [Unknown("cannot tell"), "yes", None, lambda: 1 / 0],
    ids=["unknown", "text", "nothing", "error"],
)
def test_whatever_else_it_answers_is_no_answer(bench: Bench, answer: Any) -> None:
    crashed(bench, ask=NotHappened())
    job = FakeJob(ask=answer if answer is not None else (lambda: None))
    with pytest.raises(OutcomeUnknown):
        bench.runner.run(job)
    assert job.ran == 0
    assert bench.run(ask=Happened("after all")) == "after all"  # the next execution asks again


def test_what_the_destination_said_survives_a_record_that_got_lost_meanwhile(bench: Bench) -> None:
    crashed(bench, ask=NotHappened())

    def lost(answer: Answer) -> Callable[[], Answer]:
        def ask() -> Answer:
            assert bench.ledger.forget(KEY)
            return answer

        return ask

    job = FakeJob(ask=lost(Unknown("cannot tell")))
    with pytest.raises(OutcomeUnknown, match="cannot tell"):
        bench.runner.run(job)
    assert bench.state is State.IN_DOUBT
    job = FakeJob(ask=lost(Happened("once")))
    assert bench.runner.run(job) == "once"
    assert job.ran == 0
    assert bench.run() == "once"


def test_a_destination_that_hangs_is_not_waited_for_for_ever(bench: Bench) -> None:
    crashed(bench, ask=NotHappened())
    release = threading.Event()
    try:
        with pytest.raises(OutcomeUnknown, match="did not answer"):
            bench.run(ask=lambda: release.wait(30), ask_timeout=0.05)
    finally:
        release.set()


def test_a_destination_that_hangs_costs_few_threads_and_is_asked_again_when_they_end(bench: Bench) -> None:
    crashed(bench, ask=NotHappened())
    asked: list[int] = []
    release = threading.Event()

    def hangs() -> NotHappened:
        asked.append(1)
        release.wait(60)
        return NotHappened()

    try:
        for _ in range(3 * MAX_HANGING):
            with pytest.raises(OutcomeUnknown, match="did not answer"):
                bench.run(ask=hangs, ask_timeout=0.01)
        assert len(asked) == MAX_HANGING
        with pytest.raises(OutcomeUnknown, match="4 earlier calls still hang"):
            bench.run(ask=hangs)
    finally:
        release.set()

    def answers() -> bool:
        with contextlib.suppress(OutcomeUnknown):
            return bool(bench.run(ask=Happened("it did")) == "it did")
        return False

    wait_for(answers, 20.0, "the questions that hung to end")


def test_an_ambiguous_error_is_a_question_where_one_can_ask(bench: Bench) -> None:
    assert bench.run(Ended(Raised.AMBIGUOUS), ask=Happened("it did")) == "it did"
    assert bench.run() == "it did"


# --- takeover (rule 4) ------------------------------------------------------------------------------------------


def test_an_execution_that_was_taken_over_is_refused_and_that_is_an_alarm(bench: Bench) -> None:
    def body(claim: Hold) -> str:
        bench.lapse()
        bench.run("the second", task_id="two", on_crash="rerun")
        return "the first"

    with pytest.raises(LeaseLost):
        bench.run(body, on_crash="rerun")
    assert bench.run() == "the second"
    (alarm,) = [event for event in bench.events if event.kind == "stale_settle"]
    assert alarm.details["fence"] < alarm.details["current_fence"]
    assert events.LEVELS["stale_settle"] == 50


def test_a_late_outcome_is_heard_while_nobody_took_over(bench: Bench) -> None:
    def body(claim: Hold) -> str:
        bench.lapse()
        with pytest.raises(OutcomeUnknown):
            bench.run(task_id="two")
        assert bench.state is State.IN_DOUBT
        return "late"

    assert bench.run(body) == "late"
    assert bench.run() == "late"


# --- people ------------------------------------------------------------------------------------------------------


def test_a_person_resolves_what_is_in_doubt(bench: Bench) -> None:
    crashed(bench)
    bench.ledger.resolve(KEY, Happened({"id": 7}), by="jo", evidence="invoice 7")
    assert bench.run() == {"id": 7}
    entry = bench.ledger.get(KEY)
    assert entry is not None
    assert [(note.by, note.evidence) for note in entry.record.notes if note.by == "jo"] == [
        ("jo", "invoice 7")
    ]
    with pytest.raises(IdempotencyError):
        bench.ledger.resolve(KEY, NotHappened(), by="jo")


def test_or_has_it_run_again(bench: Bench) -> None:
    crashed(bench)
    bench.ledger.resolve(KEY, NotHappened(), by="jo")
    assert bench.run("again") == "again"


def test_results_expire_and_fences_grow_all_the_same(bench: Bench) -> None:
    fences = []
    for n in range(3):
        job = FakeJob(n)
        assert bench.runner.run(job) == n
        fences.append(job.claims[0].fence)
        bench.clock.advance(86_401)
    assert fences == sorted(set(fences))


def test_evidence_does_not_expire(bench: Bench) -> None:
    crashed(bench)
    bench.clock.advance(10 * 365 * 86_400)
    with pytest.raises(OutcomeUnknown):
        bench.run()


def test_a_listener_that_fails_costs_nothing(bench: Bench) -> None:
    def broken(event: events.Event) -> None:
        raise RuntimeError

    stop = events.listen(broken, here=True)
    try:
        assert bench.run() == "done"
    finally:
        stop()


def test_an_outcome_is_what_the_protocol_stores(bench: Bench) -> None:
    bench.run()
    entry = bench.ledger.get(KEY)
    assert entry is not None
    assert entry.record.outcome == Outcome(True, b'j"done"')
    assert protocol.ttl(entry.record, Policy(1, 2, 3)) == 2


# --- steps ------------------------------------------------------------------------------------------------------


def test_a_step_whose_error_was_swallowed_is_not_run_again_unasked(bench: Bench) -> None:
    """The reply to the charge was lost, the body went on to the mail, and its worker died before the end."""
    charges: list[str] = []

    def charge() -> None:
        charges.append("one")
        raise TimeoutError

    def body(claim: Hold) -> str:
        with contextlib.suppress(TimeoutError):
            run_step(claim, bench.ledger.codec, "charge", charge, None, 0.0)
        return str(run_step(claim, bench.ledger.codec, "mail", lambda: "mailed", None, 0.0))

    job = FakeJob(on_crash="resume")
    request = Request(owners.mint(), "one", job.fingerprint, job.options.policy)
    _, first = bench.ledger.claim(KEY, request)
    assert first is not None
    assert body(first) == "mailed"  # the worker dies here
    bench.clock.advance(2 * LEASE / MICROSECONDS)
    with pytest.raises(OutcomeUnknown, match="'charge'"):
        bench.run(body, on_crash="resume")
    assert charges == ["one"]
    assert bench.state is State.IN_DOUBT


@pytest.mark.parametrize(("most", "size"), [(20, 1), (2, 1 << 19)])
def test_a_record_full_of_steps_is_an_error_before_the_next_one(
    bench: Bench, most: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step writes the whole record again, so unbounded steps would cost traffic that grows as their square."""
    monkeypatch.setattr(protocol, "MAX_STEPS", 20)
    done: list[int] = []

    def step() -> str:
        done.append(1)
        return "x" * size

    def body(claim: Hold) -> None:
        for n in range(most + 1):
            run_step(claim, bench.ledger.codec, f"s{n}", step, None, 0.0)

    with pytest.raises(ConfigurationError, match=r"was not begun.*Give each part a task"):
        bench.run(body, on_crash="resume")
    assert len(done) == most


def test_what_fills_a_record_is_still_known_to_a_resumed_attempt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_STEPS", 20)
    job = FakeJob(on_crash="resume")
    _, first = bench.ledger.claim(KEY, Request(owners.mint(), "one", job.fingerprint, job.options.policy))
    assert first is not None
    results = iter(range(20))
    for n in range(20):
        run_step(first, bench.ledger.codec, f"s{n}", lambda: next(results), None, 0.0)
    bench.lapse()

    def body(claim: Hold) -> list[int]:
        return [run_step(claim, bench.ledger.codec, f"s{n}", lambda: -1, None, 0.0) for n in range(20)]

    assert bench.run(body, on_crash="resume") == list(range(20))
