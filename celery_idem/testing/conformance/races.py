"""Tests of concurrent threads, processes and a forked child."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import unittest
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from celery_idem.core.model import Stored
from celery_idem.stores.base import OWNER, Reply, Store
from celery_idem.testing.conformance.base import MINE, PATIENCE, YOURS, Suite, held_by, stamp_of


class Races(Suite):
    """One caller wins, and no write is lost."""

    def test_threads_race_and_one_creates(self) -> None:
        def create(i: int) -> list[Reply]:
            return [self.store.create(key, MINE + b"%d" % i) for key in keys]

        keys = [self.key(str(n)) for n in range(20)]
        _one_winner_each(self._race(create))

    def test_threads_race_and_one_replaces(self) -> None:
        def replace(i: int) -> list[Reply]:
            return [self.store.replace(key, old, YOURS + b"%d" % i) for key, old in olds.items()]

        olds = {key: held_by(self.store.create(key, MINE)) for key in map(self.key, "abcdefghijklmnopqrst")}
        _one_winner_each(self._race(replace))

    def test_no_write_gets_lost(self) -> None:
        self.store.create(self.key("count"), MINE + b"0")
        stamps: list[int] = []

        def count(_: int) -> None:
            for _ in range(10):
                while True:
                    old = held_by(self.store.read(self.key("count")))
                    new = self.store.replace(
                        self.key("count"), old, MINE + b"%d" % (int(old.value[OWNER:]) + 1)
                    )
                    if new.done:
                        stamps.append(stamp_of(new))
                        break

        self._race(count)
        assert held_by(self.store.read(self.key("count"))).value == MINE + b"%d" % (10 * self.racers)
        assert len(set(stamps)) == 10 * self.racers

    def _race(self, run: Callable[[int], Any]) -> list[Any]:
        start = threading.Barrier(self.racers)
        results: list[Any] = [None] * self.racers
        failures: list[BaseException] = []

        def one(i: int) -> None:
            try:
                start.wait(PATIENCE)
                results[i] = run(i)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(self.racers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        if failures:
            raise failures[0]
        assert not any(thread.is_alive() for thread in threads), "the store did not answer in bounded time"
        return results

    def test_processes_race_and_one_wins(self) -> None:
        if not self.shared_by_processes:
            raise unittest.SkipTest("this store lives in one process")
        keys = [self.key(str(n)) for n in range(40)]
        olds = {key: self.store.create(key, MINE).stored for key in keys[20:]}
        context = multiprocessing.get_context("spawn")  # new interpreters, like workers on other machines
        start = context.Barrier(self.processes)
        wins: list[list[str]] = []
        with contextlib.ExitStack() as running:
            pipes = []
            for i in range(self.processes):
                mine, theirs = context.Pipe()
                process = context.Process(target=_racer, args=(self.make_store, start, theirs, keys, olds, i))
                process.start()
                running.callback(_end, process)
                theirs.close()
                pipes.append(mine)
            for pipe in pipes:
                assert pipe.poll(PATIENCE), "a racing process did not finish"
                wins.append(pipe.recv())
        assert sorted(key for won in wins for key in won) == sorted(keys)

    def test_a_forked_child_uses_the_store_of_its_parent(self) -> None:
        assert self.store.create(self.key("parent"), MINE).done
        child = os.fork()
        if child == 0:  # pragma: no cover  # measured in the parent
            status = 1
            with contextlib.suppress(BaseException):
                for n in range(50):
                    assert self.store.create(self.key(f"child {n}"), YOURS + b"%d" % n).done
                    assert held_by(self.store.read(self.key(f"child {n}"))).value == YOURS + b"%d" % n
                assert self.store.read(self.key("parent")).done
                status = 0
            os._exit(status)
        try:
            for n in range(50):  # at the same time: replies must not get mixed up
                assert self.store.create(self.key(f"parent {n}"), MINE + b"%d" % n).done
                assert held_by(self.store.read(self.key(f"parent {n}"))).value == MINE + b"%d" % n
        finally:
            status = _reap(child)
        assert status == 0, "the child could not use the store"
        if self.shared_by_processes:
            assert self.store.read(self.key("child 49")).done

    def test_it_opens_again_after_close(self) -> None:
        assert self.store.create(self.key("a"), MINE).done
        self.store.close()
        self.store.close()
        if self.shared_by_processes:
            assert self.store.read(self.key("a")).done
        assert self.store.create(self.key("b"), MINE).done


def _one_winner_each(racers: list[list[Reply]]) -> None:
    """Check that for each key one racer wrote, and the others saw its value."""
    for replies in zip(*racers, strict=True):
        winners = [reply for reply in replies if reply.done]
        assert len(winners) == 1
        assert {reply.stored for reply in replies} == {winners[0].stored}


def _racer(
    make_store: Callable[[], Store],
    start: Any,
    pipe: Connection,
    keys: list[str],
    olds: dict[str, Stored | None],
    number: int,
) -> None:
    """Run in a separate process: create the first keys, replace the others, and send the keys that were won."""
    store = make_store()
    store.read(keys[0])  # connected before the start
    start.wait(PATIENCE)
    won = []
    for key in keys:
        old = olds.get(key)
        value = YOURS + b"%d" % number
        reply = store.create(key, value) if old is None else store.replace(key, old, value)
        if reply.done:
            won.append(key)
    pipe.send(won)
    store.close()


def _end(process: Any) -> None:
    process.join(PATIENCE / 6)
    if process.is_alive():
        process.kill()
        process.join()


def _reap(child: int) -> int:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        threading.Event().wait(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child did not finish with the store")
