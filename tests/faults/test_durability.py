"""`idem_durability`: a write that the disk or a replica did not confirm raises an error that says so."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from celery_idem.core.errors import StoreError
from celery_idem.stores.redis import RedisStore
from tests.support.servers import RedisServer, ValkeyServer
from tests.support.waiting import wait_for

VALUE = b"o" * 12 + b"record"


def test_fsync_waits_for_the_disk(start_valkey: Callable[..., ValkeyServer]) -> None:
    server = start_valkey(appendonly=True)
    store = RedisStore(server.url, "fsync")
    created = store.create("k", VALUE)
    assert created.done
    assert created.stored is not None
    assert store.replace("k", created.stored, VALUE + b"2").done
    # A killed process loses nothing that the kernel has, so only the counts of the server show that the store waited.
    counts = dict(re.findall(rb"cmdstat_(\w+):calls=(\d+)", store.execute("INFO", "commandstats")))
    assert int(counts[b"waitaof"]) >= 2
    server.kill()
    server.restart()
    reply = store.read("k")
    assert reply.stored is not None
    assert reply.stored.value == VALUE + b"2"


def test_fsync_without_a_file_is_refused(start_valkey: Callable[..., ValkeyServer]) -> None:
    store = RedisStore(start_valkey().url, "fsync")
    with pytest.raises(StoreError, match=r"cannot honour idem_durability='fsync'.*appendonly"):
        store.create("k", VALUE)


def test_fsync_on_a_server_that_does_not_know_it(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis(appendonly=True)
    store = RedisStore(server.url, "fsync")
    if b"redis_version:7.0" not in store.execute("INFO", "server"):
        pytest.skip("this Redis knows WAITAOF")
    with pytest.raises(StoreError, match=r"Redis 7\.2 or Valkey"):
        store.create("k", VALUE)


def test_replicas_are_waited_for(start_redis: Callable[..., RedisServer]) -> None:
    main = start_redis()
    store = RedisStore(main.url + "?socket_timeout=1", "replicas:1")
    with pytest.raises(StoreError, match="0 of 1 replicas"):
        store.create("k", VALUE)
    replica = start_redis(options=("--replicaof", "127.0.0.1", str(main.port)))
    copy = RedisStore(replica.url)
    wait_for(lambda: b"master_link_status:up" in copy.execute("INFO", "replication"), message="the replica")
    # The record was written. The same caller makes it durable by writing it again.
    again = store.create("k", VALUE)
    assert again.done
    assert again.stored is not None
    seen = copy.read("k").stored
    assert seen == again.stored
    changes = store.replace_many([])
    assert changes == []
    replica.pause()
    with pytest.raises(StoreError, match="0 of 1 replicas"):
        store.replace("k", again.stored, VALUE + b"2")
    replica.resume()
    assert store.replace("k", again.stored, VALUE + b"2").done
