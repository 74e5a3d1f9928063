"""`asubmit` and `async_wait` give the same receipts as `submit` and `wait` and never block the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import psutil
import pytest
import redis as redis_py
from celery import Celery
from celery.signals import after_task_publish
from mcp import Client

from celery_idem import Receipt, asubmit, submit
from celery_idem.adapters.http import door
from celery_idem.adapters.mcp import server
from celery_idem.core.model import NO_FINGERPRINT
from celery_idem.integration import awaiting, receipts
from celery_idem.integration.announcements import announcements_of
from celery_idem.integration.looking import PLAIN_POLICY, Look
from tests.callers import shop as shops
from tests.support.effects import Effects, Gate
from tests.support.proxy import Proxy
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("worker")]

NEVER = 1000.0  # seconds: longer than any test, so that only a wake-up can end a wait


@pytest.fixture
def published() -> Iterator[list[str]]:
    """The first argument of each message that this process publishes."""
    seen: list[str] = []

    def note(body: Any = None, **more: Any) -> None:
        seen.append(str(body[0][0]))

    after_task_publish.connect(note)
    yield seen
    after_task_publish.disconnect(note)


async def until(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(wait_for, condition)


# --- answers ---------------------------------------------------------------------------


def test_new_then_known(shop: Celery, done: Effects, name: str) -> None:
    pay = shop.tasks["shop.pay"]

    async def answers() -> list[Receipt]:
        first = await pay.asubmit(name, "7", 4200, note="please", scope="acme", priority=3)
        answer = await first.async_wait(60)
        again = await asubmit(shop, "shop.pay", (name, "7"), {"cents": 4200}, scope="acme")
        assert await again.async_wait(0) is again
        other = await pay.asubmit(name, "7", 1, scope="acme")
        with pytest.raises(TypeError):
            await pay.asubmit(name)
        return [first, answer, again, other]

    first, answer, again, other = asyncio.run(answers())
    assert [each.status for each in (first, answer, again, other)] == [
        "accepted",
        "executed",
        "replayed",
        "conflict",
    ]
    assert first.key == pay.intent_key(name, "7", 4200, scope="acme")
    assert answer.result == again.result == {"paid": 4200, "invoice": "7"}
    assert done.count(f"pay-{name}-7") == 1


def test_fifty_at_once_are_one_effect(shop: Celery, folder: Path, done: Effects, name: str) -> None:
    slow = shop.tasks["shop.slow"]

    async def one() -> Receipt:
        receipt: Receipt = await slow.asubmit(name)
        return await receipt.async_wait(60)

    async def all_of_them() -> list[Receipt]:
        calls = [asyncio.ensure_future(one()) for _ in range(50)]
        await asyncio.to_thread(done.wait, f"slow-{name}")
        Gate(folder / f"gate-{name}").open()
        return await asyncio.gather(*calls)

    answers = asyncio.run(all_of_them())
    assert {answer.result for answer in answers} == {f"slow {name}"}
    assert {answer.status for answer in answers} <= {"executed", "replayed"}
    assert done.count(f"slow-{name}") == 1


def test_the_time_is_up(shop: Celery, folder: Path, name: str) -> None:
    async def answers() -> list[Receipt]:
        receipt = await shop.tasks["shop.slow"].asubmit(name)
        found = [await receipt.async_wait(0), await receipt.async_wait(0.1)]
        Gate(folder / f"gate-{name}").open()
        return [*found, await receipt.async_wait(60)]

    assert [answer.status for answer in asyncio.run(answers())] == ["accepted", "accepted", "executed"]


# --- woken -----------------------------------------------------------------------------


def test_the_result_wakes_who_waits(
    redis: RedisServer, shop: Celery, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published result ends the wait. The next look is 1000 seconds away, so nothing else can end it."""
    monkeypatch.setattr(receipts, "LONGEST_LOOK", NEVER)
    monkeypatch.setattr(receipts, "LONGEST_LOOK_IF_WOKEN", NEVER)
    heard: list[float] = []
    woken = awaiting.Waker._woken
    monkeypatch.setattr(awaiting.Waker, "_woken", lambda self: (heard.append(time.monotonic()), woken(self)))
    gate = Gate(folder / f"gate-{name}")

    async def answer() -> Receipt:
        receipt = await shop.tasks["shop.slow"].asubmit(name)
        waiting = asyncio.ensure_future(receipt.async_wait(60))
        await until(lambda: heard)
        with contextlib.closing(redis_py.Redis.from_url(redis.url)) as client:
            before = len(heard)
            assert client.client_kill_filter(_type="pubsub")
            await until(lambda: len(heard) > before)  # it has subscribed again
        before = len(heard)
        gate.open()
        found = await waiting
        assert len(heard) > before
        return found

    assert asyncio.run(answer()).status == "executed"


