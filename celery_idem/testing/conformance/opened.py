"""Tests of the index of open keys: ``due``, ``open`` and ``mark``."""

from __future__ import annotations

from celery_idem.core.model import MICROSECONDS, Stored
from celery_idem.stores.base import Change, Mark, NoIndexError, Reply
from celery_idem.testing.conformance.base import AWKWARD, MINE, SHORT, YOURS, Suite, held_by, stamp_of

HOUR = 3600 * MICROSECONDS


class OpenKeys(Suite):
    """The index follows the writes, and can be corrected. It is complete from ``indexed`` on."""

    def listed(self, prefix: str = "", before: int | None = None) -> list[tuple[str, int, Stored | None]]:
        """Return the entries of the index, with short keys. A missing index is first marked as complete."""
        try:
            found = list(self.store.open(self.key(prefix), before))
        except NoIndexError:
            self.store.indexed(self.key(""))
            found = list(self.store.open(self.key(prefix), before))
        return [(key.removeprefix(self.key("")), at, stored) for key, at, stored in found]

    def names(self, prefix: str = "", before: int | None = None) -> list[str]:
        return [name for name, _, _ in self.listed(prefix, before)]

    def test_a_write_with_a_time_to_look_is_open_and_one_without_is_not(self) -> None:
        self.store.create(self.key("settled"), MINE)
        first = self.store.create(self.key("a"), MINE + b"1", None, HOUR)
        assert self.listed() == [("a", stamp_of(first) + HOUR, first.stored)]
        again = self.store.create(self.key("a"), YOURS, None, 0)  # the key exists: nothing changes
        assert not again.done
        second = self.store.replace(self.key("a"), held_by(first), MINE + b"2", None, 2 * HOUR)
        assert self.listed() == [("a", stamp_of(second) + 2 * HOUR, second.stored)]
        refused = self.store.replace(self.key("a"), held_by(first), MINE + b"3")
        assert not refused.done
        assert self.names() == ["a"]
        assert self.store.replace(self.key("a"), held_by(second), MINE + b"3", HOUR).done
        assert self.listed() == []

    def test_what_is_deleted_is_not_open(self) -> None:
        first = self.store.create(self.key("a"), MINE, None, 0)
        assert self.store.replace(self.key("a"), held_by(first), MINE, 0).done
        assert self.store.create(self.key("b"), MINE, 0).done
        assert self.listed() == []

    def test_the_earliest_comes_first(self) -> None:
        made = {}
        for n in (3, 1, 4, 0, 2):
            made[n] = self.store.create(self.key(str(n)), MINE, None, n * HOUR)
        assert self.names() == ["0", "1", "2", "3", "4"]
        assert self.names(before=stamp_of(made[2]) + 2 * HOUR) == ["0", "1", "2"]
        assert self.names(before=stamp_of(made[0]) - 1) == []

    def test_a_time_to_look_may_lie_in_the_past(self) -> None:
        first = self.store.create(self.key("a"), MINE, None, -HOUR)
        assert self.listed(before=stamp_of(first) - HOUR) == [("a", stamp_of(first) - HOUR, first.stored)]

    def test_more_than_a_page_even_of_one_time(self) -> None:
        marks = []
        for n in range(1100):
            stamp = stamp_of(self.store.create(self.key(f"{n:04}"), MINE, None, -n))
            if n >= 550:
                marks.append(Mark(self.key(f"{n:04}"), stamp, HOUR - stamp))
        self.store.mark(marks)
        found = self.listed()
        assert sorted(name for name, _, _ in found) == [f"{n:04}" for n in range(1100)]
        assert [at for _, at, _ in found] == sorted(at for _, at, _ in found)
        assert [at for _, at, _ in found[:550]] == [HOUR] * 550

    def test_only_keys_with_the_prefix(self) -> None:
        for name in AWKWARD:
            self.store.create(self.key(name), MINE, None, 0)
        for prefix in ("", "pl", "pl%", "größe"):
            assert sorted(self.names(prefix)) == sorted(n for n in AWKWARD if n.startswith(prefix)), prefix

    def test_replace_many_writes_times_to_look(self) -> None:
        held = [held_by(self.store.create(self.key(str(n)), MINE, None, HOUR)) for n in range(3)]
        times = [2 * HOUR, None, HOUR]
        done = self.store.replace_many(
            [Change(self.key(str(n)), held[n], MINE, None, times[n]) for n in range(3)]
        )
        assert self.listed() == [
            ("2", stamp_of(done[2]) + HOUR, done[2].stored),
            ("0", stamp_of(done[0]) + 2 * HOUR, done[0].stored),
        ]

    def test_an_entry_is_corrected_only_if_its_key_was_not_written_since(self) -> None:
        first = self.store.create(self.key("a"), MINE, None, HOUR)
        other = self.store.create(self.key("b"), MINE)
        self.store.mark([Mark(self.key("a"), stamp_of(first), 5), Mark(self.key("b"), stamp_of(other), 7)])
        assert self.listed() == [
            ("a", stamp_of(first) + 5, first.stored),
            ("b", stamp_of(other) + 7, other.stored),
        ]
        second = self.store.replace(self.key("a"), held_by(first), MINE, None, HOUR)
        self.store.mark([Mark(self.key("a"), stamp_of(first), None), Mark(self.key("b"), 0, None)])
        assert sorted(self.names()) == ["a", "b"]
        self.store.mark(
            [Mark(self.key("a"), stamp_of(second), None), Mark(self.key("b"), stamp_of(other), None)]
        )
        assert self.listed() == []

    def test_an_entry_without_a_value_can_be_taken_out(self) -> None:
        last: Reply = self.store.create(self.key("a"), MINE, SHORT, HOUR)
        self.wait_until(self.store, last.now + SHORT + 2000)
        assert all(stored is None for _, _, stored in self.listed())
        self.store.mark([Mark(self.key("a"), 0, None)])
        assert self.listed() == []
        assert self.store.create(self.key("a"), MINE, None, HOUR).done
        self.store.mark([Mark(self.key("a"), 0, None)])  # refused: the key was written since
        assert self.names() == ["a"]
