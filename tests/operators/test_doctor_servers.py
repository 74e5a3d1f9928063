"""``doctor`` finds servers that are full, lost their data, are read-only, or failed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis as redis_py

from celery_idem.operate import doctor
from celery_idem.operate.doctor import at_start, kept, servers
from celery_idem.stores import sql_connections
from tests.operators.conftest import command_line
from tests.operators.test_doctor import an_app
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for

FILLER = b"x" * 100_000


def asked(url: str, **conf: Any) -> dict[str, doctor.Finding]:
    app = an_app(conf={"idem_store": url, **conf})
    return {finding.code: finding for finding in doctor.examine(doctor.gather(app), doctor.ASKING)}


def fill(client: redis_py.Redis, count: int) -> None:
    for n in range(count):
        client.set(f"other:{n}", FILLER)


@pytest.fixture
def worker() -> Iterator[Callable[[str], None]]:
    """Run the start-up step of a worker, and wait until it has written its note about the server."""
    steps: list[at_start.AtStart] = []

    def start(url: str) -> None:
        app = an_app(conf={"idem_store": url})
        step = at_start.AtStart(SimpleNamespace(app=None, steps=[]))
        step.start(SimpleNamespace(app=app, pool_cls=None))
        steps.append(step)
        (ledger,) = doctor.snapshot.Operator(app).ledgers()
        wait_for(lambda: kept.read(ledger, servers.NAME), message="the worker's note")

    yield start
    for step in steps:
        step.stop(None)


# --- full -------------------------------------------------------------------------------


@pytest.mark.redis
def test_a_full_redis(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis(appendonly=True)
    with redis_py.Redis.from_url(server.url) as client:
        fill(client, 20)
        used = int(client.info("memory")["used_memory"])
        client.config_set("maxmemory", int(used / 0.9))
        found = asked(server.url)
        assert {"memory"} == set(found)
        assert found["memory"].severity == "warning"

        client.config_set("maxmemory", used // 2)
        found = asked(server.url)
        assert {"memory", "not-writable"} == set(found)
        assert {finding.severity for finding in found.values()} == {"error"}
        assert "not allowed when used memory" in found["not-writable"].wrong
        assert "shop.send not run, tried again later" in found["not-writable"].wrong
        assert "maxmemory" in found["not-writable"].change
        assert command_line(an_app(conf={"idem_store": server.url}))("doctor").exit_code == 1

        client.config_set("maxmemory", 10 * used)
        assert asked(server.url) == {}
        assert set(client.scan_iter("idem*")) <= {b"idem~open"}, "the probe is deleted"


@pytest.mark.redis
def test_a_redis_that_has_evicted(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis(appendonly=True)
    with redis_py.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", int(client.info("memory")["used_memory"]) + 500_000)
        client.config_set("maxmemory-policy", "allkeys-lru")
        fill(client, 20)
        assert client.info("stats")["evicted_keys"]
        found = asked(server.url)
        assert found["evicted"].severity == found["eviction"].severity == "error"

        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")
        found = asked(server.url)
        assert set(found) == {"evicted"}
        assert found["evicted"].severity == "warning"


# --- another run of the server ------------------------------------------------------------


@pytest.mark.redis
def test_a_redis_that_came_back_empty(
    start_redis: Callable[..., RedisServer],
    worker: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(at_start, "EVERY", 0.05)
    server = start_redis()
    worker(server.url)
    assert "data-lost" not in asked(server.url)
    with caplog.at_level("ERROR", logger="celery_idem"):
        server.kill()
        server.restart()
        wait_for(lambda: "has lost its data" in caplog.text, message="the worker to notice")
    found = asked(server.url)["data-lost"]
    assert found.severity == "error"
    assert "Every action from before then is forgotten" in found.wrong
    keep = {"idem_result_ttl": 0.0, "idem_failure_ttl": 0.0}
    assert "data-lost" not in asked(server.url, **keep), "nothing from before would be remembered any more"


@pytest.mark.redis
def test_a_redis_that_was_restarted_with_its_data(
    start_redis: Callable[..., RedisServer], worker: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_start, "EVERY", 0.05)
    server = start_redis(appendonly=True)
    worker(server.url)
    assert asked(server.url) == {}
    (ledger,) = doctor.snapshot.Operator(an_app(conf={"idem_store": server.url})).ledgers()
    noted = kept.read(ledger, servers.NAME)["runs"][0]["since"]
    # Redis counts its uptime in whole seconds, so a start shortly after the note could seem to be before it.
    wait_for(lambda: ledger.store.read("").now / 1e6 > noted + 1, message="a second to pass")
    server.restart()
    assert set(asked(server.url)) == {"restart"}
    wait_for(
        lambda: len(kept.read(ledger, servers.NAME)["runs"]) == 2, message="a worker to note the restart"
    )
    found = asked(server.url)
    assert set(found) == {"restart"}
    assert found["restart"].severity == "note"
    with redis_py.Redis.from_url(server.url) as client:
        client.config_set("appendonly", "no")
    found = asked(server.url)
    assert found["restart"].severity == "warning"
    assert "appendonly yes" in found["restart"].change


@pytest.mark.redis
def test_a_replica_that_lags_and_then_takes_over(
    start_redis: Callable[..., RedisServer], worker: Callable[[str], None]
) -> None:
    at_once = ("--repl-diskless-sync-delay", "0")
    primary = start_redis(appendonly=True, options=at_once)
    replica = start_redis(appendonly=True, options=at_once)
    with redis_py.Redis.from_url(replica.url) as client, redis_py.Redis.from_url(primary.url) as other:
        client.replicaof("127.0.0.1", str(primary.port))
        wait_for(lambda: client.info("replication")["master_link_status"] == "up", message="the replica")
        wait_for(lambda: client.info("server")["uptime_in_seconds"] >= 2, message="a start before the note")
        worker(primary.url)
        wait_for(lambda: client.exists("idem~kept:servers"), message="the note at the replica")
        found = asked(primary.url)
        assert set(found) == {"replicas"}
        assert 'idem_durability = "replicas:1"' in found["replicas"].change
        assert asked(replica.url)["read-only"].severity == "error"
        replica.pause()
        try:
            fill(other, 3)
            wait_for(lambda: "replica-lags" in asked(primary.url), 30, message="the replica to lag")
            assert " bytes behind" in asked(primary.url)["replica-lags"].wrong
        finally:
            replica.resume()
        client.replicaof("NO", "ONE")
        found = asked(replica.url)
        assert set(found) == {"failover"}
        assert found["failover"].severity == "warning"
        assert 'idem_durability = "replicas:1"' in found["failover"].change


@pytest.mark.parametrize(
    ("noted", "present", "what"),
    [
        ([("a", "1")], ("a", "1"), None),
        ([("a", "1")], ("a", "2"), "recovery"),
        ([("a", "1")], ("b", "1"), "copy"),
        ([("a", "1"), ("b", "1")], ("b", "1"), "copy"),
        ([], ("a", "1"), None),
    ],
)
def test_runs_of_a_postgresql(
    noted: list[tuple[str, str]], present: tuple[str, str], what: str | None
) -> None:
    """`doctor` distinguishes a recovery from a copy by the identifier and the timeline of a PostgreSQL server."""
    runs = [{"run": run, "line": line, "since": 900.0 + n} for n, (run, line) in enumerate(noted)]
    store = doctor.StoreFacts(
        "postgresql://x",
        tasks=("shop.send",),
        noted={"runs": runs},
        server={"run": present[0], "line": present[1]},
        now=1000.0,
    )
    tasks = (doctor.TaskFacts("shop.send", True),)
    found = doctor.examine(doctor.Snapshot(stores=(store,), tasks=tasks), doctor.ASKING)
    assert [finding.code for finding in found] == ([what] if what else [])


# --- databases --------------------------------------------------------------------------


@pytest.mark.postgres
def test_a_postgresql_that_does_not_take_writes(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    assert asked(postgres_url) == {}
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        with admin.transaction():
            admin.execute("LOCK TABLE celery_idem IN SHARE MODE")
            monkeypatch.setattr(sql_connections, "TIMEOUT", 0.5)
            found = asked(postgres_url)
            monkeypatch.undo()
        assert set(found) == {"not-writable"}
        assert "no answer within 0.5 s" in found["not-writable"].wrong

        name = admin.info.dbname
        admin.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        found = asked(f"{postgres_url}?application_name=another_session")
    assert set(found) == {"not-writable"}
    assert found["not-writable"].severity == "error"
    assert "default_transaction_read_only off" in found["not-writable"].change


def test_a_sqlite_file_that_another_process_locks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    monkeypatch.setattr(sql_connections, "TIMEOUT", 0.2)
    url = f"sqlite:///{tmp_path}/idem.db"
    assert asked(url) == {}
    with sqlite3.connect(tmp_path / "idem.db") as other:
        other.execute("BEGIN IMMEDIATE")
        found = asked(url)
    assert set(found) == {"not-writable"}
    assert "locked" in found["not-writable"].wrong
