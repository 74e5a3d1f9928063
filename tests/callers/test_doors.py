"""Ten calls of one action from four processes have one effect, and all ten receive its result.

The calls differ in their free text, the order of their arguments and the use of defaults. The test runs once for
each way to call a task (a "door").
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.callers.knocker import DOORS, FRAMEWORKS, NAMES
from tests.support.effects import Effects, Gate
from tests.support.workers import ROOT

pytestmark = pytest.mark.redis

RETRIES = 10
PROCESSES = 4


class Knocker:
    """One process of callers."""

    def __init__(self, family: subprocess.Popen[bytes], orders: int, answers: int) -> None:
        self._family = family
        self._orders = os.fdopen(orders, "w")
        self._answers = os.fdopen(answers)

    def tell(self, order: dict[str, Any]) -> None:
        self._orders.write(json.dumps(order) + "\n")
        self._orders.flush()

    def hear(self, timeout: float = 90.0) -> list[Any]:
        """Return the results of the order. Kill all processes if they do not come in time."""
        timer = threading.Timer(timeout, os.killpg, (self._family.pid, signal.SIGKILL))
        timer.start()
        try:
            line = self._answers.readline()
        finally:
            timer.cancel()
        assert line, f"no answers within {timeout:g} s"
        answers: list[Any] = json.loads(line)
        return answers

    def close(self) -> None:
        self._orders.close()
        self._answers.close()


@contextlib.contextmanager
def knocking(env: dict[str, str], http_url: str, mcp_url: str, folder: Path) -> Iterator[list[Knocker]]:
    """Start four caller processes. They are forks of one process, so the imports are done once."""
    env = {**os.environ, **env, "CALLERS_HTTP": http_url, "CALLERS_MCP": mcp_url}
    pipes = [(os.pipe(), os.pipe()) for _ in range(PROCESSES)]  # for orders and for answers
    theirs = [(orders[0], answers[1]) for orders, answers in pipes]
    words = [f"{orders},{answers}" for orders, answers in theirs]
    with contextlib.ExitStack() as ends, (folder / "knockers.log").open("ab") as log:
        family = subprocess.Popen(
            [sys.executable, "-m", "tests.callers.knocker", *words],
            pass_fds=[file for pair in theirs for file in pair],
            stdin=subprocess.DEVNULL,
            stderr=log,
            env=env,
            cwd=ROOT,
            start_new_session=True,
        )
        ends.callback(family.wait)
        ends.callback(os.killpg, family.pid, signal.SIGKILL)
        for file in (file for pair in theirs for file in pair):
            os.close(file)
        knockers = [Knocker(family, orders[1], answers[0]) for orders, answers in pipes]
        for knocker in knockers:
            ends.callback(knocker.close)
        yield knockers


@pytest.fixture(scope="module")
def knockers(shop_env: dict[str, str], http_url: str, mcp_url: str, folder: Path) -> Iterator[list[Knocker]]:
    with knocking(shop_env, http_url, mcp_url, folder) as knockers:
        yield knockers


def reworded(values: dict[str, Any], random_: random.Random) -> dict[str, Any]:
    """Return the same action in another form: arguments by position or by name, with or without the default."""
    values = {**values, "currency": "EUR", "note": f"in other words, {random_.random()}"}
    positional = random_.randint(0, 3)
    names = [*NAMES[positional:]]
    if random_.random() < 0.5:
        names.remove("currency")
    random_.shuffle(names)
    return {"args": [values[n] for n in NAMES[:positional]], "kwargs": {n: values[n] for n in names}}


def knock(knockers: list[Knocker], folder: Path, name: str, door: str) -> list[Any]:
    """Make ten calls of one action at once and return their results.

    Agent frameworks take seconds to import, so one process makes all of their calls.
    """
    if door in FRAMEWORKS:
        knockers = knockers[:1]
    random_ = random.Random(door)
    calls = [reworded({"customer": name, "invoice": "7", "cents": 4200}, random_) for _ in range(RETRIES)]
    gate = Gate(folder / "go")
    for number, knocker in enumerate(knockers):
        knocker.tell({"door": door, "calls": calls[number :: len(knockers)], "gate": str(gate.path)})
    gate.open()
    return [answer for knocker in knockers for answer in knocker.hear()]


@pytest.mark.parametrize("door", DOORS)
def test_ten_retries_from_four_processes(
    knockers: list[Knocker], done: Effects, tmp_path: Path, name: str, door: str
) -> None:
    answers = knock(knockers, tmp_path, name, door)
    assert answers == [{"paid": 4200, "invoice": "7"}] * RETRIES
    assert done.count(f"pay-{name}-7") == 1
