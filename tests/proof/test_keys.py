"""One action has one key, and two actions never share a key. Hypothesis makes pairs of similar arguments.

`meaning` says what a call means. It was written from the documentation and shares no code with the code under test.
`make fuzz` tries many more examples.
"""

from __future__ import annotations

import dataclasses
import itertools
import unicodedata
import uuid
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from inspect import signature
from typing import Any, NamedTuple

import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from celery_idem.core.errors import IntentError
from celery_idem.core.keys import ALL_ARGUMENTS, declare

UTC = timezone.utc


class Colour(Enum):
    RED = "red"
    ONE = 1


class Level(IntEnum):
    ONE = 1
    TWO = 2


class Word(str):
    def __str__(self) -> str:
        return "something else"

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Point:
    x: Any
    y: Any


# --- what a value means -------------------------------------------------------------------


class Refused(Exception):
    """The value cannot be part of a key."""


def meaning(value: Any) -> Any:
    """Return what a value means, as a hashable value. It is equal for values that stand for the same action."""
    if value is None or isinstance(value, bool):
        return ("only", repr(value))
    if isinstance(value, Enum):
        return meaning(value.value)
    if isinstance(value, str):
        text = unicodedata.normalize("NFC", "".join(value))
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise Refused
        return ("text", text)
    if isinstance(value, (int, float, Decimal)):
        if value != value or abs(value) == float("inf"):
            raise Refused
        return ("number", str(Fraction(value)))  # as text: Python gives -1 and -2 one hash
    if isinstance(value, (bytes, bytearray)):
        return ("bytes", bytes(value))
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise Refused
        return ("instant", str((value - datetime(2000, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)))
    if isinstance(value, (date, time)):
        return (type(value).__name__, value.isoformat())
    if isinstance(value, timedelta):
        return ("span", str(value))
    if isinstance(value, uuid.UUID):
        return ("uuid", str(value.int))
    if isinstance(value, (list, tuple)):
        return ("list", tuple(meaning(item) for item in value))
    if isinstance(value, (set, frozenset)):
        return ("set", frozenset(meaning(item) for item in value))
    if isinstance(value, dict):
        return _mapping(value)
    if dataclasses.is_dataclass(value):
        return _mapping(vars(value))
    raise Refused


def _mapping(value: dict[Any, Any]) -> Any:
    pairs = {}
    for key, item in value.items():
        plain = key.value if isinstance(key, Enum) else key
        if isinstance(plain, bool) or not isinstance(plain, (str, int)):
            raise Refused
        name = meaning(plain if isinstance(plain, str) else f"{plain:d}")
        if name in pairs:
            raise Refused
        pairs[name] = meaning(item)
    return ("map", frozenset(pairs.items()))


def meant(*values: Any) -> Any:
    """Return what the values mean together, or None if one of them is refused."""
    try:
        return tuple(meaning(value) for value in values)
    except Refused:
        return None


# --- values --------------------------------------------------------------------------------

# fmt: off
ATOMS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 10, 2**53, 2**53 + 1, -(2**53), 10**20, 10**20 + 1, 10**25,
    0.0, -0.0, 1.0, 0.1, 0.5, 1e20, 1e25, 1e300, 5e-324, 2.0**53, float("nan"), float("inf"),
    *map(Decimal, ("0", "-0", "1", "1.00", "1E1", "10", "0.1", "0.5", "1E20", "1E+25", "NaN", "1E500")),
    "", "a", "1", "1.0", "true", "null", "red", "é", "e\u0301", "\u212b", "Å", "$date", "$$date", "\ud800", "\x00", "b",
    Word("a"), Colour.RED, Colour.ONE, Level.ONE, Level.TWO, b"", b"a", b"\xff", bytearray(b"a"),
    date(2026, 11, 1), "2026-11-01", datetime(2026, 11, 1), time(1, 2), time(1, 2, 0, 1), timedelta(1),  # noqa: DTZ001
    datetime(2026, 11, 1, 12, tzinfo=UTC), datetime(2026, 11, 1, 14, tzinfo=timezone(timedelta(hours=2))),
    datetime(1, 1, 1, tzinfo=UTC), timedelta(seconds=86400), timedelta(microseconds=-1),
    uuid.UUID(int=1), str(uuid.UUID(int=1)), object(),
    *(number / 8 for number in range(-20, 20)), *(Decimal(number) / 8 for number in range(-20, 20)),
    {"$date": "2026-11-01"}, {"$set": []}, {"$set": [1]},
]
NAMES: list[Any] = [
    "a", "b", 1, "1", Level.ONE, 10**20, str(10**20), "$date", "$$date", "é", "e\u0301", True, None, "x", "y",
]
# fmt: on

ALIKE = [
    [spelling for spelling, means in spellings if means == meaning_]
    for spellings in ([(value, meant(value)) for value in values] for values in (ATOMS, NAMES))
    for _, meaning_ in spellings
]
"""For each atom, then for each name: the atoms or names that mean the same."""


class Pair(NamedTuple):
    """Two values that are equal in meaning, except in a few places."""

    one: Any
    other: Any


@st.composite
def atoms(draw: st.DrawFn) -> Pair:
    place = draw(st.integers(0, len(ATOMS) - 1))
    other = st.sampled_from(ATOMS) if draw(st.integers(0, 4)) == 4 else st.sampled_from(ALIKE[place])
    return Pair(ATOMS[place], draw(other))


