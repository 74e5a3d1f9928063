"""Retries, however the body asks for them, and redeliveries continue the same intent."""

from __future__ import annotations

from typing import Any

import pytest
from celery.exceptions import Reject, Retry
from kombu.exceptions import OperationalError

from celery_idem import ALL_ARGUMENTS, Happened, OutcomeUnknown
from celery_idem.core.model import CALLER_KEY, FINGERPRINT, KEY, SCOPE
from tests.celery.conftest import SOON, Stage
from tests.celery.here import InProcess


class Timeout(Exception):
    pass


class Unpicklable(Timeout):
    def __init__(self, call: Any) -> None:
        super().__init__(lambda: call)


@pytest.fixture
def here() -> InProcess:
    return InProcess()


# --- key and fingerprint travel ------------------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("labels", [{}, {SCOPE: "acme"}, {CALLER_KEY: "order 7"}])
def test_a_retry_is_the_same_intent_whatever_the_body_did_to_its_arguments(
    here: InProcess, by_name: bool, labels: dict[str, str]
) -> None:
    @here.task("count", intent=("name", "basket"), must_match=("cents",), max_retries=5)
    def count(self: Any, name: str, basket: Any, cents: int) -> list[Any]:
        basket["tries"] = self.request.retries
        if self.request.retries < 3:
            changed = {"name": name, "basket": basket, "cents": cents + 1}
            raise self.retry(kwargs=changed, headers={"tenant": "x"})
        here.effects.append(cents)
        return [self.request.retries, self.claim.attempt]

    arguments = {"name": "a", "basket": {"apples": 1}, "cents": 5}
    send = (
        here.app.send_task if by_name else lambda name, **options: here.app.tasks[name].apply_async(**options)
    )
    result = send("count", kwargs=arguments, headers=dict(labels))
    assert here.deliver() == ["RETRY"] * 3 + ["SUCCESS"]
    assert result.get(timeout=1) == [3, 4]
    assert here.states == ["succeeded"]
    assert here.effects == [8]
    assert {headers[KEY] for headers in here.headers[1:]} == {here.entries[0].key}
    # The fingerprint is still that of the caller's arguments.
    for cents, state in ((5, "SUCCESS"), (8, "FAILURE")):
        send("count", kwargs={**arguments, "cents": cents}, headers=dict(labels))
        assert here.deliver() == [state]


def test_a_retry_before_the_body_is_the_same_intent(here: InProcess) -> None:
    from celery_idem import IdempotentTask

    class Late(IdempotentTask):
        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            if not self.request.retries:
                raise self.retry()

    @here.task("late", base=Late)
    def late(self: Any, name: str) -> str:
        here.effects.append(name)
        return name

    here.app.send_task("late", ("a",))
    assert here.deliver() == ["RETRY", "SUCCESS"]
    assert here.headers[1][KEY] == late.intent_key("a")
    assert (here.states, here.effects) == (["succeeded"], ["a"])


def test_a_header_that_is_forwarded_to_another_call_is_not_taken_for_its_own(here: InProcess) -> None:
    @here.task("pay", must_match=("cents",))
    def pay(self: Any, name: str, cents: int) -> int:
        here.effects.append(name)
        if name == "a":
            pay.apply_async(("b", 6), headers=self.request.headers)
        return cents

    pay.delay("a", 5)
    assert here.deliver() == ["SUCCESS", "SUCCESS"]
    assert here.effects == ["a", "b"]


@pytest.mark.parametrize("sent", ["", "no hex", 7, None, [], "00" * 11, "00" * 24])
def test_a_fingerprint_that_is_not_ours_opens_nothing(here: InProcess, sent: Any) -> None:
    @here.task("pay", must_match=("cents",))
    def pay(self: Any, name: str, cents: int) -> int:
        return cents

    pay.delay("a", 5)
    here.deliver()
    for cents, state in ((5, "SUCCESS"), (6, "FAILURE")):
        headers = {KEY: pay.intent_key("a", 5), FINGERPRINT: sent}
        here.app.send_task("pay", ("a", cents), headers=headers)
        assert here.deliver() == [state]


