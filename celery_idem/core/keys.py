"""Computes idempotency keys and fingerprints from the arguments of calls.

Three steps: *bind* the arguments to the signature, so that positional, keyword and defaulted calls agree; take the
fields of the intent; hash their *canonical form*, which is RFC 8785 JSON of normalised values. Equal values:

* numbers are the same when Python says they are equal (``1``, ``1.0``,
  ``Decimal("1.00")``); a bool is not a number;
* text is compared in Unicode normal form C;
* lists and tuples are the same; an Enum is its value; a dataclass or pydantic model is the dictionary of its fields;
  integer dictionary keys are text, as in JSON;
* aware datetimes are the same when they are the same instant;
* bytes, dates, UUIDs, time spans, sets, addresses and secrets keep their type: ``"2026-11-01"`` is not
  ``date(2026, 11, 1)``;
* naive datetimes, NaN, infinities and any other object are refused.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import inspect
import math
import re
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import Any, Final, NamedTuple

import rfc8785

from celery_idem.core import pydantic_models as models
from celery_idem.core.errors import ConfigurationError, IntentError
from celery_idem.core.model import (
    CALLER_KEY,
    FINGERPRINT,
    FINGERPRINT_ENTRY,
    FINGERPRINT_TAG,
    KEY,
    MESSAGE,
    NO_FINGERPRINT,
    OCCURRENCE,
    PART_OF,
    SCOPE,
    SCOPE_SIZE,
    Fingerprint,
)

SCHEME = 1
"""Version of the rules below that decide which calls share a key. Part of every key."""

VALUE = FINGERPRINT_ENTRY - FINGERPRINT_TAG
"""Bytes of a value's digest in a fingerprint."""

DIGEST = 32
"""Hex digits of the digest in a key: 128 bits. A collision among 1e9 keys has a chance of 1e-21 (64 bits: 2.7 %)."""

MAX_DEPTH = 64
"""Maximum nesting of an argument: far above real calls, far below Python's recursion limit."""

MAX_INT_BITS = 14_000
"""Maximum size of integers: Python converts at most 4,300 digits to text."""

_ADDRESSES = (IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network)

_URLS = frozenset({"pydantic.networks", "pydantic_core._pydantic_core"})
"""Modules of pydantic's URL types, which are not str."""

_SAFE_INT = 2**53 - 1  # the largest exact integer in every JSON reader (RFC 8785, section 3.2.2.3)


class AllArguments:
    """The type of ``ALL_ARGUMENTS``."""

    def __repr__(self) -> str:
        return "ALL_ARGUMENTS"


ALL_ARGUMENTS: Final = AllArguments()
"""As ``intent=``: every argument is part of the intent. Only right where a retry never changes an argument."""

IntentSpec = Iterable[str] | str | Callable[[dict[str, Any]], Mapping[str, Any]] | AllArguments


# --- canonical form ------------------------------------------------------------------


def canonical(value: Any) -> Any:
    """Normalise a value to JSON types, equal for equal arguments.

    Raises:
        IntentError: the value cannot be part of a key; the message says why.
    """
    return _canonical(value, 0)


