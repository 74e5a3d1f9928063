"""The values that the doctor works with: a set-up as a snapshot, and what is wrong with one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from celery_idem.integration.settings import Settings

Severity = Literal["error", "warning", "note"]


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
        code: short and stable, for filters and for the documentation.
        where: the task, the store or the setting it is about.
        wrong: what goes wrong, in one sentence.
        change: the exact setting to change.
    """

    severity: Severity
    code: str
    where: str
    wrong: str
    change: str


@dataclass(frozen=True)
class TaskFacts:
    """What matters of one task.

    Attributes:
        intent: parameters in the intent; None where a function computes it.
        parameters: every parameter, and its annotation as text.
        retry_horizon: seconds until its last retry; None where they never end.
        unread: why it could not be looked at; "" where it was.
    """

    name: str
    guarded: bool
    settings: Settings = field(default_factory=Settings)
    intent: tuple[str, ...] | None = ()
    all_arguments: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)
    acks_late: bool = True
    reject_on_worker_lost: bool = True
    time_limit: float | None = None
    soft_time_limit: float | None = None
    retry_horizon: float | None = 0.0
    scheduled: bool = False
    asks: bool = False
    unread: str = ""


@dataclass(frozen=True)
class StoreFacts:
    """What matters of one store.

    Attributes:
        error: why it could not be asked; "" where it was.
        unseen: why its INFO was not to be had, though it answers; "" where it was.
        info: the server's INFO, for a Redis.
        skew: seconds between its clock and ours, beyond what the round trip explains.
        ahead: seconds by which the latest of the records looked at was written in the future of its clock.
    """

    url: str
    durability: str = "none"
    error: str = ""
    unseen: str = ""
    info: Mapping[str, str] = field(default_factory=dict)
    skew: float = 0.0
    ahead: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """A set-up, as values.

    Attributes:
        visibility: seconds until the broker delivers an unacknowledged message again; None: it does not by time.
        confirmed: whoever publishes learns whether the broker has the message.
        pool: the worker's pool; "" where it is not known.
        result_expires: seconds the result backend keeps results; None: for ever.
        pickled: pickle is accepted for results.
        unusable: why results could not be read again; "" where they can.
        ticks: the beat scheduler gives each tick its occurrence.
        longest_delay: the longest countdown in the beat schedule, in seconds.
        store_scheme: of ``idem_store``, or of the result backend that stands in for it.
    """

    visibility: float | None = 3600.0
    confirmed: bool = True
    pool: str = ""
    result_expires: float | None = 86_400.0
    pickled: bool = False
    unusable: str = ""
    ticks: bool = False
    longest_delay: float = 0.0
    store_scheme: str = "redis"
    tasks: tuple[TaskFacts, ...] = ()
    stores: tuple[StoreFacts, ...] = ()


Check = Callable[[Snapshot], Iterator[Finding]]
"""Looks at a snapshot alone: no server, no clock, so each can be tested with values."""
