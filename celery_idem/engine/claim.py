"""An execution's hold on one intent."""

from __future__ import annotations

import threading
from typing import Any

from celery_idem.core import keys, protocol
from celery_idem.core.errors import LeaseLost
from celery_idem.core.model import (
    MICROSECONDS,
    Outcome,
    Record,
    Request,
    Stored,
)
from celery_idem.engine import clock
from celery_idem.stores.base import Reply


class Retries:
    """What a body has published to be run later, and what it got instead. Celery's ``Retry`` is a signal here.

    Attributes:
        signal: of the message that continues this intent; None while there is none.
        causes: the errors because of which it was asked for.
        apart: signals of messages that are intents of their own.
        refused: what ``retry`` raised instead of publishing, and because of which error.
    """

    __slots__ = ("apart", "causes", "refused", "signal")

    def __init__(self) -> None:
        self.signal: Any = None  # any: this module knows nothing of Celery
        self.causes: list[BaseException] = []
        self.apart: list[Any] = []
        self.refused: tuple[BaseException, BaseException | None] | None = None


class Claim:
    """One execution's hold on one intent: what a body sees as ``self.claim``.

    Attributes:
        key: the idempotency key.
        lost: True once this execution must not start another effect: somebody took
            over, the lease could not be renewed in time, or the body has ended (a thread
            that it did not wait for sees that).
    """

    # What few executions change.
    _taken_over = False
    _ending = False
    _ended = False
    """Its body has ended. A thread that the body left behind may still have this claim."""
    _step_running = ""
    _step_unrecorded = False
    _retries: Retries | None = None
    _promised: tuple[Outcome, Any] | None = None
    """What a transaction of the author's is to commit: the outcome, and its value as every caller gets it."""

    def __init__(
        self,
        key: str,
        request: Request,
        stored: Stored | None,
        record: Record,
        before: float,
    ) -> None:
        self.key = key
        self._request = request
        # What stood in the store when this claim last wrote: both parts change together, because
        # the renewing thread reads them while the body's thread writes them.
        self._seen = (stored, record)
        # Not later than that write, by this process' clock: the lease counts from there.
        self._written_at = before
        self._lock = threading.Lock()
        self._steps_seen: set[str] = set()

    @classmethod
    def unguarded(cls, key: str, request: Request) -> Claim:
        """For a body that runs without a store (``on_store_error="run"``)."""
        claim = cls(key, request, None, protocol.fresh(request), 0.0)
        claim._written_at = float("inf")
        return claim

    @property
    def fence(self) -> int:
        """Grows with every new owner of the intent: let the destination refuse a smaller one.

        0 while no store stands behind the claim.
        """
        return self._seen[1].fence

    @property
    def attempt(self) -> int:
        """Which execution of this intent this is; 1 for the first."""
        return self._seen[1].attempts

    @property
    def task_id(self) -> str:
        """Celery's id of this execution's task."""
        return self._seen[1].task_id

    @property
    def lost(self) -> bool:
        return self._taken_over or self._ended or clock.elapsed() > self._trusted_until

    @property
    def _trusted_until(self) -> float:
        return self._written_at + protocol.trusted_for(self._request.policy.lease) / MICROSECONDS

    @property
    def guarded(self) -> bool:
        """False when the body runs without a store."""
        return self._seen[0] is not None

    def _end(self) -> None:
        """Before the first write that ends this hold. No renewal creates the record anew from here on;
        one that is doing so is waited for, and what it created is then there to be ended."""
        with self._lock:
            self._ending = True

    def downstream_key(self, name: str) -> str:
        """A key for one call this body makes, such as ``"charge"``: the same in every
        attempt, ASCII, and short enough for an ``Idempotency-Key`` header."""
        return keys.downstream_key(self.key, name)

    def __repr__(self) -> str:
        return f"<Claim {self.key} fence={self.fence} attempt={self.attempt}>"


def renewed(claim: Claim, record: Record, reply: Reply, before: float) -> None:
    """Remember what stands in the store, and trust the lease as long as that write allows.

    The renewing thread may be slow to note its write while the body's thread has made the
    next one. Going back to the older would make every later renewal fail.

    Args:
        before: the worker's time before the call that ``reply`` answers.
    """
    if reply.stored is None or not reply.now:  # nothing was asked: no news
        return
    with claim._lock:
        seen = claim._seen[0]
        if seen is None or reply.stored.stamp >= seen.stamp:
            claim._seen = (reply.stored, record)
            claim._written_at = before - age(reply)


def age(reply: Reply) -> float:
    """Seconds since what stands there was written: more than none where the reply to that write got lost."""
    assert reply.stored is not None
    return max(0, reply.now - reply.stored.stamp) / MICROSECONDS


def lease_lost(claim: Claim) -> LeaseLost:
    """What a body is told that must stop."""
    return LeaseLost(
        f"Another execution took {claim.key} over, so this one stopped. What it did before that stays done: if "
        "that was an effect, look for a second one.",
        claim.key,
    )


def doubt_message(key: str, reason: str) -> str:
    """What a caller is told of an intent in doubt."""
    return (
        f"{key} is in doubt: {reason}. The effect may or may not have happened; nothing was run now. Look at the "
        f"destination, then say what you found: "
        f"celery -A proj idem resolve {key!r} --happened RESULT or --not-happened."
    )
