"""Fixtures: servers for the session, an empty database for each test, workers that are ended after it.

Where a server cannot be started, the test is skipped with the reason. With CELERY_IDEM_REQUIRE_SERVERS=1
(REQUIRE_DOCKER=1 for the Docker engine) it fails instead, so that a CI run cannot pass by skipping.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import celery.app.builtins  # noqa: F401  # before SHARED is computed: every application has these tasks
import psutil
import pytest
import redis
from celery._state import _on_app_finalizers
from hypothesis import HealthCheck, settings

import example_project.legacy  # noqa: F401  # a shared task on purpose
from celery_idem.engine import events
from tests.support import shared
from tests.support.effects import Effects, Gate
from tests.support.jobs import Bench
from tests.support.servers import (
    PostgresServer,
    RabbitMQServer,
    RedisServer,
    Server,
    ServerMissingError,
    ValkeyServer,
)
from tests.support.workers import CeleryWorker

S = TypeVar("S", bound=Server)

# No deadline: how long an example takes depends on the machine. `make fuzz` runs many more examples.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fuzz", settings.get_profile("tests"), max_examples=50_000)
settings.load_profile("tests")

# Functions that return the log of a process started for a test. The logs are shown when the test fails.
LOGS = pytest.StashKey[list[Callable[[], str]]]()

# The processes of a run when it was interrupted.
INTERRUPTED: list[psutil.Process] = []

# What Celery adds to every application of the process. `@app.task` of any application adds its task there too.
SHARED = frozenset(_on_app_finalizers)


def pytest_configure() -> None:
    # A SIGTERM (a cancelled CI job) then ends the run like Ctrl-C, and the fixtures stop the servers.
    # Its default action would leave them running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A shell starts a background process with SIGINT ignored, and every child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Otherwise every process compiles what it imports anew, and pytest rewrites each test file.
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_keyboard_interrupt() -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # xdist interrupts its processes a second time, while they are ending
    INTERRUPTED.extend(psutil.Process().children(recursive=True))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Kills what an interrupted run left, and ends the shared RabbitMQ.

    xdist kills a process that does not end within ten seconds, before the fixtures of that process have ended.
    """
    for process in INTERRUPTED:
        with contextlib.suppress(psutil.Error):
            process.kill()
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        shared.end(config._tmp_path_factory.getbasetemp() / "rabbitmq")


