"""The worker's main process: what it knows of a child's death before any lease lapses."""

from __future__ import annotations

from celery.worker.request import Request


class IdempotentRequest(Request):  # type: ignore[misc]
    """Celery's request of an idempotent task, in the worker's main process."""
