"""Worker CPU per no-op task over bare Celery: ``python -m benchmarks.worker``.

One worker per variant, started together; rounds are interleaved, so that a machine
that gets slower slows all variants. CPU is the operating system's own count, of the
worker and its children, so that other load hardly matters.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import redis

from tests.support.servers import RedisServer
from tests.support.waiting import wait_for

PUBLISH = """
import os, sys
from benchmarks.apps import app, noop
first, count = int(sys.argv[1]), int(sys.argv[2])
with app.producer_pool.acquire(block=True) as producer:
    for n in range(first, first + count):
        noop.apply_async((n,), producer=producer, ignore_result=False)
"""


def cpu(pid: int) -> float:
    """CPU seconds of a process and its living children."""
    root = psutil.Process(pid)
    return sum(sum(p.cpu_times()[:2]) for p in [root, *root.children(recursive=True)])


def measure(url: str, variants: list[str], pool: str, rounds: int, count: int) -> dict[str, list[float]]:
    """Microseconds of CPU per task, for each variant and round."""
    client = redis.Redis.from_url(url)
    workers = {}
    results: dict[str, list[float]] = {variant: [] for variant in variants}
    logs = Path(tempfile.mkdtemp())
    try:
        for variant in variants:
            env = {**os.environ, "BENCH_URL": url, "BENCH_VARIANT": variant}
            command = [
                sys.executable,
                "-m",
                "celery",
                "-A",
                "benchmarks.apps",
                "worker",
                "-P",
                pool,
                "-c",
                "1",
            ]
            command += [
                "--without-gossip",
                "--without-mingle",
                "--without-heartbeat",
                "-l",
                "WARNING",
                "-n",
                variant,
            ]
            log = (logs / variant).open("wb")
            workers[variant] = (subprocess.Popen(command, env=env, stdout=log, stderr=log), env)
        first = 0
        for turn in range(rounds + 1):  # the first warms up and does not count
            for variant in variants:
                process, env = workers[variant]
                client.flushdb()
                os.kill(process.pid, 19)  # SIGSTOP: the queue fills while it sleeps
                subprocess.run(
                    [sys.executable, "-c", PUBLISH, str(first), str(count)], env=env, check=True, timeout=120
                )
                first += count
                before = cpu(process.pid)
                os.kill(process.pid, 18)
                wait_for(
                    lambda: sum(1 for _ in client.scan_iter("celery-task-meta-*", 5000)) >= count,
                    timeout=120,
                    message=f"{variant} did not finish: see {logs}",
                )
                if turn:
                    results[variant].append((cpu(process.pid) - before) / count * 1e6)
    finally:
        for process, _ in workers.values():
            os.kill(process.pid, 18)
            process.terminate()
        for process, _ in workers.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", default="solo", choices=["solo", "prefork", "threads"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--variants", default="bare,floor,idem")
    options = parser.parse_args()
    variants = options.variants.split(",")
    with RedisServer(Path(tempfile.mkdtemp())) as server:
        began = time.monotonic()
        results = measure(server.url, variants, options.pool, options.rounds, options.count)
        print(
            f"{options.pool}: {options.rounds} rounds of {options.count} tasks in {time.monotonic() - began:.0f} s"
        )
        bare = statistics.median(results[variants[0]])
        for variant in variants:
            median = statistics.median(results[variant])
            ratios = [a / b for a, b in zip(results[variant], results[variants[0]], strict=True)]
            print(f"{variant:10} {median:7.0f} µs CPU per task   {median / bare:5.2f} × bare", end="   ")
            print(f"(round by round {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
