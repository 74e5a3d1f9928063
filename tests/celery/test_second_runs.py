"""A second run of a body gets the original arguments, and not the final state that the first run stored."""

from __future__ import annotations

import sys
import uuid
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Ignore

from celery_idem import ConfigurationError, IdempotentTask, NotHappened, ResultUnavailable


class Timeout(Exception):
    pass


class Refused(Exception):
    pass


@pytest.fixture
def app() -> Celery:
    app = Celery("second", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(idem_store=f"memory://{uuid.uuid4().hex}")
    return app


def a_task(app: Celery, **options: Any) -> Any:
    return app.task(base=IdempotentTask, bind=True, name="mail", intent=("order",), **options)


@pytest.mark.parametrize("directly", [False, True], ids=["eager", "direct"])
def test_what_was_not_done_is_done_with_the_arguments_that_were_sent(app: Celery, directly: bool) -> None:
    sent, asked = [], []

    def ask(task: Any, order: str, *, lines: list[dict[str, int]]) -> NotHappened:
        asked.append([dict(line) for line in lines])
        lines.clear()
        return NotHappened()

    @a_task(app, ambiguous_errors=(Timeout,), reconcile=ask)
    def mail(self: Any, order: str, *, lines: list[dict[str, int]]) -> int:
        parcel = []
        while lines:
            parcel.append(lines.pop(0).pop("n"))
        if self.claim.attempt == 1:
            raise Timeout
        sent.extend(parcel)
        return len(parcel)

    given = {"lines": [{"n": 1}, {"n": 2}]}
    assert (mail("o1", **given) if directly else mail.apply(("o1",), given).result) == 2
    assert (sent, asked) == ([1, 2], [[{"n": 1}, {"n": 2}]])


def test_arguments_that_cannot_be_copied_are_given_as_they_are(app: Celery) -> None:
    lines = iter([1, 2])

    @a_task(app, ambiguous_errors=(Timeout,), reconcile=lambda task, order, lines: NotHappened())
    def mail(self: Any, order: str, lines: Any) -> Any:
        if self.claim.attempt == 1:
            raise Timeout
        return list(lines)

    frame = sys._getframe()  # Python 3.11 can copy every iterator, but not a frame
    assert mail("o1", lines) == [1, 2]
    with pytest.raises(TypeError, match="not iterable"):  # of the body, and not of a copy
        mail("o2", frame)


def test_a_final_state_of_the_first_run_is_none_of_the_second(app: Celery) -> None:
    ran: list[int] = []

    @a_task(app, ambiguous_errors=(Timeout,), reconcile=lambda task, order: NotHappened())
    def mail(self: Any, order: str) -> None:
        ran.append(self.claim.attempt)
        if self.claim.attempt == 1:
            self.update_state(state="FAILURE", meta=ValueError("of the first run"))
            raise Timeout
        raise Ignore

    assert mail.apply(("o1",)).state == "IGNORED"
    assert mail.guard.ledger.get(mail.intent_key("o1")).state == "released"
    assert ran == [1, 2]


def test_a_step_that_has_run_does_not_run_again_though_its_result_could_not_be_stored(app: Celery) -> None:
    charged: list[str] = []
    mended: list[bool] = []

    @a_task(app)
    def mail(self: Any, order: str) -> str:
        self.step("charge", lambda: charged.append(order) or (1 if mended else object()))
        return "done"

    ledger, key = mail.guard.ledger, mail.intent_key("o1")
    with pytest.raises(ConfigurationError, match="The step has run"):
        mail("o1")
    mended.append(True)
    assert ledger.forget(key)
    with pytest.raises(ResultUnavailable, match="'charge' has run in an earlier attempt"):
        mail("o1")
    assert len(charged) == 1
    assert ledger.forget(key, steps=True)
    assert mail("o1") == "done"


class WithNotes(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.__notes__ = ("a tuple",)


class OwnNotes(Exception):
    def add_note(self, who: str, note: str) -> None:  # type: ignore[override,unused-ignore]
        raise AssertionError("a replay runs no code of the class")


class Frozen(Exception):
    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("frozen")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes")
@pytest.mark.parametrize("error", [WithNotes, OwnNotes, Frozen])
def test_a_replayed_error_says_that_it_is_one_whatever_its_class_makes_of_notes(
    app: Celery, error: type[Exception]
) -> None:
    @a_task(app)
    def mail(self: Any, order: str) -> None:
        raise error("no")

    for _ in range(3):
        with pytest.raises(error, match=r"^no") as caught:
            mail("o1")
    assert "Nothing was run now" in caught.value.__notes__[-1]


def test_a_retry_that_is_asked_for_after_the_end_is_refused_before_it_is_published(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[BaseException] = []

    class Again(IdempotentTask):
        abstract = True

        def on_failure(self, *args: Any) -> None:
            try:
                self.retry(countdown=0, throw=False)
            except ConfigurationError as error:
                refused.append(error)

    @app.task(
        base=Again, bind=True, name="mail", intent=("order",), no_effect_errors=(Refused,), max_retries=1
    )
    def mail(self: Any, order: str) -> str:
        if order == "closed" and not self.request.retries:
            raise Refused
        if order == "stolen":
            raise ValueError
        return "done"

    mail.apply(("stolen",))
    assert len(refused) == 1
    assert "raise self.retry(exc=error)" in str(refused[0])
    mail.apply(("closed",))  # the intent was released, so its retry runs
    assert len(refused) == 1
