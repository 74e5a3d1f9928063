"""Bytes: a record as one packed value, and an outcome's value or error.

Record, version 1, all integers big-endian::

    owner 12 | version 1 | state 1 | parts 2 | attempts 2 | crashes 1 | fence 8 | parts…

``parts`` says which optional parts follow, in the order of ``_PARTS``; the last one
is the outcome's payload and takes the rest. A finished record of a task without
``must_match`` is 27 + 16 bytes and its payload. Read it without this package:
``docs/explanation/record.md``.

A payload is one byte that names a serializer (``_SERIALIZERS``; ``n``: its name follows) and its
data. Nothing is unpickled unless the application accepts pickle for results.
"""

from __future__ import annotations

import builtins
import contextlib
import struct
import sys
from collections.abc import Collection, Iterator
from functools import lru_cache
from json import JSONDecoder
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any, NamedTuple

from kombu import serialization
from kombu.exceptions import KombuError, SerializerNotInstalled
from kombu.utils import json as kombu_json

from celery_idem.errors import StoreError
from celery_idem.intent import FINGERPRINT_ENTRY, SCOPE_SIZE, Note, Noticed, Outcome, Record, State, Step

_VERSION = 1
_HEAD = struct.Struct(">12sBBHHBQ")
_LENGTH = struct.Struct(">I")
_TIME = struct.Struct(">Q")

STATE_AT = 13
"""Offset of the state byte in a packed record: what a store may filter a scan by."""

# Bits of ``parts``. The order is the order in the record.
_LEASE = 1 << 0
_UUID = 1 << 1
_TASK_ID = 1 << 2
_FINGERPRINT = 1 << 3
_STEPS = 1 << 4
_OPEN_STEPS = 1 << 5
_ASKING = 1 << 6
_REASON = 1 << 7
_NOTES = 1 << 8
_DIGESTS = 1 << 9
_MISSING = 1 << 10
_PAYLOAD = 1 << 11
_NOTICED = 1 << 12  # this and what follows stand before the outcome, which comes last
_SCOPE = 1 << 13
_KNOWN = (1 << 14) - 1


def pack(record: Record) -> bytes:
    """A record as the bytes a store keeps."""
    (
        state,
        owner,
        task_id,
        fence,
        attempts,
        crashes,
        lease,
        fingerprint,
        steps,
        open_steps,
        asking,
        reason,
        notes,
        digests,
        noticed,
        scope,
        outcome,
    ) = record  # taken apart once: a named tuple's fields are slow to read by name
    parts = 0
    tail: list[bytes] = []
    if lease:
        parts |= _LEASE
        tail.append(_TIME.pack(lease))
    if task_id:
        packed = _uuid_bytes(task_id)
        if packed is not None:
            parts |= _UUID
            tail.append(packed)
        else:
            parts |= _TASK_ID
            tail.append(_text(task_id))
    if fingerprint:
        parts |= _FINGERPRINT
        tail.append(_blob(fingerprint))
    if steps:
        parts |= _STEPS
        tail.append(_LENGTH.pack(len(steps)))
        for name, payload in steps:
            tail += (_text(name), _blob(payload))
    if open_steps:
        parts |= _OPEN_STEPS
        tail.append(_LENGTH.pack(len(open_steps)))
        tail += map(_text, open_steps)
    if asking:
        parts |= _ASKING
        tail.append(asking)
    if reason:
        parts |= _REASON
        tail.append(_text(reason))
    if notes:
        parts |= _NOTES
        tail.append(_LENGTH.pack(len(notes)))
        for at, by, what, evidence in notes:
            tail += (_TIME.pack(at), _text(by), _text(what), _text(evidence))
    if digests:
        parts |= _DIGESTS
        tail.append(_blob(digests))
    if noticed is not None:
        parts |= _NOTICED
        tail += map(_TIME.pack, noticed)
    if scope:
        parts |= _SCOPE
        tail.append(scope)
    if outcome is not None:
        if outcome.payload is None:
            parts |= _MISSING
            tail.append(_text(outcome.missing))
        else:
            parts |= _PAYLOAD
            tail.append(outcome.payload)
    head = _HEAD.pack(owner, _VERSION, state, parts, attempts, crashes, fence)
    return b"".join((head, *tail))


