"""A write that also stores and publishes a second value: both are written, or the first alone, or neither."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from celery_idem.core.errors import StoreError
from celery_idem.core.model import Stored
from celery_idem.stores import open_store
from celery_idem.stores.base import Announcement, Change, Creation
from celery_idem.stores.redis import RedisStore

pytestmark = pytest.mark.redis

OLD, NEW = b"a" * 20, b"b" * 20
TOLD = Announcement(b"answers:1", b"paid", 60)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def store(redis_url: str) -> RedisStore:
    opened = open_store(redis_url)
    assert isinstance(opened, RedisStore)
    return opened


def standing(store: RedisStore) -> Stored:
    held = store.create("k", OLD).stored
    assert held is not None
    return held


def test_both_are_written_and_the_channel_is_told(store: RedisStore, client: redis.Redis) -> None:
    with client.pubsub() as ears:
        ears.subscribe(TOLD.key)
        assert ears.get_message(timeout=5)
        reply, told = store.announce(Change("k", standing(store), NEW), TOLD)
        assert (reply.done, told) == (True, True)
        message = ears.get_message(timeout=5)
    assert message is not None
    assert message["data"] == client.get(TOLD.key) == b"paid"
    assert 0 < client.ttl(TOLD.key) <= 60  # type: ignore[operator]
    assert store.read("k").stored == reply.stored
    assert reply.stored is not None
    assert reply.stored.value == NEW


def test_a_creation_writes_both_or_finds_another(store: RedisStore, client: redis.Redis) -> None:
    reply, told = store.announce(Creation("k", OLD), TOLD)
    assert (reply.done, told, store.read("k").stored) == (True, True, reply.stored)
    assert client.get(TOLD.key) == b"paid"
    client.delete(TOLD.key)
    again, told = store.announce(Creation("k", NEW), TOLD)
    assert (again.done, told, again.stored) == (False, False, reply.stored)
    assert client.get(TOLD.key) is None
    store.announce(Creation("other", OLD), TOLD._replace(seconds=None))
    assert client.ttl(TOLD.key) == -1


def test_for_ever_is_for_ever(store: RedisStore, client: redis.Redis) -> None:
    store.announce(Change("k", standing(store), NEW), TOLD._replace(seconds=None))
    assert client.ttl(TOLD.key) == -1


def test_where_another_wrote_neither_is_written(store: RedisStore, client: redis.Redis) -> None:
    held = standing(store)
    other = store.replace("k", held, b"c" * 20)
    reply, told = store.announce(Change("k", held, NEW), TOLD)
    assert (reply.done, told, reply.stored) == (False, False, other.stored)
    assert client.get(TOLD.key) is None


@pytest.mark.parametrize("channels", ["resetchannels", "allchannels"])
def test_who_may_not_write_it_writes_the_first_alone(
    redis_url: str, client: redis.Redis, channels: str
) -> None:
    client.execute_command(
        "ACL", "SETUSER", "narrow", "reset", "on", ">s3cret", "+@all", "~k", "~k~open", channels
    )
    store = open_store(redis_url.replace("redis://", "redis://narrow:s3cret@"))
    assert isinstance(store, RedisStore)
    reply, told = store.announce(Change("k", standing(store), NEW), TOLD)
    assert (reply.done, told) == (True, False)
    assert client.keys("answers*") == []


def test_it_knows_its_own_address(store: RedisStore, redis_url: str) -> None:
    here = redis.ConnectionPool.from_url(redis_url).connection_kwargs
    assert store.is_at(here)
    assert not store.is_at({"hosts": [here], "master_name": "mymaster"}), (
        "behind sentinels, which name the server"
    )
    for other in (
        {"db": 7},
        {"port": 1},
        {"host": "elsewhere"},
        {"path": "/tmp/socket"},
        {"username": "another"},
    ):
        assert not store.is_at({**here, **other})


def test_a_server_that_is_full_writes_neither(store: RedisStore, client: redis.Redis) -> None:
    held = standing(store)
    client.config_set("maxmemory", "1")
    try:
        with pytest.raises(StoreError, match="maxmemory"):
            store.announce(Change("k", held, NEW), TOLD)
    finally:
        client.config_set("maxmemory", "0")
    assert store.read("k").stored == held
    assert client.get(TOLD.key) is None


def test_a_store_behind_sentinels_is_nowhere_in_particular() -> None:
    store = open_store("sentinel://localhost:26379/0?master_name=mymaster")
    assert not store.is_at({"host": "localhost", "port": 6379, "db": 0}), (
        "the addresses are those of sentinels"
    )


def test_who_may_not_publish_writes_both(redis_url: str, client: redis.Redis) -> None:
    client.execute_command(
        "ACL", "SETUSER", "quiet", "reset", "on", ">s3cret", "+@all", "~*", "resetchannels"
    )
    store = open_store(redis_url.replace("redis://", "redis://quiet:s3cret@"))
    assert isinstance(store, RedisStore)
    for change in (Change("k", standing(store), NEW), Creation("other", OLD)):
        client.delete(TOLD.key)
        reply, told = store.announce(change, TOLD)
        assert (reply.done, told) == (True, True)
        assert client.get(TOLD.key) == b"paid"
        assert store.read(change.key).stored == reply.stored
