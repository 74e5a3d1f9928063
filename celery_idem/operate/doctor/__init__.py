"""What in a set-up will go wrong, and the setting to change.

Two halves. ``gathering`` looks at the application and at its stores and makes a ``Snapshot``, plain
values (``facts``). The checks look at a snapshot alone, so each finding can be tested without a
server; they are in a room for each subject: ``stores``, ``timing``, ``running``, ``intents``. A
worker examines what needs no store when it starts (``at_start``), and logs what it finds;
``celery -A proj idem doctor`` examines everything, and its exit status is for a CI.
"""

from __future__ import annotations

from celery_idem.operate.doctor import intents, running, stores, timing
from celery_idem.operate.doctor.facts import Check, Finding, Severity, Snapshot, StoreFacts, TaskFacts
from celery_idem.operate.doctor.gathering import gather

__all__ = ["ASKING", "CHEAP", "Finding", "Snapshot", "StoreFacts", "TaskFacts", "examine", "gather"]

CHEAP: tuple[Check, ...] = (
    stores.memory_store,
    timing.retention,
    timing.eta_beyond_visibility,
    timing.leases,
    running.unread,
    running.time_limits,
    running.acknowledgement,
    running.publishing,
    running.results,
    intents.no_intent,
    intents.volatile_intent,
    intents.all_arguments,
    intents.beat_without_occurrence,
    running.choices,
)
"""Checks that need nothing but the configuration."""

ASKING: tuple[Check, ...] = (
    stores.store_answers,
    stores.eviction,
    stores.persistence,
    stores.replicas,
    stores.replica_as_store,
    stores.clock_skew,
    stores.clock_went_back,
)
"""Checks that look at what the stores said."""

ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}


def examine(snapshot: Snapshot, checks: tuple[Check, ...] = CHEAP + ASKING) -> list[Finding]:
    """Everything that is wrong, the worst first."""
    found = [finding for check in checks for finding in check(snapshot)]
    return sorted(found, key=lambda finding: ORDER[finding.severity])
