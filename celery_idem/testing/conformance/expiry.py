"""Tests of time to live and purge."""

from __future__ import annotations

from celery_idem.core.model import MICROSECONDS, Stored
from celery_idem.stores.base import KEEP, Change, Reply
from celery_idem.testing.conformance.base import MINE, SHORT, YOURS, Suite, held_by, stamp_of


class Expiry(Suite):
    """A value is kept for its time to live, and no longer."""

    def test_a_value_expires(self) -> None:
        first = self.store.create(self.key("a"), MINE + b"1", SHORT)
        assert self.store.read(self.key("a")).stored == first.stored
        self.wait_until(self.store, first.now + SHORT + 2000)
        assert self.store.read(self.key("a")).stored is None
        assert self.store.read(self.key("a")).done is False
        refused = self.store.replace(self.key("a"), held_by(first), MINE + b"2")
        assert (refused.done, refused.stored) == (False, None)
        assert dict(self.store.scan(self.key(""))) == {}
        second = self.store.create(self.key("a"), YOURS)
        assert second.done
        assert stamp_of(second) > stamp_of(first)

    def test_a_value_is_kept_as_long_as_it_should_be(self) -> None:
        ttl = 3600 * MICROSECONDS
        first = self.store.create(self.key("a"), MINE, ttl)
        self.wait_until(self.store, first.now + SHORT)
        assert self.store.read(self.key("a")).stored == first.stored

    def test_the_time_to_live_counts_from_the_last_write(self) -> None:
        first = self.store.create(self.key("for ever"), MINE, SHORT)
        assert self.store.replace(self.key("for ever"), held_by(first), MINE).done
        first = self.store.create(self.key("longer"), MINE, SHORT)
        assert self.store.replace(self.key("longer"), held_by(first), MINE, 3600 * MICROSECONDS).done
        first = self.store.create(self.key("shorter"), MINE)
        last = self.store.replace(self.key("shorter"), held_by(first), MINE, SHORT)
        assert last.done
        self.wait_until(self.store, last.now + SHORT + 2000)
        assert {key for key, _ in self.store.scan(self.key(""))} == {self.key("for ever"), self.key("longer")}

    def test_what_is_left_of_a_time_to_live_can_be_kept(self) -> None:
        def write(name: str, ttl: int | None) -> Reply:
            key, first = self.key(name), self.store.create(self.key(name), MINE, ttl)
            if name.endswith("many"):
                return self.store.replace_many([Change(key, held_by(first), MINE + b"2", KEEP)])[0]
            return self.store.replace(key, held_by(first), MINE + b"2", KEEP)

        last = [write(name, SHORT) for name in ("one", "many")]
        last += [write(f"for ever {name}", None) for name in ("one", "many")]
        assert all(reply.done for reply in last)
        self.wait_until(self.store, last[-1].now + SHORT + 2000)
        found = {key for key, _ in self.store.scan(self.key(""))}
        assert found == {self.key("for ever one"), self.key("for ever many")}

    def test_a_time_to_live_may_be_shorter_than_the_store_counts(self) -> None:
        for ttl in (1, 999, 1001):
            created = self.store.create(self.key(str(ttl)), MINE, ttl)
            assert created.done
            replaceable = self.store.create(self.key(f"replaced {ttl}"), MINE)
            assert self.store.replace(self.key(f"replaced {ttl}"), held_by(replaceable), MINE, ttl).done
            self.wait_until(self.store, self.store.read(self.key("nothing")).now + 4000)
            assert self.store.read(self.key(str(ttl))).stored is None
            assert self.store.peek(self.key(str(ttl))) is None
            assert self.store.read(self.key(f"replaced {ttl}")).stored is None

    def test_a_time_to_live_may_be_very_long(self) -> None:
        ttl = 100 * 365 * 86_400 * MICROSECONDS
        first = self.store.create(self.key("a"), MINE, ttl)
        assert first.done
        assert self.store.replace(self.key("a"), held_by(first), MINE, ttl).done
        assert self.store.read(self.key("a")).done

    def test_a_time_to_live_of_zero_deletes(self) -> None:
        first = self.store.create(self.key("a"), MINE)
        refused = self.store.replace(self.key("a"), Stored(YOURS, stamp_of(first)), YOURS, 0)
        assert (refused.done, refused.stored) == (False, first.stored)
        deleted = self.store.replace(self.key("a"), held_by(first), MINE + b"2", 0)
        assert deleted.done
        assert stamp_of(deleted) > stamp_of(first)
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
            last = self.store.create(self.key(f"expired {n}"), MINE, 1).now
        self.wait_until(self.store, last + 4000)
        for limit in (1, 2, 1000):
            assert 0 <= self.store.purge(limit) <= limit
        assert self.store.purge(1000) == 0
        assert dict(self.store.scan(self.key(""))) == kept
