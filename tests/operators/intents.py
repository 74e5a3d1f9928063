"""Creates intents in several states through the ledger, as workers do."""

from __future__ import annotations

import json
from typing import Any

from celery_idem import Ledger
from celery_idem.core import calls
from celery_idem.core.model import MICROSECONDS, Acquired, Fingerprint, Outcome, Policy, Request
from celery_idem.engine import owners

KEEP = 3600 * MICROSECONDS


def message(*args: Any, task_id: str = "a-task", queue: str = "celery") -> bytes:
    """Return a call as an open record holds it."""
    body = json.dumps([args, {}, {}]).encode()
    return calls.pack(
        calls.Call(task_id, {}, {}, "application/json", "utf-8", "", queue, "", False, None, body)
    )


def claimed(
    ledger: Ledger,
    key: str,
    lease: float = 30.0,
    digests: bytes = b"",
    place: str = "",
    call: bytes = b"",
    **policy: Any,
) -> Any:
    """Claim an intent and return the claim."""
    rules = Policy(lease=int(lease * MICROSECONDS), result_ttl=KEEP, failure_ttl=KEEP, **policy)
    decision, claim = ledger.claim(
        key,
        Request(
            owners.mint(),
            f"task-of-{key[-8:]}",
            Fingerprint(),
            rules,
            digests=digests,
            place=place,
            call=call,
        ),
    )
    assert isinstance(decision, Acquired)
    return claim


def succeeded(ledger: Ledger, key: str, value: object = "ok") -> None:
    claimed(ledger, key).settle(Outcome(True, b"j" + json.dumps(value).encode()), 0.0)


def in_doubt(
    ledger: Ledger, key: str, reason: str = "the worker stopped without reporting an outcome", **given: Any
) -> None:
    claimed(ledger, key, **given).doubt(reason, 0.0)


def suspected(ledger: Ledger, key: str, first: object = "inv-1", second: object = "inv-2") -> tuple[Any, Any]:
    """Create an intent with two outcomes and return both claims.

    A second execution took the intent over and settled it. Then the first execution ended as well.
    """
    call = message("a", 7)
    late = claimed(ledger, key, lease=0, on_crash="rerun", place="shop@web-1, process 11", call=call)
    stands = claimed(ledger, key, on_crash="rerun", place="shop@web-2, process 22", call=call)
    stands.settle(Outcome(True, b"j" + json.dumps(second).encode()), 0.0)
    late.settle(Outcome(True, b"j" + json.dumps(first).encode()), 0.0)
    return late, stands
