"""``Receipt``: what a caller learns about an intent. It is a value, with advice for a model.

The callers are models and orchestrators, which retry everything that looks like an error. So a known answer is a value
and never an exception.

===========  ==================================================================================
status       meaning
===========  ==================================================================================
accepted     this call will be done: it is in its record, and published
executed     done, by the delivery that this call published
replayed     done by another delivery; this call did nothing
in_progress  another delivery holds it
conflict     the same intent is known with other values; ``differs`` names them
in_doubt     it may have happened, and no program here can know
failed       the body failed
not_run      nothing was done, or only the finished steps: call again unchanged
===========  ==================================================================================

If one status needs different advice, ``code`` says which:

===========  ===========  =====================================================================
code         status       meaning
===========  ===========  =====================================================================
not_kept     executed,    done, but the value was not stored or cannot be read
             replayed
undecided    in_doubt     its worker is dead: the next delivery decides
unsure       failed       no record says so: the body may not have run. Call again once
invalid      failed       the arguments do not fit the task: correct them
cancelled    failed       a person cancelled it: it will not run
partly_done  not_run      the finished steps are kept; the next call continues after them
store_error  not_run      the store did not answer
not_sent     accepted     the broker did not take the message: recovery publishes it
not_sent     not_run      the message could not be published
===========  ===========  =====================================================================
"""

from __future__ import annotations

import base64
import inspect
import math
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from copy import deepcopy
from dataclasses import InitVar, dataclass, field, fields, replace
from datetime import date, datetime
from datetime import time as clock_time
from enum import Enum
from typing import Any, Literal, Protocol

from celery_idem.core.errors import IdempotencyError
from celery_idem.integration.announcements import Announcements
from celery_idem.integration.awaiting import Waker, in_thread, warn_on_loop

Status = Literal[
    "accepted", "executed", "replayed", "in_progress", "conflict", "in_doubt", "failed", "not_run"
]
Code = Literal[
    "", "not_kept", "undecided", "unsure", "invalid", "cancelled", "partly_done", "store_error", "not_sent"
]

PENDING: tuple[Status, ...] = ("accepted", "in_progress")
"""Non-final statuses."""

FIRST_LOOK = 0.02
"""Seconds until ``wait`` looks for the second time: the shortest way through a broker and a worker."""

LOOK_GROWTH = 1.5
"""Growth of the time between looks. So the time from the body's end to its answer is at most half its run time."""

LONGEST_LOOK = 1.0
"""The longest time between looks, in seconds. One small read a second costs a store nothing, and after a minute a
person or a model does not notice a second."""

LONGEST_LOOK_IF_WOKEN = 5.0
"""The longest time between looks, in seconds, while the result backend wakes the caller. These looks find what it does
not publish: an answer by a delivery with another task id, or a result that is not stored."""

_RUNNING = "Accepted and running. Do NOT call again, also not with reworded arguments."
_DONE = "Done. Report it as done."
_DONE_EARLIER = "Already done earlier; nothing was done now. Report it as done."
_NOT_KEPT = " Its result was not kept."

ADVICE: Mapping[tuple[Status, Code], str] = {
    ("accepted", ""): _RUNNING,
    ("accepted", "not_sent"): (
        "Accepted. The broker did not take its message, which is published when it does. Do NOT call again."
    ),
    ("in_progress", ""): _RUNNING,
    ("executed", ""): _DONE,
    ("executed", "not_kept"): _DONE + _NOT_KEPT,
    ("replayed", ""): _DONE_EARLIER,
    ("replayed", "not_kept"): _DONE_EARLIER + _NOT_KEPT,
    ("conflict", ""): (
        "Key already used with different {differs}. If this is a different action, give it another occurrence; "
        "otherwise stop."
    ),
    ("in_doubt", ""): "It may have happened. Do not retry; a person must resolve it.",
    ("in_doubt", "undecided"): (
        "No worker has it any more. Call again once, unchanged: that decides what happened."
    ),
    ("failed", ""): (
        "It was tried and failed; calling again unchanged gives this same answer. Report the failure."
    ),
    ("failed", "unsure"): (
        "It failed. Safe to call again unchanged, once: it is tried again where nothing was done, else this answer "
        "stays. Then report the failure."
    ),
    ("failed", "cancelled"): (
        "A person cancelled it, and it will not run; calling again unchanged gives this same answer. Report that."
    ),
    ("failed", "invalid"): "Nothing was done. Correct the arguments and call again.",
    ("not_run", ""): "Nothing was done. Safe to call again unchanged.",
    ("not_run", "partly_done"): (
        "Only its finished steps are done. Safe to call again unchanged: it goes on after them."
    ),
    ("not_run", "store_error"): (
        "The store did not answer, so nothing was run now. Safe to call again unchanged: it is still done once."
    ),
    ("not_run", "not_sent"): "It could not be handed over. Safe to call again unchanged.",
}
"""``next`` by status and code. Each sentence says whether to call again. No code reads this text."""


class Source(Protocol):
    """Where a receipt looks again. Not part of its value."""

    def look(self, receipt: Receipt) -> Receipt:
        """Return the receipt of the same intent as it is now."""

    def announcements(self, receipt: Receipt) -> Announcements | None:
        """Return what wakes the caller; None if nothing does."""


