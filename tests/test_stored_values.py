"""Stored results: the first caller and every later one get the same value."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st
from kombu.serialization import register, registry, unregister

from celery_idem import ConfigurationError, IdempotentTask, ResultUnavailable
from celery_idem.core import calls
from celery_idem.core.model import KEY, Note, Record, State, Step
from celery_idem.core.record import pack, unpack
from celery_idem.core.results import Codec
from celery_idem.integration import messages
from celery_idem.integration.settings import Settings
from celery_idem.integration.wiring import codec_of
from tests.support.jobs import Bench, FakeJob

MARK = {"__type__": "uuid", "__value__": {"hex": "00" * 16}}


# --- values that look like kombu's marks -----------------------------------------------------------

imitations = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries(
            {"__type__": inner | st.sampled_from(["uuid", "idem:dict"]), "__value__": inner}
        )
        | st.dictionaries(st.sampled_from(["__type__", "__value__", "a"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(imitations)
def test_a_dictionary_that_imitates_a_mark_comes_back_as_it_was(value: Any) -> None:
    payload, shown = Codec().kept(value)
    assert shown == value == Codec().decode(payload, "k")


def test_real_marks_still_work_beside_imitations() -> None:
    value = [
        uuid.UUID(int=1),
        datetime(2026, 1, 1, tzinfo=timezone.utc),
        MARK,
        {"__type__": "no", "__value__": 1},
    ]
    assert Codec().kept(value)[1] == value
    assert Codec().decode(Codec().encode(uuid.UUID(int=1))) == uuid.UUID(int=1)


class Forging:
    def __json__(self) -> dict[str, Any]:
        return {"__type__": "unheard of", "__value__": 1}


def test_what_could_not_be_read_again_is_done_without_a_value(bench: Bench) -> None:
    value = Forging()
    assert bench.run(lambda claim: value) is value
    with pytest.raises(ResultUnavailable, match="cannot be read again"):
        bench.run()


# --- the application's own serializers ---------------------------------------------------------------


@pytest.fixture
def shop_json() -> Iterator[str]:
    register("shop-json", json.dumps, json.loads, "application/x-of-the-shop", "utf-8")
    yield "shop-json"
    unregister("shop-json")


def conf(**values: Any) -> dict[str, Any]:
    return {"result_serializer": "shop-json", "accept_content": ["shop-json"], **values}


@pytest.mark.parametrize("accepted", ["shop-json", "application/x-of-the-shop"])
def test_a_registered_serializer_is_used(shop_json: str, accepted: str) -> None:
    ours = codec_of(Settings(), conf(accept_content=[accepted]))
    assert ours.unusable() == ""
    payload, shown = ours.kept({"a": (1, 2), **MARK})
    assert payload[:1] == b"n"
    assert shown == ours.decode(payload) == {"a": [1, 2], **MARK}
    # A result written before the application changed its serializer can be read after it, in both directions.
    assert ours._replace(accept=("json", shop_json)).decode(Codec().encode([1])) == [1]
    assert Codec(accept=("json", shop_json)).decode(payload) == shown


def test_json_of_the_applications_own_is_used() -> None:
    encoders, decoders = dict(registry._encoders), dict(registry._decoders)
    register(
        "json", lambda o: json.dumps({"mine": o}), lambda s: json.loads(s)["mine"] + 1, "application/json"
    )
    try:
        ours = codec_of(Settings(), {})
        assert ours.kept(1)[1] == 2
    finally:
        registry._encoders, registry._decoders = encoders, decoders


def an_app(**conf: Any) -> tuple[Any, list[str]]:
    app = Celery("values", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(idem_store=f"memory://{uuid.uuid4().hex}", **conf)
    ran: list[str] = []

    @app.task(base=IdempotentTask, name="pay", intent=("order",))
    def pay(order: str) -> Any:
        ran.append(order)
        return object()

    return pay, ran


@pytest.mark.parametrize(
    ("serializer", "accept", "why"),
    [
        ("unheard-of", ["unheard-of", "json"], "no serializer 'unheard-of' is registered"),
        ("pickle", ["json"], "could not be read again"),
    ],
)
def test_one_that_cannot_be_used_is_refused_before_anything_runs(
    serializer: str, accept: list[str], why: str
) -> None:
    pay, ran = an_app(result_serializer=serializer, accept_content=accept)
    with pytest.raises(ConfigurationError, match=rf"{why}.*Nothing was run.*kombu.serialization.register"):
        pay("o1")
    assert ran == []


def test_one_that_is_registered_late_is_found() -> None:
    pay, ran = an_app(**conf())
    with pytest.raises(ConfigurationError):
        pay("o1")
    register("shop-json", json.dumps, json.loads, "application/x-of-the-shop", "utf-8")
    try:
        pay("o1")
    finally:
        unregister("shop-json")
    assert ran == ["o1"]


def test_a_stored_value_that_cannot_be_read_here_is_done(bench: Bench) -> None:
    """The error is not a StoreError, which would say that nothing was done."""
    bench.ledger.codec = Codec("pickle", ("pickle",))
    bench.run(lambda claim: [1])
    bench.ledger.codec = Codec()
    with pytest.raises(ResultUnavailable, match=r"is done.*cannot be read here.*result_accept_content"):
        bench.run()


# --- ignored results ---------------------------------------------------------------------------------


def test_where_the_result_is_ignored_a_replay_is_quiet() -> None:
    pay, ran = an_app()
    pay.apply(("o1",), ignore_result=True)
    again = pay.apply(("o1",), ignore_result=True)
    assert (again.state, again.result, ran) == ("SUCCESS", None, ["o1"])
    assert isinstance(pay.apply(("o1",)).result, ResultUnavailable)
    linked = pay.apply(("o1",), ignore_result=True, link=pay.s())
    assert isinstance(
        linked.result, ResultUnavailable
    )  # the linked task would get another value than the first time
    with pytest.raises(ResultUnavailable):
        pay("o1")
    assert ran == ["o1"]


# --- text -------------------------------------------------------------------------------------------

any_text = st.text(max_size=20)


@given(any_text, any_text, any_text)
def test_text_of_any_kind_comes_back(name: str, reason: str, task_id: str) -> None:
    names = (name, b"caf\xe9".decode("utf-8", "surrogateescape"))
    record = Record(
        State.RUNNING,
        task_id=task_id,
        steps=tuple(Step(one, b"j1") for one in names),
        open_steps=names,
        reason=reason,
        notes=(Note(1, *names, reason),),
    )
    assert unpack(pack(record), 5, "k") == record._replace(fence=5)


def test_steps_of_undecodable_names_do_not_meet(bench: Bench) -> None:
    from celery_idem.engine.steps import run_step

    one, other = (raw.decode("utf-8", "surrogateescape") for raw in (b"mail-\xe9", b"mail-\xe8"))
    sent: list[str] = []

    def body(claim: Any) -> None:
        for name in (one, other):
            run_step(claim, bench.ledger.codec, name, lambda name=name: sent.append(name), None, 0.0)
        if len(sent) == 2:
            sent.append("failed")
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        bench.run(body)
    assert bench.ledger.forget(FakeJob().key)
    bench.run(body)
    assert sent == [one, other, "failed"]


def test_a_call_keeps_the_types_of_what_is_equal() -> None:
    """Parts of packed calls come from a cache, where True == 1 == 1.0."""
    app = Celery("types", broker="memory://", set_as_current=False)
    app.conf.idem_store = f"memory://{uuid.uuid4().hex}"

    @app.task(base=IdempotentTask, name="shop.pay", intent=("order",))
    def task(order: str) -> None: ...

    key = task.intent_key("a")
    for value in (True, 1, 1.0, False, 0, "1", [1], [True], {"a": True}):
        headers = {"id": "1", KEY: key, "x": value}
        sent = messages.of_message(task, (("a",), {}, {}), headers=headers, serializer="json")
        assert repr(calls.unpack(sent).headers["x"]) == repr(value)
        submitted = messages.of_submission(task, key, ("a",), {}, "1", {"x": value}, {})
        options = calls.unpack(submitted).options
        assert options is not None
        assert repr(options["x"]) == repr(value)
    app.close()
