"""Which answers are owed: what Celery does after the settlement, and what recovery can find out about it."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, signals
from celery.app.task import Context
from celery.utils.dispatch.signal import _make_id

from celery_idem import IdempotentTask
from celery_idem.core.model import Outcome
from celery_idem.integration import answers, deaths, owing


def application(backend: str | None, **conf: Any) -> Celery:
    app = Celery("owed", broker="memory://", backend=backend, set_as_current=False)
    app.conf.update(idem_store="memory://owed", **conf)
    return app


def pay(n: int) -> int:
    return n


KINDS = {
    "redis://": (True, True, True),
    "cache+memory://": (True, True, False),
    "redis:// unordered": (True, True, False),
    "db+sqlite://": (True, True, True),
    "file:///tmp": (True, True, True),
    "rpc://": (True, False, True),
    "disabled://": (False, False, True),
    "no.such.module:Backend": (False, False, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_result_backend_does_with_answers(kind: str, tmp_path: Path) -> None:
    url, _, unordered = kind.partition(" ")
    conf = {"result_backend_transport_options": {"result_chord_ordered": False}} if unordered else {}
    app = application(url.replace("/tmp", str(tmp_path)), **conf)
    task = app.task(base=IdempotentTask, name="pay", intent=("n",))(pay)
    assert tuple(answers.kind_of(task)) == KINDS[kind]


@pytest.mark.parametrize("kind", [staticmethod, classmethod, None])
def test_an_authors_after_return_is_called_as_before(kind: Any) -> None:
    seen: list[Any] = []

    class Reports(IdempotentTask):
        def after_return(self, *args: Any) -> None:
            seen.append((self, args))

    if kind is not None:
        Reports.after_return = kind(lambda *args: seen.append(args))  # type: ignore[method-assign]
    app = application(None)
    task = app.task(base=Reports, name="pay", intent=("n",))(pay)
    task.apply((1,)).get()
    status, value, _, args, kwargs, einfo = seen[0][-6:] if kind is not None else seen[0][1]
    assert (status, value, args, kwargs, einfo) == ("SUCCESS", 1, (1,), {}, None)
    task.after_return("SUCCESS", 1, "some id", (1,), {}, None)  # an author may call it
    assert len(seen) == 2


def test_what_celery_never_answers_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Settled:
        store, closing = None, None

    monkeypatch.setattr(owing, "KEPT", 3)
    monkeypatch.setattr(owing, "RESULTS", {})
    holds = [Settled() for _ in range(10)]
    known = [weakref.ref(hold) for hold in holds]
    for n in range(10):
        owing.owe_result(f"never {n}", holds.pop())  # type: ignore[arg-type]
    assert len(owing.RESULTS) <= 3
    assert [one() for one in known] == [None] * 10  # a hold has the result, which may be large


@pytest.mark.parametrize(
    ("succeeded", "state", "is_its"),
    [
        (True, "SUCCESS", True),
        (True, "FAILURE", False),  # the caller was told that it is unknown, before the outcome came late
        (True, "STARTED", False),
        (False, "FAILURE", True),
        (False, "SUCCESS", False),
        (False, "RETRY", False),
    ],
)
def test_a_result_that_is_not_the_outcomes_is_no_answer(succeeded: bool, state: str, is_its: bool) -> None:
    class Backend:
        def get_state(self, task_id: str) -> str:
            return state

    kind, outcome = answers.Kind(True, True, True), Outcome(succeeded, b"j1")
    assert answers.is_answered(Backend(), "id", outcome) == is_its
    assert kind.has_answer(Backend(), Context(id="id"), outcome) == is_its
    # A failure is stored before errbacks are called, and every result before a chord's part is counted.
    assert kind.has_answer(Backend(), Context(id="id", errbacks=[{}]), outcome) == (is_its and succeeded)
    assert kind.has_answer(Backend(), Context(id="id", chain=[{}]), outcome) == (is_its and succeeded)
    assert not kind.has_answer(Backend(), Context(id="id", chord={"task": "total"}), outcome)


def test_each_thread_of_a_worker_is_started_by_a_receiver_of_its_own() -> None:
    """Before 5.7, Celery takes the methods of two objects of one class for one receiver."""
    assert deaths  # imported: a worker loads this module
    for signal, what in ((signals.worker_ready, "begins"), (signals.worker_shutdown, "ends")):
        for name in ("purging", "recovering"):
            key = _make_id(f"celery_idem {name} {what}")
            assert any(known == key for (known, _), _ in signal.receivers), (name, what)
