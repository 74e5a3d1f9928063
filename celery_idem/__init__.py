"""Celery tasks that take effect once, however often they arrive."""

from __future__ import annotations

from celery_idem.claims import Claim
from celery_idem.errors import (
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
from celery_idem.intent import Happened, NotHappened, Unknown
from celery_idem.keys import ALL_ARGUMENTS
from celery_idem.ledger import Ledger
from celery_idem.receipts import Receipt, look_up, submit
from celery_idem.task import IdempotentTask
from celery_idem.typed import idempotent_task

__all__ = [
    "ALL_ARGUMENTS",
    "Claim",
    "ConfigurationError",
    "FingerprintMismatch",
    "Happened",
    "IdempotencyError",
    "IdempotentTask",
    "InProgress",
    "IntentConflict",
    "IntentError",
    "LeaseLost",
    "Ledger",
    "NotHappened",
    "OutcomeUnknown",
    "Receipt",
    "ResultUnavailable",
    "StoreError",
    "Unknown",
    "idempotent_task",
    "look_up",
    "submit",
]
