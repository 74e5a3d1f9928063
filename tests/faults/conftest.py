"""Fixtures of the fault tests: a broker, a store, workers, and a destination that counts effects."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.result import AsyncResult
from celery.states import READY_STATES

from celery_idem import Ledger
from celery_idem.engine.entries import Entry
from celery_idem.stores import open_store
from tests.conftest import running
from tests.faults import app as faulty
from tests.faults.rows import ADVICE, COMMITTED, Row, observe, read
from tests.support.effects import Effects, Gate
from tests.support.servers import RabbitMQServer, RedisServer
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

BROKERS = ("rabbitmq", "redis")

# The application of the workers. With "tests.faults.unguarded" these tests have to fail.
APP = os.environ.get("FAULTS_APP", "tests.faults.app")

# Seconds. Shorter than the lease, so that a decision within this time was not caused by the lease;
# much longer than a decision takes, so that no test fails on a busy machine.
SOON = faulty.LEASE - 10.0


class Case:
    """One call: its message, its record, its effects, and the answer that its caller receives."""

    def __init__(self, stage: Stage, task: str, intent: str, result: AsyncResult) -> None:
        self.stage = stage
        self.task = task
        self.intent = intent
        self.result = result

    @property
    def effects(self) -> int:
        return self.stage.effects.count(self.intent)

    @property
    def entry(self) -> Entry | None:
        return self.stage.entry(self.task, self.intent)

    @property
    def state(self) -> str:
        entry = self.entry
        return entry.state if entry is not None else "absent"

    @property
    def gate(self) -> Gate:
        return Gate(self.stage.folder / f"gate-{self.intent}")

    def wait_answer(self, timeout: float = SOON) -> str:
        """Wait for the caller's answer. Return "the result" or the name of the exception."""
        wait_for(
            lambda: self.result.state in READY_STATES,
            timeout,
            lambda: f"an answer to {self.task} {self.intent}: {self.result.state}, record {self.state}",
        )
        if self.result.state == "SUCCESS":
            assert self.result.result == f"done: {self.intent}"
            return "the result"
        return type(self.result.result).__name__

    def wait_state(self, *states: str, timeout: float = SOON) -> str:
        """Wait until the record is in one of these states, and return it."""
        return wait_for(
            lambda: self.state if self.state in states else "",
            timeout,
            lambda: f"{states} of {self.task} {self.intent}, which is {self.state}",
        )

    def wait_final_answer(self, expected: str) -> str:
        """Read the answer again until it is the expected one: a later answer may replace the first."""

        def answer() -> str:
            self.result = AsyncResult(self.result.id, app=self.stage.publisher)
            return self.wait_answer()

        return wait_for(
            lambda: expected if answer() == expected else "",
            SOON,
            lambda: f"{expected} of {self.task} {self.intent}: {answer()}",
        )

    def wait_hanging(self, timeout: float = SOON) -> int:
        """Wait until the body hangs at its crash point. Return the pid of its process."""
        place = self.stage.folder / f"hangs-{self.intent}"
        text = wait_for(lambda: place.exists() and place.read_text(), timeout, f"{self.intent} to hang")
        return int(text)

    def again(self, **options: Any) -> Case:
        """Publish the same action again, as a new message of another caller."""
        return self.stage.call(self.task, self.intent, **options)

    def row(self, fault: str, acks: str, sees: str) -> None:
        """Record what was observed, and compare it with what the documentation says."""
        row = Row(
            fault=fault,
            policy=self.task.partition(".")[0],
            acks=acks,
            broker=self.stage.broker_name,
            effects=self.effects,
            sees=sees,
            ends=self.state,
        )
        observe(row)
        assert read(COMMITTED).get(row.case) == row, ADVICE


class Stage:
    """One broker, one store, one folder and any number of workers."""

    def __init__(
        self,
        folder: Path,
        broker_name: str,
        broker_url: str,
        store: RedisServer,
        results: RedisServer | None = None,
        query: str = "",
    ) -> None:
        self.folder = folder
        self.broker_name = broker_name
        self.broker_url = broker_url
        self.store = store
        self.queue = f"faults-{uuid.uuid4().hex}"
        self.effects = Effects(folder / "effects.jsonl")
        self.workers: list[CeleryWorker] = []
        self.backend_url = (results or store).url_for(2)
        self.store_url = store.url_for(1) + query
        self.publisher = Celery(
            "publisher", broker=broker_url, backend=self.backend_url, set_as_current=False
        )
        self.publisher.conf.task_default_queue = self.queue
        if broker_name == "rabbitmq":
            # Publishing waits until the message is on the broker's disk, so that it survives a kill.
            self.publisher.conf.broker_transport_options = {"confirm_publish": True}
        self.ledger = Ledger(open_store(store.url_for(1)))

    def start_worker(self, *, env: dict[str, str] | None = None, **options: Any) -> CeleryWorker:
        settings = {
            "FAULTS_FOLDER": str(self.folder),
            "FAULTS_BROKER": self.broker_url,
            "FAULTS_BACKEND": self.backend_url,
            "FAULTS_STORE": self.store_url,
            "FAULTS_QUEUE": self.queue,
        }
        worker = CeleryWorker(APP, self.folder, env={**settings, **(env or {})}, **options)
        self.workers.append(worker)
        return worker

    def call(self, task: str, intent: str = "", at: str = "", how: str = "", **options: Any) -> Case:
        """Publish as a producer that does not use celery_idem: the worker derives the key."""
        intent = intent or uuid.uuid4().hex[:12]
        kwargs = {"intent": intent, "policy": task.partition(".")[0], "at": at, "how": how}
        return Case(self, task, intent, self.publisher.send_task(task, kwargs=kwargs, **options))

    def entry(self, task: str, intent: str) -> Entry | None:
        key = faulty.app.tasks[task].intent_key(intent=intent, policy="")
        return self.ledger.get(key)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.ledger.store.close()
        self.publisher.close()


@pytest.fixture(scope="module")
def make_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Stage]]:
    """`make_stage("redis", broker_url, store)` returns a Stage, which is closed after the module."""
    stages: list[Stage] = []

    def make(broker_name: str, broker_url: str, store: RedisServer, *more: Any) -> Stage:
        stage = Stage(tmp_path_factory.mktemp("stage"), broker_name, broker_url, store, *more)
        stages.append(stage)
        return stage

    yield make
    for stage in stages:
        stage.close()


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for one test module: broker, store and results in databases 0, 1 and 2."""
    with running(lambda: RedisServer(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest.fixture(scope="module", params=BROKERS)
def stage(request: pytest.FixtureRequest, make_stage: Callable[..., Stage], own_redis: RedisServer) -> Stage:
    """A stage with each of the brokers, without workers."""
    if request.param == "redis":
        return make_stage("redis", own_redis.url_for(0), own_redis)
    rabbitmq: RabbitMQServer = request.getfixturevalue("rabbitmq")
    return make_stage("rabbitmq", rabbitmq.url, own_redis)
