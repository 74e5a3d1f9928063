"""Bounded waiting for a condition."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Seconds between the first two checks: short beside the waits, long beside a check.
LOOK_EVERY = 0.02

# What takes long is looked at less often, up to so many seconds apart.
SLOWER, SLOWEST = 1.1, 0.1


def wait_for(
    predicate: Callable[[], T],
    timeout: float = 60.0,
    message: str | Callable[[], str] = "the condition",
    every: float = LOOK_EVERY,
) -> T:
    """Call `predicate` until what it returns is true, and return that.

    `timeout` and `every` are seconds. `message` names what was waited for; as a function it is called only
    when the time is up, so that it can show a log. Raises AssertionError then. An exception of the predicate
    is not caught: one that means "not yet" has to be turned into a false value by the predicate itself.
    """
    deadline = time.monotonic() + timeout
    pause = every
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            text = message() if callable(message) else message
            raise AssertionError(f"waited {timeout:g} s for: {text}; last seen: {value!r}")
        time.sleep(pause)
        pause = min(pause * SLOWER, max(every, SLOWEST))
