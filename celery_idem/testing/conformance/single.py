"""Tests of create, read and replace, of stamps and the clock."""

from __future__ import annotations

import os
import time
from unittest import mock

from celery_idem.core.model import MICROSECONDS, Stored
from celery_idem.stores.base import OWNER
from celery_idem.testing.conformance.base import AWKWARD, MINE, PATIENCE, YOURS, Suite, held_by, stamp_of


class SingleValues(Suite):
    """Create, read and replace."""

    def test_it_says_where_it_is(self) -> None:
        assert isinstance(self.store.url, str)
        assert self.store.url

    def test_nothing_there(self) -> None:
        reply = self.store.read(self.key("a"))
        assert (reply.done, reply.stored) == (False, None)
        assert reply.now > 0
        assert self.store.peek(self.key("a")) is None

    def test_create_then_read(self) -> None:
        reply = self.store.create(self.key("a"), MINE + b"1")
        assert reply.done
        assert reply.stored == Stored(MINE + b"1", reply.stored.stamp if reply.stored else 0)
        again = self.store.read(self.key("a"))
        assert again.done
        assert again.stored == reply.stored
        assert again.now >= reply.now
        assert self.store.peek(self.key("a")) == reply.stored

    def test_a_first_stamp_is_the_time_of_the_write(self) -> None:
        before = self.store.read(self.key("a")).now
        reply = self.store.create(self.key("a"), MINE)
        after = self.store.read(self.key("a")).now
        assert before <= stamp_of(reply) <= after
        assert stamp_of(reply) <= reply.now

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
            assert held_by(reply).value == MINE + name.encode()

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
            assert self.store.read(key).stored == Stored(value, stamp_of(created))
            replaced = self.store.replace(key, held_by(created), value[::-1])
            assert replaced.done
            assert self.store.read(key).stored == Stored(value[::-1], stamp_of(replaced))

    def test_replace_what_is_unchanged(self) -> None:
        first = self.store.create(self.key("a"), MINE + b"1")
        second = self.store.replace(self.key("a"), held_by(first), YOURS + b"2")
        assert second.done
        assert held_by(second).value == YOURS + b"2"
        assert stamp_of(second) > stamp_of(first)
        assert self.store.read(self.key("a")).stored == second.stored

    def test_replace_of_an_older_stamp_is_refused(self) -> None:
        first = self.store.create(self.key("a"), MINE + b"1")
        second = self.store.replace(self.key("a"), held_by(first), MINE + b"2")
        third = self.store.replace(self.key("a"), held_by(first), MINE + b"3")
        assert (third.done, third.stored) == (False, second.stored)
        assert self.store.read(self.key("a")).stored == second.stored

    def test_replace_of_a_later_stamp_is_refused(self) -> None:
        first = self.store.create(self.key("a"), MINE + b"1")
        old = Stored(MINE + b"1", stamp_of(first) + 1)
        second = self.store.replace(self.key("a"), old, MINE + b"2")
        assert (second.done, second.stored) == (False, first.stored)

    def test_replace_of_another_owner_is_refused(self) -> None:
        first = self.store.create(self.key("a"), MINE + b"1")
        second = self.store.replace(self.key("a"), Stored(YOURS + b"1", stamp_of(first)), YOURS + b"2")
        assert (second.done, second.stored) == (False, first.stored)
        assert self.store.read(self.key("a")).stored == first.stored

    def test_replace_compares_the_owner_and_not_the_rest(self) -> None:
        first = self.store.create(self.key("a"), MINE + b"1")
        second = self.store.replace(self.key("a"), Stored(MINE + b"another", stamp_of(first)), MINE + b"2")
        assert second.done

    def test_replace_of_nothing_writes_nothing(self) -> None:
        reply = self.store.replace(self.key("a"), Stored(MINE, 1), MINE + b"2")
        assert (reply.done, reply.stored) == (False, None)
        assert reply.now > 0
        assert self.store.read(self.key("a")).stored is None

    def test_stamps_only_grow_and_follow_the_clock(self) -> None:
        reply = self.store.create(self.key("a"), MINE)
        stamps = [stamp_of(reply)]
        for _ in range(50):
            reply = self.store.replace(self.key("a"), held_by(reply), MINE)
            assert reply.done
            stamps.append(stamp_of(reply))
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
                reply = self.store.replace(self.key("a"), held_by(created), MINE, 3600 * MICROSECONDS)
                assert reply.done
                fresh = self.store.create(self.key(str(shift)), MINE, 3600 * MICROSECONDS)
                assert fresh.done
            created = reply
            for stamp in (stamp_of(reply), stamp_of(fresh)):
                assert before <= stamp <= before + PATIENCE * MICROSECONDS
            assert self.store.read(self.key(str(shift))).stored is not None
