"""Measures what it costs when many callers wait for one long body. The servers count the commands.

Used by ``test_waiters`` and by ``benchmarks/waiters.py``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import redis as redis_py

from celery_idem.integration.delivery import BACKOFF, SLOT_WAITS
from celery_idem.integration.receipts import FIRST_LOOK, LONGEST_LOOK, LOOK_GROWTH
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from tests.celery.conftest import Stage
    from tests.support.servers import RedisServer

PATIENCE = 60.0
"""Seconds in which all waiters receive the result after the body has ended."""

LONGEST = 90.0
"""Seconds that waiters wait for the body. The body itself ends after at most 60 seconds."""


class Cost(NamedTuple):
    """The cost of waiting.

    Attributes:
        seconds: how long the body ran while the callers waited.
        commands: scripts that the store ran in that time.
        messages: messages published to the broker, less the first one of each caller.
        answers: the results that the callers received.
    """

    seconds: float
    commands: int
    messages: int
    answers: list[object]


class Counter:
    """Counts the store's commands and the published messages since its creation."""

    def __init__(self, store: RedisServer, broker: RedisServer) -> None:
        self._store = redis_py.Redis.from_url(store.url)
        self._broker = redis_py.Redis.from_url(broker.url)
        self._began = (0, 0)
        self._began = self.now()

    def now(self) -> tuple[int, int]:
        store, broker = self._store.info("commandstats"), self._broker.info("commandstats")
        # Redis also counts each command inside a script. Only the scripts come from clients, so only they are counted.
        commands = sum(store.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "eval"))
        return commands - self._began[0], broker.get("cmdstat_lpush", {"calls": 0})["calls"] - self._began[1]

    def close(self) -> None:
        self._store.close()
        self._broker.close()


def most_returns(seconds: float) -> int:
    """Return how often a duplicate may come back in that time.

    Each pause is longer than the one before by the factor in ``BACKOFF``. Jitter can shorten it by a tenth. The first
    pauses end before the lease does, so the lease does not shorten them.
    """
    first, growth, longest = BACKOFF
    returns, at, pause = 0, 0.0, first
    while at < seconds:
        at += 0.9 * pause
        pause = min(longest, pause * growth)
        returns += 1
    return returns


def most_looks(seconds: float) -> int:
    """Return how often a receipt may look in that time."""
    looks, at, pause = 0, 0.0, FIRST_LOOK
    while at < seconds:
        looks += 1
        at += pause
        pause = min(pause * LOOK_GROWTH, LONGEST_LOOK)
    return looks + 1


def most_commands(seconds: float) -> int:
    """Return the most commands of one duplicate at the worker: its looks in the slot and one for each return."""
    return 1 + SLOT_WAITS + most_returns(seconds)


def renewals(seconds: float, lease: float) -> int:
    """Return the most commands of the execution itself."""
    return 2 + int(6 * seconds / lease)


def at_the_worker(
    stage: Stage,
    counter: Callable[[], Counter],
    name: str,
    number: int,
    enough: Callable[[float, Counter], bool],
) -> Cost:
    """Deliver an intent ``number`` times more while its body runs, until ``enough(seconds, counter)``."""
    first = stage.slow.apply_async((name,))
    stage.effects.wait(name)
    count = counter()
    began = time.monotonic()
    others = [stage.slow.apply_async((name,)) for _ in range(number)]
    wait_for(
        lambda: enough(time.monotonic() - began, count), LONGEST, "the others to have waited long enough", 0.1
    )
    stage.gate(name).open()
    first.get(timeout=PATIENCE)
    seconds = time.monotonic() - began  # until the outcome is stored, which may take long on a busy machine
    answers = [result.get(timeout=PATIENCE + seconds) for result in (first, *others)]
    commands, messages = count.now()
    count.close()
    return Cost(seconds, commands, messages - number, answers)


def at_receipts(
    stage: Stage,
    counter: Callable[[], Counter],
    name: str,
    number: int,
    enough: Callable[[float, Counter], bool],
) -> Cost:
    """Submit the intent from ``number`` callers while its body runs. All wait for its result."""
    first = stage.slow.submit(name)
    stage.effects.wait(name)
    count = counter()
    began = time.monotonic()
    together = threading.Barrier(number + 1)

    def call() -> object:
        together.wait(PATIENCE)
        return stage.slow.submit(name).wait(LONGEST).result

    with ThreadPoolExecutor(number) as pool:
        others = [pool.submit(call) for _ in range(number)]
        together.wait(PATIENCE)
        wait_for(
            lambda: enough(time.monotonic() - began, count),
            LONGEST,
            "the others to have waited long enough",
            0.1,
        )
        stage.gate(name).open()
        answer = first.wait(PATIENCE).result
        seconds = time.monotonic() - began
        answers = [other.result(PATIENCE) for other in others]
    commands, messages = count.now()
    count.close()
    return Cost(seconds, commands, messages, [answer, *answers])