@st.composite
def collections(draw: st.DrawFn, inner: st.SearchStrategy[Pair]) -> Pair:
    """Draw two collections of the same kind from pairs. The second has another spelling."""
    ones, others = zip(*items, strict=True) if (items := draw(st.lists(inner, max_size=3))) else ((), ())
    kind = draw(st.sampled_from(["list", "map", "point", "set"]))
    if kind == "list":
        return Pair(list(ones), tuple(others))
    if kind == "point" and len(items) == 2:
        return Pair(
            Point(*ones), draw(st.sampled_from([Point(*others), dict(zip("yx", others[::-1], strict=True))]))
        )
    order = draw(st.permutations(range(len(items))))
    if kind == "set":
        return Pair(_set(ones), _set([others[n] for n in order]))
    places = [draw(st.integers(0, len(NAMES) - 1)) for _ in items]
    spelt = [draw(st.sampled_from(ALIKE[len(ATOMS) + place])) for place in places]
    return Pair(
        {NAMES[place]: one for place, one in zip(places, ones, strict=True)},
        {spelt[n]: others[n] for n in order},
    )


def _set(items: Any) -> Any:
    try:
        return frozenset(items)
    except TypeError:  # not hashable
        return {"a": list(items)}


pairs = st.recursive(atoms(), collections, max_leaves=6)


# --- calls ---------------------------------------------------------------------------------


def task(customer: Any, invoice: Any = 1, **more: Any) -> None:
    """The task whose calls are compared."""


DECLARATION = declare("shop.charge", signature(task), ("customer", "invoice"))


class Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    means: Any

    def key(self) -> str | None:
        """Return the key, or None if the call is refused. Any other error fails the test."""
        try:
            return DECLARATION.key("idem", DECLARATION.bind(self.args, self.kwargs))
        except IntentError:
            return None


def spellings(customer: Any, invoice: Any) -> list[Call]:
    """Return the ways to pass both arguments, and one call that uses the default of the invoice."""
    means = meant(customer, invoice)
    return [
        Call((customer, invoice), {}, means),
        Call((customer,), {"invoice": invoice}, means),
        Call((), {"invoice": invoice, "customer": customer}, means),
        Call((customer,), {"note": invoice}, meant(customer, 1)),
    ]


@st.composite
def near_calls(draw: st.DrawFn) -> tuple[Call, Call]:
    customer, invoice = draw(pairs), draw(pairs)
    form = st.sampled_from(range(4))
    return (
        spellings(customer.one, invoice.one)[draw(form)],
        spellings(customer.other, invoice.other)[draw(form)],
    )


@given(near_calls())
def test_one_action_has_one_key_and_two_never_share_one(calls: tuple[Call, Call]) -> None:
    one, other = calls
    for call in calls:
        assert (call.key() is None) == (call.means is None)
    if one.means is not None and other.means is not None:
        assert (one.key() == other.key()) == (one.means == other.means)


@pytest.mark.parametrize("alike", [True, False])
def test_calls_are_near_one_another(alike: bool) -> None:
    """The examples include one action in two spellings and two similar actions, else the test above proves nothing."""
    one, other = find(
        near_calls(),
        lambda calls: (
            None not in (calls[0].means, calls[1].means)
            and (calls[0].means == calls[1].means) is alike
            and all(isinstance(call.args[0], (list, tuple)) and call.args[0] for call in calls if call.args)
            and repr(calls[0].args) != repr(calls[1].args)
        ),
    )
    assert (one.key() == other.key()) is alike


def test_every_atom_and_every_name_beside_every_other() -> None:
    keys: dict[Any, str | None] = {}
    seen: dict[str, Any] = {}
    wraps: list[Any] = [
        lambda atom: atom,
        lambda atom: [atom],
        lambda atom: ("a", atom),
        lambda atom: {"x": atom, "y": 1},
        lambda atom: Point(atom, Decimal(1)),
        lambda atom: _set([atom]),
    ]
    values = [wrap(atom) for atom, wrap in itertools.product(ATOMS, wraps)]
    values += [{name: 1, other: 1} for name, other in itertools.product(NAMES, NAMES)]
    for value in values:
        for call in (*spellings(value, 1), *spellings("a", value)):
            key = call.key()
            assert (key is None) == (call.means is None), call
            if key is not None:
                assert keys.setdefault(call.means, key) == key, f"this action has another key too: {call}"
                assert seen.setdefault(key, call.means) == call.means, f"another action has this key: {call}"
    assert len(keys) > 500


# --- found by reading, or by earlier versions of this test ---------------------------------------


def test_an_extra_argument_cannot_hide_a_positional_one() -> None:
    def task(customer: Any, /, **more: Any) -> None: ...

    declaration = declare("shop.charge", signature(task), ALL_ARGUMENTS)
    with pytest.raises(IntentError, match="both called 'customer'"):
        declaration.bind((1,), {"customer": 2})


class Tenant(str, Enum):  # as in code from before Python 3.11
    ACME = "acme"


def test_a_scope_is_the_text_that_json_makes_of_it() -> None:
    declaration = declare("shop.charge", signature(lambda customer: None), "customer")
    arguments = {"customer": 1}
    assert declaration.key("idem", arguments, Tenant.ACME) == declaration.key("idem", arguments, "acme")
    with pytest.raises(IntentError, match="scope"):
        declaration.key("idem", arguments, 10**6000)  # type: ignore[arg-type]


def test_a_set_of_texts_that_are_one_text_has_one_item() -> None:
    declaration = declare("shop.charge", signature(lambda tags: None), "tags")
    assert declaration.key("idem", {"tags": {"é", "e\u0301"}}) == declaration.key("idem", {"tags": {"é"}})
