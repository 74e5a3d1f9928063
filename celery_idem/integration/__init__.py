"""Connects Celery to the engine: tasks, deliveries, receipts, settings, and ledgers of an application.

Never here: rules.
"""

# Modules that the packages above may import; the others are this package's own.
__all__ = [
    "awaiting", "declaring", "delivery", "describing", "looking", "looks", "many", "messages", "options",
    "publishing", "receipts", "recovering", "settings", "submitting", "task", "typed", "wiring",
]  # fmt: skip
