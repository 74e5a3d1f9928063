"""The configuration of the how-to for quorum queues works on a real RabbitMQ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.page import ROOT, blocks
from tests.support.effects import Effects
from tests.support.servers import RabbitMQServer
from tests.support.workers import CeleryWorker

TASKS = """
import os, signal
from celery_idem import IdempotentTask
from tests.support.effects import Effects, Gate

app.conf.result_backend = app.conf.idem_store


@app.task(base=IdempotentTask, bind=True, intent=("n",), acks_late=True, reject_on_worker_lost=True, on_crash="rerun")
def work(self, n, path="", die=False):
    Effects(path + "/effects").add(n)
    Gate(path + "/gate").wait()
    if die and self.claim.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return n
"""


@pytest.fixture
def shop(
    rabbitmq: RabbitMQServer, redis_url: str, queue_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> object:
    """The page's application with a task, importable as `quorum_shop`."""
    (block,) = blocks(ROOT / "docs" / "how-to" / "rabbitmq-quorum-queues.md")
    code = block.code.replace("amqp://guest:guest@localhost:5672//", rabbitmq.url).replace(
        '"celery"', f'"{queue_name}"'
    )
    code = code.replace("redis://localhost:6379/1", redis_url)
    code += f'\napp.conf.task_default_queue = app.conf.task_default_routing_key = "{queue_name}"\n'
    (tmp_path / "quorum_shop.py").write_text(code + TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "quorum_shop", raising=False)
    return __import__("quorum_shop")


@pytest.mark.rabbitmq
@pytest.mark.redis
def test_a_duplicate_waits_and_a_killed_worker_is_redelivered(
    shop: object, start_worker: Callable[..., CeleryWorker], tmp_path: Path
) -> None:
    worker = start_worker("quorum_shop", concurrency=2)
    done = Effects(tmp_path / "effects")

    first = shop.work.delay("a", str(tmp_path))
    done.wait("a")
    again = shop.work.delay("a", str(tmp_path))  # it goes back with a countdown, for which RabbitMQ waits
    other = shop.work.delay("b", str(tmp_path), die=True)
    done.wait("b")
    (tmp_path / "gate").touch()

    assert first.get(timeout=60) == again.get(timeout=60) == "a"
    assert other.get(timeout=60) == "b"
    assert done.counts() == {"a": 1, "b": 2}  # b ran again, because of on_crash="rerun"
    assert "Direct exchanges are not supported" not in worker.log_text()
