"""Blocking calls from an event loop: in threads with a bound, and woken from other threads. Needs anyio.

The functions behind ``asubmit`` and ``async_wait`` are the blocking ones. What is here keeps them off the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from celery_idem.core.errors import ConfigurationError
from celery_idem.integration.announcements import Announcements

if TYPE_CHECKING:
    from types import TracebackType

    from anyio import CapacityLimiter, Event
    from anyio.lowlevel import RunVar

T = TypeVar("T")

THREADS = 16
"""Threads of one event loop for each kind of call: a healthy store answers thousands of calls a second through them,
and each of them may have connections of its own to the store, the result backend and the broker."""

Kind = Literal["submit", "look"]
"""What a thread is for. Apart, so that a thousand receipts that look do not hold up a submit."""


async def in_thread(kind: Kind, call: Callable[..., T], *args: Any) -> T:
    """Run a blocking call in a thread.

    Cancelled before it has a thread, it is not made. Cancelled later, it goes on to its end in its thread, which
    stays counted, and its result is dropped.

    Raises:
        ConfigurationError: anyio is not installed.
    """
    run_sync = _anyio().to_thread.run_sync
    return cast("T", await run_sync(call, *args, abandon_on_cancel=True, limiter=_limiter(kind)))


def _anyio() -> Any:
    try:
        import anyio.lowlevel
        import anyio.to_thread
    except ImportError as error:
        raise ConfigurationError("Awaiting needs anyio: pip install 'celery_idem[async]'.") from error
    return anyio


def _limiter(kind: Kind) -> CapacityLimiter:
    of_loop = _limiters(kind)
    limiter = of_loop.get(None)
    if limiter is None:
        limiter = _anyio().CapacityLimiter(THREADS)
        of_loop.set(limiter)
    return limiter


@functools.cache
def _limiters(kind: Kind) -> RunVar[CapacityLimiter | None]:
    return cast("RunVar[CapacityLimiter | None]", _anyio().lowlevel.RunVar(f"celery_idem {kind}"))


class Waker:
    """Wakes one coroutine when the result of its task is published. Use it in a ``with`` statement.

    Attributes:
        heard: it was woken at least once, so the subscription works.
    """

    def __init__(self, announcements: Announcements | None) -> None:
        self._anyio = _anyio()
        self._announcements = announcements
        self._task_id = ""
        self._soon = _call_soon()
        self._event: Event | None = None
        self.heard = False

    def __enter__(self) -> Waker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.follow("")

    def follow(self, task_id: str) -> None:
        """Be woken for this task from now on; "": for none."""
        if self._announcements is None or task_id == self._task_id:
            return
        if self._task_id:
            self._announcements.remove(self._task_id, self._wake)
        if task_id:
            self._announcements.add(task_id, self._wake)
        self._task_id = task_id

    def expect(self) -> None:
        """Count what wakes from now on. Before a look: what is published while it looks wakes it at once."""
        self._event = self._anyio.Event()

    async def wait(self, longest: float) -> None:
        """Return when woken since ``expect``, or after so many seconds."""
        assert self._event is not None
        with self._anyio.move_on_after(longest):
            await self._event.wait()

    def _wake(self) -> None:
        """Called in another thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._soon(self._woken)

    def _woken(self) -> None:
        self.heard = True
        if self._event is not None:
            self._event.set()


def _call_soon() -> Callable[[Callable[[], None]], object]:
    """What makes a call on this event loop from another thread."""
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        import trio

        soon: Callable[[Callable[[], None]], object] = trio.lowlevel.current_trio_token().run_sync_soon
        return soon


_warned = False


def warn_on_loop(blocking: str, instead: str) -> None:
    """Warn, once per process, where the caller's caller blocks the event loop that runs it."""
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
