"""Tests of scan, create_many and replace_many."""

from __future__ import annotations

import threading

from celery_idem.core.model import MICROSECONDS, Stored
from celery_idem.stores.base import Change, Creation, Reply
from celery_idem.testing.conformance.base import AWKWARD, MINE, PATIENCE, YOURS, Suite, held_by, stamp_of


class ManyValues(Suite):
    """Scan, create_many and replace_many."""

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
        deleted = self.key("old 0")
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
                    held = self.store.read(deleted).stored
                    assert held is not None
                    self.store.replace(deleted, held, MINE, 0)
        finally:
            stop.set()
            writer.join(PATIENCE)
        assert not failures
        assert before - {deleted} <= seen
        assert all(key.startswith(self.key("")) for key in seen)

    def test_replace_many_answers_each_in_order(self) -> None:
        a = held_by(self.store.create(self.key("a"), MINE + b"a"))
        b = held_by(self.store.create(self.key("b"), MINE + b"b"))
        c = held_by(self.store.create(self.key("c"), MINE + b"c"))
        changes = [
            Change(self.key("a"), a, MINE + b"A"),
            Change(self.key("b"), Stored(YOURS, b.stamp), YOURS + b"B"),
            Change(self.key("absent"), a, MINE),
            Change(self.key("c"), c, MINE, 0),
        ]
        done = self.store.replace_many(changes)
        assert [reply.done for reply in done] == [True, False, False, True]
        assert held_by(done[0]).value == MINE + b"A"
        assert stamp_of(done[0]) > a.stamp
        assert done[1].stored == b
        assert done[2].stored is None
        assert self.store.read(self.key("a")).stored == done[0].stored
        assert self.store.read(self.key("b")).stored == b
        assert self.store.read(self.key("absent")).stored is None
        assert self.store.read(self.key("c")).stored is None

    def test_create_many_answers_each_in_order(self) -> None:
        held = held_by(self.store.create(self.key("b"), YOURS + b"b"))
        expired = self.store.create(self.key("expired"), YOURS, 1)
        self.wait_until(self.store, expired.now + 4000)
        names = ["c", "b", "a", "expired", *map(str, range(200))]
        done = self.store.create_many(
            [Creation(self.key(name), MINE + name.encode(), 3600 * MICROSECONDS, 5) for name in names]
        )
        replies = [reply for reply in done if isinstance(reply, Reply)]
        assert [reply.done for reply in replies] == [name != "b" for name in names]
        assert replies[1].stored == held
        for name, reply in zip(names, replies, strict=True):
            assert self.store.read(self.key(name)).stored == reply.stored
            assert name == "b" or held_by(reply).value == MINE + name.encode()
        assert self.store.create_many([]) == []

    def test_replace_many_of_nothing_and_of_many(self) -> None:
        assert self.store.replace_many([]) == []
        held = [held_by(self.store.create(self.key(str(n)), MINE)) for n in range(300)]
        done = self.store.replace_many(
            [
                Change(self.key(str(n)), stored, MINE + b"%d" % n, 3600 * MICROSECONDS)
                for n, stored in enumerate(held)
            ]
        )
        assert all(reply.done for reply in done)
        assert held_by(self.store.read(self.key("299"))).value == MINE + b"299"