def test_a_release_between_a_body_and_its_retry_may_change_must_match(here: InProcess) -> None:
    def declared(*names: str) -> Any:
        @InProcess().task("pay", must_match=names)
        def pay(self: Any, name: str, cents: int, to: str) -> None: ...

        return pay.idem_declaration

    before = declared("cents").fingerprint({"name": "a", "cents": 5, "to": "x"})
    changed = {"name": "a", "cents": 6, "to": "y"}
    after = declared("cents", "to").continued(before.packed.hex(), changed)
    assert after.names == ("cents", "to")
    assert after.packed[: len(before.packed)] == before.packed
    assert after.packed[len(before.packed) :] == declared("to").fingerprint(changed).packed
    fewer = declared("to").continued(before.packed.hex(), changed)
    assert fewer.packed == after.packed


# --- one intent has one retry -----------------------------------------------------------------------------


def test_several_retries_are_one_message(here: InProcess) -> None:
    @here.task("poll", autoretry_for=(Timeout,))
    def poll(self: Any, name: str) -> str:
        here.effects.append(name)
        if not self.request.retries:
            first = self.retry(countdown=7, throw=False)
            assert self.retry(throw=False).when == first.when
            raise Timeout
        return "done"

    result = poll.delay("a")
    assert here.deliver() == ["RETRY", "SUCCESS"]
    assert (here.effects, result.get(timeout=1)) == (["a", "a"], "done")


def test_a_message_published_by_hand_is_a_retry_too(here: InProcess) -> None:
    @here.task("poll")
    def poll(self: Any, name: str) -> str:
        here.effects.append(name)
        if len(here.effects) == 1:
            self.signature_from_request(countdown=1).apply_async()
        return f"{len(here.effects)}"

    result = poll.delay("a")
    assert here.deliver() == ["RETRY", "SUCCESS"]
    assert result.get(timeout=1) == "2"


def test_a_retry_with_a_task_id_of_its_own_is_the_one_that_is_waited_for(here: InProcess) -> None:
    @here.task("poll", on_duplicate="raise")
    def poll(self: Any, name: str) -> str:
        here.effects.append(name)
        if not self.request.retries:
            raise self.retry(task_id="another", countdown=60)
        return "done"

    poll.delay("a")
    assert here.deliver() == ["RETRY", "SUCCESS"]
    assert here.app.AsyncResult("another").get(timeout=1) == "done"


def mailing(here: InProcess, **options: Any) -> Any:
    """Declare a task that sends a batch of messages and publishes a separate retry for each that fails."""

    @here.task("mail", **options)
    def mail(self: Any, messages: list[str]) -> int:
        for message in messages:
            if message.startswith("bad") and not self.request.retries:
                self.retry(args=[[message]], throw=False)
            else:
                here.effects.append(message)
        return len(messages)

    return mail


def test_each_part_of_a_batch_is_an_intent_of_its_own(here: InProcess) -> None:
    mail = mailing(here, intent=("messages",), max_retries=2)

    @here.app.task(name="told", shared=False)
    def told(value: int) -> None:
        here.effects.append(f"told {value}")

    for labels in ({}, {"idempotency_key": "first"}, {"idempotency_key": "second"}):
        here.effects.clear()
        for _ in range(2):
            mail.apply_async((["a", "bad1", "b", "bad2"],), link=told.s(), **labels)
            here.deliver()
        # The links run for the batch, once for each call. They do not run for a part.
        assert sorted(here.effects) == ["a", "b", "bad1", "bad2", "told 4", "told 4"]
    assert len(here.entries) == 9


def test_swallowed_retries_with_other_arguments_are_lost_neither(here: InProcess) -> None:
    @here.task("mail", intent=("messages",))
    def mail(self: Any, messages: list[str]) -> int:
        for message in messages:
            try:
                if message.startswith("bad") and not self.request.retries:
                    raise self.retry(args=[[message]])
                here.effects.append(message)
            except Retry:
                continue
        return len(messages)

    mail.delay(["a", "bad1", "bad2", "b"])
    here.deliver()
    assert sorted(here.effects) == ["a", "b", "bad1", "bad2"]
    assert set(here.states) == {"succeeded"}


def test_a_part_of_which_nobody_knows_whether_it_happened_is_not_done_again(here: InProcess) -> None:
    @here.task("mail", intent=("messages",), ambiguous_errors=(Timeout,))
    def mail(self: Any, messages: list[str]) -> None:
        for message in messages:
            here.effects.append(message)
            if len(messages) > 1:
                self.retry(args=[[message]], exc=Timeout(), throw=False)

    result = mail.delay(["a", "b"])
    assert here.deliver() == ["FAILURE"]
    assert isinstance(result.result, OutcomeUnknown)
    assert (here.effects, here.states) == (["a"], ["in_doubt"])


