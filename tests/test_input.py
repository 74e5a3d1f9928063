"""``args`` is a list or tuple and ``kwargs`` a mapping. Every way to call a task refuses anything else at once."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import build_tracer
from kombu import Connection
from pydantic import BaseModel, Field, SecretStr

import celery_idem
from celery_idem import ConfigurationError, IdempotencyError, IdempotentTask, Ledger
from celery_idem.adapters.tools import tool_of
from celery_idem.core import calls
from celery_idem.core.calls import Call
from celery_idem.operate.operators import read_arguments
from tests.support import hand

DONE: list[Any] = []


@pytest.fixture
def app() -> Celery:
    DONE.clear()
    name = uuid.uuid4().hex
    app = Celery("input", broker=f"memory://{name}", backend="cache+memory://", set_as_current=False)
    app.conf.update(idem_store=f"memory://{name}", task_default_queue=name)

    @app.task(
        base=IdempotentTask, name="shop.charge", intent=("customer",), must_match=("cents",), shared=False
    )
    def charge(customer: Any, cents: Any = 5) -> Any:
        DONE.append((customer, cents))
        return cents

    @app.task(
        base=IdempotentTask, bind=True, name="shop.again", intent=("customer",), typing=False, shared=False
    )
    def again(self: Any, customer: Any) -> None:
        DONE.append(customer)
        raise self.retry(args={"customer": 7}, countdown=0)

    return app


def published(app: Celery) -> int:
    with Connection(app.conf.broker_url) as connection:
        queue = connection.SimpleQueue(app.conf.task_default_queue)
        return int(queue.qsize())


def test_the_name_of_all_other_keywords_is_no_argument(app: Celery) -> None:
    def pay(order: int, **details: Any) -> None: ...

    app.finalize()
    for option in ("intent", "must_match", "secret"):
        options = {"intent": ("order",), option: ("details",)}
        with pytest.raises(ConfigurationError, match=rf"{option}= names \*\*details"):
            app.task(base=IdempotentTask, name="shop.wide", shared=False, **options)(pay)
    app.task(base=IdempotentTask, name="shop.one", shared=False, intent=("order",), must_match="cents")(pay)
    assert app.tasks["shop.one"].idem_declaration.must_match == ("cents",)


def kept(app: Celery, **options: Any) -> Call:
    """Publish a call, deliver it, and return the call that its record holds while the body runs."""
    found: list[Any] = []

    @app.task(base=IdempotentTask, name="shop.look", intent=("order",), bind=True, shared=False)
    def look(self: Any, order: int) -> None:
        entry = Ledger.from_app(app).get(self.claim.key)
        assert entry is not None
        found.append(calls.unpack(entry.record.call))

    look.apply_async((1,), **options)
    hand.drain(app)
    (call,) = found
    assert isinstance(call, Call)
    return call


@pytest.mark.parametrize("index", [0, 1])
def test_a_kept_call_knows_its_place_in_its_group(app: Celery, index: int) -> None:
    headers = kept(app, group_id="g1", group_index=index).headers
    assert (headers["group"], headers["group_index"]) == ("g1", index)


def test_a_kept_call_is_shown_as_its_author_said(app: Celery) -> None:
    assert kept(app, argsrepr="('***',)").headers["argsrepr"] == "('***',)"


def test_a_kept_call_of_no_group_has_nothing_of_it(app: Celery) -> None:
    assert kept(app).headers.keys().isdisjoint({"group", "group_index", "argsrepr", "kwargsrepr"})


def test_a_task_id_may_be_a_uuid(app: Celery) -> None:
    given = uuid.uuid4()
    result = app.tasks["shop.charge"].apply_async(("a",), task_id=given)
    assert len(hand.drain(app)) == 1
    assert (DONE, result.get(timeout=5)) == ([("a", 5)], 5)
    entry = Ledger.from_app(app).get(app.tasks["shop.charge"].intent_key("a"))
    assert entry is not None
    assert entry.record.task_id == str(given)


@pytest.mark.parametrize("line", [b"\xff\xfe{", b'{"key": "k", "args": ["\xe9"]}', b"[" * 100_000])
def test_a_file_of_arguments_is_utf_8(line: bytes) -> None:
    with pytest.raises(IdempotencyError, match="Line 1 is not"):
        read_arguments([line])
    assert read_arguments([b'\xef\xbb\xbf{"key": "k", "args": [1]}'])["k"].args == (1,)


NO_ARGS: list[Any] = [
    {"customer": 1, "cents": 900}, {}, "ab", b"ab", {1, 2}, frozenset({1}), 5, iter([1, 2]), (x for x in (1, 2)),
    {"customer": 1}.values(), range(2),
]  # fmt: skip
NO_KWARGS: list[Any] = [[("customer", 1)], ("customer",), "customer", {"customer"}, 5]

CALLS: dict[str, Callable[[Celery, Any, Any], Any]] = {
    "apply_async": lambda app, a, k: app.tasks["shop.charge"].apply_async(a, k),
    "apply": lambda app, a, k: app.tasks["shop.charge"].apply(a, k),
    "untyped": lambda app, a, k: app.tasks["shop.again"].apply_async(a, k),
    "signature": lambda app, a, k: app.tasks["shop.charge"].signature(a, k),
    "signature by name": lambda app, a, k: app.tasks["shop.charge"].signature(args=a, kwargs=k),
    "subtask": lambda app, a, k: app.tasks["shop.charge"].subtask(a, kwargs=k),
    "submit": lambda app, a, k: celery_idem.submit(app, "shop.charge", a, k),
    "submit by name": lambda app, a, k: celery_idem.submit(app, "elsewhere.charge", a, k),
    "callers key": lambda app, a, k: app.tasks["shop.charge"].apply_async(a, k, idempotency_key="evt_1"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("args", NO_ARGS, ids=lambda value: type(value).__name__)
def test_args_are_a_list_or_a_tuple(app: Celery, call: str, args: Any) -> None:
    with pytest.raises(
        TypeError, match=r"args must be a list or tuple, not \w+. Give named arguments as kwargs="
    ):
        CALLS[call](app, args, None)
    assert published(app) == 0
    assert DONE == []
    assert list(Ledger.from_app(app).list()) == []


@pytest.mark.parametrize("args", NO_ARGS, ids=lambda value: type(value).__name__)
def test_args_in_a_loop_are_lists_or_tuples(app: Celery, args: Any) -> None:
    task = app.tasks["shop.charge"]
    for build in (task.starmap, lambda calls: task.chunks(calls, 1)):
        with pytest.raises(TypeError, match="args must be a list or tuple"):
            build([(1,), args])
    assert task.starmap(iter([(1,), [2]])).kwargs["it"] == [(1,), [2]]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kwargs", NO_KWARGS, ids=lambda value: type(value).__name__)
def test_kwargs_are_a_mapping(app: Celery, call: str, kwargs: Any) -> None:
    with pytest.raises(
        TypeError, match=r"kwargs must be a dictionary, not \w+. Give positional arguments as args="
    ):
        CALLS[call](app, None, kwargs)
    assert published(app) == 0
    assert DONE == []


@pytest.mark.parametrize("call", ["apply_async", "apply", "signature", "submit"])
def test_what_is_right_stays_right(app: Celery, call: str) -> None:
    for args, kwargs in (([1], None), ((1,), {}), (None, {"customer": 1}), ((), {"customer": 1, "cents": 5})):
        CALLS[call](app, args, kwargs)


def test_a_retry_with_a_dictionary_as_args(app: Celery) -> None:
    with pytest.raises(TypeError, match="args must be a list or tuple"):
        app.tasks["shop.again"].apply((1,)).get()
    assert DONE == [1]


@pytest.mark.parametrize("args", [{"customer": 1, "cents": 900}, "ab", {1}], ids=str)
def test_a_foreign_message(app: Celery, args: Any) -> None:
    """Another producer's message can carry wrong args, and Celery's tracer unpacks them before our task runs."""
    task = app.tasks["shop.charge"]
    traced = build_tracer(task.name, task, app=app)(
        uuid.uuid4().hex, args, {}, {"is_eager": False, "id": "1"}
    )
    assert "args must be a list or tuple" in str(traced.retval)
    assert DONE == []
    assert list(Ledger.from_app(app).list()) == []


def test_a_file_of_arguments(app: Celery) -> None:
    with pytest.raises(IdempotencyError, match=r"Line 1 .*args must be a list or tuple"):
        read_arguments([json.dumps({"key": "k", "args": {"customer": 1}}).encode()])
    with pytest.raises(IdempotencyError, match=r"Line 1 .*kwargs must be a dictionary"):
        read_arguments([json.dumps({"key": "k", "kwargs": ["customer"]}).encode()])


class Order(BaseModel):
    number: int
    note: str = Field("", exclude=True)
    token: SecretStr = SecretStr("")


@pytest.mark.parametrize("hint", [Order, list[Order], dict[str, Order], Order | None])
def test_a_tool_hands_models_on_as_they_were_sent(app: Celery, hint: Any) -> None:
    """A dump of the model would leave out or mask fields, and two different actions would share a key."""

    def place(order) -> None: ...  # type: ignore[no-untyped-def]

    place.__annotations__ = {"order": hint}
    app.task(base=IdempotentTask, name="shop.place", intent=("order",), pydantic=True, shared=False)(place)
    tool = tool_of(app, "shop.place")
    one = {"number": 1, "note": "a", "token": "hunter2"}
    sent = [one] if hint == list[Order] else {"x": one} if hint == dict[str, Order] else one
    assert tool.parse(json.dumps({"order": sent})) == {"order": sent}
    key = app.tasks["shop.place"].intent_key
    texts = [json.dumps({"order": sent}).replace('"a"', note) for note in ('"a"', '"b"')]
    assert len({key(**tool.parse(text)) for text in texts}) == 2
