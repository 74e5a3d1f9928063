"""The index of open intents is a hint. If it is wrong or missing, the records count."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from celery_idem import Ledger
from celery_idem.core import protocol
from celery_idem.core.model import Fingerprint, NotHappened, Outcome, Policy, Request, Tell
from celery_idem.engine import owners
from celery_idem.engine.claim import Hold
from celery_idem.engine.entries import OPEN
from celery_idem.stores import open_store
from celery_idem.stores.base import Mark
from celery_idem.stores.memory import MemoryStore
from celery_idem.testing import FakeClock
from tests.support.servers import RedisServer

DAY = 86_400_000_000
LIVE = Policy(lease=DAY, result_ttl=DAY, failure_ttl=DAY)
INDEX = "idem~open"


def claim(ledger: Ledger, name: str, policy: Policy = LIVE) -> Hold:
    _, hold = ledger.claim(
        f"shop.pay:{name}", Request(owners.mint(), str(uuid.uuid4()), Fingerprint(), policy)
    )
    assert hold is not None
    return hold


def fill(ledger: Ledger) -> None:
    """Creates intents in several states, most of them finished."""
    for n in range(20):
        claim(ledger, f"done{n}").settle(Outcome(True, b"j1"), 0.0)
    claim(ledger, "failed").settle(Outcome(False, b"j1"), 0.0)
    claim(ledger, "released").release(0.0)
    claim(ledger, "doubt").doubt("unknown", 0.0)
    claim(ledger, "later").schedule(86_400.0, 0.0)
    claim(ledger, "runs")
    claim(ledger, "killed").exit("killed", 0.0)


WHAT_IS_OPEN = {
    "shop.pay:doubt": "in_doubt",
    "shop.pay:later": "scheduled",
    "shop.pay:runs": "running",
    "shop.pay:killed": "in_doubt",
}


def seen(ledger: Ledger) -> dict[str, str]:
    return {entry.key: entry.state for entry in ledger.list("open")}


@pytest.fixture(params=[pytest.param("redis", marks=pytest.mark.redis), "sqlite", "memory"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
    else:
        url = f"sqlite:///{tmp_path / 'idem.db'}" if request.param == "sqlite" else f"memory://{tmp_path}"
    ledger = Ledger(open_store(url))
    fill(ledger)
    yield ledger
    ledger.store.close()


def test_lists_of_what_is_open_read_nothing_else(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(ledger) == WHAT_IS_OPEN  # the first listing builds the index, if the store has to

    def scan(self: object, prefix: str) -> Iterator[object]:
        raise AssertionError("every record was read")

    monkeypatch.setattr(type(ledger.store), "scan", scan)
    assert seen(ledger) == WHAT_IS_OPEN
    for state in OPEN:
        wanted = sorted(key for key, its in WHAT_IS_OPEN.items() if its == state)
        assert sorted(entry.key for entry in ledger.list(state)) == wanted
    assert [entry.key for entry in ledger.list("open", task="shop.other")] == []
    assert sorted(state for _, state in ledger.stats("open")) == sorted(WHAT_IS_OPEN.values())
    with pytest.raises(AssertionError):
        list(ledger.list("succeeded"))


def test_an_intent_leaves_the_index_with_its_outcome(ledger: Ledger) -> None:
    seen(ledger)
    ledger.resolve("shop.pay:doubt", NotHappened(), by="ann")
    assert seen(ledger) == {key: state for key, state in WHAT_IS_OPEN.items() if key != "shop.pay:doubt"}
    for key in list(seen(ledger)):
        ledger.forget(key)
    assert [listed.key for listed in ledger.store.open("idem:")] == []


def test_every_write_says_when_to_look(ledger: Ledger) -> None:
    """The index that the writes made equals one rebuilt from the records."""
    seen(ledger)

    def index() -> list[tuple[str, int]]:
        return [(listed.key, listed.at) for listed in ledger.store.open("idem:")]

    written = index()
    assert ledger.reindex() == len(WHAT_IS_OPEN)
    assert index() == written


def test_wrong_entries_are_corrected_when_they_are_met(ledger: Ledger) -> None:
    seen(ledger)
    store = ledger.store
    for name, due in (("done1", 5), ("released", -DAY), ("doubt", -DAY), ("runs", None)):
        entry = ledger.get(f"shop.pay:{name}")
        assert entry is not None
        store.mark([Mark(f"idem:shop.pay:{name}", entry._stamp, due)])
    assert seen(ledger) == {key: state for key, state in WHAT_IS_OPEN.items() if key != "shop.pay:runs"}
    assert "idem:shop.pay:done1" not in [listed.key for listed in store.open("idem:")]
    assert list(ledger.overdue()) == []  # the doubt's entry has its right time again
    assert ledger.reindex() == len(WHAT_IS_OPEN)
    assert seen(ledger) == WHAT_IS_OPEN


# --- recovery ---------------------------------------------------------------------------------


def test_recovery_looks_at_what_is_overdue_the_oldest_first_and_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        protocol, "PUBLISHED_WAIT", 20_000_000
    )  # another test's application may have shortened it
    clock = FakeClock()
    ledger = Ledger(MemoryStore(clock))
    for n, lease in enumerate((40, 10, 30, 900)):
        claim(ledger, str(n), LIVE._replace(lease=lease * 1_000_000))
    for n in range(50):  # once their callers are answered, only a person has to look at these
        claim(ledger, f"doubt{n}").doubt("unknown", 0.0)
    clock.advance(10)
    assert list(ledger.overdue()) == []  # within the grace
    clock.advance(60)
    for n in range(50):
        taken = ledger.recover(f"shop.pay:doubt{n}", lambda _: False, LIVE)
        assert isinstance(taken, Tell)
        ledger.answered(f"shop.pay:doubt{n}", taken, LIVE)
    assert [entry.key for entry in ledger.overdue()] == ["shop.pay:1", "shop.pay:2", "shop.pay:0"]
    assert [entry.key for entry in ledger.overdue(2)] == ["shop.pay:1", "shop.pay:2"]


def test_shadow_records_are_in_no_index() -> None:
    ledger = Ledger(MemoryStore())
    claim(ledger.shadow(), "a", LIVE._replace(indexed=False))
    assert seen(ledger) == {}
    assert list(ledger.store.open("idem~shadow:")) == []
    assert [entry.state for entry in ledger.shadow().list("running")] == ["running"]


def test_when_to_look() -> None:
    """The time to look at a record, for each state."""
    record = protocol.fresh(Request(owners.mint(), "t", Fingerprint(), LIVE._replace(lease=7)))
    assert protocol.due(record) == 7 + protocol.GRACE
    assert protocol.due(record, LIVE._replace(indexed=False)) is None
    _, doubtful = protocol.doubt(record, record.owner, "unknown")
    assert doubtful is not None
    assert protocol.due(doubtful) == protocol.PUBLISHED_WAIT  # by then its caller was answered
    _, retried = protocol.doubt(record, record.owner, "unknown", retry=9)
    assert retried is not None
    assert protocol.due(retried) == protocol.PUBLISHED_WAIT + 9
    _, direct = protocol.doubt(record._replace(task_id=""), record.owner, "unknown")
    assert direct is not None
    assert protocol.due(direct) == protocol.NEVER  # a direct call is answered by the error that it raises
    _, settled = protocol.settle(record, record, Outcome(True, b"j1"))
    _, released = protocol.release(record, record.owner)
    assert settled is not None
    assert released is not None
    assert protocol.due(settled) is None
    assert protocol.due(released) is None
    # The clock went back: recovery counts from when that was noticed.
    stamp, now = 10 * DAY, 5 * DAY
    marked = protocol.noticed(record, stamp, now)
    assert marked is not None
    due = protocol.due(marked)
    assert due is not None
    assert stamp + 1 + due == now + 7 + protocol.GRACE


def test_a_rebuilt_index_has_only_the_settled_intents_whose_call_is_kept() -> None:
    ledger = Ledger(MemoryStore(FakeClock()))
    claim(ledger, "plain").settle(Outcome(True, b"j1"), 0.0, owed=b"")
    claim(ledger, "linked").settle(Outcome(True, b"j1"), 0.0, owed=b"its call")
    assert seen(ledger) == {}  # they are not open, though recovery looks at them
    assert ledger.reindex() == 1


def test_an_outcome_that_is_kept_for_a_moment_is_not_owed() -> None:
    ledger = Ledger(MemoryStore(FakeClock()))
    brief = LIVE._replace(result_ttl=2 * protocol.PUBLISHED_WAIT - 1)
    for name, policy, owes in (("long", LIVE, True), ("brief", brief, False)):
        hold = claim(ledger, name, policy)
        hold.settle(Outcome(True, b"j1"), 0.0, owed=b"its call")
        assert (hold.record.recovery is not None, hold.record.call) == (owes, b"its call" if owes else b"")


# --- Redis, where the index is a separate key --------------------------------------------------


def deleted(client: redis.Redis) -> None:
    client.delete(INDEX)


def a_string(client: redis.Redis) -> None:
    client.set(INDEX, "something")


def without_the_sign_that_it_is_complete(client: redis.Redis) -> None:
    client.zrem(INDEX, b"")
    client.zrem(INDEX, "idem:shop.pay:runs")


def of_nonsense(client: redis.Redis) -> None:
    client.zadd(
        INDEX,
        {
            "idem:shop.pay:none": 1,  # no record
            "idem:shop.pay:done1": 2,  # settled
            "idem:shop.pay:list": 3,  # not a record
            "other:shop.pay:a": 4,  # of another namespace
            b"\xff\xfe": 5,  # not text
            "idem:shop.pay:runs": float("inf"),
            "idem:shop.pay:later": -5.5,
            "idem:shop.pay:doubt": 0,
        },
    )
    client.rpush("idem:shop.pay:list", "x")


@pytest.mark.redis
@pytest.mark.parametrize(
    "damage", [deleted, a_string, without_the_sign_that_it_is_complete, of_nonsense], ids=lambda d: d.__name__
)
def test_a_broken_index_in_redis(redis_url: str, damage: Callable[[redis.Redis], None]) -> None:
    ledger = Ledger(open_store(redis_url))
    fill(ledger)
    assert seen(ledger) == WHAT_IS_OPEN
    with redis.Redis.from_url(redis_url) as client:
        right = client.zrange(INDEX, 0, -1, withscores=True)
        damage(client)
        claim(ledger, "during").settle(Outcome(True, b"j1"), 0.0)  # a write does not fail for the index
        assert list(ledger.overdue()) == []
        assert seen(ledger) == WHAT_IS_OPEN
        assert client.zrange(INDEX, 0, -1, withscores=True) == right
    ledger.store.close()


@pytest.mark.redis
def test_a_user_who_may_not_write_the_index(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis()
    ledger = Ledger(open_store(server.url))
    fill(ledger)
    with redis.Redis.from_url(server.url) as client:
        client.execute_command(
            "ACL", "SETUSER", "reader", "on", ">s3cret", "~*", "+@read", "+@scripting", "+time", "+select"
        )
    reader = Ledger(open_store(server.url.replace("//", "//reader:s3cret@")))
    assert seen(reader) == WHAT_IS_OPEN  # by a scan
    assert seen(ledger) == WHAT_IS_OPEN
    assert seen(reader) == WHAT_IS_OPEN
