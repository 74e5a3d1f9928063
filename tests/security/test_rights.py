"""The rights in docs/security.md are enough for a worker and for operators, and they allow nothing more."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import Celery

from celery_idem import OutcomeUnknown, StoreError
from celery_idem.stores import open_store
from tests.security.conftest import command_line
from tests.security.rights_app import make
from tests.support.effects import Effects
from tests.support.servers import PostgresServer, RedisServer
from tests.support.workers import CeleryWorker

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


@pytest.fixture
def served(tmp_path: Path, start_worker: Callable[..., CeleryWorker]) -> Callable[[str, str], Celery]:
    """`served(broker, store)` starts a worker and returns its application."""

    def start(broker: str, store: str) -> Celery:
        env = {"RIGHTS_BROKER": broker, "RIGHTS_STORE": store, "RIGHTS_FOLDER": str(tmp_path)}
        start_worker("tests.security.rights_app", env=env)
        return make(broker, store, tmp_path)

    return start


def everything_a_worker_does(app: Celery, done: Effects) -> None:
    pay = app.tasks["rights.pay"]
    for how in ("", "retry", "die"):
        name = f"a{how}"
        assert pay.delay(name, how).get(timeout=30) == f"paid {name}"
        assert pay.delay(name, how).get(timeout=30) == f"paid {name}"  # the same, from the record
        assert done.count(name) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="aerror"):
            pay.delay("aerror", "error").get(timeout=30)
    for name in ("adoubt", "bdoubt"):
        with pytest.raises(OutcomeUnknown):
            pay.delay(name, "doubt").get(timeout=30)
    assert done.count() == 6


def everything_a_reader_does(app: Celery) -> None:
    rows = [json.loads(line) for line in command_line(app, "list", "--json").splitlines()]
    assert len(rows) == 6
    assert [row["key"] for row in rows if row["state"] == "in_doubt"]
    for words in (("list", "--json", "--state=in_doubt"), ("stats", "--json"), ("audit", "--json")):
        assert "Error: " not in command_line(app, *words)
    assert json.loads(command_line(app, "show", "--json", rows[0]["key"]))["key"] == rows[0]["key"]


def everything_an_operator_does(app: Celery) -> None:
    pay = app.tasks["rights.pay"]
    doubtful = [pay.intent_key(name) for name in ("adoubt", "bdoubt")]
    for key, answer in zip(doubtful, ("--happened=1", "--not-happened"), strict=True):
        told = command_line(app, "resolve", "--json", "--yes", key, answer, "--evidence=seen")
        assert json.loads(told)["state"] == ("succeeded" if answer == "--happened=1" else "released")
    assert json.loads(command_line(app, "forget", "--json", "--yes", doubtful[0]))["forgotten"]
    assert "purged" in json.loads(command_line(app, "purge", "--json", "--yes"))


def refused_to_write(app: Celery, key: str) -> None:
    for words in (("forget", "--yes", key), ("resolve", "--yes", key, "--not-happened", "--evidence=x")):
        assert re.search("permission denied|needs more rights", command_line(app, *words)), words


# --- Redis ------------------------------------------------------------------------------------------


@pytest.fixture
def redis_users(start_redis: Callable[..., RedisServer]) -> RedisServer:
    """A server with the users of docs/security.md."""
    import redis

    server = start_redis()
    rules = re.findall(r"^ACL SETUSER (.+)$", block("redis"), re.MULTILINE)
    assert len(rules) == 2
    with redis.Redis.from_url(server.url) as admin:
        for rule in rules:
            admin.execute_command("ACL", "SETUSER", *rule.replace("PASSWORD", "s3cret").split())
    return server


@pytest.mark.redis
def test_redis_users(redis_users: RedisServer, served: Callable[[str, str], Celery], tmp_path: Path) -> None:
    def url(user: str) -> str:
        return f"redis://{user}:s3cret@127.0.0.1:{redis_users.port}/0"

    app = served(redis_users.url_for(1), url("shop-worker"))
    everything_a_worker_does(app, Effects(tmp_path / "effects.jsonl"))
    reader = make("memory://", url("shop-reader"), tmp_path)
    everything_a_reader_does(reader)
    refused_to_write(reader, app.tasks["rights.pay"].intent_key("adoubt"))
    everything_an_operator_does(app)
    shadow = make("memory://", url("shop-worker"), tmp_path, idem_shadow=True)
    shadow.tasks["rights.pay"].apply(("in shadow",), throw=True)
    assert "rights.pay" in command_line(shadow, "shadow", "--json")
    worker = open_store(url("shop-worker"))
    for key in ("other:a", "idem2:a", "theirs~shadow:a"):
        with pytest.raises(StoreError, match=r"(?i)permission"):
            worker.read(key)
        with pytest.raises(StoreError, match=r"(?i)permission"):
            worker.create(key, b"x" * 40)
    for command in ("FLUSHALL", "KEYS *", "CONFIG GET *", "SHUTDOWN", "ACL LIST", "SUBSCRIBE a"):
        with pytest.raises(StoreError, match=r"(?i)permission"):
            worker.execute(*command.split())  # type: ignore[attr-defined]


# --- PostgreSQL -------------------------------------------------------------------------------------


@pytest.fixture
def shop_database(postgres: PostgresServer, tmp_path: Path) -> Iterator[str]:
    """The URL, without the user, of a database with the table and the roles of docs/security.md."""
    import psycopg

    url = postgres.create_database(f"rights_{uuid.uuid4().hex}")
    table = command_line(make("memory://", "memory://", tmp_path), "schema")
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(table)
        admin.execute(block("sql"))
    yield url.replace("postgres@", "{}@")
    with psycopg.connect(
        url, autocommit=True
    ) as admin:  # roles belong to the server, which other tests use as well
        admin.execute("DROP OWNED BY shop_worker, shop_reader; DROP ROLE shop_worker, shop_reader")


@pytest.mark.postgres
@pytest.mark.redis
def test_postgresql_roles(
    shop_database: str, redis_url: str, served: Callable[[str, str], Celery], tmp_path: Path
) -> None:
    app = served(redis_url, shop_database.format("shop_worker"))
    everything_a_worker_does(app, Effects(tmp_path / "effects.jsonl"))
    reader = make("memory://", shop_database.format("shop_reader"), tmp_path)
    everything_a_reader_does(reader)
    refused_to_write(reader, app.tasks["rights.pay"].intent_key("adoubt"))
    everything_an_operator_does(app)
    worker, owner = (
        open_store(shop_database.format("shop_worker")),
        open_store(shop_database.format("postgres")),
    )
    owner.create("other:a", b"x" * 40)
    assert worker.read("other:a").stored is None  # row level security hides the rows of other namespaces
    assert [key for key, _ in worker.scan("") if not key.startswith(("idem:", "idem~"))] == []
    with pytest.raises(StoreError, match="policy"):
        worker.create("other:b", b"x" * 40)
