"""`idem audit` finds key drift, and its opposite, in the records of calls.

Drift: one action has several keys. The opposite ("spread"): several actions share a key.
"""

from __future__ import annotations

import json
import uuid
from datetime import datetime, timezone
from typing import Any

import pytest
from celery import Celery

from celery_idem import IdempotentTask, Ledger
from celery_idem.core.digests import MAX_ENTRIES, Digester, differing, marked, tag_of, varied
from tests.operators.conftest import Idem, command_line

Calls = dict[str, Any]


@pytest.fixture
def shop() -> Celery:
    app = Celery("audited", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(idem_store=f"memory://{uuid.uuid4().hex}")
    options = {"base": IdempotentTask, "shared": False}

    @app.task(name="shop.pay", intent=("customer_id", "requested_at"), **options)
    def pay(customer_id: str, cents: int, requested_at: str) -> None: ...

    @app.task(name="shop.pay_twice_wrong", intent=("customer_id", "requested_at", "request_id"), **options)
    def pay_twice_wrong(customer_id: str, cents: int, requested_at: str, request_id: str) -> None: ...

    @app.task(name="shop.good", intent=("customer_id", "invoice_id"), **options)
    def good(customer_id: str, invoice_id: int, cents: int, note: str = "") -> None: ...

    @app.task(name="shop.remind", intent=("customer_id",), secret=("token",), **options)
    def remind(customer_id: str, invoice_id: int = 0, token: str = "") -> None: ...

    app.finalize()
    return app


def found(app: Celery, *words: str) -> list[dict[str, Any]]:
    suspicions: list[dict[str, Any]] = json.loads(command_line(app)("audit", "--json", *words).output)
    return suspicions


def test_a_timestamp_in_the_intent_is_named(shop: Celery) -> None:
    for n in range(30):
        for _ in range(3):  # the same action, tried three times
            now = datetime.now(timezone.utc).isoformat()
            shop.tasks["shop.pay"].apply((f"cus{n}", 100 * n, now))
    (suspicion,) = found(shop)
    assert (suspicion["kind"], suspicion["parameters"]) == ("drift", ["requested_at"])
    assert (suspicion["calls"], suspicion["of"], suspicion["likely"]) == (90, 90, True)
    assert "'requested_at'" in command_line(shop)("audit").output


def test_two_that_vary_at_once_are_named_together(shop: Celery) -> None:
    for n in range(10):
        for _ in range(3):
            now = datetime.now(timezone.utc).isoformat()
            shop.tasks["shop.pay_twice_wrong"].apply((f"cus{n}", 100 * n, now, uuid.uuid4().hex))
    (suspicion,) = found(shop)
    assert set(suspicion["parameters"]) == {"requested_at", "request_id"}


def test_a_good_key_is_left_alone(shop: Celery) -> None:
    for n in range(50):
        for _ in range(3):
            shop.tasks["shop.good"].apply((f"cus{n % 7}", n, 100 + n))
    assert found(shop) == []


def test_calls_far_apart_are_not_retries(shop: Celery) -> None:
    for n in range(6):
        shop.tasks["shop.pay"].apply(("cus", 100, f"day {n}"))
    assert found(shop)
    assert found(shop, "--within", "0") == []


def test_a_free_argument_that_says_what_the_action_is(shop: Celery) -> None:
    for n in range(20):
        shop.tasks["shop.remind"].apply((f"cus{n}", 1))
        shop.tasks["shop.remind"].apply((f"cus{n}", 2))  # another invoice; its reminder is never sent
    (suspicion,) = found(shop)
    assert (suspicion["kind"], suspicion["parameters"], suspicion["calls"]) == ("spread", ["invoice_id"], 20)
    assert suspicion["likely"]
    assert "must_match" in suspicion["says"]


def test_a_reworded_note_is_what_free_means(shop: Celery) -> None:
    shop.tasks["shop.good"].apply(("cus", 1, 100), {"note": "please pay"})
    shop.tasks["shop.good"].apply(("cus", 1, 100), {"note": "kindly pay"})
    (suspicion,) = found(shop)
    assert (suspicion["parameters"], suspicion["likely"]) == (["note"], False)


def test_the_mark_is_written_once_and_the_outcome_stays(shop: Celery) -> None:
    task, ledger = shop.tasks["shop.good"], Ledger.from_app(shop)
    stamps = []
    for note in ("a", "b", "c", "b"):
        task.apply(("cus", 1, 100), {"note": note})
        entry = ledger.get(task.intent_key("cus", 1, 100))
        assert entry is not None
        stamps.append(entry.changed_at)
    assert stamps[0] < stamps[1] == stamps[2] == stamps[3]
    assert varied(entry.record.digests) == {tag_of("note")}
    assert entry.state == "succeeded"


def test_off_means_nothing_is_kept(shop: Celery) -> None:
    shop.conf.idem_audit = False
    shop.tasks["shop.pay"].apply(("cus", 100, "now"))
    (entry,) = Ledger.from_app(shop).list()
    assert entry.record.digests == b""


def test_a_secret_has_no_digest_without_a_key_of_its_own(shop: Celery) -> None:
    remind = shop.tasks["shop.remind"]
    without = remind.guard.digester.of(("cus", 1, "s3cret"), {})
    assert without == remind.guard.digester.of(("cus", 1, "other"), {})
    declaration = remind.guard.declaration
    keyed, other = Digester(declaration, "idem", "k1"), Digester(declaration, "idem", "k2")
    assert keyed.of(("c", 1, "s3cret"), {}) != keyed.of(("c", 1, "other"), {})
    assert keyed.of(("c", 1, "s3cret"), {}) != other.of(("c", 1, "s3cret"), {})


def test_digests_agree_however_a_call_is_spelt(shop: Celery) -> None:
    digester = shop.tasks["shop.good"].guard.digester
    spelt = [
        digester.of(("c", 1, 100), {}),
        digester.of(("c",), {"cents": 100, "invoice_id": 1, "note": ""}),
        digester.of((), {"customer_id": "c", "invoice_id": 1, "cents": 100}),
    ]
    for other in spelt[1:]:
        assert differing(spelt[0], other) == set()
        assert marked(spelt[0], other) == spelt[0]
    assert differing(spelt[0], digester.of(("c", 1, 101), {})) == {tag_of("cents")}


def test_many_parameters_stay_within_the_budget() -> None:
    import inspect

    from celery_idem.core import keys

    def wide(**values: Any) -> None: ...

    declaration = keys.declare("wide", inspect.signature(wide), keys.ALL_ARGUMENTS)
    packed = Digester(declaration, "idem").of((), {f"p{n}": n for n in range(100)})
    assert len(packed) == MAX_ENTRIES * 6


def test_scope_and_occurrence_drift_too(shop: Celery) -> None:
    for n in range(5):
        shop.tasks["shop.good"].apply(("cus", 1, 100), occurrence=f"run-{n}")
    (suspicion,) = found(shop)
    assert suspicion["parameters"] == ["occurrence"]


def test_the_same_through_headers_alone(idem: Idem, app: Celery) -> None:
    """A worker that takes the key from the header also digests the arguments."""
    task = app.tasks["shop.remind"]
    task.apply(("a",), headers={"idem-key": task.intent_key("a")})
    entry = Ledger.from_app(app).get(task.intent_key("a"))
    assert entry is not None
    assert entry.record.digests
