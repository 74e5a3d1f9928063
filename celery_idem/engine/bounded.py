"""A call on a thread of its own gets a bounded time, and only so many threads may be left hanging in one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TooLateError(Exception):
    """No answer in time, or none to be expected."""


class Bounded:
    """Makes calls that no driver bounds.

    Args:
        name: of the threads.
        most: how many calls may hang past their time; then the next is not made. Calls in their time do not count.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._hanging: set[threading.Thread] = set()

    def call(self, call: Callable[[], T], seconds: float) -> T:
        """What ``call``, which must not raise, returns within that time.

        Raises:
            TooLateError: it did not; it may go on. Or earlier calls hang, and this one was not made.
        """
        for thread in list(self._hanging):
            if not thread.is_alive():  # none is, in a forked child
                self._hanging.discard(thread)
        if len(self._hanging) >= self._most:
            raise TooLateError(f"{len(self._hanging)} earlier calls still hang in this process")
        values: list[T] = []
        thread = threading.Thread(target=lambda: values.append(call()), name=self._name, daemon=True)
        thread.start()
        try:
            thread.join(seconds)
        finally:  # also where a time limit's exception comes meanwhile
            if thread.is_alive():
                self._hanging.add(thread)
        if not values:
            raise TooLateError(f"no answer within {seconds:g} s")
        return values[0]