def test_a_result_that_is_not_published_is_found(shop: Celery, redis: RedisServer, folder: Path) -> None:
    """If no result is published, a wait finds the answer at its next look.

    This happens if the task ignores its result or the result backend cannot publish.
    """
    key = shop.tasks["shop.slow"].intent_key("a")
    ignoring = shops.make(redis.url, folder)
    ignoring.tasks["shop.slow"].ignore_result = True
    for app, told in ((shop, announcements_of(shop)), (ignoring, None)):
        look = Look(app, None, NO_FINGERPRINT, PLAIN_POLICY, published=True)
        assert look.announcements(Receipt("accepted", key)) is told
        assert look.announcements(Receipt("accepted", "")) is announcements_of(app)  # submitted by name
    app = Celery("plain", set_as_current=False, broker="memory://", backend="cache+memory://")
    app.conf.update(idem_store="memory://await", task_always_eager=True)
    silent = announcements_of(app)
    silent.add("1", pytest.fail)
    wait_for(lambda: silent._thread is None)
    silent.add("2", pytest.fail)
    assert silent._thread is None
    assert silent._waiting == {}
    assert (
        asyncio.run(Receipt("in_progress", "k", "1", _source=Ends(app)).async_wait(60)).status == "replayed"
    )


class Ends:
    """A source whose second look finds the final status."""

    def __init__(self, app: Celery) -> None:
        self.app, self.looks = app, 0

    def look(self, receipt: Receipt) -> Receipt:
        self.looks += 1
        return dataclasses.replace(receipt, status="replayed") if self.looks > 1 else receipt

    def announcements(self, receipt: Receipt) -> Any:
        return announcements_of(self.app)


# --- cancelled -------------------------------------------------------------------------


def test_a_cancelled_wait_leaves_nothing(shop: Celery, folder: Path, name: str) -> None:
    waiting = announcements_of(shop)._waiting

    async def cancel() -> Receipt:
        receipt = await shop.tasks["shop.slow"].asubmit(name)
        task = asyncio.ensure_future(receipt.async_wait(NEVER))
        await until(lambda: receipt.task_id in waiting)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert receipt.task_id not in waiting
        with anyio.move_on_after(0.05) as scope:  # as Starlette and the MCP SDK cancel
            await receipt.async_wait(NEVER)
        assert scope.cancelled_caught
        assert receipt.task_id not in waiting
        Gate(folder / f"gate-{name}").open()
        return await receipt.async_wait(60)

    assert asyncio.run(cancel()).status == "executed"


def test_a_cancelled_submit_is_whole_or_nothing(
    redis: RedisServer,
    folder: Path,
    done: Effects,
    name: str,
    published: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with store_behind(redis, folder) as (app, proxy), ThreadPoolExecutor(1) as pool:
        monkeypatch.setitem(awaiting._pools, ("submit", os.getpid()), pool)
        pay = app.tasks["shop.pay"]

        async def cancel() -> Receipt:
            proxy.delay = 0.2
            begun = asyncio.ensure_future(pay.asubmit(name, "7", 1))
            waits = asyncio.ensure_future(pay.asubmit(f"{name}-none", "7", 1))
            await until(lambda: pool._work_queue.qsize() == 1)  # the first call is reading the store
            for task in (begun, waits):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert published == []
            await asyncio.to_thread(done.wait, f"pay-{name}-7")
            proxy.delay = 0.0
            receipt: Receipt = await pay.asubmit(name, "7", 1)
            return await receipt.async_wait(60)

        assert asyncio.run(cancel()).status == "replayed"
    assert published == [name]
    assert (done.count(f"pay-{name}-7"), done.count(f"pay-{name}-none-7")) == (1, 0)


# --- the loop --------------------------------------------------------------------------


@contextlib.contextmanager
def store_behind(redis: RedisServer, folder: Path) -> Iterator[tuple[Celery, Proxy]]:
    """The shop with its store behind a proxy. The worker reaches the same store directly."""
    proxy = Proxy(redis.port)
    try:
        yield shops.make(redis.url, folder, idem_store=f"redis://127.0.0.1:{proxy.port}/0"), proxy
    finally:
        proxy.close()


async def lag(what: Callable[[], Awaitable[object]]) -> float:
    """Return the longest time, in seconds, that the loop was blocked while ``what`` ran on it.

    A thread that ticks beside the loop measures how long the machine or the interpreter kept both waiting. That time
    does not count.
    """
    longest = beside = 0.0
    ended = threading.Event()

    async def tick() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)

    def tick_beside() -> None:
        nonlocal beside
        before = time.monotonic()
        while not ended.wait(0.01):
            beside = max(beside, time.monotonic() - before)
            before = time.monotonic()

    thread = threading.Thread(target=tick_beside)
    thread.start()
    ticking = asyncio.ensure_future(tick())
    await asyncio.sleep(0)
    try:
        await what()
        await asyncio.sleep(0.05)  # so that a tick that was delayed is counted too
    finally:
        ticking.cancel()
        ended.set()
        thread.join()
    return max(0.0, longest - beside)


