"""A program that can write to the store decides what callers receive, but cannot run code.

Pickle is not read unless the application accepts it. A stored error only ever becomes an exception. A value that is no
record raises an error that names the key.
"""

from __future__ import annotations

import json
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import TaskPredicate

from celery_idem import IdempotentTask, Ledger, OutcomeUnknown, ResultUnavailable, StoreError
from celery_idem.core.model import Outcome, Record, State, Step
from celery_idem.core.record import pack
from celery_idem.core.results import Codec, NotStorable
from celery_idem.integration.settings import of_app
from celery_idem.integration.wiring import codec_of

RUNS: list[str] = []


def go_off(what: str) -> None:
    RUNS.append(what)


class Bomb:
    """An object that leaves a trace in `RUNS` when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return go_off, ("unpickled",)


BOMB = b"p" + pickle.dumps(Bomb())


@pytest.fixture(autouse=True)
def no_trace() -> None:
    RUNS.clear()


def write(app: Celery, key: str, payload: bytes, succeeded: bool = True, **parts: Any) -> None:
    """Write a record, as a program with access to the store can."""
    state = State.SUCCEEDED if succeeded else State.FAILED
    ledger = Ledger.from_app(app)
    record = Record(
        state=state, owner=b"x" * 12, task_id="t", fence=1, outcome=Outcome(succeeded, payload), **parts
    )
    ledger.store.create(f"{ledger.namespace}:{key}", pack(record))


# --- pickle ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conf",
    [
        {},
        {"result_accept_content": ["json"], "accept_content": ["json", "pickle"]},
        {"result_accept_content": ["application/json", "yaml"]},
        {"task_serializer": "pickle", "accept_content": ["json"]},
    ],
    ids=["default", "for-messages-only", "by-content-type", "written-not-accepted"],
)
def test_pickle_is_not_read_unless_results_may_be_pickled(
    memory_app: Callable[..., Celery], conf: dict[str, Any]
) -> None:
    app = memory_app(**conf)
    task = app.tasks["shop.pay"]
    write(app, task.intent_key("c1"), BOMB)
    with pytest.raises(ResultUnavailable, match="result_accept_content") as told:
        task.apply(("c1",), throw=True)
    assert task.intent_key("c1") in str(told.value)
    assert RUNS == []


def test_pickle_is_read_where_the_application_says_so(memory_app: Callable[..., Celery]) -> None:
    """Pickle is read if the application accepts it. Without this test, a broken pickle would pass the one above."""
    app = memory_app(result_accept_content=["json", "application/x-python-serialize"])
    task = app.tasks["shop.pay"]
    write(app, task.intent_key("c1"), BOMB)
    task.apply(("c1",), throw=True)
    assert RUNS == ["unpickled"]


def test_a_step_of_a_record_is_not_unpickled_either(memory_app: Callable[..., Celery]) -> None:
    app = memory_app()

    def body(self: Any, a: int) -> Any:
        return self.step("charge", lambda: "charged")

    task = app.task(
        base=IdempotentTask, bind=True, shared=False, name="shop.steps", intent=("a",), on_crash="resume"
    )(body)
    key = task.intent_key(1)
    lapsed = Record(
        state=State.RUNNING,
        owner=b"x" * 12,
        task_id="t",
        fence=1,
        lease=1,
        attempts=1,
        steps=(Step("charge", BOMB),),
    )
    ledger = Ledger.from_app(app)
    ledger.store.create(f"{ledger.namespace}:{key}", pack(lapsed))
    with pytest.raises(OutcomeUnknown):
        task.apply((1,), throw=True)
    assert RUNS == []


def test_what_cannot_be_read_again_is_not_written(memory_app: Callable[..., Celery]) -> None:
    app = memory_app(result_serializer="pickle", result_accept_content=["json"])
    made = codec_of(of_app(app.conf), app.conf)
    with pytest.raises(NotStorable, match="could not be read again"):
        made.encode({"a": 1})


# --- errors -----------------------------------------------------------------------------------


def error(module: str, name: str, *args: object) -> bytes:
    return (
        b"j"
        + json.dumps(
            {"module": module, "type": name, "args": args, "text": " ".join(map(str, args))}
        ).encode()
    )


@pytest.mark.parametrize(
    ("module", "name", "args"),
    [
        ("os", "system", ["touch TARGET"]),
        ("subprocess", "Popen", [["touch", "TARGET"]]),
        ("pathlib", "Path", ["TARGET"]),
        ("builtins", "eval", ["open('TARGET', 'w')"]),
        ("builtins", "open", ["TARGET", "w"]),
        ("builtins", "SystemExit", [3]),
        ("builtins", "KeyboardInterrupt", []),
        ("builtins", "BaseException", []),
        ("builtins", "type", ["a", [], {}]),
        ("builtins", "Exception.__init__", []),
        ("builtins", "Exception.__subclasses__", []),
        ("tests.security.test_records", "Bomb.__reduce__", []),
    ],
)
def test_a_stored_error_is_only_ever_rebuilt_as_an_exception(
    tmp_path: Path, module: str, name: str, args: list[Any]
) -> None:
    target = tmp_path / "ran"
    text = json.dumps(args).replace("TARGET", str(target))
    made = Codec().decode_error(error(module, name, *json.loads(text)), "k")
    assert isinstance(made, Exception)
    assert type(made).__name__ == name.rpartition(".")[2]
    # It is a new class of that name, not the named object: its only bases are our stand-in and built-in classes.
    assert {base.__module__ for base in type(made).__mro__[1:]} == {
        "celery_idem.core.stored_errors",
        "builtins",
    }
    assert issubclass(type(made).__mro__[1], Exception)
    assert not target.exists()


@pytest.mark.parametrize("name", ["Ignore", "Reject", "Retry"])
def test_a_stored_error_is_no_order_to_celery(name: str, memory_app: Callable[..., Celery]) -> None:
    """A forged Reject(requeue=True) does not requeue the message, which would loop a hundred times a second."""
    app = memory_app()
    task = app.tasks["shop.pay"]
    write(app, task.intent_key("c1"), error("celery.exceptions", name, "forged", True), succeeded=False)
    answer = task.apply(("c1",))
    assert answer.state == "FAILURE"
    assert not isinstance(answer.result, TaskPredicate)


def test_no_module_is_imported_to_find_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trojan.py").write_text("class Horse(Exception): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    made = Codec().decode_error(error("trojan", "Horse", "neigh"), "k")
    assert "trojan" not in sys.modules
    assert (type(made).__name__, str(made)) == ("Horse", "neigh")


def test_no_module_is_asked_for_what_it_would_import_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that import on attribute access, like `celery`, import nothing."""
    lazy = type(sys)("lazy_module_of_a_test")
    lazy.__getattr__ = RUNS.append  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, lazy.__name__, lazy)
    Codec().decode_error(error(lazy.__name__, "Anything"), "k")
    assert RUNS == []


