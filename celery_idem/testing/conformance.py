"""What every store must do, as tests.

Subclass it in a test module, and say how to open your store::

    from celery_idem.testing import StoreConformance

    class TestMyStore(StoreConformance):
        def make_store(self):
            return MyStore("my://localhost")

pytest collects the rest. The class uses no pytest itself: plain asserts, and
``setup_method`` and ``teardown_method``, which other runners know too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import unittest
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

from celery_idem import owners
from celery_idem.errors import StoreError
from celery_idem.intent import (
    MICROSECONDS,
    Acquired,
    Done,
    Fingerprint,
    Outcome,
    Policy,
    Replay,
    Request,
    Stored,
)
from celery_idem.ledger import Ledger
from celery_idem.stores.base import OWNER, Change, Reply, Store
from celery_idem.testing.crashing import CrashingStore

PATIENCE = 60.0
"""Seconds until something that should have happened is a failure: for a very slow machine."""

SHORT = 0.2
"""Seconds that a value is kept in the tests of expiry: long beside a round trip, short to wait for."""

MINE = b"owner-mine--"
YOURS = b"owner-yours-"

AWKWARD = (
    "plain",
    "shop.send_invoice:0123456789abcdef",
    "Plain",  # differs in case only
    "plain ",  # differs by a space at the end
    "pl_in",
    "pl%in",
    "pl*in",
    "pl?in",
    "pl[a]in",
    "pl\\ain",
    "pl'; DROP TABLE records; --",
    'pl"ain',
    "pl\nain",
    "größe",  # a composed ö
    "gro\u0308ße",  # and a decomposed one: a store does not normalise
    "支払い",
    "💶",
    "{tag}plain",
    "x" * 700,
)


class StoreConformance:
    """Tests for one kind of store. Each uses keys of its own, so the store need not be empty.

    Override ``make_store``; and, where they do not fit, the attributes and ``wait_until``.
    """

    shared_by_processes = True
    """False for a store that lives in one process: the races between processes are then skipped."""

    racers = 8
    """Threads in a race."""

    processes = 3
    """Processes in a race. Each takes about a second to start."""

    def make_store(self) -> Store:
        """A store that is open, or opens itself when it is used.

        Every call must give an object of its own on the same data. Other processes call
        this too: they get a pickled copy of this instance, so what a fixture puts on it
        must be simple values, such as a URL.
        """
        raise NotImplementedError

    def wait_until(self, store: Store, when: int) -> None:
        """Return when the store's time is past ``when``, in microseconds. With a clock of your own: move it."""
        _await(lambda: store.read(self.key("nothing")).now > when, f"the store's time to pass {when}")

    # --- set-up -----------------------------------------------------------------------

    def setup_method(self, *_: object) -> None:
        self._prefix = f"conformance-{uuid.uuid4().hex}:"
        self._opened: Store | None = None

    def teardown_method(self, *_: object) -> None:
        if self._opened is not None:
            self._opened.close()

    @property
    def store(self) -> Store:
        """Opened at first use: fixtures of a subclass come before it."""
        if self._opened is None:
            self._opened = self.make_store()
        return self._opened

    def key(self, name: str) -> str:
        """A key that no other test uses."""
        return self._prefix + name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    # --- create and read --------------------------------------------------------------

    def test_it_says_where_it_is(self) -> None:
        assert isinstance(self.store.url, str)
        assert self.store.url

    def test_nothing_there(self) -> None:
        reply = self.store.read(self.key("a"))
        assert (reply.done, reply.stored) == (False, None)
        assert reply.now > 0

    def test_create_then_read(self) -> None:
        reply = self.store.create(self.key("a"), MINE + b"1")
        assert reply.done
        assert reply.stored == Stored(MINE + b"1", reply.stored.stamp if reply.stored else 0)
        again = self.store.read(self.key("a"))
        assert again.done
        assert again.stored == reply.stored
        assert again.now >= reply.now

    def test_a_first_stamp_is_the_time_of_the_write(self) -> None:
        before = self.store.read(self.key("a")).now
        reply = self.store.create(self.key("a"), MINE)
        after = self.store.read(self.key("a")).now
        assert before <= _stamp(reply) <= after
        assert _stamp(reply) <= reply.now

    def test_create_of_what_is_there_changes_nothing(self) -> None:
        first = self.store.create(self.key("a"), MINE + b"1")
        second = self.store.create(self.key("a"), YOURS + b"2", 1)
        assert (second.done, second.stored) == (False, first.stored)
        assert second.now >= first.now
        assert self.store.read(self.key("a")).stored == first.stored

    def test_keys_do_not_meet(self) -> None:
        made = {}
        for name in AWKWARD:
            made[name] = self.store.create(self.key(name), MINE + name.encode())
            assert made[name].done, f"{name!r} met another key"
        for name, reply in made.items():
            assert self.store.read(self.key(name)).stored == reply.stored
            assert _held(reply).value == MINE + name.encode()

    def test_any_bytes_come_back(self) -> None:
        values = [
            bytes(OWNER),
            bytes(range(256)),
            MINE + b"\r\n$1\r\n*1\r\n\x00'\"\\\n",
            b"\xff" * 40,
            MINE + os.urandom(3 << 20),  # above any buffer, and incompressible
        ]
        for n, value in enumerate(values):
            key = self.key(str(n))
            created = self.store.create(key, value)
            assert created.done
            assert self.store.read(key).stored == Stored(value, _stamp(created))
            replaced = self.store.replace(key, _held(created), value[::-1])
            assert replaced.done
            assert self.store.read(key).stored == Stored(value[::-1], _stamp(replaced))

    # --- replace ----------------------------------------------------------------------

    def test_replace_what_is_unchanged(self) -> None:
        first = self.store.create(self.key("a"), MINE + b"1")
        second = self.store.replace(self.key("a"), _held(first), YOURS + b"2")
        assert second.done
        assert _held(second).value == YOURS + b"2"
        assert _stamp(second) > _stamp(first)
        assert self.store.read(self.key("a")).stored == second.stored

    def test_replace_of_an_older_stamp_is_refused(self) -> None:
        first = self.store.create(self.key("a"), MINE + b"1")
        second = self.store.replace(self.key("a"), _held(first), MINE + b"2")
        third = self.store.replace(self.key("a"), _held(first), MINE + b"3")
        assert (third.done, third.stored) == (False, second.stored)
        assert self.store.read(self.key("a")).stored == second.stored

    def test_replace_of_a_later_stamp_is_refused(self) -> None:
        first = self.store.create(self.key("a"), MINE + b"1")
        old = Stored(MINE + b"1", _stamp(first) + 1)
        second = self.store.replace(self.key("a"), old, MINE + b"2")
        assert (second.done, second.stored) == (False, first.stored)

    def test_replace_of_another_owner_is_refused(self) -> None:
        first = self.store.create(self.key("a"), MINE + b"1")
        second = self.store.replace(self.key("a"), Stored(YOURS + b"1", _stamp(first)), YOURS + b"2")
        assert (second.done, second.stored) == (False, first.stored)
        assert self.store.read(self.key("a")).stored == first.stored

    def test_replace_compares_the_owner_and_not_the_rest(self) -> None:
        first = self.store.create(self.key("a"), MINE + b"1")
        second = self.store.replace(self.key("a"), Stored(MINE + b"another", _stamp(first)), MINE + b"2")
        assert second.done

    def test_replace_of_nothing_writes_nothing(self) -> None:
        reply = self.store.replace(self.key("a"), Stored(MINE, 1), MINE + b"2")
        assert (reply.done, reply.stored) == (False, None)
        assert reply.now > 0
        assert self.store.read(self.key("a")).stored is None

    def test_stamps_only_grow_and_follow_the_clock(self) -> None:
        reply = self.store.create(self.key("a"), MINE)
        stamps = [_stamp(reply)]
        for _ in range(50):
            reply = self.store.replace(self.key("a"), _held(reply), MINE)
            assert reply.done
            stamps.append(_stamp(reply))
        assert stamps == sorted(set(stamps))
        # A stamp may run ahead of the clock by one for each write, and by no more.
        assert stamps[-1] <= self.store.read(self.key("a")).now + len(stamps)

    def test_the_clients_clock_does_not_count(self) -> None:
        created = self.store.create(self.key("a"), MINE, 3600 * MICROSECONDS)
        before = self.store.read(self.key("a")).now
        year = 365 * 86_400
        for shift in (year, -year):
            real, real_ns = time.time, time.time_ns
            with (
                mock.patch("time.time", lambda real=real, shift=shift: real() + shift),
                mock.patch("time.time_ns", lambda real=real_ns, shift=shift: real() + shift * 10**9),
            ):
                assert self.store.read(self.key("a")).stored is not None
                reply = self.store.replace(self.key("a"), _held(created), MINE, 3600 * MICROSECONDS)
                assert reply.done
                fresh = self.store.create(self.key(str(shift)), MINE, 3600 * MICROSECONDS)
                assert fresh.done
            created = reply
            for stamp in (_stamp(reply), _stamp(fresh)):
                assert before <= stamp <= before + PATIENCE * MICROSECONDS
            assert self.store.read(self.key(str(shift))).stored is not None

    # --- time to live -----------------------------------------------------------------

    def test_a_value_expires(self) -> None:
        first = self.store.create(self.key("a"), MINE + b"1", _short())
        assert self.store.read(self.key("a")).stored == first.stored
        self.wait_until(self.store, first.now + _short() + 2000)
        assert self.store.read(self.key("a")).stored is None
        assert self.store.read(self.key("a")).done is False
        refused = self.store.replace(self.key("a"), _held(first), MINE + b"2")
        assert (refused.done, refused.stored) == (False, None)
        assert dict(self.store.scan(self.key(""))) == {}
        second = self.store.create(self.key("a"), YOURS)
        assert second.done
        assert _stamp(second) > _stamp(first)

    def test_a_value_is_kept_as_long_as_it_should_be(self) -> None:
        ttl = 3600 * MICROSECONDS
        first = self.store.create(self.key("a"), MINE, ttl)
        self.wait_until(self.store, first.now + _short())
        assert self.store.read(self.key("a")).stored == first.stored

    def test_the_time_to_live_counts_from_the_last_write(self) -> None:
        first = self.store.create(self.key("for ever"), MINE, _short())
        assert self.store.replace(self.key("for ever"), _held(first), MINE).done
        first = self.store.create(self.key("longer"), MINE, _short())
        assert self.store.replace(self.key("longer"), _held(first), MINE, 3600 * MICROSECONDS).done
        first = self.store.create(self.key("shorter"), MINE)
        last = self.store.replace(self.key("shorter"), _held(first), MINE, _short())
        assert last.done
        self.wait_until(self.store, last.now + _short() + 2000)
        assert {key for key, _ in self.store.scan(self.key(""))} == {self.key("for ever"), self.key("longer")}

    def test_a_time_to_live_may_be_shorter_than_the_store_counts(self) -> None:
        for ttl in (1, 999, 1001):
            created = self.store.create(self.key(str(ttl)), MINE, ttl)
            assert created.done
            replaceable = self.store.create(self.key(f"replaced {ttl}"), MINE)
            assert self.store.replace(self.key(f"replaced {ttl}"), _held(replaceable), MINE, ttl).done
            self.wait_until(self.store, self.store.read(self.key("nothing")).now + 4000)
            assert self.store.read(self.key(str(ttl))).stored is None
            assert self.store.read(self.key(f"replaced {ttl}")).stored is None

    def test_a_time_to_live_may_be_very_long(self) -> None:
        ttl = 100 * 365 * 86_400 * MICROSECONDS
        first = self.store.create(self.key("a"), MINE, ttl)
        assert first.done
        assert self.store.replace(self.key("a"), _held(first), MINE, ttl).done
        assert self.store.read(self.key("a")).done

    def test_a_time_to_live_of_zero_deletes(self) -> None:
        first = self.store.create(self.key("a"), MINE)
        refused = self.store.replace(self.key("a"), Stored(YOURS, _stamp(first)), YOURS, 0)
        assert (refused.done, refused.stored) == (False, first.stored)
        gone = self.store.replace(self.key("a"), _held(first), MINE + b"2", 0)
        assert gone.done
        assert _stamp(gone) > _stamp(first)
        assert self.store.read(self.key("a")).stored is None
        again = self.store.create(self.key("a"), YOURS)
        assert again.done

    def test_create_with_a_time_to_live_of_zero_leaves_nothing(self) -> None:
        reply = self.store.create(self.key("a"), MINE, 0)
        assert reply.done
        assert self.store.read(self.key("a")).stored is None
        there = self.store.create(self.key("a"), MINE)
        refused = self.store.create(self.key("a"), YOURS, 0)
        assert (refused.done, refused.stored) == (False, there.stored)
        assert self.store.read(self.key("a")).stored == there.stored

    def test_purge_deletes_what_has_expired_and_nothing_else(self) -> None:
        kept = {
            self.key(f"kept {n}"): self.store.create(self.key(f"kept {n}"), MINE).stored for n in range(3)
        }
        long = self.key("long")
        kept[long] = self.store.create(long, MINE, 3600 * MICROSECONDS).stored
        last = 0
        for n in range(5):
            last = self.store.create(self.key(f"gone {n}"), MINE, 1).now
        self.wait_until(self.store, last + 4000)
        for limit in (1, 2, 1000):
            assert 0 <= self.store.purge(limit) <= limit
        assert self.store.purge(1000) == 0
        assert dict(self.store.scan(self.key(""))) == kept

    # --- scan -------------------------------------------------------------------------

    def test_scan_gives_each_key_with_its_value(self) -> None:
        made = {
            self.key(name): self.store.create(self.key(name), MINE + name.encode()).stored for name in AWKWARD
        }
        assert dict(self.store.scan(self.key(""))) == made

    def test_a_prefix_is_taken_literally(self) -> None:
        for name in AWKWARD:
            self.store.create(self.key(name), MINE)
        for prefix in AWKWARD:
            expected = {self.key(name) for name in AWKWARD if name.startswith(prefix)}
            assert {key for key, _ in self.store.scan(self.key(prefix))} == expected, prefix

    def test_scan_of_nothing(self) -> None:
        assert list(self.store.scan(self.key("nothing"))) == []

    def test_scan_of_more_than_one_batch_while_others_write(self) -> None:
        before = {self.key(f"old {n}") for n in range(1200)}
        for key in before:
            self.store.create(key, MINE)
        gone = self.key("old 0")
        stop = threading.Event()
        failures: list[BaseException] = []

        def write() -> None:
            try:
                n = 0
                while not stop.is_set():
                    n += 1
                    self.store.create(self.key(f"new {n}"), YOURS)
                    key = self.key(f"old {1 + n % 1199}")
                    held = self.store.read(key).stored
                    if held is not None:
                        self.store.replace(key, held, YOURS)
            except BaseException as error:
                failures.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            seen = set()
            for n, (key, stored) in enumerate(self.store.scan(self.key(""))):
                assert stored.value in (MINE, YOURS)
                seen.add(key)
                if n == 0:
                    held = self.store.read(gone).stored
                    assert held is not None
                    self.store.replace(gone, held, MINE, 0)
        finally:
            stop.set()
            writer.join(PATIENCE)
        assert not failures
        assert before - {gone} <= seen
        assert all(key.startswith(self.key("")) for key in seen)

    # --- replace_many -----------------------------------------------------------------

    def test_replace_many_answers_each_in_order(self) -> None:
        a = _held(self.store.create(self.key("a"), MINE + b"a"))
        b = _held(self.store.create(self.key("b"), MINE + b"b"))
        c = _held(self.store.create(self.key("c"), MINE + b"c"))
        changes = [
            Change(self.key("a"), a, MINE + b"A"),
            Change(self.key("b"), Stored(YOURS, b.stamp), YOURS + b"B"),
            Change(self.key("absent"), a, MINE),
            Change(self.key("c"), c, MINE, 0),
        ]
        done = self.store.replace_many(changes)
        assert [reply.done for reply in done] == [True, False, False, True]
        assert _held(done[0]).value == MINE + b"A"
        assert _stamp(done[0]) > a.stamp
        assert done[1].stored == b
        assert done[2].stored is None
        assert self.store.read(self.key("a")).stored == done[0].stored
        assert self.store.read(self.key("b")).stored == b
        assert self.store.read(self.key("absent")).stored is None
        assert self.store.read(self.key("c")).stored is None

    def test_replace_many_of_nothing_and_of_many(self) -> None:
        assert self.store.replace_many([]) == []
        held = [_held(self.store.create(self.key(str(n)), MINE)) for n in range(300)]
        done = self.store.replace_many(
            [
                Change(self.key(str(n)), stored, MINE + b"%d" % n, 3600 * MICROSECONDS)
                for n, stored in enumerate(held)
            ]
        )
        assert all(reply.done for reply in done)
        assert _held(self.store.read(self.key("299"))).value == MINE + b"299"

    # --- races ------------------------------------------------------------------------

    def test_threads_race_and_one_creates(self) -> None:
        def create(i: int) -> list[Reply]:
            return [self.store.create(key, MINE + b"%d" % i) for key in keys]

        keys = [self.key(str(n)) for n in range(20)]
        _one_winner_each(self._race(create))

    def test_threads_race_and_one_replaces(self) -> None:
        def replace(i: int) -> list[Reply]:
            return [self.store.replace(key, old, YOURS + b"%d" % i) for key, old in olds.items()]

        olds = {key: _held(self.store.create(key, MINE)) for key in map(self.key, "abcdefghijklmnopqrst")}
        _one_winner_each(self._race(replace))

    def test_no_write_gets_lost(self) -> None:
        self.store.create(self.key("count"), MINE + b"0")
        stamps: list[int] = []

        def count(_: int) -> None:
            for _ in range(10):
                while True:
                    old = _held(self.store.read(self.key("count")))
                    new = self.store.replace(
                        self.key("count"), old, MINE + b"%d" % (int(old.value[OWNER:]) + 1)
                    )
                    if new.done:
                        stamps.append(_stamp(new))
                        break

        self._race(count)
        assert _held(self.store.read(self.key("count"))).value == MINE + b"%d" % (10 * self.racers)
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
        context = multiprocessing.get_context("spawn")  # a new interpreter each, as workers on other machines
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
                    assert _held(self.store.read(self.key(f"child {n}"))).value == YOURS + b"%d" % n
                assert self.store.read(self.key("parent")).done
                status = 0
            os._exit(status)
        try:
            for n in range(50):  # at the same time: replies must not get mixed up
                assert self.store.create(self.key(f"parent {n}"), MINE + b"%d" % n).done
                assert _held(self.store.read(self.key(f"parent {n}"))).value == MINE + b"%d" % n
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

    # --- replies that get lost ----------------------------------------------------------

    def test_a_claim_that_meets_its_own_lost_write_has_won(self) -> None:
        store, ledger, request = self._ledger()
        store.crash("after create")
        with _raises_store_error():
            ledger.claim("shop.pay:1", request)
        decision, claim = ledger.claim("shop.pay:1", request)
        assert isinstance(decision, Acquired)
        assert claim is not None
        assert claim.attempt == 1
        assert isinstance(ledger.settle(claim, Outcome(True, b"j1"), 0.0), Done)

    def test_a_takeover_that_meets_its_own_lost_write_has_won(self) -> None:
        store, ledger, request = self._ledger()
        _, claim = ledger.claim("shop.pay:1", request)
        assert claim is not None
        assert isinstance(ledger.release(claim, 0.0), Done)
        second = _request()
        store.crash("after replace")
        with _raises_store_error():
            ledger.claim("shop.pay:1", second)
        decision, claim = ledger.claim("shop.pay:1", second)
        assert isinstance(decision, Acquired)
        assert claim is not None
        assert claim.attempt == 2

    def test_a_lost_claim_is_taken_up_by_whoever_carries_its_owner(self) -> None:
        store, ledger, request = self._ledger()
        store.crash("after create")
        with _raises_store_error():
            ledger.claim("shop.pay:1", request)
        decision, _ = ledger.claim("shop.pay:1", _request())
        assert not isinstance(decision, Acquired)
        decision, claim = ledger.claim("shop.pay:1", _request(carried=(request.owner,)))
        assert isinstance(decision, Acquired)
        assert claim is not None
        assert claim.attempt == 1
        decision, _ = ledger.claim("shop.pay:1", _request(carried=(request.owner,)))
        assert not isinstance(decision, Acquired)  # a second copy of that message

    def test_an_outcome_whose_reply_was_lost_is_there(self) -> None:
        store, ledger, request = self._ledger()
        _, claim = ledger.claim("shop.pay:1", request)
        assert claim is not None
        store.crash("after replace")
        assert isinstance(ledger.settle(claim, Outcome(True, b"j1"), PATIENCE), Done)
        decision, _ = ledger.claim("shop.pay:1", _request())
        assert decision == Replay(Outcome(True, b"j1"))

    def test_a_claim_that_was_never_written_is_free(self) -> None:
        store, ledger, request = self._ledger()
        store.crash("before create")
        with _raises_store_error():
            ledger.claim("shop.pay:1", request)
        decision, _ = ledger.claim("shop.pay:1", _request())
        assert isinstance(decision, Acquired)

    def _ledger(self) -> tuple[CrashingStore, Ledger, Request]:
        store = CrashingStore(self.store)
        return store, Ledger(store, self._prefix.replace(":", "-")), _request()


