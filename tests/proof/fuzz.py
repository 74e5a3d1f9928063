"""Arguments made at random, near one another on purpose: `python -m tests.proof.fuzz --count 1000000 --seed 1`.

Three things are looked for: an error that is no `IntentError`, two calls that mean different actions under one
key, and two calls that mean the same under two keys. What two calls mean is said by `meaning`, which was written
from the documentation and shares no line with the code under test.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import random
import sys
import time as clock
import unicodedata
import uuid
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from typing import Any

from celery_idem.core.errors import IntentError
from celery_idem.core.keys import declare


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


class Refused(Exception):
    """This value means nothing that could be compared."""


def meaning(value: Any) -> Any:
    """What a value means: equal for values that are the same action's, hashable."""
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
        return (
            "instant",
            str((value - datetime(2000, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1)),
        )
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
        return _mapping({"x": value.x, "y": value.y})
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


ATOMS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 10, 2**53, 2**53 + 1, -(2**53), 10**20, 10**20 + 1, 10**25),
    *(0.0, -0.0, 1.0, 0.1, 0.5, 1e20, 1e25, 1e300, 5e-324, 2.0**53, float("nan"), float("inf")),
    *(
        Decimal(text)
        for text in ("0", "-0", "1", "1.00", "1E1", "10", "0.1", "0.5", "1E20", "1E+25", "NaN", "1E500")
    ),
    *(
        "",
        "a",
        "1",
        "1.0",
        "true",
        "null",
        "red",
        "é",
        "e\u0301",
        "\u212b",
        "Å",
        "$date",
        "$$date",
        "\ud800",
        "\x00",
        "b",
    ),
    *(Word("a"), Colour.RED, Colour.ONE, Level.ONE, Level.TWO, b"", b"a", b"\xff", bytearray(b"a")),
    *(date(2026, 11, 1), "2026-11-01", datetime(2026, 11, 1), time(1, 2), time(1, 2, 0, 1), timedelta(1)),  # noqa: DTZ001
    datetime(2026, 11, 1, 12, tzinfo=timezone.utc),
    datetime(2026, 11, 1, 14, tzinfo=timezone(timedelta(hours=2))),
    datetime(1, 1, 1, tzinfo=timezone.utc),
    *(
        timedelta(seconds=86400),
        timedelta(microseconds=-1),
        uuid.UUID(int=1),
        str(uuid.UUID(int=1)),
        object(),
    ),
)
KEYS: tuple[Any, ...] = (
    "a",
    "b",
    1,
    "1",
    Level.ONE,
    10**20,
    str(10**20),
    "$date",
    "$$date",
    "é",
    "e\u0301",
    True,
    None,
    "x",
    "y",
)


def value_of(rng: random.Random, depth: int = 0) -> Any:
    """One argument: mostly an atom, else a small collection of arguments."""
    roll = rng.random()
    if roll < 0.55 + depth * 0.15:
        return rng.choice(ATOMS)
    if roll < 0.62 + depth * 0.13:
        number = rng.randrange(-20, 20)
        return rng.choice(
            [number, float(number), Decimal(number), number / 8, Decimal(number) / 8, str(number)]
        )
    size = rng.randrange(3)
    items = [value_of(rng, depth + 1) for _ in range(size)]
    kind = rng.randrange(6)
    if kind == 0:
        return items
    if kind == 1:
        return tuple(items)
    if kind == 2:
        return {rng.choice(KEYS): item for item in items}
    if kind == 3:
        return Point(*[*items, 1, 2][:2])
    if kind == 4:
        return {"$date": "2026-11-01"} if size else {"$set": items}
    try:
        return set(items)
    except TypeError:  # not hashable
        return frozenset(str(item) for item in range(size))


def task(customer: Any, invoice: Any = 1, **more: Any) -> None:
    """What is called."""


DECLARATION = declare("shop.charge", inspect.signature(task), ("customer", "invoice"))


def call_of(rng: random.Random) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional and keyword arguments, and what the call means."""
    customer, invoice = value_of(rng), value_of(rng)
    form = rng.randrange(4)
    if form == 0:
        args, kwargs = (customer, invoice), {}
    elif form == 1:
        args, kwargs = (customer,), {"invoice": invoice}
    elif form == 2:
        args, kwargs = (), {"invoice": invoice, "customer": customer}
    else:
        args, kwargs, invoice = (customer,), {"note": invoice}, 1
    return args, kwargs, (customer, invoice)


def fuzz(count: int, seed: int, say: Callable[[str], None] = print) -> tuple[int, int, int]:
    """Derive `count` keys; (different keys, refused calls, calls that met an earlier one's meaning).

    Raises AssertionError with the arguments and the seed.
    """
    rng = random.Random(seed)
    meant: dict[str, int] = {}
    keys: dict[int, str] = {}
    refused = again = 0
    for number in range(count):
        args, kwargs, means = call_of(rng)
        try:
            expected: int | None = hash((meaning(means[0]), meaning(means[1])))
        except Refused:
            expected = None
        shown = f"seed {seed}, call {number}: {args!r} {kwargs!r}"
        try:
            key = DECLARATION.key("idem", DECLARATION.bind(args, kwargs))
        except IntentError:
            assert expected is None, f"refused, and means something: {shown}"
            refused += 1
            continue
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} instead of IntentError: {shown}") from error
        assert expected is not None, f"means nothing, and got a key: {shown}"
        again += expected in keys
        assert meant.setdefault(key, expected) == expected, f"another action has this key: {shown}"
        assert keys.setdefault(expected, key) == key, f"this action has another key too: {shown}"
    say(
        f"seed {seed}: {count:,} calls, {len(keys):,} actions, {again:,} calls of one met before, {refused:,} refused"
    )
    return len(keys), refused, again


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=None, help="default: from the clock; it is printed")
    options = parser.parse_args()
    began = clock.perf_counter()
    fuzz(options.count, options.seed if options.seed is not None else clock.time_ns() % 10**9)
    print(f"{clock.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
