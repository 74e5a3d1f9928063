"""One execution after the other, without Celery: jobs made here, over a store in memory that a test can break."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_idem import (
    FingerprintMismatch,
    Happened,
    IdempotencyError,
    LeaseLost,
    NotHappened,
    OutcomeUnknown,
    ResultUnavailable,
    StoreError,
    Unknown,
    events,
    owners,
    protocol,
)
from celery_idem.intent import (
    MICROSECONDS,
    Acquired,
    Answer,
    Fingerprint,
    Outcome,
    Policy,
    Raised,
    Request,
    State,
)
from celery_idem.ledger import Claim, Ledger
from celery_idem.runner import Job, Options, Runner
from celery_idem.steps import run_step
from celery_idem.stores.memory import MemoryStore
from celery_idem.testing import CrashingStore, FakeClock

KEY = "shop.pay:0123456789abcdef0123456789abcdef"
LEASE = 30 * MICROSECONDS
DAY = 86_400 * MICROSECONDS


class Left(Exception):
    """What `come_back` raises to leave, as Celery's Retry does."""


class Ended(BaseException):
    """What a body raises, of the kind in its argument."""

    def __init__(self, kind: Raised) -> None:
        super().__init__(kind)
        self.kind = kind


class Failed(Exception):
    pass


class FakeJob(Job):
    """`body` may be a value or a function; what it raises is of the kind in `Ended`, else an error."""

    def __init__(
        self,
        body: Any = "done",
        *,
        ask: Any = None,
        must_match: bytes = b"",
        carried: tuple[bytes, ...] = (),
        task_id: str = "one",
        wait: Callable[[], None] | None = None,
        delay: float = 5.0,
        **options: Any,
    ) -> None:
        policy = Policy(LEASE, DAY, DAY, options.pop("on_crash", "in_doubt"), asks=ask is not None)
        fingerprint = Fingerprint(("cents",), b"tag." + must_match.ljust(8)) if must_match else Fingerprint()
        super().__init__(KEY, task_id, fingerprint, Options(policy, **{"patience": 0.0, **options}), carried)
        self._body = body
        self._answer = ask
        self._wait = wait
        self._delay = delay
        self.ran = 0
        self.claims: list[Claim] = []
        self.came_back: list[tuple[float, tuple[bytes, ...], str]] = []

    def body(self, claim: Claim) -> Any:
        self.ran += 1
        self.claims.append(claim)
        if isinstance(self._body, BaseException):
            raise self._body
        return self._body(claim) if callable(self._body) else self._body

    def kind_of(self, error: BaseException) -> Raised:
        return error.kind if isinstance(error, Ended) else Raised.ERROR

    def retry_delay(self, error: BaseException) -> float:
        return self._delay

    def ask(self, claim: Claim) -> Answer:
        answer: Answer = self._answer() if callable(self._answer) else self._answer
        return answer

    def follow(self, task_id: str) -> tuple[bool, Any]:
        return True, f"of {task_id}"

    def come_back(self, seconds: float, carried: tuple[bytes, ...], why: str) -> None:
        self.came_back.append((seconds, carried, why))
        if self._wait is None:
            raise Left(why)
        self._wait()


