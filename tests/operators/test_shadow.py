"""Shadow mode: every call runs, duplicates are counted, and no outcome of shadow mode is replayed later."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from celery import Celery

from celery_idem import FingerprintMismatch, IdempotentTask, Ledger
from celery_idem.engine import events
from celery_idem.operate.audit import ENOUGH
from tests.operators.conftest import command_line, use_store

Ran = list[str]


@pytest.fixture
def ran() -> Ran:
    return []


@pytest.fixture
def shop(ran: Ran) -> Celery:
    app = Celery("shadowed", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(idem_store=f"memory://{uuid.uuid4().hex}", idem_shadow=True)
    options = {"base": IdempotentTask, "shared": False}

    @app.task(name="shop.charge", intent=("customer_id",), must_match=("cents",), bind=True, **options)
    def charge(self: Any, customer_id: str, cents: int = 0) -> str:
        ran.append(customer_id)
        return str(self.step("charge", lambda: f"charged {customer_id} {len(ran)}"))

    @app.task(name="shop.fail", intent=("customer_id",), **options)
    def fail(customer_id: str) -> None:
        ran.append(customer_id)
        raise ValueError(customer_id)

    @app.task(name="shop.retry", intent=("customer_id",), bind=True, max_retries=1, **options)
    def retry(self: Any, customer_id: str) -> str:
        ran.append(customer_id)
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        return "ok"

    app.finalize()
    return app


def report(app: Celery) -> dict[str, dict[str, Any]]:
    rows = json.loads(command_line(app)("shadow", "--json").output)
    return {row["task"]: row for row in rows}


def test_nothing_is_blocked_and_everything_is_counted(shop: Celery, ran: Ran) -> None:
    charge = shop.tasks["shop.charge"]
    heard: list[Any] = []
    stop = events.listen(heard.append, here=True)
    try:
        assert charge.apply(("a", 1)).get() == "charged a 1"
        assert charge.apply(("a", 1)).get() == "charged a 2"  # a guard would have replayed
        assert charge.apply(("a", 2)).get() == "charged a 3"  # a guard would have refused
    finally:
        stop()
    assert ran == ["a", "a", "a"]
    assert [(e.kind, e.details["would"]) for e in heard] == [("shadow", "replay"), ("shadow", "mismatch")]
    row = report(shop)["shop.charge"]
    assert (row["calls"], row["intents"]) == (3, 1)
    assert row["would"] == {"replay": 1, "mismatch": 1}
    assert row["differs"] == {"cents": 1}
    assert row["verdict"] == "look"
    assert "cents" in row["why"]


def test_switched_off_nothing_of_it_is_replayed(shop: Celery, ran: Ran) -> None:
    charge = shop.tasks["shop.charge"]
    charge.apply(("a", 1))
    assert list(Ledger.from_app(shop).list()) == []
    assert json.loads(command_line(shop)("stats", "--json").output) == []
    shop.conf.idem_shadow = False
    use_store(shop, shop.conf.idem_store)
    assert charge.apply(("a", 2)).get() == "charged a 2"  # other cents: no mismatch with the shadow call
    assert charge.apply(("a", 2)).get() == "charged a 2"  # now it is guarded
    with pytest.raises(FingerprintMismatch):
        charge.apply(("a", 3)).get()


def test_errors_and_retries_pass_through(shop: Celery, ran: Ran) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="a"):
            shop.tasks["shop.fail"].apply(("a",)).get()
    assert shop.tasks["shop.retry"].apply(("b",)).get() == "ok"
    assert ran == ["a", "a", "b", "b"]
    rows = report(shop)
    assert rows["shop.fail"]["would"] == {"replay": 1}
    assert rows["shop.retry"]["would"] == {}  # its own retry is no duplicate
    assert rows["shop.retry"]["calls"] == 2


def test_a_store_that_is_away_stops_nothing(shop: Celery, ran: Ran) -> None:
    use_store(shop, "redis://localhost:1/0")
    heard: list[Any] = []
    stop = events.listen(heard.append, here=True)
    try:
        for _ in range(3):
            shop.tasks["shop.charge"].apply(("a", 1)).get()
    finally:
        stop()
    assert ran == ["a", "a", "a"]
    assert [event.kind for event in heard] == ["store_error"]  # once; later calls do not try the store


def test_ready_when_enough_was_seen_and_nothing_looks_wrong(shop: Celery) -> None:
    for n in range(ENOUGH):
        shop.tasks["shop.charge"].apply((f"cus{n % 60}", 5))
    row = report(shop)["shop.charge"]
    assert row["verdict"] == "ready"
    assert f"{ENOUGH - 60} of {ENOUGH} calls were duplicates" in row["why"]
    run = command_line(shop)
    assert "ready" in run("shadow").output
    assert json.loads(run("shadow", "--clear", "--yes", "--json").output) == {"removed": 60}
    assert report(shop) == {}
