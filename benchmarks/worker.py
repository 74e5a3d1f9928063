"""Measures a worker's cost per no-op task over bare Celery: ``python -m benchmarks.worker --pool solo``.

Each variant has one worker. The rounds of all variants are interleaved, so that a slower machine slows all of them.
In a round, a worker is stopped, its queue is filled, and it runs until the last result. Workers are restarted a few
times, because two processes of one program differ in speed by one or two percent. CPU is the operating system's count
for the worker and its children, which other load hardly changes. Broker and results are in one Redis. Each guard has
its own Redis, whose statistics (bytes, round trips, commands) concern this guard alone. celery_idem runs twice: with
the results in its store, which is the default, and with a separate store.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import psutil
import redis

from benchmarks.peers import PACKAGES, environment
from benchmarks.report import Row, compared, show
from tests.support.processes import Program
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for

GUARDS = ("bare", "floor", "idem", "apart")

NAMES = {
    "bare": "bare Celery",
    "floor": "floor: SET NX GET, SET",
    "idem": "celery_idem",
    "apart": "celery_idem, store elsewhere",
}

READY_WITHIN, DONE_WITHIN = 120.0, 120.0
"""Timeouts in seconds. Both take two or three seconds on an idle machine."""

IDLE = 4.0
"""Seconds after which a Redis server has freed the buffers of idle clients (two are enough)."""

STARTS, ROUNDS, COUNT = 7, 3, 400
"""Starts, rounds per start, tasks per round. The guard's ratio varied from 1.18 to 1.26 in single starts, and from 1.19
to 1.21 in medians of seven or more."""

TARGETS = {NAMES["idem"]: 0.95}
"""Targets for a worker's CPU, over bare Celery's."""


class Spent(NamedTuple):
    """The cost of a round per task: microseconds, and the counts of the store's server."""

    cpu: float
    wall: float
    trips: float
    sent: float
    published: float


OURS = ("INFO", "CLIENT", "HELLO", "DBSIZE")
"""Commands that the benchmark itself sends to a server."""

NO_TASKS = re.compile(r"^(?!.*bench\.noop).*idem(~|:\*|:$)")
"""Commands that a worker's main process sends to its store every second or two, without any task: it looks for overdue
intents, expired records and a changed server."""


class Watch:
    """Counts the commands of clients: ``sent`` for tasks, and ``looks``. Commands inside scripts do not count."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url, socket_timeout=None)
        self.sent = self.looks = 0
        self._monitor = self._client.monitor()
        self._monitor.__enter__()
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()

    def _count(self) -> None:
        for counted in self._monitor.listen():
            if counted["command"] == "ECHO bench-over":
                return
            if counted["client_type"] == "lua" or counted["command"].startswith(OURS):
                continue
            if NO_TASKS.search(counted["command"]):
                self.looks += 1
            else:
                self.sent += 1

    def close(self) -> None:
        self._client.echo("bench-over")
        self._thread.join(30)
        self._client.close()


class Side:
    """A variant: its store, its worker, and the process that publishes its tasks."""

    def __init__(self, variant: str, python: str, pool: str, env: Mapping[str, str], folder: Path) -> None:
        self.variant = variant
        self.store = RedisServer(folder / f"store of {variant}")
        self.store.start()
        environ = {**os.environ, **env, "BENCH_VARIANT": variant, "BENCH_STORE": self.store.url}
        together = variant == "idem"
        if together:
            environ["BENCH_RESULTS"] = self.store.url
        self.results = environ["BENCH_RESULTS"]
        self.keys = 2 if together else 1  # keys per task in the server of the results
        options = ["--without-gossip", "--without-mingle", "--without-heartbeat", "-c", "1", "-l", "INFO"]
        self.worker = Program(
            [
                python,
                "-m",
                "celery",
                "-A",
                "benchmarks.apps:app",
                "worker",
                "-P",
                pool,
                "-n",
                variant,
                *options,
            ],
            log=folder / f"{variant}.log",
            env=environ,
        )
        self.publisher = subprocess.Popen(
            [python, "-m", "benchmarks.apps"],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> None:
        wait_for(
            lambda: b"ready." in self.worker.log.read_bytes() or not self.worker.alive,
            READY_WITHIN,
            lambda: self.worker.log.read_text()[-2000:],
        )
        assert self.worker.alive, self.worker.log.read_text()[-2000:]

    def publish(self, first: int, count: int) -> None:
        assert self.publisher.stdin is not None
        assert self.publisher.stdout is not None
        self.publisher.stdin.write(f"{first} {count}\n")
        self.publisher.stdin.flush()
        while (line := self.publisher.stdout.readline()) != "done\n":
            assert line, f"{self.variant}: publishing failed"  # another line is output of a peer's package

    def cpu(self) -> float:
        """Return the CPU microseconds of the worker and its living children."""
        root = psutil.Process(self.worker.pid)
        return sum(_cpu(process) for process in [root, *root.children(recursive=True)])

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.worker.pid, signal.SIGCONT)
        self.worker.kill()
        self.publisher.kill()
        self.publisher.wait()
        for stream in (self.publisher.stdin, self.publisher.stdout):
            if stream is not None:
                stream.close()
        self.store.stop()


def _cpu(process: psutil.Process) -> float:
    """Return a process' CPU time: nanoseconds on Linux, elsewhere hundredths of a second."""
    try:
        files = Path(f"/proc/{process.pid}/task").glob("*/schedstat")
        counts = [int(file.read_text().split()[0]) for file in files]
    except (OSError, IndexError):
        counts = []
    return sum(counts) / 1e3 if counts else sum(process.cpu_times()[:2]) * 1e6


