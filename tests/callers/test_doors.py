"""Ten retries from four processes at once, reworded, reordered, defaulted: one effect, ten right answers.

Once for each door.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
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

    def __init__(self, env: dict[str, str], log: Path) -> None:
        words = [sys.executable, "-m", "tests.callers.knocker"]
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=env,
                cwd=ROOT,
                text=True,
            )

    def tell(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def hear(self, timeout: float = 90.0) -> list[Any]:
        """The answers to its order. The process is killed when they do not come in time."""
        assert self.process.stdout is not None
        timer = threading.Timer(timeout, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        assert line, f"no answers within {timeout:g} s"
        answers: list[Any] = json.loads(line)
        return answers

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def knocking(env: dict[str, str], http_url: str, mcp_url: str, folder: Path) -> Iterator[list[Knocker]]:
    """Four processes of callers of one shop."""
    env = {**os.environ, **env, "CALLERS_HTTP": http_url, "CALLERS_MCP": mcp_url}
    with contextlib.ExitStack() as ends:
        knockers = []
        for _ in range(PROCESSES):
            knockers.append(Knocker(env, folder / "knockers.log"))
            ends.callback(knockers[-1].close)
        yield knockers


@pytest.fixture(scope="module")
def knockers(shop_env: dict[str, str], http_url: str, mcp_url: str, folder: Path) -> Iterator[list[Knocker]]:
    with knocking(shop_env, http_url, mcp_url, folder) as knockers:
        yield knockers


def reworded(values: dict[str, Any], random_: random.Random) -> dict[str, Any]:
    """One way to say the same: some by position, the rest by name in any order, the default said or not."""
    values = {**values, "currency": "EUR", "note": f"in other words, {random_.random()}"}
    positional = random_.randint(0, 3)
    names = [*NAMES[positional:]]
    if random_.random() < 0.5:
        names.remove("currency")
    random_.shuffle(names)
    return {"args": [values[n] for n in NAMES[:positional]], "kwargs": {n: values[n] for n in names}}


def knock(knockers: list[Knocker], folder: Path, name: str, door: str) -> list[Any]:
    """Ten calls of one action at once, and their answers. Frameworks take long to import: one process does."""
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
