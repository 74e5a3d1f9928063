"""Times calls side by side in one process."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence

Call = Callable[[str], object]


def timed(calls: Mapping[str, Call], threads: int, count: int, turn: int) -> dict[str, list[float]]:
    """Return the microseconds of each call: ``count`` calls of each kind, each with its own key.

    The kinds alternate call by call, in every order. So each has the same share of quiet moments of the machine,
    and none always follows the same other kind. That matters: a GET in a tight loop took half as long as the same
    GET after some microseconds of other work.
    """
    orders: Sequence[tuple[str, ...]] = list(itertools.permutations(calls))
    times: dict[str, list[float]] = {name: [] for name in calls}
    lock = threading.Lock()

    def work(number: int) -> None:
        mine: dict[str, list[float]] = {name: [] for name in calls}
        for n in range(count // threads):
            key = f"bench.task:{turn:04x}{number:04x}{n:024x}"
            for name in orders[n % len(orders)]:
                call = calls[name]
                began = time.perf_counter()
                call(key)
                mine[name].append((time.perf_counter() - began) * 1e6)
        with lock:
            for name, taken in mine.items():
                times[name] += taken

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
    """Return medians and 99th percentiles of each round but the first, which warms up."""
    p50: dict[str, list[float]] = {name: [] for name in calls}
    p99: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        clear()
        for name, times in timed(calls, threads, count, turn).items():
            if turn:
                p50[name].append(statistics.median(times))
                p99[name].append(statistics.quantiles(times, n=100)[98])
    return p50, p99