# --- small things ------------------------------------------------------------------------


def _short() -> int:
    return int(SHORT * MICROSECONDS)


def _held(reply: Reply) -> Stored:
    assert reply.stored is not None
    return reply.stored


def _stamp(reply: Reply) -> int:
    return _held(reply).stamp


def _one_winner_each(racers: list[list[Reply]]) -> None:
    """Each racer's replies for the same keys: one wrote, and the others saw what it wrote."""
    for replies in zip(*racers, strict=True):
        winners = [reply for reply in replies if reply.done]
        assert len(winners) == 1
        assert {reply.stored for reply in replies} == {winners[0].stored}


def _request(carried: tuple[bytes, ...] = ()) -> Request:
    day = 86_400 * MICROSECONDS
    policy = Policy(lease=day, result_ttl=day, failure_ttl=day)
    return Request(owners.mint(), str(uuid.uuid4()), Fingerprint(), policy, carried)


@contextlib.contextmanager
def _raises_store_error() -> Iterator[None]:
    try:
        yield
    except StoreError:
        return
    raise AssertionError("no StoreError was raised")


def _await(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE:g} s for {what}"
        threading.Event().wait(0.005)


def _racer(
    make_store: Callable[[], Store],
    start: Any,
    pipe: Connection,
    keys: list[str],
    olds: dict[str, Stored | None],
    number: int,
) -> None:
    """In a process of its own: create the first keys, replace the others, and say which were won."""
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
