"""``self.claim`` and ``self.step`` work in coroutines, threads and greenlets that have the body's context."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from celery import Celery

from celery_idem import Happened, IdempotencyError, IdempotentTask
from tests.support.workers import ROOT


@pytest.fixture
def app() -> Celery:
    app = Celery("async", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(idem_store=f"memory://{uuid.uuid4().hex}")
    return app


def in_to_thread(call: Callable[[], Any]) -> Any:
    async def run() -> Any:
        return await asyncio.to_thread(call)

    return asyncio.run(run())


def in_asyncio_run(call: Callable[[], Any]) -> Any:
    async def run() -> Any:
        await asyncio.sleep(0)
        return call()

    return asyncio.run(run())


def in_async_to_sync(call: Callable[[], Any]) -> Any:
    async def run() -> Any:
        await asyncio.sleep(0)
        return call()

    return async_to_sync(run)()


def in_async_to_sync_and_back(call: Callable[[], Any]) -> Any:
    return async_to_sync(sync_to_async(call, thread_sensitive=False))()


def in_an_executor(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, call).result()


PLACES = [in_asyncio_run, in_async_to_sync, in_async_to_sync_and_back, in_to_thread, in_an_executor]
place = pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)


@place
def test_the_claim_and_steps_are_there(app: Celery, place: Callable[..., Any]) -> None:
    sent: list[str] = []

    @app.task(base=IdempotentTask, bind=True, name="pay", intent=("order",))
    def pay(self: Any, order: str) -> tuple[str, bool]:
        def send() -> tuple[str, bool]:
            self.step("send", sent.append, order)
            return self.claim.key, self.claim.lost

        return tuple(place(send))  # type: ignore[return-value]

    assert pay("o1") == pay.apply(("o1",)).get() == [pay.intent_key("o1"), False]
    assert sent == ["o1"]
    with pytest.raises(IdempotencyError, match="not running under a claim"):
        pay.claim  # noqa: B018


@pytest.mark.parametrize(
    "place", PLACES[2:], ids=lambda place: place.__name__
)  # a loop does not run inside a loop
def test_nested_bodies_have_their_own_claims_and_scopes(app: Celery, place: Callable[..., Any]) -> None:
    @app.task(base=IdempotentTask, bind=True, name="inner", intent=("order",))
    def inner(self: Any, order: str) -> str:
        return str(place(lambda: self.claim.key))

    @app.task(base=IdempotentTask, bind=True, name="outer", intent=("order", "deep"))
    def outer(self: Any, order: str, deep: int = 1) -> list[str]:
        def call() -> list[str]:
            before = self.claim.key
            keys = [before, inner(order), *(self(order, deep - 1) if deep else [])]
            assert self.claim.key == before
            return keys

        return list(place(call))

    keys = outer.apply(("o1",), scope="acme").get()
    assert keys == [
        outer.intent_key("o1", scope="acme"),
        inner.intent_key("o1"),
        outer.intent_key("o1", 0, scope="acme"),
        inner.intent_key("o1"),
    ]


@place
def test_a_body_that_calls_its_own_intent_runs_on(app: Celery, place: Callable[..., Any]) -> None:
    """A body that calls its own intent runs it inside its claim. Waiting for the claim would be a deadlock."""

    @app.task(base=IdempotentTask, bind=True, name="pay", intent=("order",))
    def pay(self: Any, order: str, deep: int = 1) -> int:
        return int(place(lambda: self(order, deep - 1))) + 1 if deep else 0

    assert pay("o1") == 1


def test_the_question_of_a_step_is_put_from_anywhere(app: Celery) -> None:
    asked = []

    @app.task(base=IdempotentTask, bind=True, name="pay", intent=("order",), on_crash="resume")
    def pay(self: Any, order: str) -> int:
        def ask() -> Happened:
            asked.append(self.claim.key)
            return Happened(7)

        def charge() -> int:
            raise SystemExit

        return int(in_to_thread(lambda: self.step("charge", charge, reconcile=ask)))

    with pytest.raises(SystemExit):
        pay("o1")
    assert pay("o1") == 7
    assert asked == [pay.intent_key("o1")]


def test_a_thread_that_outlives_the_body_sees_that_it_has_ended(app: Celery) -> None:
    ended, found, effects = threading.Event(), [], []

    @app.task(base=IdempotentTask, bind=True, name="pay", intent=("order",))
    def pay(self: Any, order: str) -> None:
        def linger() -> None:
            ended.wait(10)
            found.append(self.claim.lost)
            try:
                self.step("late", effects.append, order)
            except IdempotencyError as error:
                found.append(str(error))
            self("o2")  # another intent, claimed like any other call
            found.append(self.claim.lost)

        if not threads:
            threads.append(threading.Thread(target=contextvars.copy_context().run, args=(linger,)))
            threads[0].start()
        effects.append(f"body {order}")
        assert not self.claim.lost

    threads: list[threading.Thread] = []
    pay("o1")
    ended.set()
    threads[0].join(10)
    assert effects == ["body o1", "body o2"]
    lost, text, still = found[:3]
    assert (lost, still) == (True, True)
    assert "The body of pay:" in text
    assert "has ended" in text


GREENLETS = """
from gevent import monkey; monkey.patch_all()
import contextvars, uuid, gevent
from celery import Celery
from celery_idem import IdempotentTask

app = Celery("g", broker="memory://", backend="cache+memory://")
app.conf.idem_store = "memory://" + uuid.uuid4().hex

@app.task(base=IdempotentTask, bind=True, name="pay", intent=("order",))
def pay(self, order):
    gevent.sleep(0.01)
    own = self.claim.key == pay.intent_key(order)
    child = gevent.spawn(contextvars.copy_context().run, lambda: (gevent.sleep(0.01), self.claim.key)[1])
    return own and child.get() == pay.intent_key(order) and self.claim.key == pay.intent_key(order)

many = [gevent.spawn(pay, str(n)) for n in range(20)]
assert all(one.get() for one in many)
"""


def test_greenlets_do_not_share_a_claim() -> None:
    pytest.importorskip("gevent")
    subprocess.run([sys.executable, "-c", GREENLETS], cwd=ROOT, check=True, timeout=60)
