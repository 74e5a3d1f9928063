"""Keeps blocking calls off the event loop of asyncio: a bounded number of threads, and wakes from other threads.

``asubmit`` and ``async_wait`` call the blocking functions in such threads.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

# asyncio and its executors would take a tenth of this package's import time. Only programs that await load them.
if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from celery_idem.integration.announcements import Announcements

T = TypeVar("T")

THREADS = 16
"""Threads of a process for each kind of call. A healthy store answers thousands of calls a second through them. Not
more, because each thread may have its own connections to the result backend and the broker."""

Kind = Literal["submit", "look"]
"""Kinds of threads. They are separate, so that a thousand receipts that look do not delay a submit."""

_pools: dict[tuple[Kind, int], ThreadPoolExecutor] = {}


async def in_thread(kind: Kind, call: Callable[..., T], *args: Any) -> T:
    """Run a blocking call in a thread.

    If it is cancelled before it has a thread, the call is not made. If it is cancelled later, the call goes on in its
    thread until it ends, and its result is dropped. The process does not exit before that.
    """
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    mine = (kind, os.getpid())  # a fork has no threads of its parent
    pool = _pools.get(mine)
    if pool is None:
        pool = _pools.setdefault(mine, ThreadPoolExecutor(THREADS, f"celery_idem {kind}"))
    run = partial(copy_context().run, call, *args)
    return await asyncio.get_running_loop().run_in_executor(pool, run)


class Waker:
    """Wakes one coroutine when the result of its task is published. The coroutine must close it.

    Attributes:
        heard: it was woken at least once, so the subscription works.
    """

    def __init__(self, announcements: Announcements | None) -> None:
        import asyncio

        self._announcements = announcements
        self._task_id = ""
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self.heard = False

    def close(self) -> None:
        self.follow("")

    def follow(self, task_id: str) -> None:
        """Wake the coroutine for this task from now on; "": for none."""
        if self._announcements is None or task_id == self._task_id:
            return
        if self._task_id:
            self._announcements.remove(self._task_id, self._wake)
        if task_id:
            self._announcements.add(task_id, self._wake)
        self._task_id = task_id

    def expect(self) -> None:
        """Forget earlier wakes. Call it before a look, so that a result published during the look wakes at once."""
        self._event.clear()

    async def wait(self, longest: float) -> None:
        """Return when a wake has come since ``expect``, or after so many seconds."""
        end = self._loop.call_later(longest, self._event.set)
        try:
            await self._event.wait()
        finally:
            end.cancel()

    def _wake(self) -> None:
        """Called in another thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._woken)

    def _woken(self) -> None:
        self.heard = True
        self._event.set()


_warned = False


def warn_on_loop(blocking: str, instead: str) -> None:
    """Warn, once per process, if the caller's caller blocks the event loop that runs it."""
    global _warned  # noqa: PLW0603  # once per process
    loops = sys.modules.get("asyncio")
    if _warned or loops is None or loops._get_running_loop() is None:
        return
    warnings.warn(
        f"{blocking} blocks the event loop that it is called on: everything else on it waits. Use {instead}.",
        RuntimeWarning,
        stacklevel=3,
    )
    _warned = True
