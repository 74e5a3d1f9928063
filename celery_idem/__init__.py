"""Celery tasks that take effect once, however often they arrive."""

from __future__ import annotations

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
from celery_idem.integration.looking import look_up
from celery_idem.integration.many import submit_many
from celery_idem.integration.receipts import Receipt
from celery_idem.integration.submitting import asubmit, submit
from celery_idem.integration.task import IdempotentTask
from celery_idem.integration.typed import idempotent_task
from celery_idem.integration.wiring import Ledger

__all__ = [
    "ALL_ARGUMENTS", "Cancelled", "Claim", "ConfigurationError", "FingerprintMismatch", "Happened",
    "IdempotencyError", "IdempotentTask", "InProgress", "IntentConflict", "IntentError", "LeaseLost",
    "Ledger", "NotHappened", "OutcomeUnknown", "Receipt", "ResultUnavailable", "StoreError", "Unknown",
    "asubmit", "idempotent_task", "look_up", "submit", "submit_many",
]  # fmt: skip
