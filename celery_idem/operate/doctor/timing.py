"""Times that have to fit each other: leases, outcomes that are kept, redelivery, retries, ETAs."""

from __future__ import annotations

from collections.abc import Iterator

from celery_idem.core.model import MICROSECONDS
from celery_idem.integration.settings import Settings
from celery_idem.operate.doctor.facts import Finding, Snapshot
from celery_idem.operate.operators import duration

SHORT_LEASE = 5.0
"""Seconds below which a lease lapses in an ordinary pause: a large garbage collection, a store
that fails over, a machine that swaps."""

LONG_LEASE = 3600.0
"""Seconds above which a lease keeps a dead worker's work from being decided for hours."""


def retention(s: Snapshot) -> Iterator[Finding]:
    for task in s.tasks:
        if not task.guarded:
            continue
        policy = task.settings.policy(task.asks)
        keep = min(policy.result_ttl, policy.failure_ttl) / MICROSECONDS
        horizons = [
            (s.visibility, "the broker may deliver a message again", "the visibility timeout"),
            (task.retry_horizon, "its own last retry may come", "the retry horizon"),
            (s.longest_delay, "a scheduled message may still wait", "the longest countdown"),
        ]
        for seconds, what, name in horizons:
            if seconds is not None and keep < seconds:
                yield Finding(
                    "error",
                    "retention",
                    task.name,
                    f"An outcome is kept {duration(keep)}, and {duration(seconds)} later {what} ({name}): by then it "
                    "is forgotten, and the task runs again.",
                    f"Set idem_result_ttl (and idem_failure_ttl) to {int(2 * seconds)} or more.",
                )
        if s.result_expires is not None and keep < s.result_expires:
            yield Finding(
                "note",
                "retention-result",
                task.name,
                f"The result backend shows results for {duration(s.result_expires)}, an outcome is replayed for "
                f"{duration(keep)} only: a caller that still sees the result may run the action again.",
                f"Set idem_result_ttl to {int(s.result_expires)}.",
            )


def eta_beyond_visibility(s: Snapshot) -> Iterator[Finding]:
    if s.visibility is not None and s.longest_delay > s.visibility:
        yield Finding(
            "warning",
            "eta",
            "broker_transport_options",
            f"Messages wait {duration(s.longest_delay)} for their ETA in a worker, and the broker delivers them again "
            f"after {duration(s.visibility)}: several copies wait at once. They run once, but cost claims and memory.",
            f'Set broker_transport_options = {{"visibility_timeout": {int(2 * s.longest_delay)}}}.',
        )


def leases(s: Snapshot) -> Iterator[Finding]:
    for settings, where in _distinct(s):
        if settings.lease < SHORT_LEASE:
            yield Finding(
                "warning",
                "short-lease",
                where,
                f"A lease of {settings.lease:g} s lapses in an ordinary pause (garbage collection, a store that fails "
                "over), and a healthy execution is taken for a dead one.",
                "Set idem_lease = 30.",
            )
        if settings.lease > LONG_LEASE:
            yield Finding(
                "warning",
                "long-lease",
                where,
                f"A lease of {duration(settings.lease)}: what a dead host left behind is decided only after that. "
                "Leases are renewed while the body runs, so it need not be as long as the body.",
                "Set idem_lease = 30.",
            )
        if s.visibility is not None and settings.lease > s.visibility:
            yield Finding(
                "warning",
                "lease-visibility",
                where,
                f"The broker redelivers after {duration(s.visibility)} and the lease is {duration(settings.lease)}: "
                "a dead worker's message comes back again and again before it can be decided.",
                f"Set idem_lease below {int(s.visibility)}.",
            )


def _distinct(s: Snapshot) -> Iterator[tuple[Settings, str]]:
    """Each setting once: of the task where it differs from the first one's, else for all."""
    guarded = [task for task in s.tasks if task.guarded]
    seen: set[float] = set()
    for task in guarded:
        if task.settings.lease not in seen:
            seen.add(task.settings.lease)
            yield task.settings, task.name