LONGEST = (
    *(
        "proof/test_explorer",
        "docs/test_pages",
        "chaos/test_chaos",
        "stores/test_topologies",
        "test_instructions",
    ),
    *(
        "faults/test_recovery",
        "containers/test_faults",
        "test_demo",
        "celery/test_every_stage",
        "docs/test_site",
    ),
    *("faults/test_interrupted", "faults/test_child_killed", "faults/test_broker", "containers/test_compose"),
    *(
        "faults/test_worker_ended",
        "stores/test_sql",
        "faults/test_frozen",
        "faults/test_store",
        "test_servers",
    ),
    *(
        "packaging/test_distribution",
        "callers/test_doors",
        "callers/test_guard_removed",
        "security/test_rights",
    ),
)
"""The test files that take longest, slowest first. `pytest --durations=0` shows how long they take."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the longest files first: each xdist process takes the next file, and none should end late."""
    if hasattr(config, "workerinput"):
        places = {Path(__file__).parent / f"{name}.py": place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    _on_app_finalizers.intersection_update(SHARED)


@pytest.fixture(autouse=True)
def tasks_stay_with_their_application() -> Iterator[None]:
    """Lets two tests have a task of the same name, each in its own application."""
    yield
    _on_app_finalizers.intersection_update(SHARED)


def missing(reason: str, demand: str = "CELERY_IDEM_REQUIRE_SERVERS") -> NoReturn:
    """Skips the test, or fails it where the environment variable `demand` is 1."""
    if os.environ.get(demand) == "1":
        pytest.fail(f"{reason} ({demand}=1 makes this a failure)", pytrace=False)
    pytest.skip(reason)


@contextlib.contextmanager
def running(make: Callable[[], S]) -> Iterator[S]:
    """Starts the server that `make` returns, and always ends it."""
    try:
        server = make()
    except ServerMissingError as error:
        missing(str(error))
    with server:
        try:
            yield server
        finally:
            # An AsyncResult unsubscribes when it is collected. Once its Redis has ended, it would try to connect
            # for minutes, in a later test and while holding a lock of that test.
            gc.collect()


# -- one server of each kind for the session ------------------------------------------------------------
@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Shared: a test that kills or freezes its server uses `start_redis` instead."""
    with running(lambda: RedisServer(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """Shared, like `redis_server`."""
    with running(lambda: ValkeyServer(tmp_path_factory.mktemp("valkey"))) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    """Shared by all processes of a run: name queues with `queue_name`, and do not stop or break the server."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        try:
            yield shared.rabbitmq(tmp_path_factory.getbasetemp().parent / "rabbitmq")
        except ServerMissingError as error:
            missing(str(error))
        return
    with running(lambda: RabbitMQServer(tmp_path_factory.mktemp("rabbitmq"))) as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Shared: `postgres_url` is an empty database in it."""
    with running(PostgresServer) as server:
        yield server


# -- containers ---------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def docker_engine() -> str:
    """The version of the running Docker engine."""
    try:
        words = ["docker", "version", "--format", "{{.Server.Version}}"]
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        missing(f"no Docker engine answers: {error}", "REQUIRE_DOCKER")


@pytest.fixture(scope="session")
def docker_compose(docker_engine: str) -> list[str]:
    """The command for Compose: version 2 is a plugin of docker, version 1 a separate program."""
    for words in (["docker", "compose"], ["docker-compose"]):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run([*words, "version"], capture_output=True, timeout=30, check=True)
            return words
    missing("neither `docker compose` nor `docker-compose` is here", "REQUIRE_DOCKER")


# -- for one test ---------------------------------------------------------------------------------------
def empty(server: RedisServer) -> str:
    assert server.alive, f"an earlier test ended the shared {server}"
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        client.script_flush()
    return server.url


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """Database 0 of an empty Redis."""
    return empty(redis_server)


@pytest.fixture
def valkey_url(valkey_server: ValkeyServer) -> str:
    """Database 0 of an empty Valkey."""
    return empty(valkey_server)


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    """A new, empty database."""
    return postgres.create_database(f"test_{uuid.uuid4().hex}")


@pytest.fixture
def queue_name() -> str:
    """A queue name that no other test uses: RabbitMQ keeps messages between tests."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def start_redis(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., RedisServer]]:
    """`start_redis(appendonly=True)`: a Redis for this test alone, to kill and to freeze."""
    yield from _starter(RedisServer, tmp_path, request)


@pytest.fixture
def start_valkey(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., ValkeyServer]]:
    """`start_valkey(appendonly=True)`: the same with Valkey."""
    yield from _starter(ValkeyServer, tmp_path, request)


def _starter(
    kind: type[RedisServer], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., RedisServer]]:
    with contextlib.ExitStack() as servers:

        def start(**options: Any) -> RedisServer:
            folder = tmp_path / f"{kind.name}-{uuid.uuid4().hex[:8]}"
            server = servers.enter_context(running(lambda: kind(folder, **options)))
            _show_log(request, server.program.log_tail)
            return server

        yield start


@pytest.fixture
def start_worker(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., CeleryWorker]]:
    """`start_worker("module:app", concurrency=2, env={…})`: a CeleryWorker, ended after the test."""
    workers: list[CeleryWorker] = []

    def start(app: str, **options: Any) -> CeleryWorker:
        worker = CeleryWorker(app, tmp_path, **options)
        workers.append(worker)
        _show_log(request, worker.log_tail)
        return worker

    yield start
    # The test is over, so no worker gets time to finish its tasks.
    for worker in workers:
        worker.kill()


@pytest.fixture
def effects(tmp_path: Path) -> Effects:
    """The destination. A worker opens the same ledger with `Effects(path)`, given this one's `.path`."""
    return Effects(tmp_path / "effects.jsonl")


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """A closed gate. A worker opens the same gate with `Gate(path)`, given this one's `.path`."""
    return Gate(tmp_path / "gate")


# -- logs of a failed test ------------------------------------------------------------------------------
def _show_log(request: pytest.FixtureRequest, tail: Callable[[], str]) -> None:
    request.node.stash.setdefault(LOGS, []).append(tail)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for tail in item.stash.get(LOGS, []):
            report.sections.append(("log of a process", tail()))
    return report


# -- the runner without Celery --------------------------------------------------------------------------
@pytest.fixture
def bench() -> Iterator[Bench]:
    """A runner over a store in memory, with every event recorded."""
    made = Bench()
    stop = events.listen(made.events.append, here=True)
    yield made
    stop()
