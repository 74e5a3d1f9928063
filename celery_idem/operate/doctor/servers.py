"""Notes the runs of a store's server that workers have seen: restart, failover, restored database, loss of data.

Workers note the present run when they start, and check every minute that it is still the same and that the note still
exists. The note is lost only together with the records. The worker then notes the loss.
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
"""Number of latest runs that are kept. A run only matters while outcomes from before it are remembered."""


def run_of(info: Mapping[str, str]) -> Json:
    """Return what identifies a run of the server; empty if the server does not tell.

    Returns:
        ``run``: the process of a Redis, or the cluster of a PostgreSQL. ``started``: when a Redis started. ``line``:
        the timeline of a PostgreSQL, which changes at each promotion and each recovery to a point in time.
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
        born: id of the note that this worker has seen; "" for none.

    Returns:
        Id of the note, and whether the data was lost since ``born``.

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


def unchanged(ledger: Ledger, born: str, run: Json) -> bool:
    """Whether the note that a worker has seen still exists, and says what the present run of the server is.

    Raises:
        StoreError: the store did not answer.
    """
    noted = kept.read(ledger, NAME)
    runs = noted.get("runs")
    return bool(noted.get("born") == born and (not run or (runs and not _differ(runs[-1], run))))


class Change(NamedTuple):
    """A change from one run of the server to another.

    Attributes:
        since: the store's time in seconds at which it was noticed.
        kind: ``restart`` of a Redis (or a replica took over that was started later); ``failover``; ``recovery`` of a
            PostgreSQL (or a standby took over); ``copy``: the data came from another server.
    """

    since: float
    kind: Literal["restart", "failover", "recovery", "copy"]


def changes(noted: Mapping[str, Any], present: Mapping[str, Any], now: float) -> Iterator[Change]:
    """Return the noted changes of the run, and the one that no worker has noted yet."""
    runs: list[Mapping[str, Any]] = list(noted.get("runs", ()))
    if runs and present and _differ(runs[-1], present):
        runs.append({**present, "since": now})
    for old, new in pairwise(runs):
        if "started" in new:  # in a failover, the new server was running before the old one's end
            yield Change(new["since"], "failover" if new["started"] < old["since"] else "restart")
        else:
            yield Change(new["since"], "recovery" if old["run"] == new["run"] else "copy")
