"""Measures a worker process with a thousand running tasks: ``python -m benchmarks.leases --pools gevent``.

Leases last two seconds. The idle process is watched for longer than three leases: its threads, its commands to the
store, and whether a lease lapsed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from celery_idem.engine.lease import LOOKS_PER_LEASE
from tests.celery.leases import LEASE, hold_many
from tests.support.servers import RedisServer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leases", type=int, default=1000)
    parser.add_argument("--pools", default="threads,gevent")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows there")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for pool in options.pools.split(","):
        with (
            tempfile.TemporaryDirectory() as folder,
            RedisServer(Path(folder) / "broker") as broker,
            RedisServer(Path(folder) / "store") as store,
        ):
            cost = hold_many(pool, options.leases, broker, store, Path(folder))
        rows.append(
            {
                "pool": pool,
                "leases": options.leases,
                "watched for, leases' lengths": round(cost.seconds / LEASE, 1),
                "renewals of each per lease's length": round(
                    cost.commands / options.leases / (cost.seconds / LEASE), 2
                ),
                "at most": LOOKS_PER_LEASE,
                "renewing threads": cost.renewers,
                "threads": cost.threads,
                "states": cost.states,
                "oldest lease seen, s": round(cost.oldest, 2),
                "claims reported as lost": cost.lost,
                "effects": cost.effects,
            }
        )
        print(", ".join(f"{what} {value}" for what, value in rows[-1].items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
