"""One task for each way in which a body can end: the rows of docs/explanation/endings.md.

Each body records its effects.
"""

from __future__ import annotations

import asyncio
import builtins
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from celery import Celery
from celery.exceptions import Ignore, Reject, Retry

from celery_idem import Happened, IdempotentTask, NotHappened
from celery_idem.engine import events
from tests.support.effects import Effects

ENV = "CELERY_TESTS"


class Declined(Exception):
    """The destination refused."""


class Busy(Exception):
    """In no list of the guard; Celery retries it automatically."""


class Refused(Exception):
    """In `no_effect_errors`."""


class Timeout(Exception):
    """In `ambiguous_errors`."""


class Case(NamedTuple):
    """One row of the table.

    Attributes:
        did: the page's text for what the body does.
        body: `(task, effect, name, part)`; `effect()` is one effect at the destination.
        answers: whether Celery ever has a result for the caller.
    """

    did: str
    body: Callable[..., Any]
    options: dict[str, Any]
    answers: bool = True


CASES: dict[str, Case] = {}


def case(
    did: str, answers: bool = True, **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(body: Callable[..., Any]) -> Callable[..., Any]:
        CASES[body.__name__] = Case(did, body, options, answers)
        return body

    return add


SOON = {"countdown": 0.05}


def once(task: Any, effect: Callable[[], None], error: Exception) -> str:
    """The first attempt has its effect and fails."""
    effect()
    if not task.request.retries:
        raise error
    return "done"


# --- without a retry ---------------------------------------------------------------------------------


@case("returns a value")
def returns(task: Any, effect: Any, name: str, part: int) -> str:
    effect()
    return "done"


@case("returns a value that cannot be stored in the record (too large, no JSON)", max_result_bytes=100)
def returns_much(task: Any, effect: Any, name: str, part: int) -> str:
    effect()
    return "x" * 200


@case("raises an error")
def raises(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    raise Declined("stolen")


@case("raises an error of `no_effect_errors`")
def raises_no_effect(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    raise Refused("closed")


@case("raises an error of `ambiguous_errors`")
def raises_ambiguous(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    raise Timeout


@case("the same; `reconcile` answers `Happened`", reconcile=lambda task, name: Happened("found"))
def raises_happened(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    raise Timeout


@case("the same; `reconcile` answers `NotHappened`", reconcile=lambda task, name: NotHappened())
def raises_not_happened(task: Any, effect: Any, name: str, part: int) -> str:
    if task.claim.attempt == 1:
        raise Timeout
    effect()
    return "done"


if sys.version_info >= (3, 11):

    @case("raises an `ExceptionGroup` with one of `ambiguous_errors` in it")
    def raises_group(task: Any, effect: Any, name: str, part: int) -> None:
        effect()
        raise vars(builtins)["ExceptionGroup"]("two calls", [Declined(), Timeout()])


@case("runs into its soft time limit", soft_time_limit=0.5)
def time_limit(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    time.sleep(30)


@case("raises `SystemExit`")
def exits(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    raise SystemExit


@case("raises `asyncio.CancelledError`")
def cancelled(task: Any, effect: Any, name: str, part: int) -> None:
    async def inside() -> None:
        effect()
        raise asyncio.CancelledError

    asyncio.run(inside())


@case("raises `Ignore`", answers=False)
def ignores(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    raise Ignore


@case('`self.update_state(state="SUCCESS", meta=…)`, and raises `Ignore`')
def says_done(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    task.update_state(state="SUCCESS", meta="done")
    raise Ignore


@case('`self.update_state(state="FAILURE", meta=…)`, and raises `Ignore`')
def says_failed(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    task.update_state(state="FAILURE", meta=Declined("no"))
    raise Ignore


@case("raises `Reject` without requeue", answers=False)
def rejects(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    raise Reject("no", requeue=False)


@case("`self.replace` with a task that has no guard")
def replaces(task: Any, effect: Any, name: str, part: int) -> Any:
    effect()
    raise task.replace(task.app.tasks["plain"].si("of the other"))


# --- retries ------------------------------------------------------------------------------------------


@case("`raise self.retry()`")
def retries(task: Any, effect: Any, name: str, part: int) -> str:
    effect()
    if not task.request.retries:
        raise task.retry(**SOON)
    return "done"


@case("`self.retry(throw=False)`, and returns")
def retries_quietly(task: Any, effect: Any, name: str, part: int) -> str:
    effect()
    if not task.request.retries:
        task.retry(throw=False, **SOON)
    return f"attempt {task.claim.attempt}"


@case("`return self.retry(throw=False)`")
def returns_retry(task: Any, effect: Any, name: str, part: int) -> Any:
    effect()
    return "done" if task.request.retries else task.retry(throw=False, **SOON)


@case("swallows the `Retry`, and returns")
def swallows(task: Any, effect: Any, name: str, part: int) -> str:
    effect()
    try:
        if not task.request.retries:
            raise task.retry(**SOON)
    except Exception:
        return "logged"
    return "done"


@case("`self.retry(throw=False)`, and raises an error")
def retries_and_raises(task: Any, effect: Any, name: str, part: int) -> str:
    effect()
    if not task.request.retries:
        task.retry(throw=False, **SOON)
        raise Declined
    return "done"


@case("`self.retry(throw=False)`, and raises an error of `ambiguous_errors`")
def retries_and_doubts(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    task.retry(throw=False, **SOON)
    raise Timeout


@case(
    "`raise self.retry()` outside of any error, where `ambiguous_errors=(Exception,)`",
    ambiguous_errors=(Exception,),
)
def polls(task: Any, effect: Any, name: str, part: int) -> str:
    effect()
    if not task.request.retries:
        raise task.retry(**SOON)
    return "done"


@case("`self.retry(throw=False)`, and raises `Ignore`")
def retries_and_ignores(task: Any, effect: Any, name: str, part: int) -> str:
    effect()
    if not task.request.retries:
        task.retry(throw=False, **SOON)
        raise Ignore
    return "done"


@case("`self.retry(throw=False)` twice")
def retries_twice(task: Any, effect: Any, name: str, part: int) -> str:
    effect()
    if not task.request.retries:
        task.retry(throw=False, **SOON)
        raise task.retry(**SOON)
    return "done"


@case("`raise self.retry(args=…)`, with another intent's arguments")
def retries_elsewhere(task: Any, effect: Any, name: str, part: int) -> str:
    effect()
    if part < 3:
        raise task.retry(args=(name, part + 1), **SOON)
    return f"part {part}"


@case("`self.retry(args=…, throw=False)` for each of two parts, each another intent")
def retries_apart(task: Any, effect: Any, name: str, part: int) -> str:
    if part:
        effect()
        return "a part"
    effect()
    for n in (1, 2):
        task.retry(args=(name, n), throw=False, **SOON)
    return "the rest"


@case("`raise self.retry(args=…, throw=False)`, another intent")
def raises_apart(task: Any, effect: Any, name: str, part: int) -> str:
    effect()
    if not part:
        raise task.retry(args=(name, 1), throw=False, **SOON)
    return "of the other"


@case("a second `self.retry(kwargs=…, throw=False)` of the same intent, with other arguments")
def retries_refused(task: Any, effect: Any, name: str, part: int, note: str = "") -> str:
    effect()
    if not task.request.retries:
        task.retry(kwargs={"note": "first"}, throw=False, **SOON)
        task.retry(kwargs={"note": "second"}, throw=False, **SOON)
    return f"the {note}"


@case("changes its arguments, and `raise self.retry()`", must_match=("basket",))
def retries_changed(task: Any, effect: Any, name: str, part: int, basket: Any = None) -> str:
    effect()
    basket = {"apples": 1} if basket is None else basket
    if task.request.retries < 2:
        basket["tries"] = task.request.retries
        raise task.retry(kwargs={"basket": basket}, **SOON)
    return "done"


@case("raises an error of `autoretry_for`", autoretry_for=(Busy,), retry_kwargs=SOON)
def autoretries(task: Any, effect: Any, name: str, part: int) -> str:
    return once(task, effect, Busy())


@case(
    "raises an error of `autoretry_for` and `no_effect_errors`", autoretry_for=(Refused,), retry_kwargs=SOON
)
def autoretries_no_effect(task: Any, effect: Any, name: str, part: int) -> str:
    return once(task, effect, Refused())


@case(
    "raises an error of `autoretry_for` and `ambiguous_errors`", autoretry_for=(Timeout,), retry_kwargs=SOON
)
def autoretries_ambiguous(task: Any, effect: Any, name: str, part: int) -> str:
    return once(task, effect, Timeout())


@case(
    "the same; `reconcile` answers `Happened`",
    autoretry_for=(Timeout,),
    retry_kwargs=SOON,
    reconcile=lambda task, name: Happened("found"),
)
def autoretries_happened(task: Any, effect: Any, name: str, part: int) -> str:
    return once(task, effect, Timeout())


@case(
    "the same; `reconcile` answers `NotHappened`",
    autoretry_for=(Timeout,),
    retry_kwargs=SOON,
    reconcile=lambda task, name: NotHappened(),
)
def autoretries_not_happened(task: Any, effect: Any, name: str, part: int) -> str:
    if not task.request.retries:
        raise Timeout
    effect()
    return "done"


@case(
    "runs into its soft time limit, under `autoretry_for=(Exception,)`",
    soft_time_limit=0.5,
    autoretry_for=(Exception,),
    retry_kwargs=SOON,
)
def autoretries_time_limit(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    time.sleep(30)


@case("`raise self.retry()` while it handles an error of `ambiguous_errors`")
def retries_handling(task: Any, effect: Any, name: str, part: int) -> str:
    effect()
    try:
        raise Timeout
    except Timeout:
        raise task.retry(**SOON) from None


@case(
    'fails in a step, under `on_crash="resume"` and `autoretry_for=(Exception,)`',
    on_crash="resume",
    autoretry_for=(Exception,),
    retry_kwargs=SOON,
)
def autoretries_step(task: Any, effect: Any, name: str, part: int) -> str:
    def charge() -> None:
        effect()
        raise Busy

    task.step("charge", charge)
    return "done"


@case("a step of it returns a value that cannot be stored")
def step_returns_much(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    task.step("charge", object)


@case("raises `self.retry(exc=e)` when no retries are left", max_retries=0)
def exhausted(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    raise task.retry(exc=Declined("still no"), **SOON)


@case("the same, with an error of `ambiguous_errors`", max_retries=0)
def exhausted_ambiguous(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    raise task.retry(exc=Timeout(), **SOON)


@case("the same, with an error of `no_effect_errors`", max_retries=0)
def exhausted_no_effect(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    raise task.retry(exc=Refused("closed"), **SOON)


@case("raises `self.retry(exc=e)` in a step, with an error of `no_effect_errors`")
def retries_a_step(task: Any, effect: Any, name: str, part: int) -> str:
    def charge() -> None:
        effect()
        if not task.request.retries:
            raise task.retry(exc=Refused("closed"), **SOON)

    task.step("charge", charge)
    return "done"


@case("raises a `Retry` that the body made, and publishes nothing", answers=False)
def retry_by_hand(task: Any, effect: Any, name: str, part: int) -> None:
    effect()
    raise Retry("later", when=1)


# --- the application --------------------------------------------------------------------------------------


def make(broker: str, backend: str, folder: str, queue: str, conf: Mapping[str, Any]) -> Celery:
    app = Celery("endings", broker=broker, backend=backend, task_cls=IdempotentTask, set_as_current=False)
    app.conf.update(
        task_default_queue=queue, worker_prefetch_multiplier=1, idem_lease=5, idem_audit=False, **conf
    )
    effects = Effects(Path(folder) / "effects.jsonl")

    @app.task(name="plain", shared=False)
    def plain(value: Any) -> Any:
        return value

    for name, found in CASES.items():
        add_task(app, name, found, effects)
    return app


def add_task(app: Celery, name: str, found: Case, effects: Effects) -> None:
    options: dict[str, Any] = {
        "no_effect_errors": (Refused,),
        "ambiguous_errors": (Timeout,),
        "intent": ("name", "part"),
        "bind": True,
        "max_retries": 3,
        **found.options,
    }
    body = found.body

    if "note" in body.__code__.co_varnames or "basket" in body.__code__.co_varnames:

        @app.task(name=name, shared=False, **options)
        def run_with_more(self: Any, name: str, part: int = 0, note: str = "", basket: Any = None) -> Any:
            more = {"note": note} if "note" in body.__code__.co_varnames else {"basket": basket}
            return body(self, lambda: effects.add(name), name, part, **more)

    else:

        @app.task(name=name, shared=False, **options)
        def run(self: Any, name: str, part: int = 0) -> Any:
            return body(self, lambda: effects.add(name), name, part)


def from_environment() -> Celery | None:
    if ENV not in os.environ:
        return None
    place = json.loads(os.environ[ENV])
    effects = Effects(Path(place["folder"]) / "events.jsonl")

    def listen(event: events.Event) -> None:
        effects.add(event.key, event=event.kind, succeeded=event.details.get("succeeded"))

    events.listen(listen, here=True)
    return make(**place)


app = from_environment()
