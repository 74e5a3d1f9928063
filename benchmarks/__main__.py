"""Runs the benchmarks that take minutes and prints one table: ``make bench``.

``--docs`` writes the numbers and the picture into the documentation. ``--full`` also runs ``growth``, which takes an
hour and needs 4 GB.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import redis

from benchmarks import imports, instructions, publish, store, worker
from benchmarks.memory import NOTHING, check, per_record
from benchmarks.peers import ROOT
from benchmarks.report import Row, show, write
from benchmarks.store import RESULT
from tests.support.servers import RedisServer

BUILD = ROOT / "build" / "bench"
RECORDS = 100_000

BYTES = 1.3
"""Target: a record's size over that of a bare ``SET … EX`` of the same result."""


def about() -> dict[str, str]:
    """Return the machine and the versions."""
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start",
        "python": platform.python_version(),
        "redis-server": subprocess.run(
            ["redis-server", "--version"], capture_output=True, text=True, check=True
        ).stdout.split()[2],
    }
    for name in ("celery", "kombu", "redis", "hiredis"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def memory() -> list[Row]:
    """Measure the bytes of a finished record, keys included."""
    made = []
    with RedisServer(BUILD / "redis") as server:
        client = redis.Redis.from_url(server.url, socket_timeout=120)
        for name, payload, target in (("a 115-byte result", RESULT, BYTES), ("no result", NOTHING, None)):
            check(payload)
            group = f"Bytes per record with {name}, {RECORDS:,} records"
            theirs, ours = (per_record(client, RECORDS, payload, bare) for bare in (True, False))
            made.append(Row(group, "SET key result EX", 1.0, value=f"{theirs:.0f} bytes"))
            made.append(
                Row(group, "celery_idem", round(ours / theirs, 3), target=target, value=f"{ours:.0f} bytes")
            )
        client.close()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--docs", action="store_true", help="write docs/performance.json and docs/img/bench.svg"
    )
    parser.add_argument("--full", action="store_true", help="then benchmarks.growth")
    parser.add_argument("--quick", action="store_true", help="a few small rounds: does everything run?")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    starts, rounds, count = (1, 2, 100) if options.quick else (worker.STARTS, worker.ROUNDS, worker.COUNT)
    described = about()
    made: list[Row] = []
    parts = [
        lambda: worker.rows("solo", starts, rounds, count, peers=True),
        lambda: worker.rows("prefork", starts, rounds, count, peers=False),
        lambda: worker.rows("threads", starts, rounds, count, peers=False),
        lambda: store.rows(2 if options.quick else store.ROUNDS, 200 if options.quick else store.COUNT),
        lambda: publish.rows(2 if options.quick else publish.ROUNDS, 100 if options.quick else publish.COUNT),
        memory,
        lambda: imports.rows(2) if options.quick else imports.rows(),
        instructions.rows,
    ]
    for part in parts:
        new = part()
        show(new)
        made += new
    places = (
        (ROOT / "docs" / "performance.json", ROOT / "docs" / "img" / "bench.svg")
        if options.docs
        else (BUILD / "bench.json", BUILD / "bench.svg")
    )
    write(made, described, *places)
    print(f"\n{' and '.join(str(place.relative_to(ROOT)) for place in places)}", flush=True)
    if options.full:
        command = [sys.executable, "-m", "benchmarks.growth", "--json", str(BUILD / "growth.json")]
        subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
