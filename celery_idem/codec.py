"""Bytes: a record as one packed value, and an outcome's value or error.

Record, version 1, all integers big-endian::

    owner 12 | version 1 | state 1 | parts 2 | attempts 2 | crashes 1 | fence 8 | parts…

``parts`` says which optional parts follow, in the order of ``_PARTS``; the last one
is the outcome's payload and takes the rest. A finished record of a task without
``must_match`` is 27 + 16 bytes and its payload. Read it without this package:
``docs/explanation/record.md``.

A payload is one byte that names a serializer (``_SERIALIZERS``) and its data. Nothing
is unpickled unless the application accepts pickle for results.
"""

from __future__ import annotations

import contextlib
import struct
import sys
from collections.abc import Collection
from functools import lru_cache
from json import JSONDecoder
from typing import Any, NamedTuple

from kombu import serialization
from kombu.exceptions import KombuError
from kombu.utils import json as kombu_json

from celery_idem.errors import StoreError
from celery_idem.intent import FINGERPRINT_ENTRY, Note, Noticed, Outcome, Record, State, Step

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
_NOTICED = 1 << 12  # before the outcome, which comes last
_KNOWN = (1 << 13) - 1


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
        return self.blob().decode()

    def rest(self) -> bytes:
        return self.take(len(self._value) - self._at)

    def at_end(self) -> bool:
        return self._at == len(self._value)


def _blob(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


def _text(text: str) -> bytes:
    return _blob(text.encode("utf-8", "replace"))


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
_SIMPLE = (type(None), bool, str)
"""Types that every serializer gives back as they are: no need to decode what was just encoded."""


_NULL = b"jnull"
_TO_JSON = kombu_json.JSONEncoder()
_FROM_JSON = JSONDecoder(object_hook=kombu_json.object_hook)
"""What ``kombu.utils.json`` makes anew for each value. They keep nothing between values."""

_SIGNAL = ("celery.exceptions", "TaskPredicate")
"""The base of Celery's Ignore, Reject and Retry. By name, because nothing here imports Celery."""


class NotStorable(Exception):
    """A value cannot be stored; the message says why."""


class Codec(NamedTuple):
    """Turns values and errors into payloads and back.

    Attributes:
        serializer: kombu's name of the serializer for new payloads.
        accept: serializers that may be read.
        max_bytes: the largest payload.
    """

    serializer: str = "json"
    accept: Collection[str] = ("json",)
    max_bytes: int = 1 << 20

    def encode(self, value: Any) -> bytes:
        """The payload of a value.

        Raises:
            NotStorable: no serializer takes it, or it is too large.
        """
        code = _SERIALIZERS.get(self.serializer)
        if code is None or self.serializer not in self.accept:
            raise NotStorable(
                f"results written with the serializer {self.serializer!r} could not be read again"
            )
        json = code == b"j"  # by far the most common, and kombu's way to it costs four times as much
        if json and value is None:  # what most tasks return
            payload = _NULL
        else:
            try:
                data = _TO_JSON.encode(value) if json else serialization.dumps(value, self.serializer)[2]
            except (KombuError, TypeError, ValueError, RecursionError, AttributeError) as error:
                why = error if json else type(error).__name__  # YAML's error would show the whole value
                raise NotStorable(f"the {self.serializer} serializer does not take it: {why}") from None
            payload = code + (data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
        if len(payload) > self.max_bytes:
            raise NotStorable(f"{len(payload)} bytes are more than idem_max_result_bytes = {self.max_bytes}")
        return payload

    def decode(self, payload: bytes, key: str | None = None) -> Any:
        """The value of a payload.

        Raises:
            StoreError: the payload cannot be read, or its serializer is not accepted.
        """
        name = _NAMES.get(payload[:1])
        if name is None or name not in self.accept:
            raise StoreError(
                f"The stored result of {key} was written with the serializer {name or payload[:1]!r}, which "
                "this application does not accept. Add it to result_accept_content.",
                key,
            )
        try:
            if payload == _NULL:
                return None
            if name == "json":
                return _FROM_JSON.decode(payload[1:].decode("utf-8", "surrogatepass"))
            content_type, encoding, _ = serialization.dumps("", name)
            return serialization.loads(payload[1:], content_type, encoding, accept={content_type})
        except Exception as error:
            raise StoreError(f"The stored result of {key} cannot be read: {error}.", key) from error

    def as_replayed(self, value: Any, payload: bytes) -> Any:
        """What a replay of this payload will return: every caller gets the same, the first included."""
        return value if type(value) in _SIMPLE else self.decode(payload)

    def encode_error(self, error: BaseException) -> bytes:
        """The payload of an exception: its class and arguments, in JSON whatever the serializer."""
        cls = type(error)
        text = _text_of(error)
        form: dict[str, Any] = {"module": cls.__module__, "type": cls.__qualname__, "text": text}
        try:
            data = kombu_json.dumps({**form, "args": error.args})
        except Exception:  # arguments that JSON does not take: their text is what can be kept
            data = kombu_json.dumps({**form, "args": [text]})
        payload: bytes = b"j" + data.encode("utf-8", "surrogatepass")
        if len(payload) > self.max_bytes:
            short = text[:1000]
            return b"j" + str(kombu_json.dumps({**form, "text": short, "args": [short]})).encode()
        return payload

    def decode_error(self, payload: bytes, key: str | None = None) -> BaseException:
        """The exception of a payload: same class and arguments where the class is loaded here.

        Only classes of modules that are already imported are looked at, and only
        exception classes are used (as Celery's own backend does), so a forged
        record cannot run anything. An unknown class becomes a new one of that name.
        """
        try:
            form = kombu_json.loads(payload[1:].decode("utf-8", "surrogatepass"))
            module, name, args = str(form["module"]), str(form["type"]), list(form["args"])
        except Exception as error:
            raise StoreError(f"The stored error of {key} cannot be read: {error}.", key) from error
        cls = _loaded(module, name)
        if cls is not None:
            with contextlib.suppress(Exception):  # a constructor that wants something else than its own args
                return cls(*args)
            with contextlib.suppress(Exception):
                exc = cls.__new__(cls)
                exc.args = tuple(args)
                return exc
        try:
            cls = type(name.rpartition(".")[2], (Exception,), {"__module__": module})
            return cls(*args)
        except ValueError as error:  # a name that no class can have
            raise StoreError(f"The stored error of {key} cannot be read: {error}.", key) from error


def _loaded(module: str, name: str) -> type[Exception] | None:
    """The exception class of that name, where its module is imported here; else None.

    Looked up without ``getattr``, with which a module may import more and a class may run code.
    """
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        try:
            found = object.__getattribute__(found, "__dict__").get(part)
        except AttributeError:
            return None
    if not (isinstance(found, type) and issubclass(found, Exception)):
        return None
    # No body's error is stored as one of Celery's signals; a forged one would have a message rejected for ever.
    signals = any((base.__module__, base.__name__) == _SIGNAL for base in found.__mro__)
    return None if signals else found


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an author's __str__ that fails must not cost the record of how the body ended
        return f"a {type(error).__name__} that cannot say what happened"
