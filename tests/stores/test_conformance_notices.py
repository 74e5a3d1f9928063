"""The conformance suite fails for stores that are wrong, each in one way."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterator, Sequence
from itertools import islice

import pytest

from celery_idem.core.errors import StoreError
from celery_idem.core.model import Stored
from celery_idem.stores.base import KEEP, Change, Creation, Listed, Mark, Reply, Store
from celery_idem.stores.memory import MemoryStore
from celery_idem.testing import FakeClock
from tests.stores import test_memory


class Wrong(MemoryStore):
    """The base of the wrong stores, which is itself right."""

    def __init__(self) -> None:
        super().__init__(FakeClock())


class IgnoresTheOwner(Wrong):
    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        held = self.read(key).stored
        mine = held is not None and held.stamp == old.stamp
        return super().replace(key, held if mine and held else old, value, ttl, due)


class IgnoresTheStamp(Wrong):
    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        held = self.read(key).stored
        return super().replace(key, Stored(old.value, held.stamp if held else 0), value, ttl, due)


class ComparesEverything(Wrong):
    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        held = self.read(key).stored
        if held is not None and held.value != old.value:
            return Reply(False, held, self._clock())
        return super().replace(key, old, value, ttl, due)


class CreatesByReplacing(Wrong):
    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        if self.read(key).stored is None:
            return self.create(key, value, ttl, due)
        return super().replace(key, old, value, ttl, due)


class Overwrites(Wrong):
    def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
        self._values.pop(key, None)
        return super().create(key, value, ttl, due)


class LooksBeforeItWrites(Wrong):
    """Has a race: another writer may write between the read and the write."""

    def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
        held = self.read(key).stored
        if held is not None:
            return Reply(False, held, self._clock())
        time.sleep(0.001)  # as long as a network may take
        now = self._clock()
        return Reply(True, self._write(key, value, now, now, ttl), now)


class KeepsTheFirstTimeToLive(Wrong):
    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        before = self._values.get(key)
        reply = super().replace(key, old, value, ttl, due)
        if reply.done and before is not None:
            self._values[key] = (self._values[key][0], before[1])
        return reply


class NeverExpires(Wrong):
    def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
        return super().create(key, value, None, due)


class RoundsDown(Wrong):
    """Rounds to milliseconds, and keeps for ever what should live for less than one."""

    def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
        return super().create(key, value, None if ttl is None else (ttl // 1000 * 1000) or None, due)


class StampsWithTheClockAlone(Wrong):
    def _write(self, key: str, value: bytes, stamp: int, now: int, ttl: int | None) -> Stored:
        return super()._write(key, value, now, now, ttl)


class AsksTheClientForTheTime(MemoryStore):
    def __init__(self) -> None:
        super().__init__(lambda: int(time.time() * 1e6))


class ScansByPattern(Wrong):
    def scan(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        return ((key, held) for key, held in super().scan("") if fnmatch.fnmatchcase(key, f"{prefix}*"))


class FoldsCase(Wrong):
    def _write(self, key: str, value: bytes, stamp: int, now: int, ttl: int | None) -> Stored:
        return super()._write(key.lower(), value, stamp, now, ttl)

    def _held(self, key: str, now: int) -> Stored | None:
        return super()._held(key.lower(), now)


class CutsLargeValues(Wrong):
    def _write(self, key: str, value: bytes, stamp: int, now: int, ttl: int | None) -> Stored:
        return super()._write(key, value[: 1 << 20], stamp, now, ttl)


class PurgesTheLiving(Wrong):
    def purge(self, limit: int) -> int:
        self._values.clear()
        return 0


class MixesUpReplies(Wrong):
    def replace_many(self, changes: list[Change]) -> list[Reply]:  # type: ignore[override]
        return super().replace_many(changes)[::-1]


class MixesUpCreations(Wrong):
    def create_many(self, items: list[Creation]) -> list[Reply | StoreError]:  # type: ignore[override]
        return super().create_many(items)[::-1]


class RenewsWhatShouldBeKept(Wrong):
    def _write(self, key: str, value: bytes, stamp: int, now: int, ttl: int | None) -> Stored:
        return super()._write(key, value, stamp, now, 60_000_000 if ttl == KEEP else ttl)


class KeepsWhatIsReplacedForNoTime(Wrong):
    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        return super().replace(key, old, value, ttl or None, due)


class KeepsWhatIsCreatedForNoTime(Wrong):
    def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
        return super().create(key, value, ttl or None, due)


# --- the index of what is open ------------------------------------------------------------------


class ListsNothing(Wrong):
    def _list(self, key: str, stored: Stored, due: int | None) -> Stored:
        return stored


class ListsTheDeleted(Wrong):
    def _list(self, key: str, stored: Stored, due: int | None) -> Stored:
        return stored if due is None else super()._list(key, stored, due)


class ListsNothingLate(Wrong):
    def _list(self, key: str, stored: Stored, due: int | None) -> Stored:
        return super()._list(key, stored, due and max(0, due))


class LatestFirst(Wrong):
    def open(self, prefix: str, before: int | None = None) -> Iterator[Listed]:
        return reversed(list(super().open(prefix, before)))


class OnePage(Wrong):
    def open(self, prefix: str, before: int | None = None) -> Iterator[Listed]:
        return islice(super().open(prefix, before), 1000)


class OpensAllPrefixes(Wrong):
    def open(self, prefix: str, before: int | None = None) -> Iterator[Listed]:
        return super().open("", before)


class ListsNothingOfMany(Wrong):
    def replace_many(self, changes: Sequence[Change]) -> list[Reply]:
        return super().replace_many([change._replace(due=None) for change in changes])


class CorrectsWhatWasWrittenSince(Wrong):
    def mark(self, marks: Sequence[Mark]) -> None:
        for mark in marks:
            self._list(mark.key, self.read(mark.key).stored or Stored(b"", 0), mark.due)


class CorrectsOnlyWhatIsThere(Wrong):
    def mark(self, marks: Sequence[Mark]) -> None:
        super().mark([mark for mark in marks if self.read(mark.key).stored is not None])


NOTICED_BY = {
    IgnoresTheOwner: "test_replace_of_another_owner_is_refused",
    IgnoresTheStamp: "test_replace_of_an_older_stamp_is_refused",
    ComparesEverything: "test_replace_compares_the_owner_and_not_the_rest",
    CreatesByReplacing: "test_replace_of_nothing_writes_nothing",
    Overwrites: "test_create_of_what_is_there_changes_nothing",
    LooksBeforeItWrites: "test_threads_race_and_one_creates",
    KeepsTheFirstTimeToLive: "test_the_time_to_live_counts_from_the_last_write",
    NeverExpires: "test_a_value_expires",
    RoundsDown: "test_a_time_to_live_may_be_shorter_than_the_store_counts",
    StampsWithTheClockAlone: "test_stamps_only_grow_and_follow_the_clock",
    AsksTheClientForTheTime: "test_the_clients_clock_does_not_count",
    ScansByPattern: "test_a_prefix_is_taken_literally",
    FoldsCase: "test_keys_do_not_meet",
    CutsLargeValues: "test_any_bytes_come_back",
    PurgesTheLiving: "test_purge_deletes_what_has_expired_and_nothing_else",
    MixesUpCreations: "test_create_many_answers_each_in_order",
    MixesUpReplies: "test_replace_many_answers_each_in_order",
    RenewsWhatShouldBeKept: "test_what_is_left_of_a_time_to_live_can_be_kept",
    KeepsWhatIsReplacedForNoTime: "test_a_time_to_live_of_zero_deletes",
    KeepsWhatIsCreatedForNoTime: "test_create_with_a_time_to_live_of_zero_leaves_nothing",
    ListsNothing: "test_a_write_with_a_time_to_look_is_open_and_one_without_is_not",
    ListsTheDeleted: "test_what_is_deleted_is_not_open",
    ListsNothingLate: "test_a_time_to_look_may_lie_in_the_past",
    LatestFirst: "test_the_earliest_comes_first",
    OnePage: "test_more_than_a_page_even_of_one_time",
    OpensAllPrefixes: "test_only_keys_with_the_prefix",
    ListsNothingOfMany: "test_replace_many_writes_times_to_look",
    CorrectsWhatWasWrittenSince: "test_an_entry_is_corrected_only_if_its_key_was_not_written_since",
    CorrectsOnlyWhatIsThere: "test_an_entry_without_a_value_can_be_taken_out",
}


@pytest.mark.parametrize("kind", [Wrong, *NOTICED_BY], ids=lambda kind: kind.__name__)
def test_a_wrong_store_is_noticed(kind: type[MemoryStore]) -> None:
    class Suite(test_memory.TestMemory):
        def make_store(self) -> Store:
            return kind()

    suite = Suite()
    suite.setup_method()
    if kind is Wrong:
        for test in NOTICED_BY.values():
            getattr(suite, test)()
            suite.setup_method()
        return
    with pytest.raises(AssertionError):
        getattr(suite, NOTICED_BY[kind])()
