"""The worker's own clock, by which it trusts a lease. It continues while the machine is suspended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial


def _clock() -> Callable[[], float]:
    """Return a clock that continues during a suspend. ``time.monotonic`` stops then, on Linux and macOS."""
    try:
        if sys.platform == "darwin":  # here this one continues; Python's monotonic is another one
            number = time.CLOCK_MONOTONIC
        else:
            number = time.CLOCK_BOOTTIME
        time.clock_gettime(number)
    except (AttributeError, OSError):
        return time.monotonic
    return partial(time.clock_gettime, number)


elapsed: Callable[[], float] = _clock()
"""Seconds since some moment. Called as ``clock.elapsed()``, so that tests can set it."""
