"""The Redis store, with redis-server and with Valkey."""

from __future__ import annotations

import socketserver
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.stores import open_store
from celery_idem.stores.base import Change, Reply, Store
from celery_idem.stores.redis import redact
from celery_idem.testing import StoreConformance
from tests.stores.servers import tls
from tests.support.servers import RedisServer

MINE = b"owner-mine--"


class TestRedis(StoreConformance):
    @pytest.fixture(autouse=True)
    def _url(self, redis_url: str) -> None:
        self.url = redis_url

    def make_store(self) -> Store:
        return open_store(self.url)


class TestValkey(StoreConformance):
    @pytest.fixture(autouse=True)
    def _url(self, valkey_url: str) -> None:
        self.url = valkey_url

    def make_store(self) -> Store:
        return open_store(self.url)


def held(reply: Reply) -> Change:
    assert reply.stored is not None
    return Change("", reply.stored, b"")


# --- faults of a server ------------------------------------------------------------------


def test_a_server_that_forgot_the_scripts_is_told_them_again(redis_url: str) -> None:
    store = open_store(redis_url)
    olds = {key: held(store.create(key, MINE)).old for key in "abc"}
    with redis.Redis.from_url(redis_url) as client:
        client.script_flush()
    replies = store.replace_many([Change(key, old, MINE + b"2") for key, old in olds.items()])
    assert [reply.done for reply in replies] == [True] * 3
    with redis.Redis.from_url(redis_url) as client:
        client.script_flush()
    assert store.create("d", MINE).done
    with redis.Redis.from_url(redis_url) as client:
        client.script_flush()
    assert store.read("d").done


