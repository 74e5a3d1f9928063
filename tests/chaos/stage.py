"""Starts everything that runs: brokers, store, destination, workers, beats, web servers and agents.

All of them end with the stage.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from tests.chaos.agents import Work
from tests.chaos.plan import Plan
from tests.support.processes import Program
from tests.support.proxy import Proxy
from tests.support.servers import (
    RabbitMQServer,
    RedisServer,
    Server,
    ServerMissingError,
    ValkeyServer,
    free_port,
)
from tests.support.waiting import wait_for
from tests.support.workers import READY_WITHIN, ROOT, CeleryWorker

S = TypeVar("S", bound=Server)

# Pool processes of each worker: enough to take over from a frozen one.
CONCURRENCY = 4

# Seconds that a client of the store waits for a reply: shorter than most of plan.STORE_FROZEN, to lose replies.
STORE_TIMEOUT = 1.0

LOOK_EVERY = 0.25  # seconds between two checks whether a program runs


class Alive(Protocol):
    @property
    def alive(self) -> bool: ...

    def kill(self) -> None: ...


class Kept:
    """A program that is started again when it ends, as a supervisor does."""

    def __init__(self, name: str, start: Callable[[], Alive]) -> None:
        self.name = name
        self.starts = 0
        self.errors: list[str] = []
        self.current: Alive | None = None
        self._start = start
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=name, daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._stopping.is_set():
            if self.current is None or not self.current.alive:
                try:
                    self.current = self._start()
                    self.starts += 1
                except AssertionError as error:  # it was killed while it started
                    self.errors.append(str(error))
            self._stopping.wait(LOOK_EVERY)

    def wait_ready(self) -> None:
        wait_for(lambda: self.current is not None, READY_WITHIN, lambda: f"{self.name}: {self.errors}")

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(READY_WITHIN)
        if self.current is not None:
            self.current.kill()


class Stage:
    """All processes of a run. `app` is the workers' application: with tests.chaos.unguarded the soak must fail."""

    def __init__(self, folder: Path, plan: Plan, app: str = "tests.chaos.shop:app") -> None:
        self.folder = folder
        self.plan = plan
        self.workers: dict[str, Kept] = {}
        self.proxy: Proxy | None = None
        self._app = app
        self._doors: dict[str, str] = {}
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> Stage:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._ends.close()

    # -- starting ---------------------------------------------------------------------------------------
    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Results are in the broker's Redis, because faults take the store down.
        self.redis = self._server(RedisServer(self.folder / "redis"))
        self.store = self._server(_store(self.folder / "store"))
        self._brokers = {"redis": self.redis.url_for(0)}
        if "rabbitmq" in self.plan.brokers:
            rabbitmq = self._server(RabbitMQServer(self.folder / "rabbitmq"))
            self.proxy = Proxy(rabbitmq.port)
            self._ends.callback(self.proxy.close)
            self._brokers["rabbitmq"] = f"amqp://guest:guest@127.0.0.1:{self.proxy.port}//"
        self.destination = free_port()
        words = [sys.executable, "-m", "tests.chaos.destination", self.folder, str(self.destination)]
        self._ready(self._program(words, "destination", "redis"), "destination ready")
        for broker in self.plan.brokers:
            self._start_worker(broker)
            self._start_door(broker)
        for worker in self.workers.values():
            worker.wait_ready()
        # Two beats with the same schedule, one on each broker if there are two.
        for name, broker in zip(("beat1", "beat2"), (self.plan.brokers * 2)[:2], strict=True):
            self._keep(name, lambda name=name, broker=broker: self._beat(name, broker))  # type: ignore[misc]

    def _server(self, server: S) -> S:
        self._ends.enter_context(server)
        return server

    def _start_worker(self, broker: str) -> None:
        def start() -> CeleryWorker:
            return CeleryWorker(
                self._app,
                self.folder / f"worker-{broker}",
                concurrency=CONCURRENCY,
                env=self.environment(broker),
                name=f"worker-{broker}",
            )

        self.workers[broker] = self._keep(f"worker-{broker}", start)

    def _start_door(self, broker: str) -> None:
        port = free_port()
        self._doors[broker] = f"http://127.0.0.1:{port}"
        words = [sys.executable, "-m", "uvicorn", "tests.chaos.server:app", "--host", "127.0.0.1"]
        words += ["--port", str(port), "--log-level", "info", "--no-access-log"]
        self._ready(self._program(words, f"door-{broker}", broker), "Uvicorn running")

    def _beat(self, name: str, broker: str) -> Program:
        words = [sys.executable, "-m", "celery", "-A", "tests.chaos.shop:app", "beat"]
        words += ["--schedule", str(self.folder / f"{name}.schedule"), "--pidfile", "", "--loglevel", "INFO"]
        return self._python(words, name, broker)

    def _keep(self, name: str, start: Callable[[], Alive]) -> Kept:
        kept = Kept(name, start)
        self._ends.callback(kept.close)
        return kept

    def _program(self, words: Sequence[object], name: str, broker: str) -> Program:
        program = self._python(words, name, broker)
        self._ends.callback(program.kill)
        return program

    def _python(self, words: Sequence[object], name: str, broker: str) -> Program:
        command = [str(word) for word in words]
        log = self.folder / f"{name}.log"
        return Program(command, log=log, env=self.environment(broker), cwd=ROOT, fork=True)

    @staticmethod
    def _ready(program: Program, sign: str) -> None:
        program.wait_until_ready(lambda: sign in program.log_text(), READY_WITHIN)

    # -- for the soak and the monkey ----------------------------------------------------------------------
    def environment(self, broker: str) -> dict[str, str]:
        """Return the environment of a process that uses this broker."""
        return {
            **os.environ,
            "CHAOS_PLAN": self.plan.to_json(),
            "CHAOS_FOLDER": str(self.folder),
            "CHAOS_BROKER": self._brokers[broker],
            "CHAOS_BACKEND": self.redis.url_for(1),
            "CHAOS_STORE": f"{self.store.url_for(0)}?socket_timeout={STORE_TIMEOUT:g}",
            "CHAOS_DESTINATION": str(getattr(self, "destination", 0)),
            "CHAOS_DOOR": self._doors.get(broker, ""),
        }

    def start_agents(self, name: str, broker: str, work: Work) -> Program:
        path = self.folder / f"{name}-{broker}.json"
        work.write(path)
        words = [sys.executable, "-m", "tests.chaos.agents", path, self.folder / "answers.jsonl"]
        return self._program(words, f"{name}-{broker}", broker)

    def worker(self, broker: str) -> CeleryWorker | None:
        """Return the worker of this broker if it is alive."""
        current = self.workers[broker].current
        assert current is None or isinstance(current, CeleryWorker)
        return current if current is not None and current.alive else None

    def logs(self) -> list[Path]:
        """Return all log files."""
        return sorted(self.folder.rglob("*.log"))


def _store(folder: Path) -> RedisServer:
    """Return a Valkey or Redis that syncs each write to disk before it replies (appendfsync always)."""
    try:
        return ValkeyServer(folder, appendonly=True)
    except ServerMissingError:
        return RedisServer(folder, appendonly=True)