class Desk:
    """A runner, its store and clock, and every event."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = CrashingStore(MemoryStore(self.clock))
        self.ledger = Ledger(self.store)
        self.runner = Runner(self.ledger)
        self.events: list[events.Event] = []

    def run(self, body: Any = "done", **options: Any) -> Any:
        return self.runner.run(FakeJob(body, **options))

    @property
    def state(self) -> State | None:
        entry = self.ledger.get(KEY)
        return entry.record.state if entry else None

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def lapse(self) -> None:
        self.clock.advance(31)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    stop = events.listen(desk.events.append)
    yield desk
    stop()


# --- once ------------------------------------------------------------------------------------


def test_the_body_runs_once_and_everybody_gets_its_value(desk: Desk) -> None:
    first, second = FakeJob({"a": (1, 2)}), FakeJob("other")
    assert desk.runner.run(first) == desk.runner.run(second) == {"a": [1, 2]}
    assert (first.ran, second.ran) == (1, 0)


def test_the_happy_path_is_two_round_trips_and_a_duplicate_one(desk: Desk) -> None:
    desk.run()
    assert desk.store.calls == ["create", "replace"]
    desk.run()
    assert desk.store.calls == ["create", "replace", "create"]


def test_a_failure_is_stored_and_raised_again(desk: Desk) -> None:
    for _ in range(2):
        job = FakeJob(Failed("no", 7))
        with pytest.raises(Failed) as caught:
            desk.runner.run(job)
        assert caught.value.args == ("no", 7)
    assert job.ran == 0
    assert desk.state is State.FAILED


def test_other_values_are_a_mismatch_whatever_the_state(desk: Desk) -> None:
    def meanwhile(claim: Claim) -> str:
        with pytest.raises(FingerprintMismatch):
            desk.run(must_match=b"6")
        return "done"

    desk.run(meanwhile, must_match=b"5")
    with pytest.raises(FingerprintMismatch) as caught:
        desk.run(must_match=b"6")
    assert caught.value.differs == ("cents",)
    assert desk.run(must_match=b"5") == "done"


def test_a_value_that_cannot_be_stored_is_done(desk: Desk) -> None:
    thing = object()
    assert desk.run(lambda claim: thing) is thing
    with pytest.raises(ResultUnavailable):
        desk.run()


def test_a_duplicate_comes_back_and_may_wait_in_place(desk: Desk) -> None:
    def meanwhile(claim: Claim) -> str:
        duplicate = FakeJob("other", task_id="two")
        with pytest.raises(Left):
            desk.runner.run(duplicate)
        assert duplicate.came_back == [(30.0, (), "in progress")]
        return "done"

    assert desk.run(meanwhile) == "done"
    assert desk.events[-1].kind == "settled"


# --- how a body ends (rule 5) ------------------------------------------------------------------

ENDS = {
    Raised.RETRY: State.SCHEDULED,
    Raised.IGNORE: State.RELEASED,
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
def test_what_a_body_raises_takes_the_intent_where_rule_5_says(desk: Desk, kind: Raised) -> None:
    told = OutcomeUnknown if kind in (Raised.AMBIGUOUS, Raised.TIME_LIMIT) else Ended
    with pytest.raises(told) as caught:
        desk.run(Ended(kind))
    if told is Ended:
        assert caught.value.kind is kind
    assert desk.state is ENDS[kind]


def test_a_retry_belongs_to_its_task_id_until_its_time_is_over(desk: Desk) -> None:
    with pytest.raises(Ended):
        desk.run(Ended(Raised.RETRY))
    with pytest.raises(Left):
        desk.run(task_id="two")
    assert desk.run("the retry", task_id="one") == "the retry"
    assert desk.run(task_id="two") == "the retry"


def test_a_retry_that_never_comes_is_anybodys(desk: Desk) -> None:
    with pytest.raises(Ended):
        desk.run(Ended(Raised.RETRY))
    desk.clock.advance(6)
    assert desk.run("two", task_id="two") == "two"


def test_what_was_released_runs_again(desk: Desk) -> None:
    with pytest.raises(Ended):
        desk.run(Ended(Raised.NO_EFFECT))
    job = FakeJob()
    assert desk.runner.run(job) == "done"
    assert job.claims[0].attempt == 2


def test_a_replaced_body_is_answered_by_its_replacement(desk: Desk) -> None:
    with pytest.raises(Ended):
        desk.run(Ended(Raised.REPLACED), task_id="one")
    job = FakeJob(task_id="two")
    assert desk.runner.run(job) == "of one"
    assert job.ran == 0


# --- crashes, and the destination (rules 3 and 8) ----------------------------------------------------


def crashed(desk: Desk, **options: Any) -> None:
    """A worker that died in the body: its claim is all that is left."""
    job = FakeJob(**options)
    request = Request(owners.mint(), job.task_id, job.fingerprint, job.options.policy)
    decision, _ = desk.ledger.claim(KEY, request)
    assert isinstance(decision, Acquired)
    desk.lapse()


def test_a_crash_is_in_doubt_and_stays_so(desk: Desk) -> None:
    crashed(desk)
    for _ in range(2):
        job = FakeJob()
        with pytest.raises(OutcomeUnknown, match="idem resolve"):
            desk.runner.run(job)
        assert job.ran == 0


@pytest.mark.parametrize("on_crash", ["resume", "rerun"])
def test_a_crash_runs_again_where_its_author_says_so_but_not_for_ever(desk: Desk, on_crash: str) -> None:
    for _ in range(Policy(1, 1, 1).max_attempts):
        crashed(desk, on_crash=on_crash)
    with pytest.raises(OutcomeUnknown, match="3 times"):
        desk.run(on_crash=on_crash)


def test_the_destination_is_asked(desk: Desk) -> None:
    crashed(desk, ask=NotHappened())
    job = FakeJob(ask=Happened({"id": 7}))
    assert desk.runner.run(job) == {"id": 7}
    assert job.ran == 0
    assert desk.run() == {"id": 7}


def test_the_body_runs_when_the_destination_says_no(desk: Desk) -> None:
    crashed(desk, ask=NotHappened())
    assert desk.run("now", ask=NotHappened()) == "now"


@pytest.mark.parametrize(
    "answer",
    [Unknown("cannot tell"), "yes", None, lambda: 1 / 0],
    ids=["unknown", "text", "nothing", "error"],
)
def test_whatever_else_it_answers_is_no_answer(desk: Desk, answer: Any) -> None:
    crashed(desk, ask=NotHappened())
    job = FakeJob(ask=answer if answer is not None else (lambda: None))
    with pytest.raises(OutcomeUnknown):
        desk.runner.run(job)
    assert job.ran == 0
    assert desk.run(ask=Happened("after all")) == "after all"  # asked again, by the next one


def test_what_the_destination_said_survives_a_record_that_got_lost_meanwhile(desk: Desk) -> None:
    crashed(desk, ask=NotHappened())

    def lost(answer: Answer) -> Callable[[], Answer]:
        def ask() -> Answer:
            assert desk.ledger.forget(KEY)
            return answer

        return ask

    job = FakeJob(ask=lost(Unknown("cannot tell")))
    with pytest.raises(OutcomeUnknown, match="cannot tell"):
        desk.runner.run(job)
    assert desk.state is State.IN_DOUBT
    job = FakeJob(ask=lost(Happened("once")))
    assert desk.runner.run(job) == "once"
    assert job.ran == 0
    assert desk.run() == "once"


def test_a_destination_that_hangs_is_not_waited_for_for_ever(desk: Desk) -> None:
    import threading

    crashed(desk, ask=NotHappened())
    release = threading.Event()
    try:
        with pytest.raises(OutcomeUnknown, match="did not answer"):
            desk.run(ask=lambda: release.wait(30), ask_timeout=0.05)
    finally:
        release.set()


def test_an_ambiguous_error_is_a_question_where_one_can_ask(desk: Desk) -> None:
    assert desk.run(Ended(Raised.AMBIGUOUS), ask=Happened("it did")) == "it did"
    assert desk.run() == "it did"


# --- the store does not answer (rule 7) ------------------------------------------------------------------


def test_down_before_the_body_it_comes_back_with_its_owner(desk: Desk) -> None:
    desk.store.crash("before create", times=99)
    job = FakeJob()
    with pytest.raises(Left):
        desk.runner.run(job)
    assert job.ran == 0
    ((seconds, carried, _),) = job.came_back
    assert seconds == 0
    assert len(carried) == 1


def test_a_claim_whose_reply_got_lost_is_taken_up_by_the_message_that_carries_it(desk: Desk) -> None:
    desk.store.crash("after create")
    lost = FakeJob()
    with pytest.raises(Left):
        desk.runner.run(lost)
    assert desk.state is State.RUNNING
    with pytest.raises(Left):  # nobody else takes it
        desk.run(task_id="two")
    carried = lost.came_back[0][1]
    job = FakeJob("taken up", carried=carried)
    assert desk.runner.run(job) == "taken up"
    assert job.claims[0].attempt == 1
    assert desk.run(carried=carried) == "taken up"


def test_in_doubt_or_not_a_carried_claim_is_taken_up(desk: Desk) -> None:
    desk.store.crash("after create")
    lost = FakeJob()
    with pytest.raises(Left):
        desk.runner.run(lost)
    desk.lapse()
    with pytest.raises(OutcomeUnknown):
        desk.run(task_id="two")
    assert desk.run("taken up", carried=lost.came_back[0][1]) == "taken up"


def test_a_wait_in_place_carries_too(desk: Desk) -> None:
    desk.store.crash("after create", times=3)
    job = FakeJob(wait=lambda: None)
    assert desk.runner.run(job) == "done"
    assert job.ran == 1
    assert [len(carried) for _, carried, _ in job.came_back] == [1, 2, 3]


def test_what_is_carried_is_bounded(desk: Desk) -> None:
    desk.store.crash("before create", times=40)
    job = FakeJob(wait=lambda: None)
    desk.runner.run(job)
    assert max(len(carried) for _, carried, _ in job.came_back) == 16


def test_or_it_raises_or_runs_unguarded(desk: Desk) -> None:
    desk.store.crash("before create", times=99)
    raising, running = FakeJob(on_store_error="raise"), FakeJob(on_store_error="run")
    with pytest.raises(StoreError, match="Nothing was run"):
        desk.runner.run(raising)
    assert raising.ran == 0
    assert desk.runner.run(running) == "done"
    assert (running.ran, running.claims[0].guarded) == (1, False)
    assert "unguarded" in desk.kinds


def test_down_after_the_body_its_caller_gets_the_truth_and_nobody_a_second_run(desk: Desk) -> None:
    desk.store.crash("before replace", times=99)
    assert desk.run() == "done"
    assert "unsettled" in desk.kinds
    desk.store.heal()
    desk.lapse()
    job = FakeJob()
    with pytest.raises(OutcomeUnknown):
        desk.runner.run(job)
    assert job.ran == 0


def test_after_the_body_it_keeps_trying_for_as_long_as_it_should(desk: Desk) -> None:
    desk.store.crash("before replace", times=2)
    assert desk.run(patience=5.0) == "done"
    assert desk.state is State.SUCCEEDED


def test_an_outcome_whose_reply_got_lost_is_settled_once(desk: Desk) -> None:
    desk.store.crash("after replace")
    assert desk.run(patience=5.0) == "done"
    assert desk.kinds.count("settled") == 1
    assert desk.run() == "done"


def test_a_record_that_the_store_lost_is_written_again(desk: Desk) -> None:
    def body(claim: Claim) -> str:
        assert desk.ledger.forget(KEY)
        return "done"

    assert desk.run(body) == "done"
    assert desk.run() == "done"


# --- interrupts ---------------------------------------------------------------------------------------------


def test_a_soft_time_limit_while_the_outcome_is_written_does_not_lose_it(desk: Desk) -> None:
    class SoftTimeLimit(Exception):
        pass

    def interrupt() -> None:
        raise SoftTimeLimit

    for point in ("before replace", "after replace"):
        other = Desk()
        other.store.crash(point, interrupt)
        job = FakeJob()
        assert other.runner.run(job) == "done"
        assert other.state is State.SUCCEEDED
        assert other.run() == "done"


def test_an_exit_while_the_outcome_is_written_goes_on_and_the_outcome_is_kept(desk: Desk) -> None:
    def leave() -> None:
        raise SystemExit(1)

    desk.store.crash("before replace", leave)
    with pytest.raises(SystemExit):
        desk.run()
    assert desk.state is State.SUCCEEDED


@pytest.mark.parametrize("point", ["before create", "after create"])
def test_an_interrupt_around_the_claim_lets_go_of_it(desk: Desk, point: str) -> None:
    def leave() -> None:
        raise SystemExit(1)

    desk.store.crash(point, leave)
    job = FakeJob()
    with pytest.raises(SystemExit):
        desk.runner.run(job)
    assert job.ran == 0
    assert desk.run("later") == "later"


# --- takeover (rule 4) ------------------------------------------------------------------------------------------


def test_an_execution_that_was_taken_over_is_refused_and_that_is_an_alarm(desk: Desk) -> None:
    def body(claim: Claim) -> str:
        desk.lapse()
        desk.run("the second", task_id="two", on_crash="rerun")
        return "the first"

    with pytest.raises(LeaseLost):
        desk.run(body, on_crash="rerun")
    assert desk.run() == "the second"
    (alarm,) = [event for event in desk.events if event.kind == "stale_settle"]
    assert alarm.details["fence"] < alarm.details["current_fence"]
    assert events.LEVELS["stale_settle"] == 50


def test_a_late_outcome_is_heard_while_nobody_took_over(desk: Desk) -> None:
    def body(claim: Claim) -> str:
        desk.lapse()
        with pytest.raises(OutcomeUnknown):
            desk.run(task_id="two")
        assert desk.state is State.IN_DOUBT
        return "late"

    assert desk.run(body) == "late"
    assert desk.run() == "late"


# --- people ------------------------------------------------------------------------------------------------------


def test_a_person_resolves_what_is_in_doubt(desk: Desk) -> None:
    crashed(desk)
    desk.ledger.resolve(KEY, Happened({"id": 7}), by="jo", evidence="invoice 7")
    assert desk.run() == {"id": 7}
    entry = desk.ledger.get(KEY)
    assert entry is not None
    assert [(note.by, note.evidence) for note in entry.record.notes if note.by == "jo"] == [
        ("jo", "invoice 7")
    ]
    with pytest.raises(IdempotencyError):
        desk.ledger.resolve(KEY, NotHappened(), by="jo")


def test_or_has_it_run_again(desk: Desk) -> None:
    crashed(desk)
    desk.ledger.resolve(KEY, NotHappened(), by="jo")
    assert desk.run("again") == "again"


def test_results_expire_and_fences_grow_all_the_same(desk: Desk) -> None:
    fences = []
    for n in range(3):
        job = FakeJob(n)
        assert desk.runner.run(job) == n
        fences.append(job.claims[0].fence)
        desk.clock.advance(86_401)
    assert fences == sorted(set(fences))


def test_evidence_does_not_expire(desk: Desk) -> None:
    crashed(desk)
    desk.clock.advance(10 * 365 * 86_400)
    with pytest.raises(OutcomeUnknown):
        desk.run()


def test_a_listener_that_fails_costs_nothing(desk: Desk) -> None:
    def broken(event: events.Event) -> None:
        raise RuntimeError

    stop = events.listen(broken)
    try:
        assert desk.run() == "done"
    finally:
        stop()


def test_an_outcome_is_what_the_protocol_stores(desk: Desk) -> None:
    desk.run()
    entry = desk.ledger.get(KEY)
    assert entry is not None
    assert entry.record.outcome == Outcome(True, b'j"done"')
    assert protocol.ttl(entry.record, Policy(1, 2, 3)) == 2


# --- steps ------------------------------------------------------------------------------------------------------


def test_a_step_whose_error_was_swallowed_is_not_run_again_unasked(desk: Desk) -> None:
    """The charge's reply was lost, the body went on to mail, and its worker died before the end."""
    charges: list[str] = []

    def charge() -> None:
        charges.append("one")
        raise TimeoutError

    def body(claim: Claim) -> str:
        with contextlib.suppress(TimeoutError):
            run_step(desk.ledger, claim, "charge", charge, None, 0.0)
        return str(run_step(desk.ledger, claim, "mail", lambda: "mailed", None, 0.0))

    job = FakeJob(on_crash="resume")
    request = Request(owners.mint(), "one", job.fingerprint, job.options.policy)
    _, first = desk.ledger.claim(KEY, request)
    assert first is not None
    assert body(first) == "mailed"  # and here it dies
    desk.clock.advance(2 * LEASE / MICROSECONDS)
    with pytest.raises(OutcomeUnknown, match="'charge'"):
        desk.run(body, on_crash="resume")
    assert charges == ["one"]
    assert desk.state is State.IN_DOUBT