def test_a_restarted_server_is_found_again(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis(appendonly=True)
    store = open_store(server.url)
    created = store.create("a", MINE)
    server.kill()
    with pytest.raises(StoreError, match="did not answer"):
        store.read("a")
    server.restart()
    assert store.read("a").stored == created.stored


def test_a_frozen_server_is_an_error_in_bounded_time(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis()
    store = open_store(f"{server.url}?socket_timeout=0.2")
    assert store.create("a", MINE).done
    server.pause()
    try:
        began = time.monotonic()
        with pytest.raises(StoreError, match="did not answer"):
            store.read("a")
        assert time.monotonic() - began < 10  # a bound, far above 0.2: the machine may be slow
    finally:
        server.resume()
    # The late reply to that read must not be taken for the reply to another command.
    assert store.read("b").stored is None
    assert store.create("c", MINE).done
    assert store.read("a").done


def test_a_server_out_of_memory_refuses_and_says_so(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis(options=("--maxmemory", "1mb", "--maxmemory-policy", "noeviction"))
    store = open_store(server.url)
    with pytest.raises(StoreError, match="refused"):
        fill(store)


def fill(store: Store) -> None:
    for n in range(200):
        store.create(str(n), MINE + bytes(100_000))


def test_what_cannot_be_opened_is_an_error_of_the_store(redis_url: str) -> None:
    """An error of redis-py must not escape, because no caller of a store expects one."""
    with pytest.raises(StoreError, match=r"refused: DB index is out of range\. Choose another database"):
        open_store(f"{redis_url.rpartition('/')[0]}/99").read("a")


class Web(socketserver.BaseRequestHandler):
    """Answers like a web server."""

    def handle(self) -> None:
        self.request.recv(4096)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_another_server_at_that_port_is_an_error_of_the_store() -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), Web) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            with pytest.raises(StoreError, match=r"does not answer as Redis does: Protocol.*host and port"):
                open_store(f"redis://127.0.0.1:{web.server_address[1]}/0").read("a")
        finally:
            web.shutdown()
            thread.join()


@pytest.mark.parametrize("write", ["set", "short", "empty", "list"])
def test_what_is_not_ours_is_an_error_and_stays(redis_url: str, write: str) -> None:
    store = open_store(redis_url)
    with redis.Redis.from_url(redis_url) as client:
        if write == "set":
            client.set("a", "somebody else's")
        elif write in ("short", "empty"):
            client.set("a", "x" if write == "short" else "")
        else:
            client.rpush("a", "x")
    for call in (lambda: store.read("a"), lambda: store.peek("a"), lambda: store.create("a", MINE)):
        with pytest.raises(StoreError, match="not a record of celery_idem"):
            call()
    assert not store_is_changed(store)


def store_is_changed(store: Store) -> bool:
    return any(stored.value.startswith(MINE) for _, stored in store.scan(""))


def test_a_list_among_the_keys_does_not_end_a_scan(redis_url: str) -> None:
    store = open_store(redis_url)
    store.create("a:1", MINE)
    with redis.Redis.from_url(redis_url) as client:
        client.rpush("a:list", "x")
        client.set("a:short", "x")
    assert [key for key, _ in store.scan("a:")] == ["a:1"]


def test_a_scan_does_not_ask_for_many_large_values_at_once(redis_url: str) -> None:
    """One MGET of fifty results of 1 MiB each blocks the server for other clients for 26 ms."""
    store = open_store(redis_url)
    with redis.Redis.from_url(redis_url) as client:
        for n in range(20):
            client.set(f"large:{n}", bytes(8) + MINE + bytes(1 << 20))
        client.config_resetstat()
        assert len(list(store.scan("large:"))) == 20
        assert client.info("commandstats")["cmdstat_mget"]["calls"] == 20


def test_replace_of_a_shorter_foreign_value_is_refused(redis_url: str) -> None:
    store = open_store(redis_url)
    old = held(store.create("a", MINE)).old
    with redis.Redis.from_url(redis_url) as client:
        client.set("a", "")
        with pytest.raises(StoreError, match="not a record of celery_idem"):
            store.replace("a", old, MINE)
        assert client.get("a") == b""


# --- forms of the URL ----------------------------------------------------------------------


def test_database_and_password(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis()
    with redis.Redis.from_url(
        server.url
    ) as client:  # set later, because the fixture must connect without a password
        client.config_set("requirepass", "s3cret")
    good = open_store(f"redis://:s3cret@127.0.0.1:{server.port}/3")
    assert good.create("a", MINE).done
    with redis.Redis(port=server.port, db=3, password="s3cret") as client:
        assert client.exists("a")
    assert "s3cret" not in good.url
    with pytest.raises(StoreError) as caught:
        open_store(f"redis://:wr0ng@127.0.0.1:{server.port}/3").read("a")
    assert "wr0ng" not in str(caught.value)


def test_unix_socket_in_kombus_spelling(start_redis: Callable[..., RedisServer], tmp_path: Path) -> None:
    path = tmp_path / "s"  # short: a socket's path holds 108 bytes
    server = start_redis(options=("--unixsocket", str(path)))
    store = open_store(f"redis+socket://{path}?virtual_host=2")
    assert store.create("a", MINE).done
    with redis.Redis(port=server.port, db=2) as client:
        assert client.exists("a")


def test_tls(start_redis: Callable[..., RedisServer], tmp_path: Path) -> None:
    port, certificate, options = tls(tmp_path, "localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    start_redis(options=options)
    store = open_store(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}")
    assert store.create("a", MINE).done
    assert store.read("a").done
    with pytest.raises(StoreError):  # a certificate of an unknown authority
        open_store(f"rediss://127.0.0.1:{port}/0").read("a")


def test_a_url_that_is_none_says_so_without_the_password() -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_store("redis://:s3cret@localhost:port/1").read("a")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="redis://"):
        open_store("radis://localhost")


def test_redact() -> None:
    assert redact("redis://user:s3cret@host:1/2?password=x") == "redis://host:1/2"
    assert redact("unix:///run/redis.sock?db=2") == "unix:///run/redis.sock"
