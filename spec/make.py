"""Writes `spec/vectors.json`: `python -m spec.make`. A test compares the file with what this makes.

Values are written as JSON. A value that JSON cannot hold is written as kombu writes it,
`{"__type__": "decimal", "__value__": "1.50"}`, with a few more types (`notation`).
"""

from __future__ import annotations

import base64
import inspect
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import MappingProxyType
from typing import Any

import rfc8785
from celery import Celery, signals

from celery_idem import ALL_ARGUMENTS, IdempotentTask, IntentError
from celery_idem.core import calls, keys, model
from celery_idem.core.model import Note, Noticed, Outcome, Record, Recovery, State, Step, Would
from celery_idem.core.record import pack
from celery_idem.core.sealing import SIZES, Seal

FILE = Path(__file__).with_name("vectors.json")

ABOUT = (
    "Test vectors of celery_idem's wire format, made by `python -m spec.make`. docs/reference/wire.md explains them. "
    "`values`: a value, and the canonical form that is hashed. `refused`: values that have none, as text, because "
    "some languages cannot read their JSON. `calls`: a call, and the text that is hashed, the key, the fingerprint, "
    "the digest of the scope, and the headers of the message. `records`: what a store holds, in hex, and what it says. "
    "`sealed`: a seal key, an intent's key, and bytes in hex, in clear and as a record holds them."
)

UTC = timezone.utc
NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)
MESSAGE = "6f1e8a1c-0a4e-4f4e-9d0a-2f7a5f0f3c11"


# --- values --------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"


@dataclass
class Money:
    cents: int
    currency: str = "EUR"


class Secret:
    """A secret like pydantic's `SecretStr`. The canonical form contains the digest of its value."""

    def __init__(self, value: str) -> None:
        self._value = value

    def get_secret_value(self) -> str:
        return self._value


