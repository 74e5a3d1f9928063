"""Bounded waiting for a condition."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Seconds between the first two checks: much shorter than a wait, much longer than a check.
LOOK_EVERY = 0.02

# The pause grows by this factor after each check, up to this many seconds.
SLOWER, SLOWEST = 1.1, 0.1


def wait_for(
    predicate: Callable[[], T],
    timeout: float = 60.0,
    message: str | Callable[[], str] = "the condition",
    every: float = LOOK_EVERY,
) -> T:
    """Calls `predicate` until its value is true, and returns the value. Raises AssertionError after `timeout` seconds.

    `every` is the first pause between two calls, in seconds. `message` names the condition for the error. If it is a
    function, it is called only then, so that it can show a log. Exceptions of `predicate` are not caught: where one
    means "not yet", `predicate` has to catch it and return a false value.
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
