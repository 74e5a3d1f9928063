"""Producers in other languages publish messages that a real worker guards."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Celery
from celery.result import AsyncResult

from spec.make import parameters
from tests.support.effects import Effects
from tests.support.languages import LANGUAGES, run
from tests.support.servers import RedisServer

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("worker")]

WITHIN = 20.0  # seconds to wait for a result: the machine may be busy, and duplicates go back to the queue


def test_a_call_from_every_language_has_one_effect(
    redis: RedisServer, shop: Celery, done: Effects, name: str
) -> None:
    """Calls from all languages have one effect, with the key that the producer derived or without a key.

    Each producer can then read the record.
    """
    pay = shop.tasks["shop.pay"]
    customer = f"gro\u0308ße-{name}"  # NFD; the Python caller below uses NFC
    bare = {"task": "shop.pay", "args": [customer], "kwargs": {"invoice": "7", "cents": 2**60}}
    full = {
        **bare,
        "namespace": "idem",
        "intent_version": 1,
        "parameters": parameters(pay.run),
        "intent": ["customer", "invoice"],
        "must_match": ["cents", "currency"],
        "scope": "acme",
    }
    calls: tuple[dict[str, Any], ...] = (full, {**bare, "scope": "acme"}, full, bare)
    ids = [line for language in LANGUAGES for line in run(language, "publish", redis.url, calls=calls)]
    receipt = pay.submit(f"größe-{name}", "7", 2**60, scope="acme").wait(WITHIN)
    assert receipt.result == {"paid": 2**60, "invoice": "7"}
    assert all(AsyncResult(one, app=shop).get(WITHIN) == receipt.result for one in ids)
    assert len(set(ids)) == len(calls) * len(LANGUAGES)
    spelt = [done.count(f"pay-{text}-{name}-7") for text in ("größe", "gro\u0308ße")]
    assert sum(spelt) == 2, "one in the scope, one outside of it"
    key = pay.intent_key(customer, "7", 2**60, scope="acme")
    for language in LANGUAGES:
        record = json.loads(*run(language, "look", redis.url, f"idem:{key}"))
        assert record["state"] == "succeeded"
        assert bytes.fromhex(record["payload"]) == b"j" + json.dumps(receipt.result).encode()
        assert run(language, "keys", calls=(full,)) == [f"{key} {record['fingerprint']}"]
