"""``submit_many`` returns what ``submit`` of each call would return, also if some of the calls are wrong."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery
from kombu.exceptions import OperationalError

from celery_idem import ConfigurationError, Ledger, submit_many
from celery_idem.integration import recovering
from celery_idem.testing import CrashingStore
from tests.callers.conftest import messages


def test_receipts_are_in_order_and_what_is_wrong_is_in_its_own(app: Celery) -> None:
    pay = app.tasks["shop.pay"]
    pay.submit("known", cents=5)
    calls: list[Any] = [
        {"invoice": "1"},
        ("2", 7),
        {"invoice": "1"},  # the same action again
        {"invoice": "known", "cents": 6},
        {"bill": "3"},
        pay.s("1").set(scope="acme"),
        pay.s("1").set(scope="acme", occurrence="2", queue="slow"),
        pay.s("4").set(occurence="2"),
        "5",
        {"invoice": "5"},
    ]
    app.amqp.queues.add("slow")
    found = submit_many(app, "shop.pay", calls)
    assert [f"{receipt.status} {receipt.code}".strip() for receipt in found] == [
        "accepted", "accepted", "in_progress", "conflict", "failed invalid", "accepted", "accepted",
        "failed invalid", "failed invalid", "accepted",
    ]  # fmt: skip
    assert found[2].task_id == found[0].task_id
    assert "occurence" in found[7].reason
    assert (messages(app), messages(app, "slow")) == (5, 1)
    ledger = Ledger.from_app(app)
    assert {entry.key for entry in ledger.list("accepted")} >= {found[n].key for n in (0, 1, 5, 6, 9)}
    with pytest.raises(ConfigurationError, match="not a task with an intent"):
        submit_many(app, "shop.other", [])
    with pytest.raises(TypeError, match="no option countdwn"):
        pay.submit_many([], countdwn=1)


def test_more_than_a_hundred_are_each_accepted_and_published_once(app: Celery) -> None:
    pay = app.tasks["shop.pay"]
    calls = [{"invoice": str(n % 150)} for n in range(250)]
    found = pay.submit_many(calls, scope="acme")
    assert [receipt.status for receipt in found] == ["accepted"] * 150 + ["in_progress"] * 100
    assert messages(app) == 150
    assert found[7].key == pay.intent_key("7", scope="acme")


def test_what_the_broker_does_not_take_recovery_publishes(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    pay = app.tasks["shop.pay"]
    tries: list[str] = []

    def away(*args: Any, **kwargs: Any) -> None:
        tries.append("")
        raise OperationalError("away")

    with monkeypatch.context() as broken:
        broken.setattr(app, "send_task", away)
        found = pay.submit_many([{"invoice": str(n)} for n in range(120)])
    assert {(receipt.status, receipt.code) for receipt in found} == {("accepted", "not_sent")}
    assert len(tries) == 1
    assert messages(app) == 0
    assert sum(one.published for one in recovering.recover(app)) == 120
    assert messages(app) == 120


def test_a_store_that_is_away_accepts_nothing(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    pay = app.tasks["shop.pay"]
    store = CrashingStore(pay.guard.ledger.store)
    monkeypatch.setattr(pay.guard.ledger, "store", store)
    store.crash("before create")
    found = pay.submit_many([("1",), ("2",)])
    assert [(receipt.status, receipt.code) for receipt in found] == [("not_run", "store_error")] * 2
    assert messages(app) == 0
    assert pay.submit_many([("1",), ("2",)])[1].status == "accepted"
