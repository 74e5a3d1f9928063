"""Errors of the guard are not errors of the body: before the body nothing ran, after it the outcome is known."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from celery_idem import Happened, StoreError
from celery_idem.core.model import Raised, State
from celery_idem.engine import events
from celery_idem.engine.lease import RENEWER
from celery_idem.engine.ledger import Ledger
from celery_idem.engine.shadow import ShadowRunner
from tests.support.jobs import Bench, Ended, FakeJob, Left

FAILURES = [RuntimeError("can't start new thread"), MemoryError("no memory"), OSError(24, "too many files")]


class Once:
    """Raises at its first call, and calls `then` at every later one."""

    def __init__(self, error: BaseException, then: Callable[..., Any]) -> None:
        self.error = error
        self.then = then
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            raise self.error
        return self.then(*args, **kwargs)


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_a_thread_that_cannot_start_is_not_how_the_body_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    once = Once(error, threading.Thread.start)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: once(thread))  # noqa: PLW0108  # a method
    job = FakeJob()
    with pytest.raises(Left, match="before the body"):
        bench.runner.run(job)
    assert (job.ran, bench.state) == (0, State.RELEASED)
    assert bench.run("later") == "later"


@pytest.mark.parametrize("where", ["claim", "watch"])
@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_whatever_fails_before_the_body_is_tried_again_in_place(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    if where == "watch":
        monkeypatch.setattr(RENEWER, "watch", Once(error, RENEWER.watch))
    else:
        bench.store.crash("after create", Once(error, print))
    job = FakeJob(wait=lambda: None)
    assert bench.runner.run(job) == "done"
    assert (job.ran, len(job.came_back)) == (1, 1)


def test_its_caller_is_told_that_nothing_was_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RENEWER, "watch", Once(FAILURES[0], RENEWER.watch))
    with pytest.raises(StoreError, match=r"start new thread.*Nothing was run.*Call again") as caught:
        bench.run(on_store_error="raise")
    assert not isinstance(caught.value, RuntimeError)
    assert bench.state is State.RELEASED


def test_where_it_cannot_be_released_either_its_message_takes_it_up_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RENEWER, "watch", Once(FAILURES[0], RENEWER.watch))
    bench.store.crash("before read", times=9)
    job = FakeJob()
    with pytest.raises(Left):
        bench.runner.run(job)
    bench.store.heal()
    assert bench.state is State.RUNNING
    bench.lapse()
    assert bench.run("taken up", carried=job.came_back[0][1]) == "taken up"


def test_a_question_that_cannot_be_put_is_put_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Ended):
        bench.run(Ended(Raised.EXIT), ask=lambda: Happened(7))
    bench.lapse()
    once = Once(FAILURES[0], threading.Thread.start)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: once(thread))  # noqa: PLW0108  # a method
    with pytest.raises(Left):
        bench.run(ask=lambda: Happened(7))
    bench.lapse()
    assert bench.run(ask=lambda: Happened(7)) == 7


@pytest.mark.parametrize(
    "interrupt",
    [SystemExit(1), KeyboardInterrupt(), Ended(Raised.TIME_LIMIT)],
    ids=lambda e: type(e).__name__,
)
def test_an_interrupt_before_the_body_is_passed_on_and_nothing_is_in_doubt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, interrupt: BaseException
) -> None:
    monkeypatch.setattr(RENEWER, "watch", Once(interrupt, RENEWER.watch))
    with pytest.raises(type(interrupt)):
        bench.run()
    assert bench.state is State.RELEASED


def test_in_shadow_it_stops_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    once = Once(FAILURES[0], RENEWER.watch)
    monkeypatch.setattr(RENEWER, "watch", once)
    assert ShadowRunner(bench.ledger).run(FakeJob()) == "done"
    assert once.calls == 1


# --- after the body ----------------------------------------------------------------------------


class Rude:
    """A value whose own code raises when it is encoded."""

    def __init__(self, error: BaseException, times: int = 99) -> None:
        self.error = error
        self.times = times

    def __json__(self) -> str:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return "polite"


class OddError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    "error", [KeyError("a"), OddError(), ValueError(OddError()), MemoryError()], ids=type
)
def test_a_value_that_fails_to_be_encoded_is_done(bench: Bench, error: Exception) -> None:
    value = Rude(error)
    assert bench.run(lambda claim: value) is value
    assert bench.state is State.SUCCEEDED


def test_a_time_limit_while_a_value_is_encoded_costs_nothing(bench: Bench) -> None:
    assert bench.run(lambda claim: Rude(Exception("soft time limit"), times=1)) == "polite"
    assert bench.run() == "polite"


@pytest.mark.parametrize(("times", "kept"), [(1, True), (99, False)])
def test_an_exit_while_a_value_is_encoded_is_passed_on_and_it_is_done(
    bench: Bench, times: int, kept: bool
) -> None:
    with pytest.raises(SystemExit):
        bench.run(lambda claim: Rude(SystemExit(), times))
    entry = bench.ledger.get("shop.pay:0123456789abcdef0123456789abcdef")
    assert entry is not None
    assert entry.record.outcome is not None
    assert (entry.record.outcome.payload is not None) == kept


@pytest.mark.parametrize("error", [ValueError("a bug in the codec"), MemoryError()], ids=type)
def test_a_bug_of_ours_after_the_body_leaves_it_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(self: Ledger, value: Any) -> Any:
        raise error

    monkeypatch.setattr(Ledger, "encode", broken)
    assert bench.run() == "done"
    assert bench.state is State.SUCCEEDED


def test_a_listener_and_a_log_filter_that_fail_change_no_outcome(bench: Bench) -> None:
    def fail(*_: Any) -> bool:
        raise RuntimeError("the monitoring is down")

    stop = events.listen(fail, here=True)
    log = logging.getLogger("celery_idem")
    level = log.level
    log.addFilter(fail)
    log.setLevel(logging.DEBUG)
    try:
        assert bench.run() == "done"
        assert bench.run() == "done"
    finally:
        log.removeFilter(fail)
        log.setLevel(level)
        stop()
    assert bench.state is State.SUCCEEDED
