"""Listeners that fail or block do not disturb tasks. Monitors show our events correctly."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.events.state import State

from celery_idem import IdempotentTask
from celery_idem.engine import events
from celery_idem.telemetry import celery_events, signals
from tests.operators.shop import send_invoice
from tests.support.waiting import wait_for


@pytest.fixture
def blocked() -> Iterator[threading.Event]:
    """A listener that blocks until the event is set."""
    gate = threading.Event()
    stop = events.listen(lambda event: gate.wait(30) and None)
    yield gate
    gate.set()
    stop()
    wait_for(lambda: not events._dispatcher._behind, message="the listeners to catch up")


def test_a_listener_that_blocks_holds_up_no_task(app: Celery, blocked: threading.Event) -> None:
    heard: list[events.Event] = []
    stop = events.listen(heard.append)
    began = time.monotonic()
    try:
        for number in range(20):
            assert send_invoice.apply(("a", number)).get() == f"inv-a-{number}"
        held_up = time.monotonic() - began
        assert heard == []  # the blocked listener comes first
        blocked.set()
        wait_for(lambda: len(heard) == 20, message="all the events")
    finally:
        stop()
    assert held_up < 20  # it would be 30 s for the first task alone
    assert [event.kind for event in heard] == ["settled"] * 20


def test_what_is_kept_for_a_blocked_listener_is_bounded(
    blocked: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(events.BACKLOG + 10):
        events.emit("told", "shop.send_invoice:1", status="replayed")
    assert len(events._dispatcher._queue) <= events.BACKLOG
    dropped = [record for record in caplog.records if "are dropped" in record.message]
    assert len(dropped) == 1


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_whatever_a_listener_raises_is_its_own_affair(app: Celery, error: type[BaseException]) -> None:
    def bad(event: events.Event) -> None:
        raise error("a bad listener")

    heard: list[str] = []
    stops = [events.listen(bad), events.listen(lambda event: heard.append(event.kind))]
    try:
        for number in range(2):
            assert send_invoice.apply(("b", number)).get() == f"inv-b-{number}"
    finally:
        for stop in stops:
            stop()
    wait_for(lambda: heard == ["settled", "settled"], message=lambda: str(heard))


def test_no_thread_can_be_started(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = events._Dispatcher()
    monkeypatch.setattr(events, "_dispatcher", dispatcher)

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    heard: list[str] = []
    stop = events.listen(lambda event: heard.append(event.kind))
    try:
        with monkeypatch.context() as without:
            without.setattr(events.Thread, "start", fail)
            events.emit("told", "shop.send_invoice:1")
        events.emit("told", "shop.send_invoice:2")
        wait_for(lambda: heard == ["told"], message=lambda: str(heard))
    finally:
        stop()


def test_a_receiver_of_a_signal_that_blocks_holds_up_no_task(app: Celery) -> None:
    gate = threading.Event()
    seen: list[str] = []

    def receive(sender: str, event: events.Event, **_: Any) -> None:
        gate.wait(30)
        seen.append(event.kind)

    signals.replayed.connect(receive)
    try:
        for _ in range(3):
            assert send_invoice.apply(("c", 1)).get() == "inv-c-1"
        assert seen == []
        gate.set()
        wait_for(lambda: seen == ["replayed"] * 2, message=lambda: str(seen))
    finally:
        signals.replayed.disconnect(receive)


def test_each_kind_has_a_message_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """Sentry groups log records by the message before its arguments are filled in."""
    with caplog.at_level(logging.DEBUG, "celery_idem"):
        for kind in events.LEVELS:
            events.emit(kind, "shop.send_invoice:1", why=kind)
            events.emit(kind, "shop.send_invoice:2", why="another")
    emitted = [record for record in caplog.records if "idem_event" in vars(record)]  # other threads log too
    texts = {vars(record)["idem_event"]: set() for record in emitted}
    for record in emitted:
        texts[vars(record)["idem_event"]].add(record.msg)
    assert set(texts) == set(events.LEVELS)
    assert all(len(found) == 1 for found in texts.values())  # each kind has one message
    assert len({text for (text,) in texts.values()}) == len(texts)  # no two kinds share a message


class Dispatcher:
    def __init__(self, state: State, hostname: str | None) -> None:
        self.state, self.hostname = state, hostname or "gen4711@a-host"

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def send(self, kind: str, **fields: Any) -> None:
        now = time.time()
        fields = {"clock": 1, "timestamp": now, "local_received": now, "pid": 1, **fields}
        self.state.event({"type": kind, "hostname": self.hostname, **fields})


@pytest.mark.parametrize("node", [None, "w1@here"])
@pytest.mark.parametrize("kind", sorted(celery_events.RARE))
def test_no_event_makes_a_worker_that_does_not_exist(
    app: Celery, monkeypatch: pytest.MonkeyPatch, kind: str, node: str | None
) -> None:
    """The event may come from the main process (``died``), another thread, or a web server."""
    state = State()
    state.event(
        {"type": "worker-online", "hostname": "w1@here", "timestamp": 1.0, "local_received": 1.0, "clock": 1}
    )
    monkeypatch.setattr(events, "worker", [node] if node else [])
    monkeypatch.setattr(app.events, "default_dispatcher", lambda hostname=None: Dispatcher(state, hostname))
    for details in ({"task_id": "t1"}, {"task_id": ""}, {}):
        event = events.Event(kind, "shop.send_invoice:1", details)
        celery_events._send(app, event, celery_events._form(event))
    assert list(state.workers) == ["w1@here"]
    assert set(state.tasks) == ({"t1"} if node else set())
    if node:
        assert state.tasks["t1"].worker.hostname == "w1@here"


def test_an_eager_call_in_a_body_is_no_task_to_a_monitor(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker received the call, so its event would create a task without a name in the monitor."""
    state = State()
    monkeypatch.setattr(events, "worker", ["w1@here"])
    monkeypatch.setattr(app.events, "default_dispatcher", lambda hostname=None: Dispatcher(state, hostname))
    stop = celery_events.install(app)
    try:
        for _ in range(2):
            send_invoice.apply(("c1", "eager")).get()
        events.emit("replayed", "shop.send_invoice:1", task_id="t1")  # as for a message
    finally:
        stop()
    wait_for(lambda: state.event_count >= 2, message="the events")
    assert set(state.tasks) == {"t1"}


def test_nor_where_another_thread_says_what_happened_to_it(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eager call has no events in a monitor, even if another thread, such as the renewing one, emits them."""

    @app.task(name="shop.loses", base=IdempotentTask, intent=("n",), bind=True, shared=False)
    def loses(self: Any, n: int) -> None:
        details = {"task_id": self.request.id, "fence": 1}
        thread = threading.Thread(target=events.emit, args=("lease_lost", self.claim.key), kwargs=details)
        thread.start()
        thread.join(60)

    state = State()
    monkeypatch.setattr(events, "worker", ["w1@here"])
    monkeypatch.setattr(app.events, "default_dispatcher", lambda hostname=None: Dispatcher(state, hostname))
    stop = celery_events.install(app)
    try:
        loses.apply((1,)).get()
    finally:
        stop()
        app.tasks.pop("shop.loses")
    wait_for(lambda: state.event_count >= 1, message="the event")
    assert set(state.tasks) == set()
