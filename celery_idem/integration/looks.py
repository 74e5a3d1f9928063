"""A thread in a worker's main process that looks at the stores now and then.

It must not fork in the middle of a look: a pool's new process would inherit locks inside a driver as they are,
without the thread that opens them again.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable

from celery_idem.core.errors import IdempotencyError
from celery_idem.engine import events

FORK_WAITS = 0.5
"""Seconds that a fork waits for the look under way, at most: no worker may stop for a database that hangs."""


class _Forks:
    """Keeps the worker from forking a pool process in the middle of a statement."""

    def __init__(self) -> None:
        self.held_off = threading.Lock()
        self._forking = threading.local()  # two threads may fork at once
        os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._in_child)

    def _before(self) -> None:
        self._forking.holds = self.held_off.acquire(timeout=FORK_WAITS)

    def _after(self) -> None:
        if self._forking.holds:
            self.held_off.release()

    def _in_child(self) -> None:
        self.held_off = threading.Lock()


FORKS = _Forks()


class Looks:
    """A thread that looks every so often.

    Args:
        name: what it does, for the name of the thread and for the log.
        look: does it once. It gets an event, which is set when it is to end.
        first: seconds until the first look, at most: by chance, so that a hundred workers that start together do not
            look at once.
        every: seconds between looks, give or take a tenth.
    """

    def __init__(
        self, name: str, look: Callable[[threading.Event], object], first: float, every: float
    ) -> None:
        self._name = name
        self._look = look
        self._first = first
        self._every = every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=f"celery_idem {name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends after what is under way; does not wait for it."""
        self._ended.set()

    def _loop(self) -> None:
        pause = random.uniform(0.0, self._first)  # noqa: S311  # to spread them
        while not self._ended.wait(pause):
            try:
                self._look(self._ended)
            except IdempotencyError as error:
                events.diagnose(logging.WARNING, "%s failed; trying again: %s", self._name, error)
            except Exception as error:
                events.diagnose(logging.ERROR, "%s failed; trying again", self._name, error=error)
            pause = self._every * random.uniform(0.9, 1.1)  # noqa: S311
