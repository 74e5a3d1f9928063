"""The tests of this folder fail if the guard is removed. A test that passes without the guard proves nothing.

The worker runs every body and ``submit`` treats every call as new. The count of effects must show it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from celery_idem import Ledger
from celery_idem.adapters.agents import function
from tests.callers import forgetful, shop, test_agents, test_doors
from tests.callers.conftest import served
from tests.callers.knocker import DOORS, FRAMEWORKS
from tests.support.effects import Effects
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

pytestmark = pytest.mark.redis

RESUMED: list[Callable[[Any, Effects, str], None]] = [
    test_agents.test_langgraph_resume_begins_the_node_anew,
    partial(test_agents.test_langgraph_resume_with_a_finished_sibling, lost=True),
    test_agents.test_langgraph_resume_with_a_finished_sibling_call,
]


@dataclass
class Unguarded:
    """A second shop, in another Redis database."""

    pay: Any
    done: Effects
    knockers: list[test_doors.Knocker]

    def count(self, name: str) -> int:
        return self.done.count(f"pay-{name}-7")


@pytest.fixture(scope="module")
def unguarded(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unguarded]:
    folder = tmp_path_factory.mktemp("unguarded")
    url = redis.url_for(1)
    env = {"CALLERS_URL": url, "CALLERS_FOLDER": str(folder), "CALLERS_FORGET": "1"}
    with contextlib.ExitStack() as ends:
        worker = CeleryWorker("tests.callers.unguarded:app", folder, concurrency=4, env=env)
        ends.callback(worker.kill)
        http_url = ends.enter_context(served("tests.callers.http_app:app", env, folder))
        mcp_url = ends.enter_context(served("tests.callers.mcp_app:app", env, folder))
        # Callers without a record never receive their result, so they wait only briefly.
        brief = {**env, "CALLERS_WITHIN": "3"}
        knockers = ends.enter_context(test_doors.knocking(brief, http_url, f"{mcp_url}/mcp", folder))
        pay = function(shop.make(url, folder), "shop.pay", wait=3)
        yield Unguarded(pay, Effects(folder / "effects.jsonl"), knockers)


# One framework is enough: all call the same function, and each takes seconds to import.
@pytest.mark.parametrize("door", [door for door in DOORS if door not in FRAMEWORKS[1:]])
def test_without_the_claim_the_check_of_this_door_fails(
    unguarded: Unguarded, tmp_path: Path, name: str, door: str
) -> None:
    with pytest.raises(AssertionError):
        test_doors.test_ten_retries_from_four_processes(
            unguarded.knockers, unguarded.done, tmp_path, name, door
        )
    # The test may have failed on a result before a second message ran. The HTTP adapter publishes no second message
    # while the first waits for a worker. So the calls are repeated until the effect happens twice.
    wait_for(
        lambda: unguarded.count(name) > 1 or not test_doors.knock(unguarded.knockers, tmp_path, name, door),
        message="something to happen twice",
    )


@pytest.mark.parametrize("test", RESUMED, ids=["node", "sibling", "sibling call"])
def test_without_the_claim_resuming_pays_twice(
    unguarded: Unguarded,
    name: str,
    test: Callable[[Any, Effects, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Otherwise the record that the first call accepted would stop the second call.
    monkeypatch.setattr(Ledger, "accept", forgetful.accept)
    with pytest.raises(AssertionError):
        test(unguarded.pay, unguarded.done, name)
    assert unguarded.count(name) == 2, "it failed, but not because it paid twice"
