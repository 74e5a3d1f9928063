"""The monkey brings about the faults of the plan, each at its time, and writes down what it did."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import redis
from amqp.exceptions import AMQPError
from kombu import Connection
from kombu.exceptions import KombuError

from tests.chaos.plan import Fault, Plan
from tests.chaos.stage import Stage
from tests.support.effects import Effects

LOOK_EVERY = 0.1  # seconds between two looks of the waker: much shorter than a lease


class Waker:
    """Resumes each process that its intent's plan has frozen, when its time is over."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder = folder
        self._plan = plan
        self._woken: set[Path] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="waker", daemon=True)
        self._thread.start()

    def __enter__(self) -> Waker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopping.wait(LOOK_EVERY):
            for note in set(self._folder.glob("frozen-*")) - self._woken:
                asleep = self._plan.intent(int(note.name.rpartition("-i")[2])).asleep
                if time.time() - note.stat().st_mtime > asleep:
                    self._woken.add(note)
                    with contextlib.suppress(OSError, ValueError):  # the process may have been killed
                        os.kill(int(note.read_text()), signal.SIGCONT)


class Monkey:
    """Runs in separate threads from `start` to `stop`. After `stop`, everything that it broke works again."""

    def __init__(self, stage: Stage, faults: list[Fault], ledger: Path) -> None:
        self._stage = stage
        self._faults = faults
        self._ledger = Effects(ledger)
        self._stopping = threading.Event()
        self._running: list[threading.Thread] = []
        # One fault at a time for the store and for each worker: a dead one cannot be frozen.
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._thread = threading.Thread(target=self._follow, name="monkey", daemon=True)
        self.done = 0
        self.current = ""

    def start(self, start: float) -> None:
        """Start the monkey. The plan's times count from `start`, in seconds since the epoch."""
        self._start = start
        self._thread.start()

    def stop(self) -> None:
        """Start no more faults, and return when every fault is over."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        for thread in self._running:
            thread.join()

    def _follow(self) -> None:
        for fault in self._faults:
            if self._stopping.wait(max(0.0, self._start + fault.at - time.time())):
                return
            thread = threading.Thread(target=self._bring_about, args=(fault,), daemon=True)
            self._running.append(thread)
            thread.start()

    def _bring_about(self, fault: Fault) -> None:
        target = fault.kind if fault.kind.endswith("child") else fault.kind.rpartition(" ")[2]
        target += fault.broker
        with self._locks[target]:
            if self._stopping.is_set():
                return
            began = time.time()
            self.current = f"{fault.kind} {fault.broker}"
            act = getattr(self, f"_{fault.kind.replace(' ', '_')}")
            try:
                detail = act(fault)
            except (OSError, psutil.Error, redis.RedisError, AMQPError, KombuError, AssertionError) as error:
                detail = {"failed": f"{type(error).__name__}: {error}"}
            self._ledger.add(
                fault.kind, broker=fault.broker, planned=fault.at, began=began, ended=time.time(), **detail
            )
            self.done += "failed" not in detail

    # -- the faults, named as in plan.FAULTS -----------------------------------------------------------------
    def _kill_child(self, fault: Fault) -> dict[str, Any]:
        pid = self._child(fault)
        if pid is None:
            return {"failed": "no child"}
        os.kill(pid, signal.SIGKILL)
        return {"victim": pid}

    def _freeze_child(self, fault: Fault) -> dict[str, Any]:
        pid = self._child(fault)
        if pid is None:
            return {"failed": "no child"}
        process = psutil.Process(pid)  # it checks the start time, so a reused pid is not hit
        process.suspend()
        self._stopping.wait(fault.seconds)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
        return {"victim": pid}

    def _kill_worker(self, fault: Fault) -> dict[str, Any]:
        worker = self._stage.worker(fault.broker)
        if worker is None:
            return {"failed": "no worker"}
        worker.kill()
        return {"victim": worker.pid}

    def _freeze_worker(self, fault: Fault) -> dict[str, Any]:
        worker = self._stage.worker(fault.broker)
        if worker is None:
            return {"failed": "no worker"}
        worker.pause()
        self._stopping.wait(fault.seconds)
        worker.resume()
        return {"victim": worker.pid}

    def _kill_store(self, fault: Fault) -> dict[str, Any]:
        victim = self._stage.store.pid
        self._stage.store.kill()
        self._stopping.wait(fault.seconds)
        self._stage.store.restart()
        return {"victim": victim}

    def _freeze_store(self, fault: Fault) -> dict[str, Any]:
        self._stage.store.pause()
        self._stopping.wait(fault.seconds)
        self._stage.store.resume()
        return {"victim": self._stage.store.pid}

    def _cut_broker(self, fault: Fault) -> dict[str, Any]:
        if fault.broker == "rabbitmq":
            assert self._stage.proxy is not None
            return {"connections": self._stage.proxy.cut()}
        with redis.Redis.from_url(self._stage.redis.url) as client:
            return {"connections": _cut(client)}

    def _kill_host(self, _: Fault) -> dict[str, Any]:
        """Kill all workers with all their processes at once."""
        workers = [worker for broker in self._stage.plan.brokers if (worker := self._stage.worker(broker))]
        for worker in workers:
            worker.kill()
        return {"victims": [worker.pid for worker in workers]} if workers else {"failed": "no worker"}

    def _empty_broker(self, fault: Fault) -> dict[str, Any]:
        """Delete all messages of the broker.

        Redis behaves as after a restart without data: its connections are cut and clients declare their queues again.
        """
        if fault.broker == "redis":
            with redis.Redis.from_url(self._stage.redis.url_for(0)) as client:
                lost = int(client.llen("chaos")) + int(client.hlen("unacked"))
                client.flushdb()
                _cut(client)
            return {"lost": lost}
        with Connection(self._stage.environment(fault.broker)["CHAOS_BROKER"]) as connection:
            return {"lost": connection.default_channel.queue_purge("chaos") or 0}

    def _child(self, fault: Fault) -> int | None:
        worker = self._stage.worker(fault.broker)
        children = worker.child_pids() if worker is not None else []
        return children[fault.child % len(children)] if children else None


def _cut(client: redis.Redis) -> int:
    """Close all connections but this one, and return their number."""
    return sum(client.client_kill_filter(_type=kind, skipme=True) for kind in ("normal", "pubsub"))