def _canonical(value: Any, depth: int) -> Any:
    if value is None or value is True or value is False:
        return value
    if isinstance(value, Enum):
        return _canonical(value.value, depth)
    if isinstance(value, str):
        return unicodedata.normalize("NFC", str.__str__(value))  # a subclass may override __str__
    if isinstance(value, int):
        return _whole(int(value))
    if isinstance(value, (float, Decimal)):
        return _number(value)
    if depth >= MAX_DEPTH:
        raise IntentError(f"it is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, (list, tuple)):
        return [_canonical(item, depth + 1) for item in value]
    if isinstance(value, Mapping):
        return _mapping(value, depth)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"$bytes": base64.b64encode(bytes(value)).decode()}
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise IntentError("it is a naive datetime, which names no instant: give it a timezone")
        return {"$datetime": value.astimezone(timezone.utc).isoformat()}
    if isinstance(value, date):
        return {"$date": value.isoformat()}
    if isinstance(value, time):
        if value.tzinfo is not None:
            raise IntentError("it is a time with a timezone, which is no instant: use a datetime")
        return {"$time": value.isoformat()}
    if isinstance(value, timedelta):
        return {"$timedelta": str(value // timedelta(microseconds=1))}
    if isinstance(value, uuid.UUID):
        return {"$uuid": str(value)}
    if isinstance(value, (set, frozenset)):
        items = {rfc8785.dumps(form): form for form in (_canonical(item, depth + 1) for item in value)}
        return {"$set": [items[form] for form in sorted(items)]}  # without duplicates of the canonical form
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _mapping(fields, depth)
    if models.is_model(value):
        fields = models.fields_of(value)
        if type(value).__pydantic_root_model__:
            return _canonical(fields["root"], depth + 1)
        return _mapping(fields, depth)
    if isinstance(value, _ADDRESSES):
        return {"$ip": str(value)}
    if hasattr(type(value), "get_secret_value"):  # the digest, because a canonical form may be shown
        return {"$secret": _hash(_canonical(value.get_secret_value(), depth + 1)).hexdigest()}
    if type(value).__module__ in _URLS and hasattr(value, "unicode_string"):
        return {"$url": str(value)}
    raise IntentError(f"a {type(value).__name__} has no canonical form: pass an id, a number or text instead")


def _mapping(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(key, Enum):
            key = key.value
        if isinstance(key, int) and not isinstance(key, bool):
            key = _text_of(int(key))  # as JSON does
        if not isinstance(key, str):
            raise IntentError(f"it has a dictionary key that is a {type(key).__name__}: use text")
        name = unicodedata.normalize("NFC", key)
        if name.startswith("$"):  # names that begin with $ are ours, such as "$date"
            name = "$" + name
        if name in result:
            raise IntentError("it has two dictionary keys that are the same once normalised")
        result[name] = _canonical(item, depth + 1)
    return result


def _whole(value: int) -> Any:
    if -_SAFE_INT <= value <= _SAFE_INT:
        return value
    return _digits(Decimal(_text_of(value)))


def _text_of(value: int) -> str:
    if value.bit_length() > MAX_INT_BITS:
        raise IntentError(f"it is an integer of more than {MAX_INT_BITS} bits")
    return str(value)


def _number(value: float | Decimal) -> Any:
    if isinstance(value, Decimal):
        if not value.is_finite():
            raise IntentError("it is NaN or infinite")
        if not value:
            return 0  # whatever its exponent is
        if -400 < value.adjusted() < 400:  # a float may be equal; outside of this range none is
            number = float(value)
            if math.isfinite(number) and Decimal(number) == value:
                return _number(number)
            if value == value.to_integral_value():
                return _whole(int(value))
        return _digits(value)
    if not math.isfinite(value):
        raise IntentError("it is NaN or infinite")
    return _whole(int(value)) if value.is_integer() else float(value)


def _digits(value: Decimal) -> dict[str, str]:
    """Return a number outside of JSON's range as digits without trailing zeros and a power of ten."""
    sign, digits, exponent = value.as_tuple()
    text = "".join(map(str, digits)).lstrip("0")
    stripped = text.rstrip("0")
    power = int(exponent) + len(text) - len(stripped)
    return {"$number": f"{'-' if sign else ''}{stripped}E{power}"}


def _json(value: Any) -> bytes:
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as error:
        raise IntentError(f"it has no canonical JSON form: {error}") from None


def _hash(value: Any) -> hashlib._Hash:
    return hashlib.sha256(_json(value))


@lru_cache(maxsize=1024)  # more than an application's tasks
def _hash_of_start(*items: Any) -> hashlib._Hash:
    """Return the hash of a JSON list's beginning. Callers add the rest to a copy."""
    return hashlib.sha256(_json(list(items))[:-1])


def _named(parameter: str, value: Any, reader: models.Reader | None = None) -> Any:
    """Return the canonical form of an argument. Errors name the parameter and never the value."""
    try:
        form = canonical(value if reader is None else reader(value))
        if type(form) is str:
            form.encode()  # the only check that text needs
        else:
            rfc8785.dumps(form)
    except IntentError as error:
        raise _refused(parameter, error) from None
    except (rfc8785.CanonicalizationError, UnicodeEncodeError):
        raise _refused(parameter, "its text is not valid Unicode") from None
    except Exception as error:  # the object's own methods fail
        raise _refused(parameter, f"reading it failed with {type(error).__name__}") from error
    return form


def _read(parameter: str, value: Any, reader: models.Reader) -> Any:
    try:
        return reader(value)
    except IntentError as error:
        raise _refused(parameter, error) from None
    except Exception as error:
        raise _refused(parameter, f"reading it failed with {type(error).__name__}") from error


_UNSTEADY = "its model's validators return another value each time"


def _refused(parameter: str, why: object) -> IntentError:
    return IntentError(
        f"The parameter {parameter!r} cannot be part of an idempotency key: {why}.", None, parameter
    )


# --- declaration ---------------------------------------------------------------------


class Declaration(NamedTuple):
    """A task's checked declaration of its intent. ``declare`` makes it.

    Attributes:
        task: the name in the task's keys (see ``identity_name``).
        names: every name that its messages may have, the present one first.
    """

    task: str
    names: tuple[str, ...]
    signature: inspect.Signature
    fields: tuple[str, ...] | None
    compute: Callable[[dict[str, Any]], Mapping[str, Any]] | None
    must_match: tuple[str, ...]
    secret: tuple[str, ...]
    version: int | str
    readers: Mapping[str, models.Reader]
    defaults: Mapping[str, Any]

    def bind(self, args: Iterable[Any] | None, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the arguments by parameter name, with defaults and the contents of ``**kwargs``.

        Raises:
            TypeError: the call does not fit the signature.
        """
        check_call(self.task, args, kwargs)
        bound = self.signature.bind(*(args or ()), **(kwargs or {}))
        parameters = self.signature.parameters
        if len(bound.arguments) < len(parameters):  # faster when all are given
            for name, value in self.defaults.items():
                bound.arguments.setdefault(name, value)
            bound.apply_defaults()
        arguments = bound.arguments
        for name, parameter in parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                extra = arguments.pop(name)
                for clash in extra.keys() & arguments.keys():  # def f(a, /, **rest) takes f(1, a=2)
                    raise IntentError(
                        f"{self.task} was called with two arguments that are both called {clash!r}, so its key "
                        "cannot tell them apart: rename the positional parameter.",
                        None,
                        clash,
                    )
                arguments.update(extra)
        return arguments

    def intent(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the canonical fields of the intent. Raises ``IntentError``: a value cannot be part of a key."""
        if self.compute is not None:
            forms = self._computed(self.compute, arguments)
            if any(reader.runs_code for reader in self.readers.values()):
                again = self._computed(self.compute, arguments)
                for name in (n for n in (*forms, *again) if forms.get(n) != again.get(n)):
                    raise _refused(name, _UNSTEADY)
            return forms
        names = arguments if self.fields is None else self.fields
        missing = [name for name in names if name not in arguments]
        if missing:
            raise IntentError(
                f"{self.task} was called without {missing[0]!r}, which is part of its intent.",
                None,
                missing[0],
            )
        return {name: self._form(name, arguments[name]) for name in names}

    def _computed(self, compute: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
        given = dict(arguments)
        for name in self.readers.keys() & given.keys():
            given[name] = _read(name, given[name], self.readers[name])
        fields = compute(given)
        if not isinstance(fields, Mapping) or not fields:
            raise IntentError(
                f"intent= of {self.task} returned {type(fields).__name__!r} instead of a dictionary with at "
                "least one field."
            )
        return {str(name): _named(str(name), value) for name, value in fields.items()}

    def _form(self, name: str, value: Any) -> Any:
        """Return the canonical form of an argument, read as a model where Celery does so."""
        reader = self.readers.get(name)
        form = _named(name, value, reader)
        if reader is not None and reader.runs_code and _named(name, value, reader) != form:
            raise _refused(name, _UNSTEADY)
        return form

    def key(
        self,
        namespace: str,
        arguments: dict[str, Any],
        scope: str | None = None,
        occurrence: str | None = None,
        caller_key: str | None = None,
        part_of: str | None = None,
    ) -> str:
        """Return the idempotency key: the task's name, a colon, and 32 hex digits.

        Args:
            scope: whose action it is, for example a tenant.
            occurrence: which of several intended repetitions.
            caller_key: the caller's own key, which replaces the fields.
            part_of: the action with a caller's own key that made this call.

        Raises:
            IntentError: a value cannot be part of a key.
        """
        fields = {} if caller_key is not None else self.intent(arguments)
        # One JSON list [SCHEME, namespace, …, fields]. All calls of a task share its beginning.
        items: list[Any] = [
            label("scope", scope),
            label("occurrence", occurrence),
            label("idempotency_key", caller_key),
            fields,
        ]
        if part_of is not None and caller_key is None:
            items.append(label("part_of", part_of))
        digest = _hash_of_start(SCHEME, namespace, self.task, str(self.version)).copy()
        digest.update(b"," + _json(items)[1:])
        return f"{self.task}:{digest.hexdigest()[:DIGEST]}"

    def fingerprint(self, arguments: dict[str, Any], caller_key: str | None = None) -> Fingerprint:
        """Return digests of what must be equal: ``must_match``, or with the caller's own key every argument."""
        names = sorted(arguments) if caller_key is not None else self.must_match
        if not names:
            return NO_FINGERPRINT
        return Fingerprint(tuple(names), b"".join(self._entry(name, arguments) for name in names))

    def continued(self, sent: Any, arguments: dict[str, Any], caller_key: str | None = None) -> Fingerprint:
        """Return the fingerprint of a message that continues an intent, from the hex in its header.

        Parameters that are not in the header (another release sent it) are added with their present values.
        """
        try:
            first = bytes.fromhex(sent)
        except (TypeError, ValueError):
            first = b""
        if len(first) % FINGERPRINT_ENTRY:
            first = b""
        known = [first[i : i + FINGERPRINT_TAG] for i in range(0, len(first), FINGERPRINT_ENTRY)]
        names = {
            _tag(self.task, name): name for name in (arguments if caller_key is not None else self.must_match)
        }
        added = sorted(name for tag, name in names.items() if tag not in known)
        return Fingerprint(
            (*(names.get(tag, tag.hex()) for tag in known), *added),
            first + b"".join(self._entry(name, arguments) for name in added),
        )

    def _entry(self, name: str, arguments: dict[str, Any]) -> bytes:
        value = _hash([SCHEME, self.task, name, self._form(name, arguments.get(name))]).digest()[:VALUE]
        return _tag(self.task, name) + value


def _tag(task: str, name: str) -> bytes:
    return _hash([SCHEME, task, name]).digest()[:FINGERPRINT_TAG]


# --- scope, occurrence, caller's key -------------------------------------------------

LABELS = {"scope": SCOPE, "occurrence": OCCURRENCE, "idempotency_key": CALLER_KEY}
"""Options that are part of a call's identity, with their message headers."""

IDENTITY = frozenset((*LABELS.values(), PART_OF))
"""Message headers that are part of a call's identity."""

MADE = frozenset((KEY, FINGERPRINT, MESSAGE, *IDENTITY))
"""Message headers that are new for each call, unless it continues an intent."""


def label(what: str, value: Any) -> str | None:
    """Normalise a scope, an occurrence or a caller's key to text in NFC. An int or Enum value becomes text.

    Everything that receives one uses this, so that header, key, record and look-up agree.

    Raises:
        IntentError: it is of another type, or empty.
    """
    if value is None:
        return None
    if isinstance(value, Enum):
        return label(what, value.value)
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise IntentError(f"{what} must be text, not {type(value).__name__}.", None, what)
    try:
        text = str.__str__(value) if isinstance(value, str) else _text_of(int(value))
        text.encode()
    except IntentError as error:
        raise IntentError(f"{what} cannot be part of an idempotency key: {error}.", None, what) from None
    except UnicodeEncodeError:
        raise IntentError(f"{what} is not valid Unicode.", None, what) from None
    if not text:
        raise IntentError(f"{what} is empty: give None instead.", None, what)
    return unicodedata.normalize("NFC", text)


def check_call(task: str, args: Any, kwargs: Any) -> None:
    """Refuse arguments that Python would unpack wrongly: a dictionary into keys, text into letters.

    Raises:
        TypeError: ``args`` is not a list or tuple, or ``kwargs`` is not a mapping.
    """
    if args is not None and not isinstance(args, (list, tuple)):
        raise TypeError(
            f"{task}: args must be a list or tuple, not {type(args).__name__}. Give named arguments as kwargs={{…}}, "
            "one positional argument as args=(value,)."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"{task}: kwargs must be a dictionary, not {type(kwargs).__name__}. Give positional arguments as args=(…)."
        )


def labelled(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the options of a call (``scope``, …) as message headers.

    Raises:
        IntentError: one of them has no normal form.
    """
    found = ((header, label(name, given.get(name))) for name, header in LABELS.items())
    return {header: value for header, value in found if value is not None}


def identity(headers: Mapping[str, Any], message: str | None) -> dict[str, str]:
    """Return the identity in a message's headers, in normal form.

    Celery copies a message's headers to the messages that its task sends. In a copy, scope and occurrence hold, and the
    key does not; with a caller's own key, the call becomes a part of that action.

    Args:
        message: the message's id; None if it has none yet.

    Raises:
        IntentError: one of them has no normal form.
    """
    own = labelled({name: headers.get(header) for name, header in LABELS.items()})
    part_of = label("part_of", headers.get(PART_OF))
    if headers.get(MESSAGE, message) != message:
        part_of = own.pop(CALLER_KEY, None) or part_of
        if part_of is not None:
            part_of = label("part_of", headers.get(KEY)) or part_of
    if part_of is not None:
        own[PART_OF] = part_of
    return own


def key_of(
    declaration: Declaration, namespace: str, arguments: dict[str, Any], own: Mapping[str, str]
) -> str:
    """Return the key of a call with the identity ``own`` (see ``identity``)."""
    return declaration.key(
        namespace, arguments, own.get(SCOPE), own.get(OCCURRENCE), own.get(CALLER_KEY), own.get(PART_OF)
    )


def scope_digest(namespace: str, scope: str | None) -> bytes:
    """Return the digest of a scope for the record; empty for none. ``scope``: in normal form."""
    return b"" if scope is None else _hash([SCHEME, namespace, scope]).digest()[:SCOPE_SIZE]


def declare(
    task: str,
    signature: inspect.Signature,
    intent: IntentSpec,
    must_match: Iterable[str] | str = (),
    secret: Iterable[str] | str = (),
    version: int | str = 1,
    readers: Mapping[str, models.Reader] | None = None,
    renamed: Mapping[str, str] | None = None,
    aliases: Iterable[str] | str = (),
) -> Declaration:
    """Check a declaration against the task's signature.

    Args:
        aliases: other names of the task, the oldest first.
        readers: readers of parameters that Celery turns into pydantic models.
        renamed: a wrapped function's names of the signature's parameters.

    Raises:
        ConfigurationError: an unknown name (the message lists the real ones), or an
            intent that names nothing.
    """
    fields: tuple[str, ...] | None = None
    compute = None
    other = renamed or {}
    if isinstance(intent, AllArguments):
        pass
    elif callable(intent):
        compute = intent
    else:
        fields = _names(task, "intent", intent, signature, other)
        if not fields:
            raise ConfigurationError(
                f"{task}: intent= names no parameter, so every call would be the same action. Name what tells "
                "two actions apart, or write intent=ALL_ARGUMENTS."
            )
    known_as = _names_given(task, aliases)
    return Declaration(
        task=identity_name(task, known_as),
        names=tuple(dict.fromkeys((task, *known_as))),
        signature=signature,
        fields=fields,
        compute=compute,
        must_match=tuple(sorted(_names(task, "must_match", must_match, signature, other))),
        secret=_names(task, "secret", secret, signature, other),
        version=version,
        readers=readers or {},
        defaults=_settled_defaults(task, signature),
    )


def identity_name(task: str, aliases: tuple[str, ...]) -> str:
    """Return the name that a task's keys are derived under: its first one, so that its intents outlive a new name."""
    return aliases[0] if aliases else task


def _names_given(task: str, aliases: Any) -> tuple[str, ...]:
    names = (aliases,) if isinstance(aliases, str) else aliases
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) and name for name in names):
        raise ConfigurationError(f"{task}: aliases= must be names of the task, such as ('shop.old',).")
    return tuple(names)


def _settled_defaults(task: str, signature: inspect.Signature) -> dict[str, Any]:
    """Return default models without generated values: each process generated another one at import."""
    try:
        return {
            name: models.settled(parameter.default)
            for name, parameter in signature.parameters.items()
            if models.is_model(parameter.default)
        }
    except IntentError as error:
        raise ConfigurationError(
            f"{task}: a default cannot be part of an idempotency key: {error}."
        ) from None


def _names(
    task: str, option: str, given: Any, signature: inspect.Signature, renamed: Mapping[str, str]
) -> tuple[str, ...]:
    if isinstance(given, str):
        given = (given,)
    try:
        names = tuple(renamed.get(name, name) if isinstance(name, str) else name for name in given)
    except TypeError:
        raise ConfigurationError(
            f"{task}: {option}= must be parameter names, not {type(given).__name__}."
        ) from None
    parameters = signature.parameters
    open_ended = next((n for n, p in parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    real = [n for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = next((n for n, p in parameters.items() if p.kind is inspect.Parameter.VAR_POSITIONAL), None)
    for name in names:
        if name == open_ended:
            raise ConfigurationError(
                f"{task}: {option}= names **{name}, which takes every argument that has no parameter of its own. Name "
                "the arguments that callers give, or write them as parameters."
            )
        if not isinstance(name, str) or (name not in real and open_ended is None):
            raise ConfigurationError(
                f"{task}: {option}= names {name!r}, which is not a parameter. It has: {', '.join(real) or 'none'}."
            )
        if name not in real and rest is not None and rest not in names:
            raise ConfigurationError(
                f"{task}: {option}= names {name!r}, which callers may give by position too, and in *{rest} it has no "
                "name. Write it as a parameter of its own, or say signature= a function (or an inspect.Signature) "
                "with the parameters that callers give, without self."
            )
    return names


_HEX = frozenset("0123456789abcdef")


def task_of(key: str) -> str | None:
    """Return the task's name in an idempotency key, or None if it is not one."""
    task, _, digest = key.rpartition(":")
    return task if task and len(digest) == DIGEST and _HEX.issuperset(digest) else None


def downstream_key(key: str, name: str) -> str:
    """Return a stable key for a service that the action calls: ASCII, at most 97 characters, for an HTTP header."""
    label = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:64]
    return f"{label}-{hashlib.sha256(rfc8785.dumps([key, name])).hexdigest()[:DIGEST]}"
