"""Finds problems of a set-up, and names the setting to change.

``snapshot`` reads the application, ``asking`` its stores, and ``schedules`` beat's entries. They return values. The
checks, in ``configuration`` and ``stores``, use only those values, so each can be tested without a server. ``declared``
and ``servers`` compare with what workers have noted (``kept``). When a worker starts, it runs the checks that need no
store (``at_start``). ``celery -A proj idem doctor`` runs all checks, and its exit status is for CI.
"""

from __future__ import annotations

from collections.abc import Iterable

from celery_idem.operate.doctor import configuration, stores
from celery_idem.operate.doctor.asking import StoreFacts
from celery_idem.operate.doctor.snapshot import Check, Finding, Severity, Snapshot, TaskFacts, gather

__all__ = [
    "ASKING", "CHEAP", "Finding", "Snapshot", "StoreFacts", "TaskFacts", "examine", "gather", "worst_first",
]  # fmt: skip

CHEAP: tuple[Check, ...] = (
    stores.memory_store, configuration.retention, configuration.eta_beyond_visibility, configuration.leases,
    configuration.unread, configuration.time_limits, configuration.acknowledgement, configuration.publishing,
    configuration.results, configuration.no_intent, configuration.volatile_intent,
    configuration.all_arguments, configuration.strays, configuration.beat_without_occurrence,
    configuration.choices,
)  # fmt: skip
"""Checks that need only the configuration."""

ASKING: tuple[Check, ...] = (
    stores.store_answers, stores.writing, stores.memory, stores.eviction, stores.evicted, stores.persistence,
    stores.replicas, stores.silent_replicas, stores.replica_as_store, stores.other_runs, stores.clock_skew,
    stores.clock_went_back, stores.calls_not_kept, stores.sealing,
)  # fmt: skip
"""Checks of what the stores said."""

ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}


def examine(snapshot: Snapshot, checks: tuple[Check, ...] = CHEAP + ASKING) -> list[Finding]:
    """Return all findings, the worst first."""
    return worst_first(finding for check in checks for finding in check(snapshot))


def worst_first(found: Iterable[Finding]) -> list[Finding]:
    """Return findings in order, the worst first."""
    return sorted(found, key=lambda finding: ORDER[finding.severity])