# --- what happened is what the task declares ----------------------------------------------------------------


@pytest.mark.parametrize("error", [Timeout(), Unpicklable(1)], ids=lambda error: type(error).__name__)
def test_an_ambiguous_error_is_asked_about_by_its_retry(here: InProcess, error: Exception) -> None:
    asked = []

    def reconcile(task: Any, name: str) -> Happened:
        asked.append(task.request.retries)
        return Happened("found")

    @here.task("pay", ambiguous_errors=(Timeout,), autoretry_for=(Exception,), reconcile=reconcile)
    def pay(self: Any, name: str) -> None:
        here.effects.append(name)
        raise error

    result = pay.delay("a")
    assert here.deliver() == ["RETRY", "SUCCESS"]
    assert (result.get(timeout=1), here.effects, asked, here.states) == ("found", ["a"], [1], ["succeeded"])


def test_an_earlier_doubt_is_not_outvoted_by_a_later_error(here: InProcess) -> None:
    @here.task("pay", ambiguous_errors=(Timeout,), autoretry_for=(KeyError,))
    def pay(self: Any, name: str) -> None:
        here.effects.append(name)
        try:
            raise Timeout
        except Timeout:
            self.retry(throw=False)
        raise KeyError

    pay.delay("a")
    assert here.deliver() == ["RETRY", "FAILURE"]
    assert (here.effects, here.states) == (["a"], ["in_doubt"])


def test_a_retry_that_runs_out_while_it_handles_an_ambiguous_error_is_in_doubt(here: InProcess) -> None:
    @here.task("pay", ambiguous_errors=(Timeout,), max_retries=0)
    def pay(self: Any, name: str) -> None:
        try:
            raise Timeout
        except Timeout:
            raise self.retry() from None

    result = pay.delay("a")
    assert here.deliver() == ["FAILURE"]
    assert isinstance(result.result, OutcomeUnknown)
    assert here.states == ["in_doubt"]


@pytest.mark.parametrize(("error", "state"), [(Timeout(), "in_doubt"), (KeyError(), "released")])
def test_a_retry_that_the_broker_does_not_take(
    here: InProcess, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str
) -> None:
    @here.task("pay", ambiguous_errors=(Timeout,), autoretry_for=(Exception,))
    def pay(self: Any, name: str) -> None:
        def fails(*args: Any, **options: Any) -> None:
            raise OperationalError

        monkeypatch.setattr(here.app, "send_task", fails)
        raise error

    pay.delay("a")
    here.deliver()
    assert here.states == [state]


@pytest.mark.parametrize(("error", "state"), [(Timeout, "in_doubt"), (KeyError, "released")])
def test_a_retry_of_a_direct_call(here: InProcess, error: type[Exception], state: str) -> None:
    @here.task("pay", ambiguous_errors=(Timeout,), autoretry_for=(Exception,))
    def pay(self: Any, name: str) -> None:
        raise error

    with pytest.raises((OutcomeUnknown, KeyError)):
        pay("a")
    assert here.states == [state]


def test_a_retry_of_a_call_inside_another_body_is_none_of_that_body(here: InProcess) -> None:
    @here.task("inner")
    def inner(self: Any, name: str) -> None:
        raise self.retry()

    @here.task("outer")
    def outer(self: Any, name: str) -> None:
        inner(name)

    outer.delay("a")
    assert here.deliver() == ["RETRY"]
    assert here.states == ["released", "released"]  # no retry was published


def test_ignore_and_reject_after_a_published_retry_leave_it_its_turn(here: InProcess) -> None:
    @here.task("poll")
    def poll(self: Any, name: str) -> str:
        here.effects.append(name)
        if not self.request.retries:
            self.retry(throw=False)
            raise Reject("no", requeue=False)
        return "done"

    poll.delay("a")
    assert here.deliver() == ["REJECTED", "SUCCESS"]
    assert (here.effects, here.states) == (["a", "a"], ["succeeded"])