def unpack(value: bytes, stamp: int, key: str) -> Record:
    """The record in a stored value.

    Args:
        stamp: the store's time of the last write: the fence of a record that was
            written before anybody knew the store's time.
        key: for the error message.

    Raises:
        StoreError: the value is not a record that this version can read.
    """
    try:
        return _unpack(value, stamp)
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise StoreError(
            f"The store holds something at {key} that is not a record of celery_idem ({error}). Nothing was "
            "run. Look at the value; if it is not needed, remove it with `celery -A proj idem forget`.",
            key,
        ) from None


def _unpack(value: bytes, stamp: int) -> Record:
    owner, version, state, parts, attempts, crashes, fence = _HEAD.unpack_from(value)
    if version != _VERSION or parts & ~_KNOWN:
        raise ValueError(f"format version {version}, parts {parts:#x}")
    state = State(state)
    read = _Reader(value, _HEAD.size)
    lease = read.time() if parts & _LEASE else 0
    task_id = ""
    if parts & _UUID:
        task_id = _uuid_text(read.take(16))
    elif parts & _TASK_ID:
        task_id = read.text()
    fingerprint = read.blob() if parts & _FINGERPRINT else b""
    if len(fingerprint) % FINGERPRINT_ENTRY:
        raise ValueError("fingerprint of a wrong length")
    steps: tuple[Step, ...] = ()
    if parts & _STEPS:
        steps = tuple(Step(read.text(), read.blob()) for _ in range(read.count()))
    open_steps: tuple[str, ...] = ()
    if parts & _OPEN_STEPS:
        open_steps = tuple(read.text() for _ in range(read.count()))
    asking = read.take(12) if parts & _ASKING else b""
    reason = read.text() if parts & _REASON else ""
    notes: tuple[Note, ...] = ()
    if parts & _NOTES:
        notes = tuple(Note(read.time(), read.text(), read.text(), read.text()) for _ in range(read.count()))
    digests = read.blob() if parts & _DIGESTS else b""
    noticed = Noticed(read.time(), read.time()) if parts & _NOTICED else None
    scope = read.take(SCOPE_SIZE) if parts & _SCOPE else b""
    outcome = None
    if parts & _MISSING:
        outcome = Outcome(state is State.SUCCEEDED, None, read.text())
    elif parts & _PAYLOAD:
        outcome = Outcome(state is State.SUCCEEDED, read.rest())
    if not read.at_end() or (outcome is not None) != state.settled:
        raise ValueError("state and parts disagree")
    return Record(
        state=state,
        owner=owner,
        task_id=task_id,
        fence=fence or stamp,
        attempts=attempts,
        crashes=crashes,
        lease=lease,
        fingerprint=fingerprint,
        steps=steps,
        open_steps=open_steps,
        asking=asking,
        reason=reason,
        notes=notes,
        digests=digests,
        noticed=noticed,
        scope=scope,
        outcome=outcome,
    )


