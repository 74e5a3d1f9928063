"""Keys, records and scripts under random input. The seed is printed.

`python -m tests.proof.fuzz --seed S --count N` repeats or extends the keys.
"""

from __future__ import annotations

import random
import secrets
from enum import Enum
from inspect import signature
from typing import Any

import pytest
import redis

from celery_idem import codec
from celery_idem.errors import IntentError, StoreError
from celery_idem.intent import Fingerprint, Note, Outcome, Policy, Record, Request, State, Step
from celery_idem.keys import ALL_ARGUMENTS, declare
from celery_idem.ledger import Ledger
from celery_idem.stores import Store, open_store
from celery_idem.stores.memory import MemoryStore
from tests.proof.fuzz import fuzz

KEY = "shop.charge:0123456789abcdef0123456789abcdef"
STORED = f"idem:{KEY}"
POLICY = Policy(lease=1_000_000, result_ttl=10**9, failure_ttl=10**9, on_crash="rerun")


def test_keys() -> None:
    actions, refused, again = fuzz(100_000, secrets.randbelow(10**9))
    assert actions > 10_000, "hardly any two calls differed"
    assert refused > 1_000, "hardly any call was refused"
    assert again > 10_000, "hardly any action came twice"


# --- found by reading, or by the fuzz ---------------------------------------------------


def test_an_extra_argument_cannot_hide_a_positional_one() -> None:
    def task(customer: Any, /, **more: Any) -> None: ...

    declaration = declare("shop.charge", signature(task), ALL_ARGUMENTS)
    with pytest.raises(IntentError, match="both called 'customer'"):
        declaration.bind((1,), {"customer": 2})


class Tenant(str, Enum):  # as code written before Python 3.11 has it
    ACME = "acme"


def test_a_scope_is_the_text_that_json_makes_of_it() -> None:
    declaration = declare("shop.charge", signature(lambda customer: None), "customer")
    arguments = {"customer": 1}
    assert declaration.key("idem", arguments, Tenant.ACME) == declaration.key("idem", arguments, "acme")
    with pytest.raises(IntentError, match="scope"):
        declaration.key("idem", arguments, 10**6000)  # type: ignore[arg-type]


def test_a_set_of_texts_that_are_one_text_has_one_item() -> None:
    declaration = declare("shop.charge", signature(lambda tags: None), "tags")
    assert declaration.key("idem", {"tags": {"é", "e\u0301"}}) == declaration.key("idem", {"tags": {"é"}})


# --- records ----------------------------------------------------------------------------


def random_record(rng: random.Random) -> Record:
    def some(size: int) -> bytes:
        return rng.randbytes(rng.randrange(size))

    def text() -> str:
        return "".join(chr(rng.choice((0, 65, 233, 8364, 128512))) for _ in range(rng.randrange(5)))

    state = rng.choice(list(State))
    outcome = None
    if state.settled:
        payload = rng.choice((None, b"j" + some(40)))
        outcome = Outcome(state is State.SUCCEEDED, payload, text() if payload is None else "")
    return Record(
        state=state,
        owner=rng.randbytes(12),
        task_id=rng.choice((text(), "0b5b2a0e-6c4b-4f0e-9f57-6a8f2f0f4d11", "x" * 36)),
        fence=rng.randrange(1, 2**63),
        attempts=rng.randrange(2**16),
        crashes=rng.randrange(2**8),
        lease=rng.randrange(2**40),
        fingerprint=rng.randbytes(12 * rng.randrange(3)),
        steps=tuple(Step(text(), some(20)) for _ in range(rng.randrange(3))),
        open_steps=tuple(text() for _ in range(rng.randrange(3))),
        asking=rng.choice((b"", rng.randbytes(12))),
        reason=text(),
        notes=tuple(Note(rng.randrange(2**60), text(), text(), text()) for _ in range(rng.randrange(3))),
        digests=some(20),
        outcome=outcome,
    )


def test_a_record_survives_packing() -> None:
    rng = random.Random(seed := secrets.randbelow(10**9))
    for _ in range(5_000):
        record = random_record(rng)
        assert codec.unpack(codec.pack(record), 1, KEY) == record, f"seed {seed}"


def test_arbitrary_bytes_are_a_record_or_a_store_error_that_names_the_key() -> None:
    rng = random.Random(seed := secrets.randbelow(10**9))
    refused = 0
    for number in range(20_000):
        value = bytearray(codec.pack(random_record(rng)) if number % 2 else rng.randbytes(rng.randrange(200)))
        for _ in range(rng.randrange(4)):
            if value:
                value[rng.randrange(len(value))] = rng.randrange(256)
        cut = bytes(value[: rng.randrange(len(value) + 1)] if number % 3 else value)
        error: StoreError | None = None
        try:
            record = codec.unpack(cut, 1, KEY)
        except StoreError as refusal:
            error = refusal
        if error is None:
            assert (record.outcome is not None) == record.state.settled, f"seed {seed}: {cut!r}"
            continue
        refused += 1
        assert error.key == KEY, f"seed {seed}"
        assert KEY in str(error), f"seed {seed}"
    assert refused > 5_000


def nonsense(rng: random.Random) -> bytes:
    """Bytes that no release of ours ever wrote: of a wrong version, or too short for a record."""
    value = bytearray(rng.randbytes(rng.randrange(1, 80)))
    if len(value) > 12:
        value[12] = rng.randrange(2, 256)
    return bytes(value)


def assert_never_runs(store: Store) -> None:
    ledger = Ledger(store)
    request = Request(secrets.token_bytes(12), "task", Fingerprint(), POLICY)
    for call in (lambda: ledger.claim(KEY, request), lambda: ledger.get(KEY)):
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.key in (KEY, STORED)
        assert KEY in str(caught.value)
    assert list(ledger.list()) == []


def test_nonsense_in_memory_never_runs() -> None:
    rng = random.Random(secrets.randbelow(10**9))
    for _ in range(200):
        store = MemoryStore()
        store.create(STORED, nonsense(rng))
        assert_never_runs(store)


@pytest.mark.redis
def test_nonsense_in_redis_never_runs(redis_url: str) -> None:
    rng = random.Random(seed := secrets.randbelow(10**9))
    print("seed", seed)
    store = open_store(redis_url)
    with redis.Redis.from_url(redis_url) as client:
        for number in range(200):
            value = rng.randbytes(8) + nonsense(rng) if number % 2 else rng.randbytes(rng.randrange(1, 9))
            client.set(STORED, value)
            assert_never_runs(store)
            assert client.get(STORED) == value, "nonsense was overwritten"
    store.close()


@pytest.mark.redis
@pytest.mark.parametrize("kind", ["list", "hash", "set", "zset", "stream"])
def test_another_kind_of_value_in_redis_never_runs(redis_url: str, kind: str) -> None:
    store = open_store(redis_url)
    with redis.Redis.from_url(redis_url) as client:
        if kind == "list":
            client.rpush(STORED, "x")
        elif kind == "hash":
            client.hset(STORED, "x", "y")
        elif kind == "set":
            client.sadd(STORED, "x")
        elif kind == "zset":
            client.zadd(STORED, {"x": 1})
        else:
            client.xadd(STORED, {"x": "y"})
        assert_never_runs(store)
        assert client.type(STORED) == kind.encode()
    store.close()
