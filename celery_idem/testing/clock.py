"""A clock that only moves when it is told to."""

from __future__ import annotations

from celery_idem.core.model import MICROSECONDS

START = 1_767_225_600 * MICROSECONDS
"""1 January 2026, 00:00 UTC, in microseconds: a time like the ones that real stores give."""


class FakeClock:
    """The time of a ``MemoryStore``: ``MemoryStore(clock=FakeClock())``.

    Args:
        start: the time it shows at first, in microseconds since the epoch.
    """

    def __init__(self, start: int = START) -> None:
        self.now = start

    def __call__(self) -> int:
        """The time, in microseconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Move it. A negative number moves it back, as a server's clock may be."""
        self.now += round(seconds * MICROSECONDS)
