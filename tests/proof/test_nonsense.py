"""Nothing runs if the store holds arbitrary bytes instead of a record. The tests print their seed."""

from __future__ import annotations

import random
import re
import secrets
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from celery import Celery

from celery_idem import IdempotentTask, Ledger, NotHappened
from celery_idem.core.errors import StoreError
from celery_idem.core.model import Fingerprint, Policy, Request, Stored
from celery_idem.integration import delivery
from celery_idem.stores import Store, open_store
from celery_idem.testing import use_store

KEY = "shop.charge:0123456789abcdef0123456789abcdef"
STORED = f"idem:{KEY}"
POLICY = Policy(lease=1_000_000, result_ttl=10**9, failure_ttl=10**9, on_crash="rerun")


def nonsense(rng: random.Random) -> bytes:
    """Return bytes that no release ever wrote: they have a wrong version or are too short for a record."""
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


STORES = [
    "memory",
    "sqlite",
    pytest.param("postgres", marks=pytest.mark.postgres),
    pytest.param("redis", marks=pytest.mark.redis),
    pytest.param("valkey", marks=pytest.mark.valkey),
]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    name = request.param
    local = {"memory": f"memory://{tmp_path}", "sqlite": f"sqlite:///{tmp_path}/idem.db"}
    store = open_store(local.get(name) or request.getfixturevalue(f"{name}_url"))
    yield store
    store.close()


def put(store: Store, value: bytes) -> None:
    """Write a value in place of what is stored."""
    stored = store.read(STORED).stored
    reply = store.create(STORED, value) if stored is None else store.replace(STORED, stored, value)
    assert reply.done


def test_nonsense_never_runs(store: Store) -> None:
    rng = random.Random(seed := secrets.randbelow(10**9))
    print("seed", seed)
    for _ in range(100):
        value = nonsense(rng)
        put(store, value)
        assert_never_runs(store)
        stored = store.read(STORED).stored
        assert stored is not None
        assert stored.value == value, "nonsense was overwritten"


@pytest.mark.parametrize("policy", ["raise", "retry", "run"])
def test_no_body_runs_on_nonsense(store: Store, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a delivery nor an operator gets past nonsense: `on_store_error="run"` is for a store that is down."""
    monkeypatch.setattr(
        delivery, "INLINE_LIMIT", 0.0
    )  # seconds; else the eager call would wait for the store
    app = Celery("nonsense", broker="memory://", backend="cache+memory://", set_as_current=False)
    url = f"memory://{uuid.uuid4().hex}"
    app.conf.update(idem_store=url, idem_on_store_error=policy)
    use_store(url, store)
    ran = []

    @app.task(base=IdempotentTask, shared=False, name="shop.charge", intent=("customer",))
    def charge(customer: int) -> None:
        ran.append(customer)

    key = charge.intent_key(1)
    store.create(f"idem:{key}", nonsense(random.Random(secrets.randbelow(10**9))))
    with pytest.raises(StoreError, match=re.escape(key)):
        charge.apply((1,)).get()
    with pytest.raises(StoreError, match=re.escape(key)):
        Ledger.from_app(app).resolve(key, NotHappened(), by="me")
    assert ran == []


@pytest.mark.redis
def test_raw_nonsense_in_redis_never_runs(redis_url: str) -> None:
    """The value may be too short for the stamp before a record, or empty."""
    rng = random.Random(seed := secrets.randbelow(10**9))
    print("seed", seed)
    store = open_store(redis_url)
    with redis.Redis.from_url(redis_url) as client:
        for length in (*range(9), *(rng.randrange(9) for _ in range(50))):
            value = rng.randbytes(length)
            client.set(STORED, value)
            assert_never_runs(store)
            assert client.get(STORED) == value, "nonsense was overwritten"
    store.close()


@pytest.mark.redis
def test_scripts_with_arbitrary_bytes(redis_url: str) -> None:
    """The scripts write what the primitives promise or raise StoreError, for any stored value and any argument."""
    rng = random.Random(seed := secrets.randbelow(10**9))
    print("seed", seed)
    store = open_store(redis_url)
    stamps = struct.Struct(">Q")
    written = refused = 0
    with redis.Redis.from_url(redis_url) as client:
        for _ in range(3_000):
            key = "".join(chr(rng.choice((0, 10, 13, 36, 42, 123, 125, 233, 0x1F600))) for _ in range(3))
            stamp = stamps.pack(rng.randrange(2**53 - 1))
            raw = rng.choice(
                (None, rng.randbytes(rng.randrange(60)), stamp + rng.randbytes(rng.randrange(1, 40)))
            )
            client.delete(key)
            if raw is not None:
                client.set(key, raw)
            value = rng.randbytes(rng.randrange(40))
            ttl = rng.choice((None, None, 0, 10**9, 10**15))
            sound = raw is not None and len(raw) > 8 and raw[:8] < stamps.pack(2**53)
            known = sound and len(raw or b"") >= 20 and rng.random() < 0.7
            old = Stored(
                raw[8:] if known and raw else rng.randbytes(12),
                _stamp_of(raw) if known else rng.randrange(2**63),
            )
            creates = rng.random() < 0.4
            error: StoreError | None = None
            try:
                reply = store.create(key, value, ttl) if creates else store.replace(key, old, value, ttl)
            except StoreError as refusal:
                error = refusal
            if error is not None:
                assert raw is not None, f"seed {seed}: {error}"
                assert not sound, f"seed {seed}: {error}"
                assert key in str(error)
                assert client.get(key) == raw
                refused += 1
                continue
            may = raw is None if creates else known
            assert reply.done is may, f"seed {seed}: {raw!r} {old!r}"
            after = client.get(key)
            if not may:
                assert after == raw, f"seed {seed}: written all the same"
            elif ttl == 0:
                assert after is None
            else:
                assert reply.stored is not None
                assert after == stamps.pack(reply.stored.stamp) + value, f"seed {seed}: not what it was given"
                written += 1
    store.close()
    assert written > 300
    assert refused > 50


def _stamp_of(raw: bytes | None) -> int:
    return int.from_bytes((raw or b"")[:8], "big")


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
