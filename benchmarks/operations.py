"""Measures operators' commands, and how they slow another client: used by ``benchmarks.growth``.

Each runs in a separate process, through the code of the command line. The other client claims every 5 ms.
On Redis, the server's own statistics are added: how long each ``SCAN`` and ``MGET`` blocked the server,
and which commands took more than 5 ms (``SLOWLOG``, ``LATENCY``).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from celery import Celery

from benchmarks import filling
from benchmarks.store import POLICY
from celery_idem import IdempotentTask
from celery_idem.core.model import Fingerprint, Request
from celery_idem.engine import owners
from celery_idem.engine.ledger import Ledger
from celery_idem.stores import open_store

STORE = "BENCH_STORE"
"""Environment variable with the store's URL, for the child."""

LONGEST = 5_000
"""Target: microseconds for which one command may block the server."""

COMMANDS = {
    "list --state in_doubt": ("list", "--state", "in_doubt"),
    "list --json": ("list", "--json"),
    "stats": ("stats",),
    "overview": (),
    "purge": ("purge", "--yes"),
}
"""Commands by name. The overview is a page of the inbox, and not a command."""

NAMES = tuple(COMMANDS)

PATIENCE = 3600
"""Seconds for one operation: reading ten million records takes minutes."""


# --- the parent --------------------------------------------------------------------------


def run(name: str, kind: str, url: str, pid: int) -> dict[str, Any]:
    """Run an operation in its own process, and return the measurements of both processes."""
    seen: dict[str, Any] = {}
    watch = watched_redis(url, pid, seen) if kind == "redis" else contextlib.nullcontext()
    if name == "purge" and kind == "postgresql":
        expire_some(url)
    with claiming(url, seen), watch:
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.operations", name],
            env={**os.environ, STORE: url},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
        )
    return {**json.loads(ran.stdout), **seen}


def expire_some(url: str) -> None:
    """Expire one record in sixteen."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("UPDATE celery_idem SET expires = 1 WHERE key LIKE '%0'")
        connection.execute("VACUUM ANALYZE celery_idem")


@contextlib.contextmanager
def claiming(url: str, seen: dict[str, Any]) -> Iterator[None]:
    """Measure the milliseconds of another client's claims while the block runs."""
    times: list[float] = []
    done = threading.Event()
    ledger = Ledger(open_store(url))

    def claim() -> None:
        while not done.wait(0.005):
            key = f"bench.meanwhile:{uuid.uuid4().hex}"
            began = time.perf_counter()
            ledger.claim(key, Request(owners.mint(), str(uuid.uuid4()), Fingerprint(), POLICY))
            times.append((time.perf_counter() - began) * 1e3)
            ledger.forget(key)

    thread = threading.Thread(target=claim)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    seen["a claim meanwhile, ms: p50"] = round(statistics.median(times), 2)
    seen["p99"] = round(statistics.quantiles(times, n=100)[98], 2)
    seen["longest"] = round(max(times), 1)


@contextlib.contextmanager
def watched_redis(url: str, pid: int, seen: dict[str, Any]) -> Iterator[None]:
    """Collect the server's own statistics while the block runs."""
    import redis

    with redis.Redis.from_url(url) as client:
        client.config_set("slowlog-log-slower-than", LONGEST)
        client.config_set("slowlog-max-len", 1024)
        client.config_set("latency-monitor-threshold", LONGEST // 1000)
        client.config_set("latency-tracking-info-percentiles", "50 99 100")
        client.config_resetstat()
        client.slowlog_reset()
        client.execute_command("LATENCY RESET")
        waited, stolen = waited_for_core(pid), stolen_from_machine()
        yield
        waited, stolen = waited_for_core(pid) - waited, stolen_from_machine() - stolen
        slow = client.slowlog_get(1024)
        for command, took in client.execute_command("INFO", "latencystats").items():
            command = command.partition("usec_")[2]
            if command in ("scan", "mget"):
                calls = client.info("commandstats")[f"cmdstat_{command}"]["calls"]
                p50, p99, longest = (round(took[p] / 1e3, 2) for p in ("p50", "p99", "p100"))
                seen[f"{calls} × {command}, ms in the server: p50, p99, longest"] = [p50, p99, longest]
        latest = {
            event[0].decode(): event[3]
            for event in client.execute_command("LATENCY LATEST")
            if event[0] != b"expire-cycle"
        }
    seen[f"commands over {LONGEST // 1000} ms"] = [
        f"{entry['command'].split()[0].decode()} {entry['duration'] / 1e3:.1f} ms" for entry in slow
    ]
    seen["LATENCY, the longest, ms"] = latest
    seen["the server waited for a core, s"] = round(waited, 1)
    seen["the machine for its host, s"] = round(stolen, 2)


def waited_for_core(pid: int) -> float:
    """Return the seconds for which a process waited for a CPU. They are part of the time of its commands."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def stolen_from_machine() -> float:
    """Return the seconds of a core that the host gave to other machines."""
    fields = Path("/proc/stat").read_text().split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")


# --- the child: one operation ----------------------------------------------------------


def peak() -> int:
    """Return the peak memory of this process in KiB. ru_maxrss would include the parent's at the start."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


class Lines(io.TextIOBase):
    """An output that counts lines and keeps the last one, to check that a listing found something."""

    def __init__(self) -> None:
        self.count = 0
        self.last = ""

    def write(self, text: str) -> int:
        self.count += text.count("\n")
        self.last = text.strip() or self.last
        return len(text)


def measure(name: str) -> dict[str, Any]:
    """Measure an operation's seconds, printed lines, and increase of the peak memory."""
    call = _overview() if name == "overview" else _command(COMMANDS[name])
    before = peak()
    began = time.perf_counter()
    with contextlib.redirect_stdout(Lines()) as lines:
        call()
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "lines": lines.count,
        "the last": lines.last[:100],
        "MiB of memory": round((peak() - before) / 1024, 1),
    }


def _app() -> Celery:
    """Return an application with the task of the records."""
    app = Celery("bench")
    app.conf.idem_store = os.environ[STORE]

    @app.task(base=IdempotentTask, intent=("n",), name=filling.TASK)
    def noop(n: int) -> None:
        """Never called."""

    return app


def _command(words: tuple[str, ...]) -> Callable[[], Any]:
    import rich.console  # noqa: F401 - its import is not what the operation costs
    from celery.bin.base import CLIContext

    from celery_idem.cli import idem

    context = CLIContext(_app(), True, ".")
    return lambda: idem.main(args=list(words), obj=context, standalone_mode=False)


def _overview() -> Callable[[], Any]:
    from benchmarks.apps import app
    from celery_idem.adapters import inbox_pages
    from celery_idem.operate.operators import Operator

    def read() -> None:
        *_, whole = inbox_pages.look(Operator(app))
        page = {"title": "", "problem": "", "base": "", "user": "", "settled": None}
        print(inbox_pages.render("figures.html", seen=whole, **page))

    return read


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