def nested(depth: int) -> Any:
    """Return an empty list inside other lists, `depth` lists in all."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


VALUES: list[tuple[str, Any]] = [
    ("null", None),
    ("true", True),
    ("false", False),
    ("zero", 0),
    ("negative zero", -0.0),
    ("one", 1),
    ("a whole float is an integer", 1.0),
    ("the largest exact integer of JSON", 2**53 - 1),
    ("a larger integer: digits without trailing zeros, and a power of ten", 2**53),
    ("its neighbour, which no double holds", 2**53 + 1),
    ("a large integer with zeros", -120 * 10**30),
    ("an integer of 300 digits", 7**355),
    ("the largest whole double below 1e21", 2.0**69),
    ("a double above 1e21 is the integer that it is exactly", 1e25),
    ("a fraction", 0.5),
    ("a tenth as a double", 0.1),
    ("seventeen digits", 0.30000000000000004),
    ("the smallest fraction without an exponent", 0.000001),
    ("a smaller one", 1.5e-7),
    ("one digit and an exponent", 1e-7),
    ("a large fraction", -4503599627370495.5),
    ("the smallest double", 5e-324),
    ("a decimal that a double holds", Decimal("0.50")),
    ("a decimal that no double holds", Decimal("0.10")),
    ("a whole decimal", Decimal("1.00")),
    ("a whole decimal with an exponent", Decimal("1E+2")),
    ("a negative decimal", Decimal("-19.99")),
    ("a decimal with trailing zeros before the point", Decimal("1234567890123456789000.0")),
    ("a decimal of 40 digits", Decimal("3.141592653589793238462643383279502884197")),
    ("a decimal beyond doubles", Decimal("1.5E+400")),
    ("a decimal below doubles", Decimal("-1.5E-400")),
    ("zero as a decimal", Decimal("0E+500")),
    ("negative zero as a decimal", Decimal("-0.00")),
    ("text", "invoice"),
    ("empty text", ""),
    ("digits are text", "1"),
    ("text with quotes, a backslash, a slash and controls", '"\\/\b\t\n\f\r\x00\x1f\x7f\u2028'),
    ("composed", "größe"),
    ("decomposed: the same text", "gro\u0308ße"),
    ("a character that changes: ANGSTROM SIGN", "\u212b"),
    ("marks in another order are the same text", "a\u0323\u0307 a\u0307\u0323"),
    ("Hangul", "\u1112\u1161\u11ab"),
    ("compatibility characters stay", "ﬁ²"),
    ("beyond the first plane", "😀\U0001d11e"),
    ("an empty list", []),
    ("a list", [1, "a", None]),
    ("a tuple is a list", (1, 2)),
    ("an empty object", {}),
    ("names in order", {"b": 1, "a": 2, "": 3, "B": 4, "aa": 5}),
    ("names in the order of UTF-16: U+1F600 comes before U+FB01", {"ﬁ": 1, "😀": 2, "\u20ac": 3, "\r": 4}),
    ("names in normal form", {"gro\u0308ße": "gro\u0308ße"}),
    ("a name that is a number", {1: "x"}),
    ("a name that begins with $", {"$date": "2026-11-01", "$$": 1, "a$": 2}),
    ("a name that JavaScript treats specially", {"__proto__": 1, "constructor": 2}),
    ("nested", {"lines": [{"sku": "A-1", "cents": 250, "tags": []}, {"sku": "B-2", "more": {"x": None}}]}),
    ("64 levels", nested(64)),
    ("bytes that are UTF-8", "größe".encode()),
    ("bytes that are not", b"\xff\x00\x10"),
    ("no bytes", b""),
    ("a UUID", uuid.UUID("0A1B2C3D-4E5F-6789-ABCD-EF0123456789")),
    ("a date", date(2026, 11, 1)),
    ("a time", time(12, 30)),
    ("a time with microseconds", time(12, 30, 5, 1000)),
    ("an instant", NOON),
    (
        "the same instant elsewhere",
        datetime(2026, 11, 1, 17, 30, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    ),
    (
        "an instant that is another day in UTC",
        datetime(2026, 12, 31, 23, 0, 0, 250000, timezone(timedelta(hours=-2))),
    ),
    ("an instant before 1970", datetime(999, 1, 2, 3, 4, 5, 6, tzinfo=UTC)),
    ("an Enum is its value", Colour.RED),
    ("a dataclass is its fields", Money(250)),
    ("a span", timedelta(days=-1, seconds=5, microseconds=7)),
    ("an empty set", set()),
    ("a set, in the order of its canonical forms' bytes", {10, 9, "b", "a", None, 0.5}),
    ("a set, in the order of UTF-8: U+FB01 comes before U+1F600", {"ﬁ", "😀"}),
    ("a set of texts that are one", {"é", "e\u0301"}),
    ("a set of lists", {(1, 2), (1,)}),
    ("an IPv4 address", IPv4Address("192.0.2.1")),
    ("an IPv6 address", IPv6Address("2001:db8::1")),
    ("a secret", Secret("sésame")),
]

REFUSED: list[tuple[str, Any]] = [
    ("a naive datetime", datetime(2026, 11, 1, 12)),  # noqa: DTZ001
    ("a decimal that is no number", Decimal("NaN")),
    ("an infinite decimal", Decimal("-Infinity")),
    ("a lone surrogate", "\ud800"),
    ("a lone surrogate in a name", {"a\udfff": 1}),
    ("names that are the same in normal form", {"é": 1, "e\u0301": 2}),
    ("65 levels", nested(65)),
]


def notation(value: Any) -> Any:
    """Return the value as JSON, as in a message. The marks int, timedelta, set, secret and ip are only used here."""
    if isinstance(value, Enum):
        return notation(value.value)
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else mark("int", str(value))
    if isinstance(value, (list, tuple)):
        return [notation(item) for item in value]
    if isinstance(value, dict):
        return {str(name): notation(item) for name, item in value.items()}
    if is_dataclass(value):
        return notation(vars(value))
    if isinstance(value, bytes):
        try:
            return mark("bytes", value.decode())
        except UnicodeDecodeError:
            return mark("base64", base64.b64encode(value).decode())
    if isinstance(value, timedelta):
        return mark("timedelta", str(value // timedelta(microseconds=1)))
    if isinstance(value, set):
        return mark("set", [notation(item) for item in sorted(value, key=repr)])
    if isinstance(value, Secret):
        return mark("secret", value.get_secret_value())
    if isinstance(value, uuid.UUID):
        return mark("uuid", {"hex": value.hex})
    if isinstance(value, (datetime, date, time)):
        return mark(type(value).__name__, value.isoformat())
    return mark({Decimal: "decimal"}.get(type(value), "ip"), str(value))


def mark(kind: str, value: Any) -> dict[str, Any]:
    return {"__type__": kind, "__value__": value}


def refused(value: Any) -> bool:
    try:
        rfc8785.dumps(keys.canonical(value))
    except (IntentError, UnicodeEncodeError, rfc8785.CanonicalizationError):
        return True
    return False


# --- calls ---------------------------------------------------------------------------


def charge(customer: Any, invoice: Any = 1, cents: Any = 0, currency: Any = "EUR", note: str = "") -> None:
    """A task with two arguments in the key, two that must match, and a free note."""


def anything(first: Any = None, **more: Any) -> None:
    """A task whose intent is all of its arguments."""


CHARGE: Mapping[str, Any] = MappingProxyType(
    {"intent": ("customer", "invoice"), "must_match": ("cents", "currency")}
)
ALL = {"intent": ALL_ARGUMENTS}


@dataclass(frozen=True)
class Call:
    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """Scope, occurrence and caller's key."""
    run: Callable[..., None] = charge
    declared: Mapping[str, Any] = field(default_factory=lambda: CHARGE)
    namespace: str = "idem"
    part_of: str | None = None


