"""Stored errors: a replay raises the same error, but never one that Celery or the interpreter would act on."""

from __future__ import annotations

import asyncio
import builtins
import pickle
import sys
from pathlib import Path
from typing import Any, ClassVar

import billiard.exceptions
import celery.exceptions
import pytest
import requests

from celery_idem import FingerprintMismatch, OutcomeUnknown, ResultUnavailable
from celery_idem.core.results import Codec
from tests.support.jobs import Bench, FakeJob


class OurMemoryError(MemoryError):
    pass


class OurIgnore(celery.exceptions.Ignore):
    pass


class Prefixed(Exception):
    """An exception whose constructor adds to its text, as many do."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"shop: {reason}")


class KeywordOnly(Exception):
    def __init__(self, *, code: int, response: object = None) -> None:
        super().__init__(f"code {code}")
        self.code = code
        self.headers = {"retry-after": 5}
        self.where = ("a", 1)
        self.response = response


class Slotted(Exception):
    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code

    def __str__(self) -> str:
        return f"code {self.code}"


class Counting(Exception):
    made = 0

    def __init__(self, *args: Any) -> None:
        type(self).made += 1
        super().__init__(*args)

    def __reduce__(self) -> Any:
        type(self).made += 1
        return super().__reduce__()


class Registered(Exception):
    """An exception that records its subclasses: a replay must not create one."""

    known: ClassVar[list[type]] = []

    def __init_subclass__(cls) -> None:
        Registered.known.append(cls)

    def __str__(self) -> str:
        return f"{len(self.args[0])} items, {self.args[0]!r}"


def replayed(error: BaseException, times: int = 1) -> Exception:
    for _ in range(times):
        error = Codec().decode_error(Codec().encode_error(error), "k")
    assert isinstance(error, Exception)
    assert error.idem_replayed is True  # type: ignore[attr-defined]
    return error


SPECIAL = [
    MemoryError("no memory"),
    OurMemoryError("no memory"),
    StopIteration(7),
    StopAsyncIteration(),
    celery.exceptions.Ignore("no"),
    OurIgnore("no"),
    celery.exceptions.Reject("no", requeue=True),
    celery.exceptions.Retry("later", when=5),
    celery.exceptions.WorkerShutdown(1),
    celery.exceptions.WorkerTerminate(1),
    billiard.exceptions.SoftTimeLimitExceeded(5),
    billiard.exceptions.TimeLimitExceeded(5),
    billiard.exceptions.WorkerLostError("exit 9"),
    billiard.exceptions.Terminated(9),
    billiard.exceptions.RestartFreqExceeded(5),
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    asyncio.CancelledError(),
]


@pytest.mark.parametrize("error", SPECIAL, ids=lambda error: type(error).__name__)
def test_what_celery_or_the_interpreter_would_act_on_is_raised_as_a_stand_in(error: BaseException) -> None:
    for times in (1, 3):
        found = replayed(error, times)
        assert type(found).__name__ == type(error).__name__
        assert str(found) == str(error)
        assert {base.__name__ for base in type(found).__mro__[1:]} == {
            "_StandIn",
            "Exception",
            "BaseException",
            "object",
        }
        # Celery pickles the error for the worker's main process, and its result backend stores the class name.
        sent = pickle.loads(pickle.dumps(found))  # noqa: S301  # as Celery does
        assert (type(sent), str(sent), sent.idem_replayed) == (type(found), str(found), True)
        assert type(found).__module__ not in sys.modules


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups need 3.11")
def test_a_group_keeps_its_members_and_what_is_special_in_it_is_a_stand_in() -> None:
    group_of, any_group_of = vars(builtins)["ExceptionGroup"], vars(builtins)["BaseExceptionGroup"]
    group = group_of("two", [ValueError("a"), group_of("inner", [MemoryError("b")])])
    found = replayed(group, 2)
    assert isinstance(found, group_of)
    assert (str(found), found.message) == (str(group), "two")
    value, inner = found.exceptions
    assert (type(value), str(value)) == (ValueError, "a")
    assert not found.subgroup((MemoryError, SystemExit))
    assert str(inner.exceptions[0]) == "b"  # type: ignore[attr-defined,unused-ignore]
    worse = any_group_of("worse", [SystemExit(3), ValueError("a")])
    stand_in = replayed(worse)
    assert not isinstance(stand_in, any_group_of)
    assert str(stand_in) == str(worse)


try:
    Path("/nowhere/at/all").read_text()
except OSError as missing_file:
    MISSING = missing_file


@pytest.mark.parametrize(
    "error",
    [
        Prefixed("stolen"),
        KeywordOnly(code=7),
        Slotted(7),
        KeyError(("a", 1)),
        ValueError(("a", 1), {"b": (2,)}),
        ValueError(object()),
        ValueError({"__type__": "uuid", "__value__": 5}),
        ValueError("\udcff"),
        OSError(5, "broken", "a.txt", None, "b.txt"),
        MISSING,
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
        ImportError("no", name="a", path="b"),
        SyntaxError("no", ("a.py", 3, 4, "text")),
        requests.HTTPError("503 for url", response=requests.Response()),
        celery.exceptions.BackendStoreError("no", state="x", task_id="y"),
        ResultUnavailable("gone", "shop.pay:1", "why"),
        FingerprintMismatch("differs", "shop.pay:1", ["cents"]),
        Registered(("a", "b")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_class_and_text_stay_the_same_at_every_replay(error: Exception) -> None:
    first, fifth = replayed(error), replayed(error, 5)
    for found in (first, fifth):
        assert isinstance(found, type(error))
        if not isinstance(error, Registered):
            assert str(found) == str(error)
    assert str(first) == str(fifth)
    assert not Registered.known


def test_attributes_come_back() -> None:
    error = replayed(KeywordOnly(code=7, response=object()))
    assert isinstance(error, KeywordOnly)
    assert (error.code, error.headers, error.where, error.response) == (7, {"retry-after": 5}, ("a", 1), None)
    http = replayed(requests.HTTPError("503 for url", response=requests.Response()))
    assert isinstance(http, requests.HTTPError)
    assert (http.response, http.request) == (None, None)
    missing = replayed(MISSING)
    assert isinstance(missing, FileNotFoundError)
    assert (missing.errno, missing.filename) == (2, "/nowhere/at/all")
    ours = replayed(OutcomeUnknown("in doubt", "shop.pay:1", "why"))
    assert isinstance(ours, OutcomeUnknown)
    assert (ours.key, ours.reason, ours.message) == ("shop.pay:1", "why", "in doubt")


def test_no_constructor_runs() -> None:
    payload = Codec().encode_error(Counting("a"))
    before = Counting.made
    assert type(Codec().decode_error(payload, "k")) is Counting
    assert Counting.made == before


def test_an_error_that_cannot_be_looked_at_is_stored_all_the_same() -> None:
    class Odd(Exception):
        @property
        def args(self) -> Any:  # type: ignore[override]
            raise RuntimeError

    assert type(replayed(Odd("a"))).__name__ == "Odd"


def test_notes_do_not_grow(bench: Bench) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("notes of exceptions need 3.11")
    lengths = []
    for _ in range(3):
        with pytest.raises(ValueError, match="no") as caught:
            bench.runner.run(FakeJob(ValueError("no")))
        lengths.append(len(getattr(caught.value, "__notes__", ())))
    assert lengths == [0, 1, 1]
