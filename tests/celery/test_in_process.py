"""Eager and direct calls, declarations and Django, without a worker."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, Task, chain, chord, group
from celery.exceptions import Retry

from celery_idem import ConfigurationError, FingerprintMismatch, Happened, IdempotentTask, InProgress, Ledger
from tests.celery import apps
from tests.celery.apps import Busy, Declined
from tests.support.effects import Effects, Gate
from tests.support.workers import ROOT


class Here:
    """This folder's application in the test process, with broker and store in memory."""

    def __init__(self, folder: Path, **conf: Any) -> None:
        store = f"memory://{uuid.uuid4().hex}"
        self.app = apps.make(
            "memory://", "cache+memory://", str(folder), "queue", {"idem_store": store, **conf}
        )
        self.effects = Effects(folder / "effects.jsonl")
        self.folder = folder

    def __getattr__(self, name: str) -> Any:
        return self.app.tasks[name]

    def gate(self, name: str) -> Gate:
        return Gate(self.folder / f"gate-{name}")


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


@pytest.fixture
def eager(tmp_path: Path) -> Here:
    return Here(tmp_path, task_always_eager=True, task_eager_propagates=False, task_store_eager_result=True)


# --- steps ---------------------------------------------------------------------------------


def test_the_question_of_a_step_has_the_claim(here: Here) -> None:
    """The reconcile function of a step runs with the claim of the attempt that took over, not of the earlier one."""
    asked: list[tuple[int, str]] = []
    fences: list[int] = []

    def charge() -> int:
        raise SystemExit

    @here.app.task(base=IdempotentTask, bind=True, name="in_steps", intent=("name",), on_crash="resume")
    def in_steps(self: Any, name: str) -> int:
        def ask() -> Happened:
            asked.append((self.claim.fence, self.request.id))
            return Happened(7)

        fences.append(self.claim.fence)
        done: int = self.step("charge", charge, reconcile=ask)
        return done

    with pytest.raises(SystemExit):
        in_steps.apply(("a",))
    result = in_steps.apply(("a",))
    assert result.get() == 7
    assert asked == [(fences[1], result.id)]
    assert fences[0] < fences[1]


# --- eager ---------------------------------------------------------------------------------


def test_apply_is_guarded(here: Here) -> None:
    answer = {"paid": 5, "of": ["a"]}
    assert [here.pay.apply(("a", 5)).get() for _ in range(3)] == [answer] * 3
    assert here.effects.count("a") == 1
    assert here.pay.apply(("a", 5), occurrence="second").get() == answer
    assert here.effects.count("a") == 2
    assert isinstance(here.pay.apply(("a", 6)).result, FingerprintMismatch)


def test_delay_is_guarded_where_everything_is_eager(eager: Here) -> None:
    assert [eager.pay.delay("a", 5).get() for _ in range(3)] == [{"paid": 5, "of": ["a"]}] * 3
    for _ in range(2):
        result = eager.declined.delay("b")
        assert result.state == "FAILURE"
        assert isinstance(result.result, Declined)
        assert result.result.args == ("stolen", 7)
    assert eager.effects.counts() == {"a": 1, "b": 1}


def test_canvas_where_everything_is_eager(eager: Here) -> None:
    for _ in range(2):
        assert chain(eager.pay.s("a", 5), eager.plain.s()).apply_async().get() == {"paid": 5, "of": ["a"]}
        members = [eager.exact.s("b", 1), eager.exact.s("b", 1), eager.exact.s("b", 2)]
        assert group(members).apply_async().get() == ["b 1", "b 1", "b 2"]
        assert chord(members)(eager.plain.s()).get() == ["b 1", "b 1", "b 2"]
    assert eager.effects.counts() == {"a": 1, "b": 2}


def test_a_retry_in_eager_mode(here: Here) -> None:
    assert here.retried.apply(("a", 2)).get() == [2, 3]
    assert here.retried.apply(("a", 0)).get() == [2, 3]
    assert here.effects.counts() == {"try a": 3, "a": 1}
    for _ in range(2):
        result = here.retried.apply(("b", 99))
        assert isinstance(result.result, Declined)
        assert result.result.args == ("still no", 99)
    assert here.effects.count("try b") == 4


def test_an_automatic_retry_in_eager_mode(here: Here) -> None:
    assert here.autoretried.apply(("a", 2)).get() == 2
    assert here.autoretried.apply(("a", 0)).get() == 2
    assert here.effects.counts() == {"try a": 3, "a": 1}


