"""A clock for tests that moves only by ``advance``."""

from __future__ import annotations

from celery_idem.core.model import MICROSECONDS

START = 1_767_225_600 * MICROSECONDS
"""1 January 2026, 00:00 UTC, in microseconds: a realistic time."""


class FakeClock:
    """The clock of a ``MemoryStore``: ``MemoryStore(clock=FakeClock())``.

    Args:
        start: its first time, in microseconds since the epoch.
    """

    def __init__(self, start: int = START) -> None:
        self.now = start

    def __call__(self) -> int:
        """Return the time in microseconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Move the clock; a negative number moves it back."""
        self.now += round(seconds * MICROSECONDS)