@contextlib.contextmanager
def sides(variants: Sequence[str], python: str, pool: str, main: RedisServer) -> Iterator[list[Side]]:
    """Start the variants' processes, and always stop them."""
    env = {"BENCH_URL": main.url_for(0), "BENCH_RESULTS": main.url_for(1), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        made: list[Side] = []
        try:
            for variant in variants:
                made.append(Side(variant, python, pool, env, Path(folder)))  # noqa: PERF401  # each is ended
            for side in made:
                side.ready()
            yield made
        finally:
            for side in made:
                side.close()


def one_round(side: Side, first: int, count: int, main: RedisServer, watched: bool = False) -> Spent:
    """Run ``count`` tasks through one worker."""
    with redis.Redis.from_url(side.results) as results, redis.Redis.from_url(side.store.url) as kept:
        before = int(results.dbsize())
        os.kill(side.worker.pid, signal.SIGSTOP)  # the worker must not run while its queue is filled
        publishing = Watch(side.store.url) if watched else None
        side.publish(first, count)
        if publishing:
            publishing.close()
        watch = Watch(side.store.url) if watched else None
        trips = reads(kept)
        cpu, began = side.cpu(), perf_counter()
        os.kill(side.worker.pid, signal.SIGCONT)
        looks = 0

        def all_there() -> bool:
            nonlocal looks
            looks += 1
            return int(results.dbsize()) >= before + count * side.keys

        wait_for(
            all_there,
            DONE_WITHIN,
            lambda: f"{side.variant} did not finish: {side.worker.log.read_text()[-2000:]}",
            every=0.005,
        )
        wall, cpu = perf_counter() - began, side.cpu() - cpu
        trips = reads(kept) - trips - 1 - (looks if side.keys > 1 else 0)  # without those of the benchmark
        if watch:
            watch.close()
            trips -= watch.looks
    sent, published = (seen.sent if seen else 0 for seen in (watch, publishing))
    return Spent(cpu / count, wall / count * 1e6, trips / count, sent / count, published / count)


def reads(kept: redis.Redis) -> int:
    """Return how often the server has read from its connections."""
    return int(kept.info("stats")["total_reads_processed"])


def bytes_kept(made: Sequence[Side], first: int, count: int, main: RedisServer) -> dict[str, float]:
    """Return the bytes that each guard keeps per task: the growth of its server in one more round."""

    def used() -> dict[str, int]:
        threading.Event().wait(IDLE)
        found = {}
        for side in made:
            with redis.Redis.from_url(side.store.url) as kept:
                found[side.variant] = int(kept.info("memory")["used_memory"])
        return found

    for side in made:
        with redis.Redis.from_url(side.store.url) as kept:
            kept.flushall()
    before = used()
    for side in made:
        one_round(side, first, count, main)
    after = used()
    return {variant: (after[variant] - before[variant]) / count for variant in before}


def quiet(store: RedisServer) -> None:
    """Wait until the server has received no other command for half a second."""
    with redis.Redis.from_url(store.url) as client:
        last = [0]

        def unchanged() -> bool:
            before, last[0] = last[0], reads(client)
            return last[0] == before + 1

        wait_for(unchanged, DONE_WITHIN, "the store to be idle", every=0.5)


Found = tuple[dict[str, list[Spent]], dict[str, Spent], dict[str, float]]
"""For each variant: the costs of its rounds, the counts of its server in one round, and the bytes kept."""


def measure(variants: Sequence[str], python: str, pool: str, starts: int, rounds: int, count: int) -> Found:
    """Run several starts with several rounds each. The servers' counts come from the first start."""
    found, counted, kept = measure_once(variants, python, pool, random.Random(0), rounds, count, asked=True)
    for start in range(1, starts):
        spent, _, _ = measure_once(variants, python, pool, random.Random(start), rounds, count)
        for variant in variants:
            found[variant] += spent[variant]
    return found, counted, kept


def measure_once(
    variants: Sequence[str],
    python: str,
    pool: str,
    order: random.Random,
    rounds: int,
    count: int,
    asked: bool = False,
) -> Found:
    """Run the rounds of one start, after a round that warms up and is not counted."""
    found: dict[str, list[Spent]] = {variant: [] for variant in variants}
    counted: dict[str, Spent] = {}
    kept: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer(Path(folder) / "main") as main,
        sides(variants, python, pool, main) as made,
    ):
        first = 10_000_000  # all numbers have the same length, so that no round has longer messages
        for side in made:
            for warming in (20, 200):  # the first brings connections and scripts
                counted[side.variant] = one_round(side, first, warming, main, watched=asked)
                first += warming
                quiet(side.store)  # a worker also sends commands to its store when it starts
        for _ in range(rounds):
            for side in order.sample(
                made, len(made)
            ):  # a varying order, so that no variant always follows the same other one
                found[side.variant].append(one_round(side, first, count, main))
                first += count
        if asked:
            kept = bytes_kept(made, first, count, main)
    return found, counted, kept


