"""Nobody calls again: what had begun or was accepted ends all the same, and its callers receive an answer.

The broker is a Redis database that the tests empty, which is as good as a broker that loses everything.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator

import pytest
from celery import Celery, chain, chord, signature

from celery_idem import IdempotentTask, Receipt
from celery_idem.integration import submitting
from tests.faults.app import effect
from tests.faults.conftest import Stage
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for

SHORT = {"FAULTS_LEASE": "2", "FAULTS_PUBLISHED_WAIT": "2000000"}
ANSWERED_WITHIN = 60.0  # seconds; lease and five seconds on a quiet machine


class Producer:
    """A process that has the tasks, and calls them with `submit`."""

    def __init__(self, stage: Stage, broker: str = "") -> None:
        self.app = Celery(
            "producer", broker=broker or stage.broker_url, backend=stage.backend_url, set_as_current=False
        )
        self.app.conf.update(
            idem_store=stage.store_url, task_default_queue=stage.queue, task_publish_retry=False
        )

    def submit(self, task: str, intent: str) -> Receipt:
        if task not in self.app.tasks:
            self.app.task(base=IdempotentTask, bind=True, name=task, intent=("intent",))(effect)
        return self.app.tasks[task].submit(intent=intent, at="", how="")


@pytest.fixture
def stage(
    make_stage: Callable[..., Stage], own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stage]:
    monkeypatch.setattr(submitting, "ACCEPTED_FOR", 2.0)
    made = make_stage("redis", own_redis.url_for(0), own_redis)
    yield made
    for worker in made.workers:
        worker.kill()


def lose_everything(stage: Stage) -> None:
    """The broker's database is empty. Records and results are in others."""
    with stage.publisher.connection_for_write() as connection:
        connection.default_channel.client.flushdb()


def recover(stage: Stage, *options: str) -> str:
    env = {**os.environ, "FAULTS_BROKER": stage.broker_url, "FAULTS_STORE": stage.store_url}
    env["FAULTS_BACKEND"], env["FAULTS_FOLDER"] = stage.backend_url, str(stage.folder)
    command = [sys.executable, "-m", "celery", "-A", "tests.faults.app", "idem", "recover", *options]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=60).stdout
