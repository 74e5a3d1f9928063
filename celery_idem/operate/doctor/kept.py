"""Values that workers note in their store when they start, so that a later ``doctor`` can compare.

They are two JSON values beside the records: ``declared`` has the tasks' declarations, and ``servers`` the runs of the
server. Their keys (``idem~kept:…``) are in no list of records.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from celery_idem.core.model import MICROSECONDS, NO_OWNER
from celery_idem.engine.ledger import Ledger

KEPT = "~kept"
"""Suffix of the namespace of these values. A namespace itself has no tilde."""

TRIES = 5
"""Attempts to write, if other workers that start at the same time write too. After that, theirs is enough."""

Json = dict[str, Any]


def read(ledger: Ledger, name: str) -> Json:
    """Return a value; empty if there is none, or none that can be read.

    Raises:
        StoreError: the store did not answer.
    """
    stored = ledger.store.peek(_key(ledger, name))
    return {} if stored is None else _unpacked(stored.value)


def write(ledger: Ledger, name: str, change: Callable[[Json, float], Json]) -> Json:
    """Change a value: ``change`` gets the present one and the store's time in seconds, and returns the new one.

    Returns:
        The value as it was before.

    Raises:
        StoreError: the store did not answer, or refused.
    """
    key = _key(ledger, name)
    reply = ledger.store.read(key)
    was: Json = {}
    for _ in range(TRIES):
        was = {} if reply.stored is None else _unpacked(reply.stored.value)
        value = NO_OWNER + json.dumps(change(was, reply.now / MICROSECONDS), separators=(",", ":")).encode()
        if reply.stored is None:
            reply = ledger.store.create(key, value)
        else:
            reply = ledger.store.replace(key, reply.stored, value)
        if reply.done:
            break
    return was


def _key(ledger: Ledger, name: str) -> str:
    return f"{ledger.namespace}{KEPT}:{name}"


def _unpacked(value: bytes) -> Json:
    try:
        found = json.loads(value[len(NO_OWNER) :])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