@dataclass(frozen=True)
class Receipt:
    """What one caller may know about an intent.

    A plain value: it can be copied, compared, pickled and made a dictionary (``to_dict``, ``dataclasses.asdict``). A
    copy can ``wait``. An unpickled one cannot, because the application is not pickled with it: use
    ``look_up(app, receipt.key)``.

    Attributes:
        status: see the table in ``docs/reference/callers.md``.
        key: the idempotency key; "" if it is not known here, because the task was submitted by name and only its worker
            knows its signature.
        task_id: Celery's id of the delivery that this call published, or else of the execution in the record; "" if
            there is none.
        result: the value, if it is done and the value was kept.
        reason: why there is no result: the body's error (only its class, for a task with secret parameters), why it is
            in doubt, or why the value was not kept; "" otherwise.
        code: the case of the status, if one status needs different advice; "" otherwise.
        differs: names of parameters whose values differ from the first call's; never values.
        retry_after: seconds after which asking again makes sense; None if it does not.
        next: one sentence that tells a model, or a person, what to do. It is made from the status and the code.
    """

    status: Status
    key: str
    task_id: str = ""
    result: Any = None
    reason: str = ""
    code: Code = ""
    differs: tuple[str, ...] = ()
    retry_after: float | None = None
    next: str = field(init=False, repr=False, compare=False)
    _source: InitVar[Source | None] = None

    def __post_init__(self, source: Source | None) -> None:
        advice = ADVICE.get((self.status, self.code)) or ADVICE[self.status, ""]
        differs = ", ".join(self.differs) or "arguments"
        vars(self).update(next=advice.format(differs=differs), _source=source)

    def __copy__(self) -> Receipt:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Receipt:
        return replace(self, result=deepcopy(self.result, memo))

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def done(self) -> bool:
        """Whether the action is done, now or earlier."""
        return self.status in ("executed", "replayed")

    @property
    def final(self) -> bool:
        """Whether repeating the call gives the same answer."""
        return self.done or (self.status == "failed" and self.code != "unsure")

    def wait(self, timeout: float = 30.0) -> Receipt:
        """Wait until the answer is known.

        Args:
            timeout: seconds. 30 by default: the default lease, after which a dead worker is decided.

        Returns:
            A new receipt. It is still ``accepted`` or ``in_progress`` if the time was not enough.

        Raises:
            IdempotencyError: the receipt was unpickled and its answer is not known yet.
        """
        receipt = self
        deadline = time.monotonic() + timeout
        pause = FIRST_LOOK
        if receipt.status in PENDING:
            warn_on_loop("Receipt.wait()", "await receipt.async_wait()")
        while receipt.status in PENDING:
            receipt = self._asked().look(self)
            left = deadline - time.monotonic()
            if receipt.status not in PENDING or left <= 0:
                break
            threading.Event().wait(min(pause, left))
            pause = min(pause * LOOK_GROWTH, LONGEST_LOOK)
        return receipt

    async def async_wait(self, timeout: float = 30.0) -> Receipt:
        """As ``wait``, without blocking the event loop. For asyncio.

        It holds no thread between looks. If Celery's result backend is Redis, the publication of the result wakes it.
        When it is cancelled, it returns at once, and a look that has begun ends in its thread.
        """
        if self.status not in PENDING:
            return self
        source = self._asked()
        deadline = time.monotonic() + timeout
        pause = FIRST_LOOK
        with closing(Waker(source.announcements(self))) as waker:
            while True:
                waker.expect()
                receipt = await in_thread("look", source.look, self)
                left = deadline - time.monotonic()
                if receipt.status not in PENDING or left <= 0:
                    return receipt
                waker.follow(receipt.task_id)
                await waker.wait(min(pause, left))
                least, most = (LONGEST_LOOK, LONGEST_LOOK_IF_WOKEN) if waker.heard else (0.0, LONGEST_LOOK)
                pause = min(max(pause * LOOK_GROWTH, least), most)

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt as plain JSON values, always with the same fields in the same order."""
        return {each.name: plain(getattr(self, each.name)) for each in fields(self)}

    def _asked(self) -> Source:
        source: Source | None = vars(self).get("_source")
        if source is None:
            again = (
                f"celery_idem.look_up(app, {self.key!r}, scope=…) gives a receipt that can."
                if self.key
                else f"app.AsyncResult({self.task_id!r}) has its result."
            )
            raise IdempotencyError(
                f"This receipt was unpickled, so it has no application to ask and cannot wait. {again}",
                self.key or None,
            )
        return source


def _public_signature() -> inspect.Signature:
    known = inspect.signature(Receipt.__init__)
    return known.replace(parameters=[p for p in known.parameters.values() if p.name != "_source"])


Receipt.__init__.__signature__ = _public_signature()  # type: ignore[attr-defined]  # for help(): `_source` is ours


def plain(value: Any) -> Any:
    """Return a value as plain JSON. Values without a form in JSON become text."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(bytes(value)).decode()
    if isinstance(value, (datetime, date, clock_time)):
        return value.isoformat()
    return str(value)
