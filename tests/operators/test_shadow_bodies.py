"""Shadow mode changes nothing for a body, whatever the body uses of the guard and however the guard fails."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from celery_idem import IdempotentTask, Ledger
from celery_idem.engine import events
from celery_idem.engine.claim import Hold
from celery_idem.engine.lease import RENEWER
from celery_idem.engine.ledger import Ledger as Place
from celery_idem.integration.deaths import IdempotentRequest
from tests.operators.conftest import use_store

Ran = list[Any]


@pytest.fixture
def ran() -> Ran:
    return []


@pytest.fixture
def app(ran: Ran) -> Celery:
    app = Celery("shadow_bodies", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(idem_store=f"memory://{uuid.uuid4().hex}", idem_shadow=True)
    return app


def task(app: Celery, body: Callable[..., Any], **options: Any) -> Any:
    body.__name__ = "body"  # Celery takes no lambda
    options = {"intent": ("what",), "bind": True, "base": IdempotentTask, "shared": False, **options}
    return app.task(body, name=f"shop.{uuid.uuid4().hex[:6]}", **options)


def test_settle_in_lets_the_authors_transaction_go_on(app: Celery, tmp_path: Path, ran: Ran) -> None:
    use_store(app, f"sqlite:///{tmp_path}/records.db")
    path = tmp_path / "billing.db"
    with sqlite3.connect(path) as made:
        made.execute("CREATE TABLE invoices (what TEXT)")

    def body(self: Any, what: str) -> str:
        connection = sqlite3.connect(path)
        with connection, self.settle_in(connection) as outcome:
            connection.execute("INSERT INTO invoices VALUES (?)", (what,))
            outcome.result = "not what an unguarded task returns"
        return f"returned {what}"

    charge = task(app, body, on_crash="transaction")
    assert [charge.apply(("a",)).get() for _ in range(2)] == ["returned a"] * 2
    with sqlite3.connect(path) as made:
        assert made.execute("SELECT what FROM invoices").fetchall() == [("a",), ("a",)]

    def fails(self: Any, what: str) -> None:
        connection = sqlite3.connect(path)
        with connection, self.settle_in(connection):
            connection.execute("INSERT INTO invoices VALUES ('lost')")
            raise ValueError(what)

    with pytest.raises(ValueError, match="b"):
        task(app, fails).apply(("b",)).get()
    with sqlite3.connect(path) as made:
        assert (
            len(made.execute("SELECT what FROM invoices").fetchall()) == 2
        )  # rolled back, as without a guard


def test_steps_and_the_claim_are_there(app: Celery, ran: Ran) -> None:
    def body(self: Any, what: str) -> list[Any]:
        one = self.step("one", lambda: ran.append(what) or len(ran))
        return [one, self.claim.lost, self.claim.key == self.intent_key(what), self.claim.downstream_key("x")]

    charge = task(app, body)
    first, second = charge.apply(("a",)).get(), charge.apply(("a",)).get()
    assert first == [1, False, True, first[3]]
    assert second == [2, False, True, first[3]]


@pytest.mark.parametrize("what", [float("nan"), datetime(2026, 1, 1), object()])  # noqa: DTZ001  # that is the point
def test_a_call_that_has_no_key_runs(app: Celery, ran: Ran, what: Any) -> None:
    def body(self: Any, what: Any) -> bool:
        ran.append(what)
        return self.claim.lost

    heard: list[events.Event] = []
    stop = events.listen(heard.append, here=True)
    charge = task(app, body)
    try:
        assert charge.apply((what,)).get() is False
        charge.apply_async((what,), serializer="pickle")  # a guard would refuse to publish it
    finally:
        stop()
    assert len(ran) == 1
    assert [(event.kind, event.details["would"]) for event in heard] == [("shadow", "refuse")]


def test_a_function_that_computes_the_intent_and_fails(app: Celery, ran: Ran) -> None:
    def compute(arguments: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("no such field")

    charge = task(app, lambda self, what: ran.append(what), intent=compute)
    charge.apply(("a",)).get()
    charge.apply_async(("a",))
    assert ran == ["a"]


@pytest.mark.parametrize(("owner", "method"), [(Place, "claim"), (Hold, "settle"), (Place, "note_shadow")])
def test_an_error_of_the_shadows_own_work(
    app: Celery, ran: Ran, owner: type, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug, or a driver's own error")

    monkeypatch.setattr(owner, method, fail)
    charge = task(app, lambda self, what: ran.append(what) or "done")
    assert [charge.apply(("a",)).get() for _ in range(2)] == ["done"] * 2
    assert ran == ["a", "a"]


def test_no_thread_can_be_started(app: Celery, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(RENEWER, "watch", fail)
    charge = task(app, lambda self, what: ran.append(what) or "done")
    assert charge.apply(("a",)).get() == "done"


def test_a_time_limit_is_never_swallowed(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise SoftTimeLimitExceeded

    monkeypatch.setattr(Place, "claim", fail)
    with pytest.raises(SoftTimeLimitExceeded):
        task(app, lambda self, what: "done").apply(("a",)).get()


def test_a_death_is_celerys_affair(app: Celery) -> None:
    request = IdempotentRequest.__new__(IdempotentRequest)
    request._task = task(app, lambda self, what: "done")
    assert request._decide(SystemExit()) is False


def test_submit_publishes_what_an_older_record_knows(app: Celery, ran: Ran) -> None:
    charge = task(app, lambda self, what: ran.append(what))
    app.conf.idem_shadow = False
    use_store(app, app.conf.idem_store)
    charge.apply(("a",)).get()
    assert charge.submit("a").status == "replayed"
    app.conf.idem_shadow = True
    use_store(app, app.conf.idem_store)
    assert charge.submit("a").status == "accepted"
    assert [entry.state for entry in Ledger.from_app(app).list()] == ["succeeded"]


def test_an_older_record_is_no_answer_to_a_call_that_runs(app: Celery, ran: Ran) -> None:
    """The call ran, so its receipt must not say that it was done earlier or that its values were refused."""
    app.conf.task_always_eager = app.conf.task_store_eager_result = True
    charge = task(app, lambda self, what, cents=1: ran.append(cents) or len(ran), must_match=("cents",))
    app.conf.idem_shadow = False
    use_store(app, app.conf.idem_store)
    assert charge.submit("a").wait(5).result == 1
    app.conf.idem_shadow = True
    use_store(app, app.conf.idem_store)
    for cents in (1, 2):
        receipt = charge.submit("a", cents).wait(5)
        assert (receipt.status, receipt.result) == ("executed", len(ran))
    assert ran == [1, 1, 2]
