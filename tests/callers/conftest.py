"""One Redis, one worker and one shop for all callers of this folder."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from celery_idem import IdempotentTask
from tests.callers import shop as shops
from tests.conftest import running
from tests.support.effects import Effects
from tests.support.processes import Program
from tests.support.servers import RedisServer, free_port
from tests.support.workers import READY_WITHIN, ROOT, CeleryWorker


@pytest.fixture(scope="package")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis server for this folder only. Tests empty the session's server, which would break this worker."""
    with running(lambda: RedisServer(tmp_path_factory.mktemp("callers-redis"))) as server:
        yield server


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("callers")


@pytest.fixture(scope="package")
def shop_env(redis: RedisServer, folder: Path) -> dict[str, str]:
    return {"CALLERS_URL": redis.url, "CALLERS_FOLDER": str(folder)}


@pytest.fixture(scope="package")
def worker(shop_env: dict[str, str], folder: Path) -> Iterator[CeleryWorker]:
    worker = CeleryWorker("tests.callers.shop:app", folder, concurrency=4, env=shop_env)
    yield worker
    worker.kill()


@contextlib.contextmanager
def served(app: str, env: dict[str, str], folder: Path) -> Iterator[str]:
    """Serve an ASGI application on a real server and yield its address."""
    port = free_port()
    words = [sys.executable, "-m", "uvicorn", app, "--host", "127.0.0.1", "--port", str(port)]
    log = folder / f"{app.partition(':')[0]}.log"
    server = Program(words, log=log, env={**os.environ, **env}, cwd=ROOT, fork=True)
    try:
        server.wait_until_ready(lambda: "Uvicorn running" in server.log_text(), READY_WITHIN)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()


@pytest.fixture(scope="package")
def http_url(worker: CeleryWorker, shop_env: dict[str, str], folder: Path) -> Iterator[str]:
    with served("tests.callers.http_app:app", shop_env, folder) as url:
        yield url


@pytest.fixture(scope="package")
def mcp_url(worker: CeleryWorker, shop_env: dict[str, str], folder: Path) -> Iterator[str]:
    with served("tests.callers.mcp_app:app", shop_env, folder) as url:
        yield f"{url}/mcp"


@pytest.fixture(scope="package")
def shop(redis: RedisServer, folder: Path) -> Celery:
    """The callers' application, in this process."""
    return shops.make(redis.url, folder)


@pytest.fixture(scope="package")
def done(folder: Path) -> Effects:
    """The effects that the worker recorded."""
    return Effects(folder / "effects.jsonl")


@pytest.fixture
def name() -> str:
    """A name that no other test uses: the store is shared."""
    return uuid.uuid4().hex[:12]


@pytest.fixture
def app() -> Iterator[Celery]:
    """An application whose queue is in memory and has no worker."""
    app = Celery("queued", broker="memory://", backend="cache+memory://", set_as_current=False)
    queue = f"queued-{uuid.uuid4().hex}"
    app.conf.update(idem_store=f"memory://{uuid.uuid4().hex}", task_default_queue=queue)

    @app.task(base=IdempotentTask, shared=False, name="shop.pay", intent=("invoice",), must_match=("cents",))
    def pay(invoice: str, cents: int = 1) -> str:
        return f"paid {invoice}"

    yield app
    app.close()


def messages(app: Celery, queue: str = "") -> int:
    with app.connection_for_read() as connection:
        name = queue or app.conf.task_default_queue
        return int(connection.default_channel.queue_declare(name).message_count)