@pytest.mark.parametrize("when", ["2030-01-01T00:00:00", "2030-01-01T00:00:00+00:00"])
def test_an_eta_may_be_text(here: InProcess, when: str) -> None:
    @here.task("poll")
    def poll(self: Any, name: str) -> str:
        if not self.request.retries:
            raise self.retry(eta=when)
        return "done"

    poll.delay("a")
    assert here.deliver() == ["RETRY", "SUCCESS"]


# --- in place --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["throw", "return", "swallow", "raise"])
def test_an_eager_retry_runs_in_place_however_it_was_asked_for(here: InProcess, how: str) -> None:
    @here.task("poll")
    def poll(self: Any, name: str) -> Any:
        here.effects.append(name)
        if self.request.retries:
            return "done"
        try:
            signal = self.retry(throw=how == "swallow")
        except Retry:
            return "swallowed"
        if how == "raise":
            raise KeyError
        return signal if how == "return" else "not yet"

    for _ in range(2):
        assert poll.apply(("a",)).get() == "done"
    assert (here.effects, here.states) == (["a", "a"], ["succeeded"])


@pytest.mark.parametrize("conf", [{}, {"task_eager_propagates": True}])
def test_an_eager_retry_that_is_raised_to_its_caller_keeps_nobody_waiting(conf: dict[str, Any]) -> None:
    """The intent is released. If errors propagate, Celery raises the `Retry` to the caller and does not run it."""
    here = InProcess(**conf)

    @here.task("poll")
    def poll(self: Any, name: str) -> str:
        here.effects.append(name)
        if len(here.effects) < 3:
            raise self.retry()
        return "done"

    options = {} if conf else {"throw": True}
    for _ in range(2):
        with pytest.raises(Retry):
            poll.apply(("a",), **options)
        assert here.states == ["released"]
    assert poll.apply(("a",), **options).get() == "done"


def test_eager_parts_run_in_place_too(here: InProcess) -> None:
    mail = mailing(here, intent=ALL_ARGUMENTS)

    assert mail.apply((["bad1", "a", "bad2"],)).get() == 3
    assert sorted(here.effects) == ["a", "bad1", "bad2"]
    assert set(here.states) == {"succeeded"}


def test_shadow_mode_leaves_a_retry_what_it_is() -> None:
    here = InProcess(idem_shadow=True)

    @here.task("mail", intent=("messages",))
    def mail(self: Any, messages: list[str]) -> str:
        here.effects.append(messages)
        if len(messages) > 1:
            self.retry(args=[messages[:1]], throw=False)
            self.retry(args=[messages[1:]], throw=False)
        return "sent"

    result = mail.delay(["a", "b"])
    assert here.deliver() == ["SUCCESS"] * 3
    assert here.effects == [["a", "b"], ["a"], ["b"]]
    assert {headers["id"] for headers in here.headers} == {result.id}


# --- early, with a real worker -----------------------------------------------------------------------------------


def test_a_retry_that_comes_before_its_body_has_ended_waits(stage: Stage, name: str) -> None:
    """The retry waits for its body, although a duplicate of this task receives InProgress at once."""
    result = stage.hasty.delay(name)
    stage.effects.wait(name)
    stage.gate(name).open()
    assert result.get(timeout=SOON) == "done"
    assert stage.effects.count(name) == 2


def test_a_redelivery_of_the_running_message_waits(stage: Stage, name: str) -> None:
    first = stage.refuses_to_wait.delay(name)
    stage.effects.wait(name)
    stage.refuses_to_wait.apply_async((name,), task_id=first.id)
    other = stage.refuses_to_wait.delay(name)
    assert other.get(timeout=SOON, propagate=False).key == stage.refuses_to_wait.intent_key(name)
    assert not first.ready()
    stage.gate(name).open()
    assert first.get(timeout=SOON) == "done"
    assert stage.effects.count(name) == 1


def test_of_many_instant_retries_none_is_lost(stage: Stage, name: str) -> None:
    """No retry is lost, also if it is delivered before its body has ended.

    There are only two calls at a time, so that the queue is short and the retry is delivered at once.
    """
    for n in range(0, 120, 2):
        results = [stage.instant.delay(f"{name}-{n + more}") for more in range(2)]
        assert [result.get(timeout=SOON) for result in results] == ["done", "done"]
    counts = stage.effects.counts()
    assert [counts[f"{name}-{n}"] for n in range(120)] == [1] * 120
