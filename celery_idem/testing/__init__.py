"""Helpers for tests of your own store, and of your own tasks under faults.

``StoreConformance``
    The tests that every store must pass, as a class to subclass.
``FakeClock``
    A clock that moves only by ``advance``.
``CrashingStore``
    A store that fails before or after a primitive of your choice, with an error or by killing the process.
``use_store``
    Makes the applications of this process use your own store.

Nothing in ``celery_idem`` imports this package.
"""

from __future__ import annotations

from celery_idem.testing.clock import FakeClock
from celery_idem.testing.conformance import StoreConformance
from celery_idem.testing.crashing import CrashingStore, use_store

__all__ = ["CrashingStore", "FakeClock", "StoreConformance", "use_store"]
