"""One Redis for this folder, and workers that differ in pool, broker and time of acknowledgement."""

from __future__ import annotations

import gc
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from celery import Celery
from celery.result import AsyncResult

from tests.celery import apps
from tests.conftest import LOGS, running
from tests.support.effects import Effects, Gate
from tests.support.servers import RabbitMQServer, RedisServer
from tests.support.workers import CeleryWorker

SOON = 60.0
"""Seconds to wait for a result before the test fails. Most results come within one second."""


class Kind(NamedTuple):
    pool: str
    broker: str
    acks_late: bool
    concurrency: int = 4

    def __str__(self) -> str:
        return f"{self.pool}-{self.broker}-{'late' if self.acks_late else 'early'}"


KINDS = [
    Kind("prefork", "redis", False),
    Kind("prefork", "redis", True),
    Kind("prefork", "rabbitmq", False),
    Kind("prefork", "rabbitmq", True),
    Kind("threads", "redis", True),
    Kind("gevent", "redis", True, 20),
    Kind("solo", "redis", False, 1),
]


@dataclass
class Stage:
    """A running worker, and the same application in this process."""

    kind: Kind
    app: Celery
    worker: CeleryWorker
    effects: Effects
    folder: Path

    def __getattr__(self, name: str) -> Any:
        """Return the task of this name."""
        try:
            return self.app.tasks[name]
        except KeyError:
            raise AttributeError(name) from None

    def gate(self, name: str) -> Gate:
        return Gate(self.folder / f"gate-{name}")

    def answers(self, *results: AsyncResult) -> list[Any]:
        return [result.get(timeout=SOON) for result in results]


@pytest.fixture(scope="package")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis server for this folder only. Tests empty the session's server, which would break these workers."""
    with running(lambda: RedisServer(tmp_path_factory.mktemp("celery-redis"))) as server:
        yield server


def start(
    kind: Kind, broker: str, backend: str, folder: Path, module: str = "tests.celery.apps:app", **conf: Any
) -> Stage:
    place = {
        "broker": broker,
        "backend": backend,
        "folder": str(folder),
        "queue": f"q-{uuid.uuid4().hex}",
        "conf": {"task_acks_late": kind.acks_late, **conf},
    }
    worker = CeleryWorker(
        module, folder, pool=kind.pool, concurrency=kind.concurrency, env={apps.ENV: json.dumps(place)}
    )
    effects = Effects(folder / "effects.jsonl")
    return Stage(kind, apps.make(**place), worker, effects, folder)


@pytest.fixture(scope="module")
def stage(
    request: pytest.FixtureRequest, redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    """A running worker of the kind in the `indirect` parameter. Default: prefork, Redis, late acknowledgement."""
    kind: Kind = getattr(request, "param", Kind("prefork", "redis", True))
    broker = redis.url
    if kind.broker == "rabbitmq":
        server: RabbitMQServer = request.getfixturevalue("rabbitmq")
        broker = server.url
    stage = start(kind, broker, redis.url_for(1), tmp_path_factory.mktemp(str(kind)))
    yield stage
    stage.worker.kill()
    gc.collect()  # results unsubscribe when they are deleted, which needs the server
    stage.app.close()


@pytest.fixture(autouse=True)
def _log(request: pytest.FixtureRequest) -> None:
    if "stage" in request.fixturenames:
        stage: Stage = request.getfixturevalue("stage")
        request.node.stash.setdefault(LOGS, []).append(stage.worker.log_tail)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return f"{request.node.originalname}-{uuid.uuid4().hex[:8]}"