CALLS = [
    Call("by position", ("42", 7, 1999)),
    Call(
        "by name, one defaulted: the same action",
        (),
        {"customer": "42", "invoice": 7, "cents": 1999, "note": "again"},
    ),
    Call("other cents: the same key, another fingerprint", ("42", 7, 2000)),
    Call("a default is part of the intent", ("42",)),
    Call(
        "values of every kind",
        (Decimal("42.10"), {"day": date(2026, 11, 1), "at": NOON}, 2**64, "gro\u0308ße"),
    ),
    Call("a scope", ("42", 7), options={"scope": "acme"}),
    Call("an occurrence", ("42", 7), options={"occurrence": "2026-11"}),
    Call(
        "both, in normal form", ("42", 7), options={"scope": "gro\u0308ße", "occurrence": 'second "reminder"'}
    ),
    Call("a scope that is a number is its digits", ("42", 7), options={"scope": 7}),
    Call(
        "a caller's key: every argument must match", ("42", 7, 1999), options={"idempotency_key": "req_8f3a"}
    ),
    Call("a caller's key in a scope", ("42",), options={"idempotency_key": "req_8f3a", "scope": "acme"}),
    Call("a part of an action", ("42", 7), part_of="shop.order:0123456789abcdef0123456789abcdef"),
    Call("another namespace", ("42", 7), options={"scope": "acme"}, namespace="shop-staging"),
    Call("another version", ("42", 7), declared={**CHARGE, "intent_version": 2}),
    Call("a version that is text", ("42", 7), declared={**CHARGE, "intent_version": "2026-11"}),
    Call("a task's name with every kind of letter", ("42", 7), declared={**CHARGE, "name": "shop.größe:😀"}),
    Call(
        "a secret parameter is hashed as any other",
        ("42", 7),
        {"note": "sésame"},
        declared={"intent": ("customer", "note"), "must_match": "note", "secret": "note"},
    ),
    Call("all arguments", (1,), {"ﬁ": 1, "😀": 2, "$a": 3}, run=anything, declared=ALL),
    Call("no argument", run=anything, declared=ALL),
    Call(
        "all arguments and a caller's key", (1,), {"ﬁ": 1, "😀": 2}, {"idempotency_key": "k"}, anything, ALL
    ),
]


def parameters(run: Callable[..., Any]) -> list[list[Any]]:
    """Return a function's parameters: a name, and the default if there is one."""
    return [
        [name] if parameter.default is parameter.empty else [name, notation(parameter.default)]
        for name, parameter in inspect.signature(run).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]


