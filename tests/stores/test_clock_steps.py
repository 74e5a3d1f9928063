"""Real servers whose clock is changed: leases of dead and live workers, and what a person may decide meanwhile."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from celery_idem.core.errors import IdempotencyError
from celery_idem.core.model import (
    MICROSECONDS,
    Acquired,
    Busy,
    Decision,
    Fingerprint,
    NotHappened,
    Policy,
    Request,
)
from celery_idem.engine import owners
from celery_idem.engine.claim import Hold
from celery_idem.engine.ledger import Ledger
from celery_idem.stores import open_store, sql_statements
from celery_idem.stores import redis as redis_module
from celery_idem.stores.base import Store
from tests.support.waiting import wait_for

LEASE = 2 * MICROSECONDS
HOUR = 3600 * MICROSECONDS
SOON = 30.0

Clocked = tuple[Store, Callable[[int], None]]
"""A store, and a function that sets its clock, in microseconds off the server's own clock."""


def redis_clocked(url: str, monkeypatch: pytest.MonkeyPatch) -> Clocked:
    """A Redis store whose scripts read a shifted TIME, and are otherwise unchanged."""
    shimmed = rb"\1; t[1] = t[1] + (redis.call('GET', 'off') or 0)"

    def source(name: str) -> bytes:
        text = (Path(redis_module.__file__).parent / name).read_bytes()
        text, found = re.subn(rb"(local t = [a-z.]+\('TIME'\))", shimmed, text)
        assert found == 1
        return text

    def files(package: str) -> Any:
        return SimpleNamespace(joinpath=lambda name: SimpleNamespace(read_bytes=lambda: source(name)))

    monkeypatch.setattr(redis_module, "files", files)
    for name, words, writes, keys in (("create", 5, True, 2), ("replace", 6, True, 2), ("read", 1, False, 1)):
        script = redis_module._Script(f"{name}.lua", words, writes, keys)
        monkeypatch.setattr(redis_module, name.upper(), script)
    store = open_store(url)
    assert isinstance(store, redis_module.RedisStore)
    return store, lambda off: store.execute("SET", "off", str(off // MICROSECONDS)) and None


def sql_clocked(url: str, dialect: str, monkeypatch: pytest.MonkeyPatch) -> Clocked:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE clock_off (off BIGINT)"))
        connection.execute(sa.text("INSERT INTO clock_off VALUES (0)"))
    now = f"({sql_statements._NOW[dialect]} + (SELECT off FROM clock_off))"  # noqa: S608
    monkeypatch.setitem(sql_statements._NOW, dialect, now)

    def set_clock(off: int) -> None:
        with engine.begin() as connection:
            connection.execute(sa.text("UPDATE clock_off SET off = :off"), {"off": off})
        engine.dispose()

    return open_store(url), set_clock


@pytest.fixture(
    params=[
        pytest.param("redis", marks=pytest.mark.redis),
        pytest.param("postgresql", marks=pytest.mark.postgres),
        "sqlite",
    ]
)
def clocked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clocked:
    if request.param == "redis":
        return redis_clocked(request.getfixturevalue("redis_url"), monkeypatch)
    if request.param == "sqlite":
        return sql_clocked(f"sqlite:///{tmp_path}/records.db", "sqlite", monkeypatch)
    return sql_clocked(request.getfixturevalue("postgres_url"), "postgresql", monkeypatch)


def claim(ledger: Ledger, key: str) -> tuple[Decision, Hold | None]:
    policy = Policy(LEASE, 10**12, 10**12, "rerun")
    return ledger.claim(key, Request(owners.mint(), "task", Fingerprint(), policy))


def test_a_clock_that_is_set_back(clocked: Clocked) -> None:
    store, set_clock = clocked
    ledger = Ledger(store)
    claim(ledger, "shop.dead:1")
    claim(ledger, "shop.resolved:1")
    _, lives = claim(ledger, "shop.lives:1")
    _, ended = claim(ledger, "shop.ended:1")
    assert lives is not None
    assert ended is not None
    set_clock(-HOUR)
    assert ledger.store.read("x").now < lives.fence

    ledger.lapse("shop.ended:1", ended.owner)
    assert isinstance(claim(ledger, "shop.ended:1")[0], Acquired)  # needs no clock
    for key in ("shop.dead:1", "shop.lives:1"):
        decision, _ = claim(ledger, key)
        assert isinstance(decision, Busy)
        assert decision.retry_after <= LEASE
    with pytest.raises(IdempotencyError, match="went back"):
        ledger.resolve("shop.resolved:1", NotHappened(), by="anna")

    def decided() -> bool:
        lives.renew()
        assert isinstance(claim(ledger, "shop.lives:1")[0], Busy)
        return isinstance(claim(ledger, "shop.dead:1")[0], Acquired)

    wait_for(decided, SOON, "the dead worker's lease to lapse")
    wait_for(
        lambda: (entry := ledger.get("shop.resolved:1")) and entry.state == "lapsed",
        SOON,
        "the other dead worker's lease to lapse",
    )
    assert ledger.resolve("shop.resolved:1", NotHappened(), by="anna").state == "released"


def test_a_clock_that_is_set_ahead_by_less_than_half_a_lease(clocked: Clocked) -> None:
    store, set_clock = clocked
    ledger = Ledger(store)
    policy = Policy(60 * MICROSECONDS, 10**12, 10**12, "rerun")
    _, lives = ledger.claim("shop.lives:1", Request(owners.mint(), "task", Fingerprint(), policy))
    assert lives is not None
    for off in (29, 58, 87):
        set_clock(off * MICROSECONDS)
        assert isinstance(claim(ledger, "shop.lives:1")[0], Busy)
        lives.renew()
    assert not lives.lost
