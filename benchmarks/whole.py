"""Counts the instructions of a whole worker per no-op task: ``python -m benchmarks.whole --broker rabbitmq``.

This includes receiving and acknowledging the message, which is most of a worker's work and which no guard changes.
``valgrind --tool=callgrind`` counts a worker with a solo pool. Two runs with different numbers of tasks are compared,
so that its start does not count. The counts of two measurements differ by less than one percent. CPU times of a worker
are much less steady on a virtual machine: two workers without a guard differed by up to 10 percent there.

Results and the guard's store are in one Redis, which is the default. The kernel's instructions do not count.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import redis

from benchmarks.instructions import PATIENCE, ValgrindMissingError, compared_to_bare, instructions, valgrind
from benchmarks.report import Row, show
from tests.support.processes import Program
from tests.support.servers import RabbitMQServer, RedisServer, Server
from tests.support.waiting import wait_for

FEW, MANY = 100, 600
"""Tasks of the two runs. Work that a worker does by the clock is a larger part of a shorter run."""

VARIANTS = ("bare", "idem")

STOPS_WITHIN = 120.0
"""Timeout in seconds for a warm shutdown, which takes a second or two without valgrind."""

BROKERS: dict[str, type[Server]] = {"redis": RedisServer, "rabbitmq": RabbitMQServer}


@contextmanager
def servers(broker: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Start a broker, and a Redis for results and store. Return their URLs."""
    with RedisServer(folder / "results") as results, BROKERS[broker](folder / "broker") as started:
        yield started.url, results.url


def run(variant: str, broker: str, tasks: int) -> int:
    """Return the instructions of one worker that runs ``tasks`` tasks and stops."""
    with tempfile.TemporaryDirectory() as name, servers(broker, Path(name)) as (url, results):
        folder = Path(name)
        environ = {
            **os.environ,
            "BENCH_VARIANT": variant,
            "BENCH_URL": url,
            "BENCH_RESULTS": results,
            "BENCH_STORE": results,
            "BENCH_CALM": "1",
            "PYTHONHASHSEED": "0",
            "PYTHONWARNINGS": "ignore",
        }
        subprocess.run(
            [sys.executable, "-m", "benchmarks.apps"],
            env=environ,
            input=f"10000000 {tasks}\n",
            text=True,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        counts = folder / "count"
        options = ["--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "INFO", "-n", variant]
        worker = Program(
            [
                valgrind(),
                "--tool=callgrind",
                f"--callgrind-out-file={counts}",
                "-q",
                sys.executable,
                *("-m", "celery", "-A", "benchmarks.apps:app", "worker", "-P", "solo", *options),
            ],
            log=folder / "log",
            env=environ,
        )
        try:
            with redis.Redis.from_url(results) as client:
                wait_for(
                    lambda: (
                        len(list(client.scan_iter("celery-task-meta-*", 1000))) >= tasks or not worker.alive
                    ),
                    PATIENCE,
                    lambda: worker.log.read_text()[-2000:],
                    every=1,
                )
            assert worker.alive, worker.log.read_text()[-2000:]
            os.kill(worker.pid, signal.SIGTERM)
            wait_for(lambda: not worker.alive, STOPS_WITHIN, lambda: worker.log.read_text()[-2000:])
        finally:
            worker.kill()
        return instructions(counts)


def rows(broker: str) -> list[Row]:
    """Return the rows, or one row that says why there are none."""
    group = f"Instructions of a whole worker (solo) per no-op task, broker {broker}"
    try:
        valgrind()
    except ValgrindMissingError as error:
        return [Row(group, "celery_idem", note=str(error))]
    with ThreadPoolExecutor(2) as pool:
        runs = {
            (variant, tasks): pool.submit(run, variant, broker, tasks)
            for variant in VARIANTS
            for tasks in (FEW, MANY)
        }
    found = {
        variant: (runs[variant, MANY].result() - runs[variant, FEW].result()) / (MANY - FEW)
        for variant in VARIANTS
    }
    return compared_to_bare(group, found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--broker", choices=sorted(BROKERS), default="redis")
    show(rows(parser.parse_args().broker))


if __name__ == "__main__":
    main()