# --- direct ----------------------------------------------------------------------------------


def test_a_plain_call_is_guarded(here: Here) -> None:
    assert [here.pay("a", 5), here.pay(name="a", cents=5)] == [{"paid": 5, "of": ["a"]}] * 2
    for _ in range(2):
        with pytest.raises(Declined, match="stolen"):
            here.declined("b")
    with pytest.raises(FingerprintMismatch):
        here.pay("a", 6)
    with pytest.raises(TypeError):
        here.pay("a", unknown=1)
    assert here.effects.counts() == {"a": 1, "b": 1}


def test_run_is_the_body_alone(here: Here) -> None:
    for n in (1, 2):
        here.pay.run("a", 5)
        assert here.effects.count("a") == n


def test_a_retry_of_a_direct_call_is_the_callers_business(here: Here) -> None:
    for n in (1, 2):
        with pytest.raises(Retry):
            here.retried_slowly("a")
        with pytest.raises(Declined):  # Celery raises the error of `self.retry(exc=…)`
            here.retried("b", 1)
        with pytest.raises(Busy):
            here.autoretried("c", 1)
        assert here.effects.counts() == {"try a": n, "try b": n, "try c": n}
    assert here.retried.apply(("b", 1)).get() == [1, 4]


def test_a_direct_call_leaves_no_request_behind(here: Here) -> None:
    here.claimed("a")
    assert here.claimed.request_stack.top is None
    with pytest.raises(Declined):
        here.declined("b")
    assert here.declined.request_stack.top is None


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def run(n: int, call: Callable[[], Any]) -> None:
        try:
            results[n] = call()
        except Exception as error:
            results[n] = error

    threads = [threading.Thread(target=run, args=(n, call)) for n, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_calls_at_the_same_time_wait_for_the_one_that_runs(here: Here) -> None:
    def opener() -> None:
        here.effects.wait("a")
        here.gate("a").open()

    calls = [lambda: here.slow("a"), lambda: here.slow("a"), lambda: here.slow.apply(("a",)).get(), opener]
    assert in_threads(*calls) == ["slow a"] * 3 + [None]
    assert here.effects.count("a") == 1


def test_or_are_told_at_once(here: Here) -> None:
    def duplicate() -> None:
        here.effects.wait("a")
        try:
            here.refuses_to_wait("a")
        finally:
            here.gate("a").open()

    first, told = in_threads(lambda: here.refuses_to_wait("a"), duplicate)
    assert first == "done"
    assert isinstance(told, InProgress)
    assert here.effects.count("a") == 1


def test_a_body_that_calls_itself(here: Here) -> None:
    assert here.calls_itself("a") == ["a", ["a", []]]
    assert here.calls_itself("a") == ["a", ["a", []]]
    assert here.effects.count("a") == 3


def test_the_first_caller_gets_what_every_later_one_gets(here: Here) -> None:
    @here.app.task(shared=False, name="tuples", intent=("name",))
    def tuples(name: str) -> Any:
        return (1, (2, {3: "x"}))

    assert tuples("a") == tuples("a") == [1, [2, {"3": "x"}]]


# --- declarations -------------------------------------------------------------------------------


def test_celerys_own_tasks_stay_its_own(here: Here) -> None:
    own = [task for name, task in here.app.tasks.items() if name.startswith("celery.")]
    assert len(own) >= 8
    for task in own:
        assert isinstance(task, IdempotentTask)
        assert task.idem_declaration is None
        assert type(task).__call__ is Task.__call__
        assert type(task).Request == Task.Request
        assert type(task).Strategy == Task.Strategy
    assert here.app.tasks["celery.map"](here.plain.s(), [1, 2]) == [1, 2]


def test_an_ordinary_task_refuses_our_options(here: Here) -> None:
    with pytest.raises(ConfigurationError, match="declares no intent"):
        here.plain.apply_async((1,), scope="acme")
    with pytest.raises(ConfigurationError, match="declares no intent"):
        here.plain.intent_key(1)


def test_a_task_that_asks_for_the_guard_must_declare_an_intent() -> None:
    app = Celery("a", set_as_current=False)
    with pytest.raises(ConfigurationError, match=r"without an intent.*Parameters: one, two"):

        @app.task(base=IdempotentTask, name="shop.pay", lazy=False, shared=False)
        def pay(one: int, two: int) -> None: ...

    assert "shop.pay" not in app._tasks


def test_an_unknown_parameter_is_refused_when_the_task_is_declared() -> None:
    app = Celery("a", set_as_current=False)
    with pytest.raises(ConfigurationError, match="customer"):

        @app.task(base=IdempotentTask, name="shop.pay", intent=("costumer",), lazy=False, shared=False)
        def pay(customer: int) -> None: ...


def test_an_annotation_that_is_wrong_is_refused_too() -> None:
    app = Celery("a", set_as_current=False, task_cls=IdempotentTask)
    app.conf.task_annotations = {"shop.pay": {"intent": ("costumer",)}}
    with pytest.raises(ConfigurationError, match="costumer"):

        @app.task(name="shop.pay", lazy=False, shared=False)
        def pay(customer: int) -> None: ...


def test_an_intent_from_a_configuration_file_may_be_the_path_of_a_function() -> None:
    app = Celery("a", set_as_current=False, task_cls=IdempotentTask, idem_store="memory://")
    app.conf.task_annotations = {"shop.pay": {"intent": "tests.celery.test_in_process:by_customer"}}

    @app.task(name="shop.pay", lazy=False, shared=False)
    def pay(customer: str) -> None: ...

    assert pay.intent_key("ACME") == pay.intent_key("acme") != pay.intent_key("other")


def by_customer(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"customer": arguments["customer"].lower()}


def test_intent_key_asks_no_store() -> None:
    app = Celery("a", set_as_current=False, idem_store="redis://127.0.0.1:1/0")

    @app.task(base=IdempotentTask, name="shop.pay", intent=("customer",), shared=False)
    def pay(customer: str) -> None: ...

    key = pay.intent_key("a")
    assert key == pay.intent_key(customer="a")
    assert key != pay.intent_key("a", scope="acme") != pay.intent_key("a", occurrence="acme")


def test_a_key_does_not_depend_on_who_computes_it() -> None:
    keys = set()
    for conf in ({}, {"idem_lease": 5}, {"task_always_eager": True}):
        app = Celery("a", set_as_current=False, idem_store="memory://", **conf)

        @app.task(base=IdempotentTask, name="shop.pay", intent=("customer",), shared=False)
        def pay(customer: str) -> None: ...

        keys.add(pay.intent_key("a"))
    assert len(keys) == 1


# --- Django --------------------------------------------------------------------------------------

DJANGO = """
import django
from django.conf import settings
settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    CELERY_BROKER_URL="memory://",
    CELERY_RESULT_BACKEND="cache+memory://",
    CELERY_TASK_ALWAYS_EAGER=True,
    CELERY_IDEM_STORE="memory://",
    CELERY_IDEM_LEASE=7,
)
django.setup()
from celery import Celery
from celery.contrib.django.task import DjangoTask
from django.db import transaction

app = Celery("proj", task_cls="celery_idem.adapters.django:IdempotentDjangoTask")
app.config_from_object("django.conf:settings", namespace="CELERY")
done = []

@app.task(bind=True, intent=("name",))
def pay(self, name):
    done.append(name)
    return len(done)

ordinary = []

@app.task
def plain(name):
    ordinary.append(name)

assert isinstance(pay._get_current_object(), DjangoTask)
assert pay.guard.settings.lease == 7
with transaction.atomic():
    pay.delay_on_commit("a")
    pay.delay_on_commit("a")
    pay.apply_async_on_commit(args=("a",), occurrence="second")
    plain.delay_on_commit("a")
    plain.delay_on_commit("a")
    assert done == ordinary == []
assert done == ["a", "a"], done
assert ordinary == ["a", "a"], ordinary
assert pay.delay("a").get() == 1
try:
    with transaction.atomic():
        pay.delay_on_commit("b")
        raise KeyError
except KeyError:
    pass
assert done == ["a", "a"], done
print("ok")
"""


def test_djangos_task_and_namespace() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", DJANGO]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


def test_a_misspelt_setting_of_djangos_is_an_error_when_a_task_is_declared() -> None:
    app = Celery("a", set_as_current=False)
    app.config_from_object(
        SimpleNamespace(CELERY_IDEM_STORE="memory://", CELERY_IDEM_LAESE=7), namespace="CELERY"
    )
    with pytest.raises(ConfigurationError, match="idem_lease"):

        @app.task(base=IdempotentTask, name="shop.pay", intent=("a",), lazy=False, shared=False)
        def pay(a: int) -> None: ...


def test_a_ledger_without_a_task(here: Here) -> None:
    here.pay("a", 5)
    assert [entry.state for entry in Ledger.from_app(here.app).list()] == ["succeeded"]
