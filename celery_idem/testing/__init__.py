"""For tests: of your own store, and of your own tasks under faults.

``StoreConformance``
    Everything a store must do, as one class of pytest methods to subclass.
``FakeClock``
    A clock that stands still until it is told to move.
``CrashingStore``
    A store that fails at a point you name: before or after a primitive, by an error or
    by the death of the process.
``use_store``
    Gives the applications of this process a store of your making.

Nothing in ``celery_idem`` imports this package.
"""

from __future__ import annotations

from celery_idem.testing.clock import FakeClock
from celery_idem.testing.conformance import StoreConformance
from celery_idem.testing.crashing import CrashingStore, use_store

__all__ = ["CrashingStore", "FakeClock", "StoreConformance", "use_store"]
