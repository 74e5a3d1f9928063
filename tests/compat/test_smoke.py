"""Tests with a real worker on each broker that run for every version of the matrix, in less than half a minute."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import celery
import pytest
from celery import Celery, chain, chord
from kombu import Connection, Exchange, Producer, Queue

from celery_idem import FingerprintMismatch
from tests.compat.app import make
from tests.conftest import running
from tests.support.effects import Effects, Gate
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

SOON = 40.0
"""Seconds to wait for a result before the test fails. Most results come within one second, after a kill within five."""

BROKERS = [
    pytest.param("redis", marks=pytest.mark.redis),
    pytest.param("valkey", marks=pytest.mark.valkey),
    pytest.param("rabbitmq", marks=[pytest.mark.rabbitmq, pytest.mark.redis]),
    pytest.param("quorum", marks=[pytest.mark.rabbitmq, pytest.mark.redis]),
]


class Stage(NamedTuple):
    app: Celery
    worker: CeleryWorker
    effects: Effects
    folder: Path
    broker: str

    def call(self, task: str, *args: Any, **kwargs: Any) -> Any:
        return self.app.tasks[f"compat.{task}"].delay(*args, **kwargs)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis server for this file only. Tests empty the session's server, which would break these workers."""
    with running(lambda: RedisServer(tmp_path_factory.mktemp("compat-redis"))) as server:
        yield server


@pytest.fixture(scope="module", params=BROKERS)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    kind = request.param
    quorum = kind == "quorum"
    if quorum and celery.VERSION < (5, 5):
        pytest.skip("Celery before 5.5 asks for a global prefetch limit, which quorum queues refuse")
    if kind in ("rabbitmq", "quorum"):
        broker, backend = request.getfixturevalue("rabbitmq").url, request.getfixturevalue("redis").url
    elif kind == "valkey":
        broker = backend = request.getfixturevalue("valkey_server").url
    else:
        broker = backend = request.getfixturevalue("redis").url
    folder = tmp_path_factory.mktemp(f"compat-{kind}")
    queue = f"compat-{uuid.uuid4().hex}"
    place = {
        "COMPAT_FOLDER": str(folder),
        "COMPAT_BROKER": broker,
        "COMPAT_BACKEND": backend,
        "COMPAT_QUEUE": queue,
        "COMPAT_QUORUM": "1" if quorum else "0",
    }
    worker = CeleryWorker("tests.compat.app:app", folder, concurrency=3, env=place)
    try:
        app = make(broker, backend, queue, quorum)
        yield Stage(app, worker, Effects(folder / "effects.jsonl"), folder, kind)
    finally:
        print(worker.log_tail(200))  # pytest shows it if a test fails
        worker.kill()


@pytest.fixture
def name() -> str:
    return f"intent-{uuid.uuid4().hex[:12]}"


def test_a_duplicate_of_something_done(stage: Stage, name: str) -> None:
    assert stage.call("pay", name, 7).get(timeout=SOON) == 7
    assert stage.call("pay", name, cents=7, note="reworded").get(timeout=SOON) == 7
    by_name = stage.app.send_task("compat.pay", (name,), {"cents": 7})  # without our headers
    assert by_name.get(timeout=SOON) == 7
    with pytest.raises(FingerprintMismatch):
        stage.call("pay", name, 8).get(timeout=SOON)
    assert stage.effects.count(name) == 1


def test_a_duplicate_of_something_running(stage: Stage, name: str) -> None:
    first = stage.call("slow", name)
    stage.effects.wait(name)
    second = stage.call("slow", name)
    wait_for(lambda: stage.worker.sent_back(second.id), SOON, "the duplicate to wait")
    Gate(stage.folder / f"gate-{name}").open()
    assert first.get(timeout=SOON) == second.get(timeout=SOON) == f"slow {name}"
    assert stage.effects.count(name) == 1


def test_chord_and_chain(stage: Stage, name: str) -> None:
    tasks = stage.app.tasks
    pay, total = tasks["compat.pay"], tasks["compat.total"]
    for _ in range(2):
        header = [pay.s(f"{name}-{cents}", cents) for cents in (1, 2, 3)]
        assert chord(header, total.s(name)).apply_async().get(timeout=SOON) == 6
    links = chain(pay.si(f"{name}-1", 1), pay.si(f"{name}-4", 4))
    assert links.apply_async().get(timeout=SOON) == 4
    mine = {intent: count for intent, count in stage.effects.counts().items() if intent.startswith(name)}
    assert mine == dict.fromkeys([name, *(f"{name}-{cents}" for cents in (1, 2, 3, 4))], 1)


def test_retry(stage: Stage, name: str) -> None:
    assert stage.call("retries", name).get(timeout=SOON) == 2
    assert stage.call("retries", name).get(timeout=SOON) == 2
    assert stage.effects.count(name) == 1


def test_a_failure_is_replayed(stage: Stage, name: str) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=name):
            stage.call("fails", name).get(timeout=SOON)
    assert stage.effects.count(name) == 1


@pytest.mark.parametrize("at", ["before", "after", "exit"])
def test_a_process_that_dies(stage: Stage, name: str, at: str) -> None:
    results = [stage.call("dies", name, at) for _ in range(2)]
    assert [result.get(timeout=SOON) for result in results] == [f"paid {name}"] * 2
    assert (stage.folder / f"died-{name}").exists()
    assert stage.effects.count(name) == 1


def test_a_message_that_was_dead_lettered(stage: Stage, name: str) -> None:
    """A dead-lettered message can go back to its queue, although RabbitMQ adds a header with a datetime to it."""
    if stage.broker not in ("rabbitmq", "quorum"):
        pytest.skip("Redis has no dead letters")
    first = stage.call("slow", name)
    stage.effects.wait(name)
    conf = stage.app.conf
    with Connection(conf.broker_url) as connection:
        to = stage.app.amqp.queues[conf.task_default_queue]
        parking = Queue(
            f"parking-{name}",
            Exchange(""),
            routing_key=f"parking-{name}",
            queue_arguments={
                "x-message-ttl": 1,
                "x-dead-letter-exchange": to.exchange.name,
                "x-dead-letter-routing-key": to.routing_key,
                **(to.queue_arguments or {}),
            },
        )(connection)
        parking.declare()
        task_id = str(uuid.uuid4())
        Producer(connection).publish(
            [[name], {}, None],
            routing_key=parking.name,
            headers={"task": "compat.slow", "id": task_id, "lang": "py"},
            serializer="json",
        )
        late = stage.app.AsyncResult(task_id)
        wait_for(lambda: stage.worker.sent_back(task_id), SOON, "the duplicate to wait")
        parking.delete()
    Gate(stage.folder / f"gate-{name}").open()
    assert first.get(timeout=SOON) == late.get(timeout=SOON) == f"slow {name}"
    assert stage.effects.count(name) == 1
