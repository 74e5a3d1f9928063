"""Celery tasks that take effect once, however often they arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery_idem.core.errors import (
    Cancelled,
    ConfigurationError,
    FingerprintMismatch,
    IdempotencyError,
    InProgress,
    IntentConflict,
    IntentError,
    LeaseLost,
    OutcomeUnknown,
    ResultUnavailable,
    StoreError,
)
from celery_idem.core.keys import ALL_ARGUMENTS
from celery_idem.core.model import Happened, NotHappened, Unknown
from celery_idem.engine.claim import Claim
from celery_idem.integration.task import IdempotentTask
from celery_idem.integration.typed import idempotent_task
from celery_idem.integration.wiring import Ledger

if TYPE_CHECKING:
    from celery_idem.integration.looking import look_up
    from celery_idem.integration.many import submit_many
    from celery_idem.integration.receipts import Receipt
    from celery_idem.integration.submitting import asubmit, submit
else:
    # Imported at first use: most programs never submit, and only publish by `delay`, or only run tasks.
    _LATE = {
        "Receipt": "receipts",
        "asubmit": "submitting",
        "look_up": "looking",
        "submit": "submitting",
        "submit_many": "many",
    }

    def __getattr__(name):
        if name not in _LATE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module = import_module(f"celery_idem.integration.{_LATE[name]}")
        return globals().setdefault(name, getattr(module, name))

    def __dir__():
        return sorted({*globals(), *__all__})


__all__ = [
    "ALL_ARGUMENTS", "Cancelled", "Claim", "ConfigurationError", "FingerprintMismatch", "Happened",
    "IdempotencyError", "IdempotentTask", "InProgress", "IntentConflict", "IntentError", "LeaseLost",
    "Ledger", "NotHappened", "OutcomeUnknown", "Receipt", "ResultUnavailable", "StoreError", "Unknown",
    "asubmit", "idempotent_task", "look_up", "submit", "submit_many",
]  # fmt: skip
