"""Canonical form: which values are equal, and which are refused."""

from __future__ import annotations

import json
import math
import re
import uuid
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from celery_idem import IntentError
from celery_idem.core import keys
from celery_idem.core.keys import canonical
from tests.support.calls import NOON, Colour, Invoice, Money, key_for


class Level(IntEnum):
    HIGH = 3


class Text(str, Enum):
    RED = "red"


class Shouting(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "other text"


SAME = [
    (1, 1.0),
    (1, Decimal("1.00")),
    (0, -0.0),
    (0, Decimal("-0.00")),
    (0, Decimal("-0E+500")),
    (0.5, Decimal("0.50")),
    (10**20, 1e20),
    (10**20, Decimal("1E+20")),
    (2**53 + 1, Decimal(2**53 + 1)),
    (Decimal("1E+400"), 10**400),
    (Decimal("0.10"), Decimal("0.1")),
    ("größe", "gro\u0308ße"),
    ([1, 2], (1, 2)),
    ("red", Colour.RED),
    ("red", Text.RED),
    (3, Level.HIGH),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({1: "x"}, {"1": "x"}),
    ({"gro\u0308ße": 1}, {"größe": 1}),
    ({"cents": 5, "currency": "EUR"}, Money(5)),
    ({"id": 1, "due": None}, Invoice(id=1)),
    (b"ab", bytearray(b"ab")),
    (b"ab", memoryview(b"ab")),
    ({3, 1, 2}, frozenset([2, 3, 1])),
    (NOON, NOON.astimezone(ZoneInfo("Asia/Tokyo"))),
    (NOON, datetime(2026, 11, 1, 13, tzinfo=timezone(timedelta(hours=1)))),
    (timedelta(minutes=1), timedelta(seconds=60)),
]

DIFFERENT = [
    None,
    True,
    False,
    0,
    1,
    2,
    0.1,
    Decimal("0.1"),  # the float 0.1 is not exactly a tenth
    -1,
    2**53 - 1,
    2**53,
    2**53 + 1,
    10**400,
    "",
    "1",
    "true",
    "null",
    "A",
    "a",
    "a ",
    [],
    [None],
    [[]],
    {},
    {"a": None},
    {"a": {}},
    ["a", None],
    b"",
    b"1",
    {"$bytes": "MQ=="},  # a dictionary that looks like the canonical form of bytes
    date(2026, 11, 1),
    "2026-11-01",
    {"$date": "2026-11-01"},
    {"$$date": "2026-11-01"},
    NOON,
    NOON + timedelta(microseconds=1),
    NOON.isoformat(),
    time(12),
    timedelta(seconds=1),
    timedelta(microseconds=1),
    uuid.UUID(int=1),
    str(uuid.UUID(int=1)),
    {1},
    {1, 2},
    [1, 2],
    [2, 1],
    {"1": 1, "2": 2},
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=[type(one).__name__ for one, _ in SAME])
def test_equal_values_share_a_key(one: Any, other: Any) -> None:
    assert key_for(one) == key_for(other)


def test_different_values_do_not() -> None:
    by_key: dict[str, Any] = {}
    for value in DIFFERENT:
        key = key_for(value)
        assert key not in by_key, f"{value!r} and {by_key[key]!r} share a key"
        by_key[key] = value


def test_a_bool_is_not_a_number_also_inside_of_collections() -> None:
    assert key_for([True]) != key_for([1])
    assert key_for({"a": False}) != key_for({"a": 0})


def test_text_of_a_subclass_is_its_own_text() -> None:
    # __str__ may return anything. A message carries the characters themselves.
    assert key_for(Shouting("a")) != key_for(Shouting("b"))


REFUSED = [
    (datetime(2026, 11, 1), "naive datetime"),  # noqa: DTZ001
    (math.nan, "NaN"),
    (math.inf, "infinite"),
    (Decimal("NaN"), "NaN"),
    (Decimal("sNaN"), "NaN"),
    (Decimal("-Infinity"), "infinite"),
    (time(12, tzinfo=timezone.utc), "time with a timezone"),
    (object(), "a object has no canonical form"),
    (lambda: None, "a function has no canonical form"),
    (Money, "a type has no canonical form"),
    (1j, "a complex has no canonical form"),
    ({(1, 2): 3}, "dictionary key that is a tuple"),
    ({True: 1}, "dictionary key that is a bool"),
    ({1: "a", "1": "b"}, "two dictionary keys"),
    ({"größe": 1, "gro\u0308ße": 2}, "two dictionary keys"),
    ("\ud800", "valid Unicode"),
    ({"\ud800": 1}, "valid Unicode"),
    (1 << 20_000, "more than 14000 bits"),
    ([object()], "a object has no canonical form"),
    ({"a": {"b": math.nan}}, "NaN"),
]


@pytest.mark.parametrize(("value", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_has_no_meaning_is_refused_by_the_parameters_name(value: Any, why: str) -> None:
    with pytest.raises(IntentError, match=re.escape(why)) as caught:
        key_for(value)
    assert caught.value.parameter == "customer_id"
    assert "'customer_id'" in str(caught.value)


def test_a_refusal_does_not_show_the_value() -> None:
    class Secret:
        def __repr__(self) -> str:
            return "hunter2"

    with pytest.raises(IntentError) as caught:
        key_for({"card": Secret()})
    assert "hunter2" not in str(caught.value)


def test_nesting_is_bounded() -> None:
    deep: Any = 1
    for _ in range(keys.MAX_DEPTH):
        deep = [deep]
    key_for(deep)
    with pytest.raises(IntentError, match="nested"):
        key_for([deep])
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(IntentError, match="nested"):
        key_for(loop)


def test_an_object_that_cannot_be_read_is_refused() -> None:
    class Broken(dict[str, Any]):
        def items(self) -> Any:
            raise RuntimeError("hunter2")

    with pytest.raises(IntentError, match="RuntimeError") as caught:
        key_for(Broken())
    assert caught.value.parameter == "customer_id"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_what_json_carries_keeps_its_key(value: Any) -> None:
    """The publisher and the worker, which reads the arguments from the message, compute the same key."""
    try:
        key = key_for(value)
    except IntentError:
        return
    assert key_for(json.loads(json.dumps(value))) == key


@given(json_values, json_values)
def test_equal_means_same_canonical_form(one: Any, other: Any) -> None:
    try:
        forms = rfc8785.dumps(canonical(one)), rfc8785.dumps(canonical(other))
    except (IntentError, rfc8785.CanonicalizationError, UnicodeEncodeError):
        return
    if forms[0] == forms[1]:
        assert key_for(one) == key_for(other)
    else:
        assert key_for(one) != key_for(other)


@given(st.decimals(allow_nan=False, allow_infinity=False))
def test_a_decimal_is_its_value_and_not_its_spelling(value: Decimal) -> None:
    sign, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)
    assert key_for(value) == key_for(Decimal((sign, (*digits, 0, 0), exponent - 2)))
