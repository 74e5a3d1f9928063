"""The worker's own clock, by which it trusts a lease: it goes on while the machine is suspended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial


def _clock() -> Callable[[], float]:
    """``time.monotonic`` stands still during a suspend on Linux and macOS, and the store's clock does not."""
    try:
        if sys.platform == "darwin":  # where this one goes on, and Python's monotonic is another
            number = time.CLOCK_MONOTONIC
        else:
            number = time.CLOCK_BOOTTIME
        time.clock_gettime(number)
    except (AttributeError, OSError):
        return time.monotonic
    return partial(time.clock_gettime, number)


elapsed: Callable[[], float] = _clock()
"""Seconds since some moment. Called as ``clock.elapsed()``, so that tests can set it."""
