"""A ``Ledger.accept`` that does not read the store: every ``submit`` treats its call as new.

The worker's claim is not changed.
"""

from __future__ import annotations

from celery_idem import Ledger
from celery_idem.core import protocol
from celery_idem.core.model import Accepted, Request
from celery_idem.engine.entries import Entry


def accept(self: Ledger, key: str, request: Request, wait: int) -> tuple[Accepted, Entry]:
    record = protocol.accepted(request, wait)
    return Accepted(record), Entry(key, record, 1, 1)
