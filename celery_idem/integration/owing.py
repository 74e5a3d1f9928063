"""The answers that this process owes: outcomes that are settled, and that Celery has still to tell (see
``protocol.settle``).

If the result is the whole answer, the task's ``after_return`` says that it was given. Celery calls it after it has
written the result. Then the entry in the index is taken out, with others. If it is not called, recovery looks at the
result.

Recovery cannot see whether links were called, or the part of a chord was counted. So the record of such an intent is
renewed while its delivery lasts, and the answer counts as given when that ends: what Celery has not done by then, it
did not do for a reason other than a kill.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from celery import signals

from celery_idem.core.errors import StoreError
from celery_idem.core.model import Policy
from celery_idem.engine import events
from celery_idem.engine.claim import Hold
from celery_idem.engine.lease import RENEWER
from celery_idem.engine.ledger import Ledger
from celery_idem.stores.base import Mark, Store

RESULTS: dict[str, tuple[Store, Mark]] = {}
"""The results that Celery has still to write, by task id. By id, because looking up the request takes longer."""

KEPT = 10_000
"""More results than a process writes at once. If there are more, Celery could not write some, and recovery will."""

_more: dict[str, list[Callable[[], object]]] = {}
"""What to do when Celery is done with the answers that are more than a result, by task id. There may be two deliveries
of one task id at once."""


def owe_result(task_id: str, hold: Hold) -> None:
    """Note that Celery has still to write the result of a settled intent, and nothing else."""
    if len(RESULTS) >= KEPT:
        RESULTS.clear()
    RESULTS[task_id] = hold.store, hold.closing


def answered(task_id: str) -> None:
    """Note that Celery has written a result that was owed."""
    RENEWER.close(*RESULTS.pop(task_id))


def owe_more(task_id: str, hold: Hold) -> None:
    """Note that Celery has still to go on with links, a chain or a chord after a settled intent."""
    RENEWER.owe(hold)
    _at_the_end(task_id, partial(RENEWER.given, hold))


def owe_replay(task_id: str, ledger: Ledger, key: str, policy: Policy) -> None:
    """Note that Celery has still to answer with the outcome of an earlier delivery, to whose caller it is owed."""
    _at_the_end(task_id, partial(ledger.told, key, policy))


def _at_the_end(task_id: str, then: Callable[[], object]) -> None:
    _listen()
    _more.setdefault(task_id, []).append(then)


# Once, and only in processes that need it, because each task takes longer with a receiver.
@lru_cache(maxsize=1)
def _listen() -> None:
    signals.task_postrun.connect(_over)


def _over(task_id: Any = None, **_: Any) -> None:
    """``task_postrun``: Celery sends it at the end of every delivery, however it ends."""
    waiting = _more.get(task_id)
    if not waiting:
        return
    then = waiting.pop(0)
    if not waiting:
        _more.pop(task_id, None)
    try:
        then()
    except StoreError as error:  # recovery looks again
        events.diagnose(logging.DEBUG, "the answer of task %s is not noted: %s", task_id, error)


def _flush(**_: Any) -> None:
    """Note what was given before the process ends. Pool processes are forked early, so this module connects it."""
    RENEWER.flush()


signals.worker_process_shutdown.connect(_flush)  # of a process of a prefork pool
signals.worker_shutdown.connect(_flush)  # of other pools
