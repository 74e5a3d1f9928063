"""How the cost grows with the number of records: ``python -m benchmarks.growth``.

For each size, on a Redis of its own: the latency of a claim, as a ratio to a bare ``SET``;
then what operators run, each in a process of its own through the command line's own code:
how long it takes, by how much it raises that process' peak memory, and how long the server
was busy with one command while it ran, because no other command is served in that time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from benchmarks.store import DAY, POLICY, RESULT
from celery_idem import codec, owners, protocol
from celery_idem.intent import Fingerprint, Outcome, Record, Request, State
from celery_idem.ledger import Ledger
from celery_idem.stores import open_store
from tests.support.servers import RedisServer

SIZES = (1_000, 100_000, 1_000_000)

DOUBT_EVERY = 25
"""One record of so many is in doubt: forty of a thousand."""

LONGEST = 5_000
"""Microseconds that one command may keep the server from all others."""

OPERATIONS = {
    "list --state in_doubt": ("list", "--state", "in_doubt"),
    "list --json": ("list", "--json"),
    "stats": ("stats",),
    "inbox overview": (),
}


# --- the parent: fills, times claims, watches the server -------------------------------


def fill(client: redis.Redis, first: int, last: int) -> None:
    """Records number ``first`` to ``last``, written over the past day, that are kept for another."""
    now = time.time_ns() // 1000
    pipe = client.pipeline(transaction=False)
    for n in range(first, last):
        common = {"owner": owners.mint(), "task_id": str(uuid.UUID(int=n)), "fence": now - n}
        if n % DOUBT_EVERY:
            record = Record(State.SUCCEEDED, **common, outcome=Outcome(True, RESULT))
        else:
            record = Record(State.IN_DOUBT, **common, crashes=1, reason="its worker fell silent")
        stamp = now - n % DAY * 1_000_000
        ttl = protocol.ttl(record, POLICY)
        value = stamp.to_bytes(8, "big") + codec.pack(record)
        pipe.set(f"idem:bench.noop:{n:032x}", value, px=None if ttl is None else ttl // 1000)
        if len(pipe) == 1000 or n == last - 1:
            pipe.execute()


def claim_over_set(client: redis.Redis, ledger: Ledger, rounds: int = 7, count: int = 1000) -> list[float]:
    """For each round, the median time of a claim over that of a bare SET; the two take turns."""
    ratios = []
    for turn in range(rounds + 1):  # the first warms up
        ours, theirs = [], []
        for n in range(count):
            key = f"bench.noop:new{n:029x}"
            request = Request(owners.mint(), str(uuid.UUID(int=n)), Fingerprint(), POLICY)
            began = time.perf_counter()
            ledger.claim(key, request)
            between = time.perf_counter()
            client.set(f"bare:{key}", b"running", nx=True, ex=DAY)
            theirs.append(time.perf_counter() - between)
            ours.append(between - began)
        pipe = client.pipeline(transaction=False)
        for n in range(count):
            pipe.delete(f"idem:bench.noop:new{n:029x}", f"bare:bench.noop:new{n:029x}")
        pipe.execute()
        if turn:
            ratios.append(statistics.median(ours) / statistics.median(theirs))
    return ratios


@contextlib.contextmanager
def pinging(url: str) -> Iterator[list[float]]:
    """Milliseconds that the PINGs of another connection took meanwhile, as their sender saw them."""
    times: list[float] = []
    done = threading.Event()

    def ping() -> None:
        with redis.Redis.from_url(url) as client:
            while not done.wait(0.005):
                began = time.perf_counter()
                client.ping()
                times.append((time.perf_counter() - began) * 1e3)

    thread = threading.Thread(target=ping)
    thread.start()
    try:
        yield times
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def watched(client: redis.Redis, pid: int, name: str) -> Iterator[dict[str, float]]:
    """Print what the server saw while one operation ran, with what the operation measured itself."""
    client.config_resetstat()
    client.slowlog_reset()
    waited = waited_for_core(pid)
    measured: dict[str, float] = {}
    yield measured
    waited = waited_for_core(pid) - waited
    slow = [entry["command"].split()[0].decode() for entry in client.slowlog_get(128)]
    shown = ", ".join(f"{what} {value}" for what, value in measured.items())
    print(f"  {name}: {shown}")
    for command, took in client.execute_command("INFO", "latencystats").items():
        command = command.partition("usec_")[2]
        if command in ("scan", "mget"):
            p50, p99, longest = (took[p] / 1e3 for p in ("p50", "p99", "p100"))
            print(f"    {command}, ms in the server: p50 {p50:.2f}, p99 {p99:.2f}, longest {longest:.2f}")
    print(
        f"    commands over {LONGEST / 1e3:.0f} ms: {len(slow)} {sorted(set(slow)) if slow else ''}; "
        f"the server waited {waited:.1f} s for a core",
        flush=True,
    )


def waited_for_core(pid: int) -> float:
    """Seconds that a process could have run, and the machine was busy with others. Commands take
    longer by that, which is not their fault."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def operate(client: redis.Redis, server: RedisServer, name: str) -> None:
    """One operation in a process of its own."""
    with watched(client, server.pid, name) as measured, pinging(server.url) as pings:
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.growth", name],
            env={**os.environ, "BENCH_VARIANT": "idem", "BENCH_URL": server.url},
            check=True,
            capture_output=True,
            text=True,
            timeout=900,
        )
        measured.update(json.loads(ran.stdout))
        measured["another's PING p50, ms"] = round(statistics.median(pings), 1)
        measured["its longest"] = round(max(pings), 1)


