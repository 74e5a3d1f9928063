"""A record of a newer format, as during an upgrade: this release does not run the body, and reports why."""

from __future__ import annotations

import pytest

from celery_idem import IdempotencyError, IdempotentTask, Ledger, StoreError
from celery_idem.core import record
from celery_idem.core.model import Record, State
from tests.support import hand

SAYS = (
    rf"has format {record.VERSION + 1}: a newer celery_idem than this one wrote it.*Nothing was run.*upgrade"
)


def newer(state: State = State.RUNNING) -> bytes:
    """A record as a later release might write it: a higher version, and parts that this release does not know."""
    packed = bytearray(record.pack(Record(state, owner=b"twelve-bytes", fence=5)))
    packed[12] = record.VERSION + 1
    return bytes(packed) + b"something new"


@pytest.mark.parametrize("state", State)
def test_it_is_refused_by_its_number_before_anything_of_it_is_read(state: State) -> None:
    with pytest.raises(StoreError, match=SAYS):
        record.unpack(newer(state if not state.settled else State.RUNNING), 1, "shop.pay:1")


@pytest.mark.parametrize("on_store_error", ["retry", "raise", "run"])
def test_a_worker_that_meets_one_runs_nothing_and_keeps_the_message(on_store_error: str) -> None:
    app = hand.application(idem_on_store_error=on_store_error)
    ran = []

    @app.task(base=IdempotentTask, shared=False, name="shop.pay", intent=("what",))
    def pay(what: str) -> None:
        ran.append(what)

    ledger = Ledger.from_app(app)
    key = pay.intent_key("rent")
    value = newer()
    ledger.store.create(f"{ledger.namespace}:{key}", value)
    result = pay.delay("rent")
    message = hand.take(app)
    hand.deliver(app, message)
    if on_store_error == "retry":
        again = hand.take(app)
        assert again.headers["id"] == result.id
    else:
        assert hand.take(app) is None
        with pytest.raises(StoreError, match=SAYS):
            result.get(timeout=5)
    assert ran == []
    stored = ledger.store.read(f"{ledger.namespace}:{key}").stored
    assert stored is not None
    assert stored.value == value  # this version did not overwrite it
    with pytest.raises(IdempotencyError, match=SAYS):
        ledger.get(key)
    assert list(ledger.list()) == []