class Picky(Exception):
    def __init__(self, *, needed: str) -> None:
        super().__init__(needed)


class Refusing(Exception):
    def __new__(cls, *args: object) -> Refusing:
        if args != ("open",):
            raise TypeError("no")
        return super().__new__(cls)


@pytest.mark.parametrize(
    ("name", "args"),
    [("Picky", ["a"]), ("Refusing", ["a"]), ("Refusing", [{"deep": [1]}]), ("Picky", [None, None])],
)
def test_an_exception_with_arguments_that_it_does_not_take(name: str, args: list[Any]) -> None:
    made = Codec().decode_error(error(__name__, name, *args), "k")
    assert (type(made).__name__, list(made.args)) == (name, args)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"j",
        b"jnull",
        b"j[1]",
        b'j{"module": "a"}',
        b'j{"module": 1, "type": 2, "args": 3}',
        b"j" + b"[" * 100_000,
        BOMB,
        error("a", "nul\0nul", "x"),
        error("a", "\ud800", "x"),
    ],
    ids=range(10),
)
def test_a_stored_error_that_is_none_names_its_key(payload: bytes) -> None:
    with pytest.raises(StoreError, match="shop\\.pay:1"):
        Codec().decode_error(payload, "shop.pay:1")
    assert RUNS == []


# --- no record at all ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\0" * 8,
        b"somebody else's value",
        b"\xff" * 200,
        # These two claim to hold four thousand million steps and two gigabytes of text.
        struct.pack(">12sBBHHBQ", b"x" * 12, 1, 1, 1 << 4, 1, 0, 1) + b"\xff\xff\xff\xff",
        struct.pack(">12sBBHHBQ", b"x" * 12, 1, 1, 1 << 7, 1, 0, 1) + b"\x7f\xff\xff\xff",
        struct.pack(">12sBBHHBQ", b"x" * 12, 9, 1, 0, 1, 0, 1),
        struct.pack(">12sBBHHBQ", b"x" * 12, 1, 200, 0, 1, 0, 1),
    ],
    ids=range(8),
)
def test_a_corrupt_record_stops_the_task_and_names_the_key(
    memory_app: Callable[..., Celery], value: bytes
) -> None:
    app = memory_app(idem_on_store_error="raise")
    task = app.tasks["shop.pay"]
    key = task.intent_key("c1")
    ledger = Ledger.from_app(app)
    ledger.store.create(f"{ledger.namespace}:{key}", value)
    with pytest.raises(StoreError, match="Nothing was run") as told:
        task.apply(("c1",), throw=True)
    assert key in str(told.value)
    assert [entry.key for entry in ledger.list()] == []  # and it does not stop the listing