def main() -> None:
    sizes = [int(size) for size in os.environ.get("BENCH_SIZES", "").split(",") if size] or SIZES
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        client = redis.Redis.from_url(server.url)
        client.config_set("slowlog-log-slower-than", LONGEST)
        client.config_set("slowlog-max-len", 128)
        client.config_set("latency-tracking-info-percentiles", "50 99 100")
        ledger = Ledger(open_store(server.url))
        filled = 0
        for size in sizes:
            fill(client, filled, size)
            filled = size
            ratios = claim_over_set(client, ledger)
            print(
                f"{size} records: claim p50 {statistics.median(ratios):.2f} × a bare SET "
                f"({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds)",
                flush=True,
            )
            for name in OPERATIONS:
                operate(client, server, name)


# --- the child: one operation ----------------------------------------------------------


def peak() -> int:
    """The largest memory of this process so far, in KiB. Not ru_maxrss: that one also counts what
    the parent had when it started us."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


class Lines(io.TextIOBase):
    """An output that keeps nothing and counts its lines: a listing that found nothing is no measurement."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, text: str) -> int:
        self.count += text.count("\n")
        return len(text)


def measure(name: str) -> dict[str, float]:
    """Seconds of one operation, the lines it printed, and by how much it raised the peak of memory."""
    call = _overview() if name == "inbox overview" else _command(OPERATIONS[name])
    before = peak()
    began = time.perf_counter()
    with contextlib.redirect_stdout(Lines()) as lines:
        call()
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "lines": lines.count,
        "MiB of memory": round((peak() - before) / 1024, 1),
    }


def _command(words: tuple[str, ...]) -> Callable[[], Any]:
    import rich.console  # noqa: F401 - its import is not what the operation costs
    from celery.bin.base import CLIContext

    from benchmarks.apps import app
    from celery_idem.cli import idem

    context = CLIContext(app, True, ".")
    return lambda: idem.main(args=list(words), obj=context, standalone_mode=False)


def _overview() -> Callable[[], Any]:
    from benchmarks.apps import app
    from celery_idem.adapters import inbox_pages
    from celery_idem.desk import Desk

    return lambda: print(inbox_pages.overview(inbox_pages.look(Desk(app)), "", ""))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