def test_a_slow_store_does_not_slow_the_loop(
    redis: RedisServer, folder: Path, done: Effects, name: str
) -> None:
    """A store that needs a second for each reply does not block the loop: by task, HTTP and MCP at the same time.

    The blocking call does block it, which shows that the measurement works.
    """
    with store_behind(redis, folder) as (app, proxy):
        pay = app.tasks["shop.pay"]
        http = httpx.AsyncClient(
            transport=httpx.ASGITransport(door(app, ["shop.pay"], token="t")),
            base_url="http://door",
            headers={"Authorization": "Bearer t"},
            timeout=60,
        )

        def order(invoice: str) -> dict[str, Any]:
            return {"customer": name, "invoice": invoice, "cents": 1}

        async def by_task(invoice: str) -> None:
            receipt = await pay.asubmit(**order(invoice))
            assert (await receipt.async_wait(60)).done

        async def by_http(invoice: str) -> None:
            answer = await http.post("/tasks/shop.pay", json=order(invoice))
            assert answer.status_code == 200

        async def by_mcp(invoice: str) -> None:
            async with Client(server(app, ["shop.pay"])) as client:
                answer = await client.call_tool("shop_pay", order(invoice))
                assert answer.structured_content["status"] in ("executed", "replayed")

        async def all_ways(turn: str) -> None:
            await asyncio.gather(by_task(f"task{turn}"), by_http(f"http{turn}"), by_mcp(f"mcp{turn}"))

        async def blocking() -> None:
            pay.submit(**order("task"))

        async def check() -> None:
            await all_ways("")  # opens connections and imports modules
            proxy.delay = 1.0
            for turn in range(5):  # on a busy machine the loop may pause for other reasons
                if await lag(partial(all_ways, str(turn))) < 0.25:
                    break
            else:
                pytest.fail("the loop was blocked five times")
            with pytest.warns(RuntimeWarning, match="blocks the event loop"):
                assert await lag(blocking) >= 0.75
            proxy.delay = 0.0
            await http.aclose()

        awaiting._warned = False
        asyncio.run(check())
    assert {count for intent, count in done.counts().items() if name in intent} == {1}


def test_a_store_that_is_away_is_waited_for(redis: RedisServer, folder: Path, name: str) -> None:
    proxy = Proxy(redis.port)
    slow = shops.make(redis.url, folder, idem_store=f"redis://127.0.0.1:{proxy.port}/0").tasks["shop.slow"]

    async def wait() -> list[Receipt]:
        receipt = await slow.asubmit(name)
        proxy.close()
        found = await receipt.async_wait(0.2)
        Gate(folder / f"gate-{name}").open()
        return [found, await receipt.async_wait(60)]

    found, answer = asyncio.run(wait())
    assert found.status in receipts.PENDING
    assert answer.status == "executed"  # from Celery's result


def test_a_thousand_wait_in_few_threads_and_little_memory(redis: RedisServer, name: str) -> None:
    app = Celery("orchestrator", broker=redis.url, backend=redis.url, set_as_current=False)
    process = psutil.Process()

    async def wait() -> tuple[Counter[str], int, int]:
        first = await asubmit(app, "shop.pay", (name, "7", 1), queue=f"nobody-{name}")
        before = process.memory_info().rss
        ids = [f"{name}-{number}" for number in range(1000)]
        some = [asyncio.ensure_future(dataclasses.replace(first, task_id=i).async_wait(60)) for i in ids]
        waiting = announcements_of(app)._waiting
        await until(lambda: len(waiting) == 1000)
        threads = sum("celery_idem look" in thread.name for thread in threading.enumerate())
        grown = process.memory_info().rss - before

        def finish() -> None:
            with contextlib.closing(redis_py.Redis.from_url(redis.url)) as client, client.pipeline() as pipe:
                for task_id in ids:
                    key = app.backend.get_key_for_task(task_id)
                    done = app.backend.encode({"status": "SUCCESS", "result": "done", "task_id": task_id})
                    pipe.set(key, done).publish(key, done)
                pipe.execute()

        await asyncio.to_thread(finish)
        answers = await asyncio.gather(*some)
        assert not waiting
        return Counter(answer.status for answer in answers), threads, grown

    answers, threads, grown = asyncio.run(wait())
    assert answers == {"executed": 1000}
    assert threads <= awaiting.THREADS
    assert grown < 50e6  # 50 kB for each: a thread's stack alone would be more


# --- warnings and errors ---------------------------------------------------------------


def test_blocking_calls_on_a_loop_warn_once(shop: Celery, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[Callable[[], object]] = [
        lambda: shop.tasks["shop.pay"].submit(name, "7", 1),
        lambda: submit(shop, "shop.pay", (name, "7", 1)),
        lambda: Receipt("in_progress", "k", _source=Ends(shop)).wait(0),
    ]

    async def call(way: Callable[[], object]) -> None:
        way()
        await asyncio.to_thread(way)

    for way in ways:
        monkeypatch.setattr(awaiting, "_warned", False)
        with pytest.warns(RuntimeWarning, match="blocks the event loop") as told:
            asyncio.run(call(way))
        assert [warning.filename for warning in told] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            asyncio.run(call(way))
            monkeypatch.setattr(awaiting, "_warned", False)
            way()  # no loop runs here
