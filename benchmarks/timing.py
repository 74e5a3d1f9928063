"""Timing calls side by side in one process."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence

Call = Callable[[str], object]


def timed(call: Call, threads: int, count: int, turn: int = 0) -> list[float]:
    """Microseconds of each call. Every call gets a key of its own, of the same length."""
    times: list[float] = []

    def work(number: int) -> None:
        mine = []
        for n in range(count // threads):
            key = f"bench.task:{turn:04x}{number:04x}{n:024x}"
            began = time.perf_counter()
            call(key)
            mine.append((time.perf_counter() - began) * 1e6)
        times.extend(mine)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return times


def rounds_of(
    calls: Mapping[str, Call],
    threads: int,
    rounds: int,
    count: int,
    clear: Callable[[], object] = lambda: None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Medians and 99th percentiles of each round; the first round warms up and does not count."""
    p50: dict[str, list[float]] = {name: [] for name in calls}
    p99: dict[str, list[float]] = {name: [] for name in calls}
    orders: Sequence[tuple[str, ...]] = list(itertools.permutations(calls))
    for turn in range(rounds + 1):
        clear()
        for name in orders[turn % len(orders)]:  # nobody always comes after the same other one
            times = timed(calls[name], threads, count, turn)
            if turn:
                p50[name].append(statistics.median(times))
                p99[name].append(statistics.quantiles(times, n=100)[98])
    return p50, p99
