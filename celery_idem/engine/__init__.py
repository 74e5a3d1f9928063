"""The protocol over a store: claims, leases, runs, steps, events.

Never here: Celery, and rules.
"""

# Modules that the packages above may import; the others are this package's own.
__all__ = ["bounded", "claim", "entries", "events", "lease", "ledger", "owners", "runner", "shadow", "steps"]
