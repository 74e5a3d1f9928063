"""The memory store: it passes the conformance suite, with a clock that the test moves."""

from __future__ import annotations

from celery_idem.stores import open_store
from celery_idem.stores.base import Store
from celery_idem.stores.memory import MemoryStore
from celery_idem.testing import FakeClock, StoreConformance


class TestMemory(StoreConformance):
    shared_by_processes = False

    def make_store(self) -> Store:
        return MemoryStore(clock=FakeClock())

    def wait_until(self, store: Store, when: int) -> None:
        assert isinstance(store, MemoryStore)
        clock = store._clock
        assert isinstance(clock, FakeClock)
        clock.now = max(clock.now, when) + 1


def test_one_url_is_one_store() -> None:
    assert open_store("memory://one") is open_store("memory://one")
    assert open_store("memory://one") is not open_store("memory://other")


def test_the_clock_moved_back_does_not_move_stamps_back() -> None:
    clock = FakeClock()
    store = MemoryStore(clock)
    first = store.create("a", b"owner-mine--")
    assert first.stored
    clock.advance(-3600)
    second = store.replace("a", first.stored, b"owner-mine--")
    assert second.stored
    assert second.stored.stamp == first.stored.stamp + 1