def call(given: Call) -> dict[str, Any]:
    """Publish the call to a broker in memory, and return it with its key, fingerprint and headers."""
    app = Celery("vectors", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(idem_store="memory://vectors", idem_namespace=given.namespace)
    task = app.task(base=IdempotentTask, shared=False, **{"name": "shop.charge", **given.declared})(given.run)
    declaration = task.idem_declaration
    published: dict[str, Any] = {}

    def note(headers: dict[str, Any], **_: Any) -> None:
        published.update({name: value for name, value in headers.items() if name in keys.MADE})

    signals.before_task_publish.connect(note)
    sent = {} if given.part_of is None else {model.PART_OF: given.part_of}
    try:
        task.apply_async(given.args, given.kwargs, task_id=MESSAGE, headers=sent, **given.options)
    finally:
        signals.before_task_publish.disconnect(note)
    arguments = declaration.bind(given.args, given.kwargs)
    scope, occurrence, caller_key = (published.get(header) for header in keys.LABELS.values())
    fields = {} if caller_key else declaration.intent(arguments)
    labels = [scope, occurrence, caller_key, fields, *([given.part_of] if given.part_of else [])]
    hashed = [keys.SCHEME, given.namespace, task.name, str(declaration.version), *labels]
    return {
        "name": given.name,
        "namespace": given.namespace,
        "task": task.name,
        "intent_version": declaration.version,
        "parameters": parameters(given.run),
        "intent": list(declaration.fields) if declaration.fields is not None else None,
        "must_match": list(declaration.must_match),
        "args": notation(given.args),
        "kwargs": notation(given.kwargs),
        **given.options,
        **({} if given.part_of is None else {"part_of": given.part_of}),
        "hashed": rfc8785.dumps(hashed).decode(),
        "key": published[model.KEY],
        "fingerprint": declaration.fingerprint(arguments, caller_key).packed.hex(),
        "scope_digest": keys.scope_digest(given.namespace, scope).hex(),
        "headers": dict(sorted(published.items())),
    }


# --- records -------------------------------------------------------------------------

OWNER = bytes(range(1, 13))
STAMP = 1_793_534_400_000_000

OUTCOMES = [
    ("a result", Outcome(True, b'j{"paid":1999}')),
    ("an empty payload", Outcome(True, b"")),
    ("no result", Outcome(True, None, "it is larger than max_result_bytes")),
    ("another task has the result", Outcome(True, None, replaced_by=MESSAGE)),
]

PARTS: list[tuple[str, dict[str, Any]]] = [
    ("nothing more", {"fence": 0}),
    ("a lease and a task id", {"lease": 30_000_000, "task_id": MESSAGE, "attempts": 2, "crashes": 1}),
    ("a task id that is no UUID", {"task_id": MESSAGE.upper()}),
    ("a fingerprint", {"fingerprint": b"tag.valuedigtagsvaluedig"}),
    ("steps", {"steps": (Step("größe", b"j1"), Step("", b"")), "open_steps": ("ship", "mail")}),
    ("a worker asks", {"asking": OWNER[::-1], "reason": "the worker stopped"}),
    (
        "notes",
        {
            "notes": (
                Note(STAMP, "ann", "run again", "not at the bank"),
                Note(1, "", "", "", Would.MISMATCH, ("cents", "ü")),
            )
        },
    ),
    ("digests", {"digests": bytes.fromhex("0a1b01020304")}),
    ("a clock that went back, and a scope", {"noticed": Noticed(5, 9), "scope": bytes(range(16))}),
]

CALL_OF_A_MESSAGE = calls.Call(
    task_id=MESSAGE,
    headers={"idem-scope": "größe"},
    properties={"priority": 3},
    content_type="application/json",
    content_encoding="utf-8",
    exchange="",
    routing_key="celery",
    broker="5d41402a",
    hidden=False,
    options=None,
    body=b'[["42", 7], {}, {}]',
)

OPEN: list[tuple[str, dict[str, Any]]] = [
    (
        "a call, and where it runs",
        {"call": calls.pack(CALL_OF_A_MESSAGE), "place": "worker@größe, process 42"},
    ),
    ("a call that is too large", {"call": calls.Why.TOO_LARGE.packed}),
    ("published by recovery", {"recovery": Recovery(2, 60_000_000)}),
]
"""Parts that only a record without an outcome has."""


def plain(value: Any) -> Any:
    """Return a part of a record as JSON: bytes in hex, a state by its name."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, State):
        return value.name.lower()
    if hasattr(value, "_asdict"):
        parts = value._asdict().items()
        return {
            name: plain(item)
            for name, item in parts
            if item is not None or name not in ("late", "resolution")
        }
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def record(name: str, made: Record) -> dict[str, Any]:
    """Return a record and its parts, without the empty ones."""
    said = {
        part: plain(value)
        for part, value in made._asdict().items()
        if part != "outcome" and (value or part in ("attempts", "crashes"))
    }
    if made.call or made.place or made.recovery:  # all or none of them are in the bytes
        said |= {
            "recovery": plain(made.recovery or Recovery(0, 0)),
            "place": made.place,
            "call": made.call.hex(),
        }
    if made.outcome:  # its parts are listed beside those of the record, as in the bytes
        given = made.outcome
        part = "replaced_by" if given.replaced_by else "payload" if given.payload is not None else "missing"
        said[part] = plain(getattr(given, part))
    if not made.fence:
        said["fence"] = STAMP
    return {"name": name, "stamp": STAMP, "packed": pack(made).hex(), "record": said}


def records() -> list[dict[str, Any]]:
    found = []
    for state in State:
        outcomes = [
            (what, outcome._replace(succeeded=state is State.SUCCEEDED)) for what, outcome in OUTCOMES
        ]
        for what, outcome in outcomes if state.settled else [("open", None)]:
            made = Record(state, owner=OWNER, fence=STAMP - 1, outcome=outcome)
            found.append(record(f"{state.name.lower()}: {what}", made))
    ended = Record(State.SUCCEEDED, owner=OWNER, fence=7, outcome=OUTCOMES[0][1])
    held = Record(State.RUNNING, owner=OWNER, fence=7)
    everything = {name: value for _, parts in PARTS[1:] for name, value in parts.items()}
    for what, parts in [*PARTS, ("everything", everything)]:
        found += [record(f"{one.state.name.lower()}: {what}", one._replace(**parts)) for one in (held, ended)]
    for what, parts in [*OPEN, ("everything, and what is open", {**everything, **OPEN[2][1], **OPEN[0][1]})]:
        found.append(record(f"running: {what}", held._replace(**parts)))
    return found


def sealed() -> list[dict[str, str]]:
    """Return sealed fields of records, with seal keys of each length."""
    found = []
    for size in SIZES:
        seal_key = base64.b64encode(bytes(range(size))).decode()
        for key, clear in (("shop.charge:5d41", b"jnull"), ("shop.größe:1", calls.pack(CALL_OF_A_MESSAGE))):
            box = Seal([seal_key]).close(clear, key)
            found.append({"seal_key": seal_key, "key": key, "clear": clear.hex(), "sealed": box.hex()})
    return found


# --- the file ------------------------------------------------------------------------


def vectors() -> dict[str, Any]:
    values = [
        {"name": name, "value": notation(value), "canonical": rfc8785.dumps(keys.canonical(value)).decode()}
        for name, value in VALUES
    ]
    assert all(refused(value) for _, value in REFUSED)
    return {
        "about": ABOUT,
        "scheme": keys.SCHEME,
        "message": MESSAGE,
        "values": values,
        "refused": [{"name": name, "json": json.dumps(notation(value))} for name, value in REFUSED],
        "calls": [call(given) for given in CALLS],
        "records": records(),
        "sealed": sealed(),
    }


def text() -> str:
    """Return the text of the file: one vector per line, in ASCII, because normal forms of a text look the same."""
    parts = []
    for name, value in vectors().items():
        lines = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else ""
        parts.append(f'"{name}": ' + (f"[\n  {lines}\n]" if lines else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(text())
