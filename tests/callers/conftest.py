"""One Redis, one worker and one shop for all callers of this folder."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from tests.callers import shop as shops
from tests.conftest import running
from tests.support.effects import Effects
from tests.support.processes import Program
from tests.support.servers import RedisServer, free_port
from tests.support.workers import READY_WITHIN, ROOT, CeleryWorker


@pytest.fixture(scope="package")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Its own: the session's is emptied by every test that uses it, below this folder's worker."""
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


@pytest.fixture(scope="package")
def http_url(worker: CeleryWorker, shop_env: dict[str, str], folder: Path) -> Iterator[str]:
    """A real server with the HTTP door."""
    port = free_port()
    words = [sys.executable, "-m", "uvicorn", "tests.callers.http_app:app", "--host", "127.0.0.1"]
    env = {**os.environ, **shop_env}
    server = Program([*words, "--port", str(port)], log=folder / "http.log", env=env, cwd=ROOT)
    try:
        server.wait_until_ready(lambda: "Uvicorn running" in server.log_text(), READY_WITHIN)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()


@pytest.fixture(scope="package")
def shop(redis: RedisServer, folder: Path) -> Celery:
    """The caller's side, in this process."""
    return shops.make(redis.url, folder)


@pytest.fixture(scope="package")
def done(folder: Path) -> Effects:
    """What the worker did."""
    return Effects(folder / "effects.jsonl")


@pytest.fixture
def name() -> str:
    """A name that no other test uses: the store is shared."""
    return uuid.uuid4().hex[:12]