def rows(pool: str, starts: int, rounds: int, count: int, peers: bool) -> list[Row]:
    """Return the rows of one pool."""
    python, why = environment() if peers else (sys.executable, dict.fromkeys(PACKAGES, ""))
    left_out = {name: reason for name, reason in why.items() if reason} if peers else {}
    variants = [*GUARDS, *(name for name in PACKAGES if peers and name not in left_out)]
    found, counted, kept = measure(variants, python, pool, starts, rounds, count)
    for name in ("idem", "apart"):  # with the result, and without it
        ours = counted[name]
        counts = f"{ours.trips} round trips and {ours.sent} commands a task"
        assert ours.sent == 2, counts
        assert 2 <= ours.trips < 2.05, (
            counts
        )  # a connection that the worker opens meanwhile adds a few round trips in all
    cpu = {NAMES.get(name, name): [one.cpu for one in spent] for name, spent in found.items()}
    wall = {NAMES.get(name, name): [one.wall for one in spent] for name, spent in found.items()}
    notes = {NAMES.get(name, name): _note(counted[name], kept[name]) for name in variants}
    return [
        *compared(f"Worker, {pool}: CPU per no-op task", cpu, NAMES["bare"], "µs", TARGETS, notes),
        *(Row(f"Worker, {pool}: CPU per no-op task", name, note=reason) for name, reason in left_out.items()),
        *compared(f"Worker, {pool}: wall clock per no-op task", wall, NAMES["bare"], "µs"),
    ]


def _note(counted: Spent, kept: float) -> str:
    """Return the statistics of the store's server."""
    if counted.sent + counted.published == 0:
        return ""
    at_publish = f", and {counted.published:.1f} when it is published" if counted.published else ""
    return f"store: {counted.sent:.1f} commands{at_publish}, {counted.trips:.1f} round trips, {kept:.0f} bytes kept"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", default="solo", choices=["solo", "prefork", "threads"])
    parser.add_argument("--starts", type=int, default=STARTS, help="how often all workers are started")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each start")
    parser.add_argument("--count", type=int, default=COUNT, help="tasks of a round")
    parser.add_argument("--peers", action="store_true", help="with the other guards, from build/bench-env")
    options = parser.parse_args()
    show(rows(options.pool, options.starts, options.rounds, options.count, options.peers))


if __name__ == "__main__":
    main()