class _Reader:
    """Reads parts one after the other; anything short is a ValueError."""

    def __init__(self, value: bytes, at: int) -> None:
        self._value = value
        self._at = at

    def take(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._value):
            raise ValueError("cut short")
        taken = self._value[self._at : end]
        self._at = end
        return taken

    def time(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def count(self) -> int:
        count = int.from_bytes(self.take(4), "big")
        if count > len(self._value):  # every entry takes a byte at least: no huge loop on nonsense
            raise ValueError("count too large")
        return count

    def blob(self) -> bytes:
        return self.take(int.from_bytes(self.take(4), "big"))

    def text(self) -> str:
        return self.blob().decode("utf-8", "surrogatepass")

    def rest(self) -> bytes:
        return self.take(len(self._value) - self._at)

    def at_end(self) -> bool:
        return self._at == len(self._value)


def _blob(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


def _text(text: str) -> bytes:
    return _blob(text.encode("utf-8", "surrogatepass"))


@lru_cache(maxsize=256)  # a record is packed for the claim and again for its end: as many as run at once
def _uuid_bytes(task_id: str) -> bytes | None:
    """The 16 bytes of a task id in uuid's usual spelling; None for any other id."""
    if len(task_id) != 36:
        return None
    try:
        packed = bytes.fromhex(task_id.replace("-", ""))
    except ValueError:
        return None
    usual = len(packed) == 16 and task_id[8:24:5] == "----" and task_id == task_id.lower()
    return packed if usual else None


def _uuid_text(packed: bytes) -> str:
    """What str(uuid.UUID(bytes=packed)) gives, at a sixth of the time."""
    h = packed.hex()
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


# --- outcomes ------------------------------------------------------------------------

_SERIALIZERS = {"json": b"j", "pickle": b"p", "yaml": b"y", "msgpack": b"m"}
_NAMES = {code: name for name, code in _SERIALIZERS.items()}
_NAMED = b"n"
"""Any other serializer of kombu's registry: a byte of length and its name come before the data."""

_SIMPLE = (type(None), bool, str)
"""Types that every serializer gives back as they are: no need to decode what was just encoded."""


_NULL = b"jnull"
_TO_JSON = kombu_json.JSONEncoder()
_MARKS = {"__type__", "__value__"}
"""Keys of the dictionaries in which kombu's JSON keeps a date, a UUID and the like."""

_LITERAL = "idem:dict"
"""The mark of a dictionary that only looks like one of those: its two values follow."""


def _from_mark(found: dict[str, Any]) -> Any:
    """kombu's object hook, and what it would take for a mark of its own."""
    if len(found) != 2 or found.keys() != _MARKS:
        return found
    if found["__type__"] == _LITERAL:
        return dict(zip(("__type__", "__value__"), found["__value__"], strict=True))
    return kombu_json.object_hook(found)


_FROM_JSON = JSONDecoder(object_hook=_from_mark)
"""What ``kombu.utils.json`` makes anew for each value. They keep nothing between values."""


def _to_json(value: Any) -> str:
    text: str = _TO_JSON.encode(value)
    if '"__type__"' in text:  # marks, or a value that imitates them
        literal = _literal(value)
        if literal is not value:
            text = _TO_JSON.encode(literal)
    return text


def _literal(value: Any) -> Any:
    """The same value, with dictionaries that would be read as marks marked themselves."""
    if isinstance(value, dict):
        new = {name: _literal(item) for name, item in value.items()}
        if new.keys() == _MARKS:
            return {"__type__": _LITERAL, "__value__": [new["__type__"], new["__value__"]]}
        return new if any(new[name] is not item for name, item in value.items()) else value
    if isinstance(value, (list, tuple)):
        items = [_literal(item) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value


class NotStorable(Exception):
    """A value cannot be stored; the message says why."""


class Codec(NamedTuple):
    """Turns values and errors into payloads and back.

    Attributes:
        serializer: kombu's name of the serializer for new payloads.
        accept: serializers that may be read.
        max_bytes: the largest payload.
        kombus_json: "json" is what kombu registers under that name, and not the application's own.
    """

    serializer: str = "json"
    accept: Collection[str] = ("json",)
    max_bytes: int = 1 << 20
    kombus_json: bool = True

    def unusable(self) -> str:
        """Why no result could be written and read again; "" where it can. Asks kombu's registry as it is now."""
        try:
            if self.serializer not in serialization.registry.name_to_type:
                raise SerializerNotInstalled
            serialization.dumps(None, self.serializer)
        except SerializerNotInstalled:
            return f"no serializer {self.serializer!r} is registered with kombu in this process"
        except Exception:  # noqa: S110  # it is there, and None is not for it
            pass
        if self.serializer not in self.accept:
            return f"results written with the serializer {self.serializer!r} could not be read again"
        return ""

    def encode(self, value: Any) -> bytes:
        """The payload of a value.

        Raises:
            NotStorable: no serializer takes it, or it is too large. Nothing else, whatever code the value
                brings along, but for an order to exit.
        """
        if value is None and self.serializer == "json" and self.kombus_json and "json" in self.accept:
            return _NULL  # what most tasks return
        try:
            payload = self._encoded(value)
        except NotStorable:
            raise
        except Exception:  # the value's own, or a soft time limit that fired here: that fires once
            try:
                payload = self._encoded(value)
            except NotStorable:
                raise
            except Exception as error:
                raise NotStorable(f"encoding it raised {type(error).__name__}") from None
        if len(payload) > self.max_bytes:
            raise NotStorable(f"{len(payload)} bytes are more than idem_max_result_bytes = {self.max_bytes}")
        return payload

    def _encoded(self, value: Any) -> bytes:
        name = self.serializer
        if name not in self.accept:
            raise NotStorable(self.unusable())
        json = (
            name == "json" and self.kombus_json
        )  # by far the most common; kombu's way costs four times as much
        try:
            data = _to_json(value) if json else serialization.dumps(value, name)[2]
        except (KombuError, TypeError, ValueError, RecursionError, AttributeError) as error:
            # Only JSON's own error says what it is about; YAML's would show the whole value.
            why = _text_of(error) if json else type(error).__name__
            raise NotStorable(f"the {name} serializer does not take it: {why}") from None
        code = _SERIALIZERS.get(name)
        if code is None or (name == "json" and not json):
            code = _NAMED + bytes((len(name.encode()),)) + name.encode()
        if isinstance(data, str):
            return code + data.encode("utf-8", "surrogatepass")
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise NotStorable(f"the {name} serializer gave {type(data).__name__}, not text or bytes")
        return code + bytes(data)

    def decode(self, payload: bytes, key: str | None = None) -> Any:
        """The value of a payload.

        Raises:
            StoreError: the payload cannot be read, or its serializer is not accepted.
        """
        if payload == _NULL and "json" in self.accept:
            return None
        name, data = _NAMES.get(payload[:1]), payload[1:]
        if payload[:1] == _NAMED:
            end = 2 + payload[1] if len(payload) > 1 else 1
            name, data = payload[2:end].decode("utf-8", "replace"), payload[end:]
        if name is None or name not in self.accept:
            raise StoreError(
                f"The stored result of {key} was written with the serializer {name or payload[:1]!r}, which "
                "this application does not accept. Add it to result_accept_content.",
                key,
            )
        try:
            if payload[:1] == b"j":
                return _FROM_JSON.decode(data.decode("utf-8", "surrogatepass"))
            content_type = serialization.registry.name_to_type[name]
            return serialization.loads(data, content_type, "binary", accept={content_type})
        except Exception as error:
            raise StoreError(f"The stored result of {key} cannot be read: {error}.", key) from error

    def kept(self, value: Any) -> tuple[bytes, Any]:
        """The payload of a value, and what a replay of it will return: every caller gets the same, the
        first included.

        Raises:
            NotStorable: it cannot be stored, or could not be read again.
        """
        payload = self.encode(value)
        if type(value) in _SIMPLE:
            return payload, value
        for last in (False, True):  # as in encode
            try:
                return payload, self.decode(payload)
            except Exception:
                if last:  # a __json__ that writes marks of its own, a decoder that does not fit its encoder
                    break
        raise NotStorable(f"what the {self.serializer} serializer makes of it cannot be read again")

    def encode_error(self, error: BaseException) -> bytes:
        """The payload of an exception: its class, arguments and attributes, in JSON whatever the serializer."""
        try:
            payload = b"j" + _to_json(_form_of(error)).encode("utf-8", "surrogatepass")
        except (
            Exception
        ):  # an author's property, group or number that fails: the end of the body is known all the same
            payload = b""
        if payload and len(payload) <= self.max_bytes:
            return payload
        short = _text_of(error)[:1000]
        return b"j" + _to_json({**_named(error), "text": short, "args": [short]}).encode(
            "utf-8", "surrogatepass"
        )

    def decode_error(self, payload: bytes, key: str | None = None) -> Exception:
        """The exception of a payload, with ``idem_replayed`` true: same class, arguments, attributes and text
        where the class is loaded here.

        Only classes of modules that are already imported are looked at, only exception classes are
        used, and no constructor of theirs is run, so a forged record cannot run anything. An unknown
        class becomes a new one of that name, and so does one that Celery or the interpreter would
        take for a message to itself (``_SPECIAL``).
        """
        try:
            return rebuilt(_FROM_JSON.decode(payload[1:].decode("utf-8", "surrogatepass")))
        except Exception as error:
            raise StoreError(f"The stored error of {key} cannot be read: {error}.", key) from error


# --- errors ----------------------------------------------------------------------------

_SPECIAL = frozenset(
    {
        # Raised by a replay, these would stop the worker's main process, reject or requeue the message for ever, count
        # as a retry, a revocation or a time limit, or end a generator. By name, because nothing here imports Celery.
        # What is no Exception (SystemExit and kin) is special as well.
        ("builtins", "MemoryError"),
        ("builtins", "StopIteration"),
        ("builtins", "StopAsyncIteration"),
        ("celery.exceptions", "TaskPredicate"),  # Ignore, Reject, Retry
        ("billiard.exceptions", "SoftTimeLimitExceeded"),
        ("billiard.exceptions", "TimeLimitExceeded"),
        ("billiard.exceptions", "WorkerLostError"),
        ("billiard.exceptions", "Terminated"),
        ("billiard.exceptions", "RestartFreqExceeded"),
        ("billiard.exceptions", "CoroStop"),
    }
)
"""Classes that a replay may not raise, and their subclasses: a stand-in of the same name is raised instead."""

_STAND_IN_MODULE = "celery_idem.replayed"
"""Module of a stand-in for a special class. There is none of that name: with the class' own module, Celery's
result backend would give its caller the special class after all."""

_GROUP: tuple[type[BaseException], ...] = tuple(
    filter(None, [getattr(builtins, "BaseExceptionGroup", None)])  # since 3.11
)
_MEMBERS = (MemberDescriptorType, GetSetDescriptorType)
_HEAP_TYPE = 1 << 9
"""Py_TPFLAGS_HEAPTYPE: a class that is not built into the interpreter or an extension."""


def _named(error: BaseException) -> dict[str, Any]:
    cls = type(error)
    return {"module": str(cls.__module__), "type": cls.__qualname__}


def _form_of(error: BaseException) -> dict[str, Any]:
    """An exception as plain values. What JSON does not take is empty, or its text."""
    text = _text_of(error)
    form: dict[str, Any] = {**_named(error), "text": text}
    if isinstance(error, _GROUP):
        form["group"] = [_form_of(one) for one in error.exceptions]  # type: ignore[attr-defined,unused-ignore]
        form["args"] = [str(error.args[0])]
    else:
        form["args"] = list(error.args) if _fits(error.args) else [text]
    kept = {name: value if _fits(value) else None for name, value in _attributes(error)}
    if kept:
        form["attributes"] = kept
        form["tuples"] = [name for name, value in kept.items() if isinstance(value, tuple)]
    return form


def _fits(value: Any) -> bool:
    try:
        _to_json(value)
    except Exception:  # a response, a connection, anything with code of its own
        return False
    return True


def _attributes(error: BaseException) -> Iterator[tuple[str, Any]]:
    """Those in its dictionary, and those beside it: ``errno`` of an OSError, slots."""
    for cls in type(error).__mro__:
        if cls is BaseException or cls in _GROUP:
            break
        for name, member in vars(cls).items():
            if isinstance(member, _MEMBERS) and not name.startswith("__"):
                with contextlib.suppress(Exception):
                    value = member.__get__(error)
                    if value is not None:
                        yield name, value
    for name, value in vars(error).items():
        if name not in _OWN_ATTRIBUTES:
            yield name, value


_OWN_ATTRIBUTES = ("idem_replayed", "_idem_form")


class _StandIn(Exception):
    """Of a class that is not here or must not be raised: its name, text and attributes, and nothing it does."""


def rebuilt(form: dict[str, Any]) -> Exception:
    """An exception from the plain values of ``_form_of``. Runs no constructor but the interpreter's own."""
    module, name, text, args = str(form["module"]), str(form["type"]), str(form["text"]), list(form["args"])
    if "group" in form:
        args.append([rebuilt(one) for one in form["group"]])
    found: Any = _class_of(module, name)
    if found is not None and not _special(found):
        exc: Exception | None = _blank(found, args, form)
        if exc is not None and _text_of(exc) == text:
            return exc
        # Its text needs more than was kept: a subclass that knows it.
        if _plain(found):
            exc = _blank(_worded(found, found.__module__, name), args, form) or exc
        if exc is not None:
            return exc
    special = found is not None and _special(found)
    stand_in: Exception | None = _blank(
        _worded(_StandIn, _STAND_IN_MODULE if special else module, name), args, form
    )
    assert stand_in is not None
    return stand_in


def _class_of(module: str, name: str) -> type[BaseException] | None:
    """The exception class of that name, where its module is imported here; else None.

    Looked up without ``getattr``, with which a module may import more and a class may run code.
    """
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        try:
            found = object.__getattribute__(found, "__dict__").get(part)
        except AttributeError:
            return None
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def _special(cls: type[BaseException]) -> bool:
    return not issubclass(cls, Exception) or any(
        (base.__module__, base.__name__) in _SPECIAL for base in cls.__mro__
    )


def _plain(cls: type[BaseException]) -> bool:
    """A subclass of it can be made without running code of its author's."""
    return type(cls) is type and not any("__init_subclass__" in vars(base) for base in cls.__mro__[:-1])


def _blank(cls: type[BaseException], args: list[Any], form: dict[str, Any]) -> Any:
    """An instance with these arguments and attributes, made by the first built-in class below; None: it cannot be."""
    builtin: Any = next(base for base in cls.__mro__ if not base.__flags__ & _HEAP_TYPE)
    attributes, tuples = form.get("attributes") or {}, form.get("tuples") or ()
    try:
        exc = builtin.__new__(cls, *args)
        BaseException.args.__set__(exc, tuple(args))  # type: ignore[attr-defined]
        members = {n: m for base in cls.__mro__ for n, m in vars(base).items() if isinstance(m, _MEMBERS)}
        own = object.__getattribute__(exc, "__dict__")
        for name, value in attributes.items():
            if name == "__notes__" and not (
                isinstance(value, list) and all(isinstance(n, str) for n in value)
            ):
                continue
            value = tuple(value) if name in tuples and isinstance(value, list) else value
            if name in members:
                with contextlib.suppress(Exception):  # read-only
                    members[name].__set__(exc, value)
            else:
                own[name] = value
        own.update(idem_replayed=True)
        if getattr(cls, "_idem_worded", False):
            own.update(_idem_form=form)
    except Exception:  # a class that cannot be made in this way
        return None
    return exc


@lru_cache(maxsize=256)  # every replay of one intent needs the same
def _worded(cls: Any, module: str, name: str) -> type[BaseException]:
    """A subclass whose instances say the text in their form, and go through pickle as it."""
    body = {
        "__module__": module,
        "__qualname__": name,
        "__str__": lambda self: str(self._idem_form["text"]),
        "__reduce__": lambda self: (rebuilt, (self._idem_form,)),
        "_idem_worded": True,
    }
    return type(name.rpartition(".")[2], (cls,), body)


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an author's __str__ that fails must not cost the record of how the body ended
        return f"a {type(error).__name__} that cannot say what happened"
