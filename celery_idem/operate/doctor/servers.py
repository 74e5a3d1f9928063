"""Which runs of a store's server workers have seen: a restart, a failover, a restored database, a loss of all data.

Workers note the run that they meet when they start, and look every minute whether the note is still there. It goes with
the data, so a note that is gone says that the records are gone too. The worker then notes the loss.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from celery_idem.core.model import MICROSECONDS
from celery_idem.engine.ledger import Ledger
from celery_idem.operate.doctor import kept
from celery_idem.operate.doctor.kept import Json

NAME = "servers"

RUNS = 5
"""Runs that are kept: the latest ones are of interest, and only while outcomes from before them are remembered."""


def run_of(info: Mapping[str, str]) -> Json:
    """What tells a run of the server from another; empty where it does not say.

    Returns:
        ``run``, the process of a Redis or the cluster of a PostgreSQL; of a Redis when it ``started``; of a PostgreSQL
        the ``line`` of its history, which is another one after each promotion and each recovery to a point in time.
    """
    if "run_id" in info and "server_time_usec" in info:
        started = int(info["server_time_usec"]) / MICROSECONDS - int(info.get("uptime_in_seconds", 0))
        return {"run": info["run_id"], "line": "", "started": started}
    if "system_identifier" in info:
        return {"run": info["system_identifier"], "line": info["timeline"]}
    return {}


def note(ledger: Ledger, run: Json, born: str = "") -> tuple[str, bool]:
    """Note the present run of the server.

    Args:
        born: what this worker remembers of the note; "" before it has one.

    Returns:
        What to remember, and whether the data was lost since.

    Raises:
        StoreError: the store did not answer, or refused.
    """
    now_born, lost = born, False

    def change(was: Json, now: float) -> Json:
        nonlocal now_born, lost
        new = dict(was) or {"born": os.urandom(8).hex(), "runs": []}
        now_born = new["born"]
        lost = bool(born) and now_born != born
        if lost:
            new["lost"] = now
        runs = new["runs"]
        if run and (not runs or _differ(runs[-1], run)):
            new["runs"] = [*runs, {**run, "since": now}][-RUNS:]
        return new

    kept.write(ledger, NAME, change)
    return now_born, lost


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (one["run"], one["line"]) != (other["run"], other["line"])


def unchanged(ledger: Ledger, born: str) -> bool:
    """Whether the note that a worker remembers is still there. Raises ``StoreError``: the store did not answer."""
    return bool(kept.read(ledger, NAME).get("born") == born)


class Change(NamedTuple):
    """Another run of the server than before.

    Attributes:
        since: the store's time in seconds at which it was noticed.
        kind: ``restart`` of a Redis (or a replica took over that was started later); ``failover``; ``recovery`` of a
            PostgreSQL (or a standby took over); ``copy``: the data came from another server.
    """

    since: float
    kind: Literal["restart", "failover", "recovery", "copy"]


def changes(noted: Mapping[str, Any], present: Mapping[str, Any], now: float) -> Iterator[Change]:
    """The changes of the run that were noted, and the one that no worker has noted yet."""
    runs: list[Mapping[str, Any]] = list(noted.get("runs", ()))
    if runs and present and _differ(runs[-1], present):
        runs.append({**present, "since": now})
    for old, new in pairwise(runs):
        if "started" in new:  # a server that ran already when the other one was in its place
            yield Change(new["since"], "failover" if new["started"] < old["since"] else "restart")
        else:
            yield Change(new["since"], "recovery" if old["run"] == new["run"] else "copy")
