"""Runs calls in separate threads, with a limit of time, and of threads that hang."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TooLateError(Exception):
    """A call did not return in time, or was not made because earlier calls hang."""


class Bounded:
    """Makes calls that nothing else limits in time.

    Args:
        name: name of the threads.
        most: number of calls that may hang past their time. After that, no call is made.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._hanging: set[threading.Thread] = set()

    def call(self, call: Callable[[], T], seconds: float) -> T:
        """Return what ``call`` returns. It must not raise.

        Raises:
            TooLateError: it did not return in time, and may go on. Or earlier calls hang, and this one was not made.
        """
        for thread in list(self._hanging):
            if not thread.is_alive():  # in a forked child, none is alive
                self._hanging.discard(thread)
        if len(self._hanging) >= self._most:
            raise TooLateError(f"{len(self._hanging)} earlier calls still hang in this process")
        values: list[T] = []
        thread = threading.Thread(target=lambda: values.append(call()), name=self._name, daemon=True)
        thread.start()
        try:
            thread.join(seconds)
        finally:  # also when the exception of a time limit interrupts join()
            if thread.is_alive():
                self._hanging.add(thread)
        if not values:
            raise TooLateError(f"no answer within {seconds:g} s")
        return values[0]
