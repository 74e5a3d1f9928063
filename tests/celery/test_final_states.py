"""If a body stores a final state and raises Ignore, this state is its outcome. Finished steps outlive a failure."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Ignore, Reject, TaskError

from celery_idem import FingerprintMismatch, IdempotentTask
from tests.celery.apps import Declined


@pytest.fixture
def app() -> Celery:
    app = Celery("final", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(idem_store=f"memory://{uuid.uuid4().hex}")
    return app


def a_task(app: Celery, body: Callable[[Any], Any], **options: Any) -> tuple[Any, list[str]]:
    effects: list[str] = []

    @app.task(base=IdempotentTask, bind=True, name="pay", intent=("order",), **options)
    def pay(self: Any, order: str, cents: int = 5) -> Any:
        effects.append(order)
        return body(self)

    return pay, effects


def ends(state: str, meta: Any, error: Exception) -> Callable[[Any], None]:
    def body(self: Any) -> None:
        self.update_state(state="PROGRESS", meta={"at": 1})
        self.update_state(state=state, meta=meta)
        raise error

    return body


def test_ignore_after_success_is_done(app: Celery) -> None:
    pay, effects = a_task(app, ends("SUCCESS", {"paid": 5}, Ignore()))
    first = pay.apply(("o1",))
    assert first.state == "IGNORED"
    assert app.AsyncResult(first.id).result == {"paid": 5}
    assert pay.apply(("o1",)).result == pay("o1") == {"paid": 5}
    assert effects == ["o1"]


@pytest.mark.parametrize(
    ("meta", "error"),
    [
        (Declined("stolen", 5), Declined("stolen", 5)),
        ("no money", TaskError("no money")),
        (None, TaskError()),
        ({"exc_type": "ValueError", "exc_module": "builtins", "exc_message": ["no"]}, ValueError("no")),
        ({"exc_type": 5}, TaskError("{'exc_type': 5}")),
        ({"why": "no"}, TaskError({"why": "no"})),
    ],
    ids=repr,
)
def test_ignore_after_failure_is_a_failure(app: Celery, meta: Any, error: Exception) -> None:
    pay, effects = a_task(app, ends("FAILURE", meta, Ignore()))
    pay.apply(("o1",))
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            pay("o1")
        assert str(caught.value) == str(error)
    assert effects == ["o1"]


@pytest.mark.parametrize(
    "body",
    [
        lambda self: (_ for _ in ()).throw(Ignore()),
        ends("PROGRESS", None, Ignore()),
        ends("SUCCESS", 1, Reject("again", requeue=True)),
        lambda self: (self.update_state("another-task", "SUCCESS", 1), (_ for _ in ()).throw(Ignore())),
    ],
    ids=["plain Ignore", "a state that is not final", "Reject", "of another task"],
)
def test_anything_else_is_released(app: Celery, body: Callable[[Any], Any]) -> None:
    pay, effects = a_task(app, body)
    for _ in range(2):
        assert pay.apply(("o1",)).state in ("IGNORED", "REJECTED")
    assert effects == ["o1", "o1"]


# --- steps ------------------------------------------------------------------------------------------


class Bug(Exception):
    pass


def in_steps(app: Celery, **options: Any) -> tuple[Any, list[str], list[bool]]:
    """Declare a task that charges in a step and then raises Bug until ``mended`` is filled."""
    charged: list[str] = []
    mended: list[bool] = []

    def body(self: Any) -> str:
        self.step("charge", charged.append, self.request.id)
        if not mended:
            raise Bug
        self.step("mail", lambda: None)
        return "done"

    return (*a_task(app, body, on_crash="resume", **options)[:1], charged, mended)


def test_a_failed_intent_that_is_forgotten_does_not_charge_again(app: Celery) -> None:
    pay, charged, mended = in_steps(app, must_match=("cents",))
    ledger, key = pay.guard.ledger, pay.intent_key("o1")
    for _ in range(2):
        with pytest.raises(Bug):
            pay("o1")
    mended.append(True)
    with pytest.raises(Bug):
        pay("o1")
    assert ledger.forget(key)
    assert ledger.get(key).state == "released"
    with pytest.raises(FingerprintMismatch):  # another amount was charged
        pay("o1", 6)
    assert pay("o1") == pay("o1") == "done"
    assert len(charged) == 1
    assert ledger.forget(key)  # it succeeded; forgetting it lets it happen once more
    assert pay("o1") == "done"
    assert len(charged) == 2


def test_everything_can_be_forgotten(app: Celery) -> None:
    pay, charged, mended = in_steps(app)
    with pytest.raises(Bug):
        pay("o1")
    mended.append(True)
    assert pay.guard.ledger.forget(pay.intent_key("o1"), steps=True)
    assert pay.guard.ledger.get(pay.intent_key("o1")) is None
    assert pay("o1") == "done"
    assert len(charged) == 2


@pytest.mark.parametrize("ttls", [{"failure_ttl": 0.0}, {"failure_ttl": 0.0, "result_ttl": 0.0}], ids=str)
def test_when_failure_ttl_is_over_it_goes_on_after_its_steps(app: Celery, ttls: dict[str, float]) -> None:
    pay, charged, mended = in_steps(app, **ttls)
    for _ in range(3):
        with pytest.raises(Bug):
            pay("o1")
    assert charged == charged[:1]
    told = pay.submit("o1", scope="other")  # there is no record, so it is published
    assert told.status == "accepted"
    mended.append(True)
    assert pay("o1") == "done"
    assert len(charged) == 1


def test_an_error_without_effect_keeps_steps_though_results_are_not_kept(app: Celery) -> None:
    pay, charged, mended = in_steps(app, no_effect_errors=(Bug,), result_ttl=0.0)
    with pytest.raises(Bug):
        pay("o1")
    mended.append(True)
    assert pay("o1") == "done"
    assert len(charged) == 1


def test_receipts_of_what_is_partly_done(app: Celery) -> None:
    from celery_idem import look_up

    pay, _, _ = in_steps(app, no_effect_errors=(Bug,))
    with pytest.raises(Bug):
        pay("o1")
    told = look_up(app, pay.intent_key("o1"))
    assert told is not None
    assert (told.status, told.code) == ("not_run", "partly_done")
    assert (
        told.next == "Only its finished steps are done. Safe to call again unchanged: it goes on after them."
    )
