"""The call in an open record: what it takes to publish the same message again, and to say which action it is.

Packed as a byte for the kind, then, in clear, two bytes of length and the task id, one line of kombu's JSON about the
message, and the message's body as it was on the wire. The body's serializer is Celery's affair: nothing here reads it.
"""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

from celery_idem.core.json_values import FROM_JSON, to_json

MISSING, CLEAR, SEALED = range(3)
"""First byte of a packed call: how it is kept. After ``MISSING`` a second one says why it is not (``Why``)."""

_LENGTH = struct.Struct(">H")

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode


class Why(IntEnum):
    """Why a record does not hold its call. The numbers are part of the stored format: never reuse one."""

    OFF = 1  # keep_call=False
    TOO_LARGE = 2  # max_call_bytes
    UNWRITABLE = 3  # an argument or a header that its serializer refuses
    KEY_LOST = 4  # it was sealed, and a person gave its key up

    @property
    def packed(self) -> bytes:
        return bytes((MISSING, self))


def missing(packed: bytes) -> Why | None:
    """Return why a call is not kept; None where it is, or where nothing says so."""
    return Why(packed[1]) if len(packed) == 2 and packed[0] == MISSING else None


class Call(NamedTuple):
    """A message, as it can be published again.

    Attributes:
        task_id: Celery's id of the call.
        headers: of the message, without those that follow from the rest.
        properties: of the message that are not the broker's own (``priority``, ``reply_to``, …).
        content_type: names the serializer of the body; "" where there was no message (a direct or an eager call).
        content_encoding: of the body.
        exchange: that the message came through.
        routing_key: with an empty exchange, the name of its queue.
        broker: which broker the message came from, as a digest of its address; "" where any may take it.
        hidden: values of ``secret`` parameters are hidden in the body, so it can be shown and not be published.
        options: of ``apply_async``, of a call that was accepted before any message was made of it; None: a message.
        body: arguments and canvas, as they were on the wire.
    """

    task_id: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    content_type: str
    content_encoding: str
    exchange: str
    routing_key: str
    broker: str
    hidden: bool
    options: dict[str, Any] | None
    body: bytes

    @property
    def publishable(self) -> bool:
        """A message can be made of it."""
        routed = self.exchange or self.routing_key or self.options is not None
        return bool(self.content_type and routed and not self.hidden)


def pack(call: Call) -> bytes:
    """Return a call as bytes. Raises ``TypeError``, ``ValueError``: kombu's JSON cannot write one of its headers."""
    task_id, headers, properties, *rest, body = call
    try:
        head = _head(tuple(headers.items()), tuple(properties.items()), *rest)
    except TypeError:  # a header that is no plain value
        head = _nested((headers, properties, *rest)).encode("utf-8", "surrogatepass")
    named = task_id.encode("utf-8", "surrogatepass")
    return b"".join((b"\x01", _LENGTH.pack(len(named)), named, head, b"\n", body))


def _nested(parts: Any) -> str:
    with suppress(TypeError):  # a date, bytes, …
        text = _encode(parts)
        if '"__type__"' not in text:
            return text
    return to_json(parts)


@lru_cache(maxsize=256)  # most calls of one producer differ in nothing but the id and the body
def _head(headers: tuple[tuple[str, Any], ...], properties: tuple[tuple[str, Any], ...], *rest: Any) -> bytes:
    return _encode((dict(headers), dict(properties), *rest)).encode("utf-8", "surrogatepass")


def unpack(packed: bytes) -> Call:
    """Return the call in bytes that are kept in clear. Raises ``ValueError``: they are something else."""
    if packed[:1] != b"\x01" or len(packed) < 3:
        raise ValueError(f"a call of kind {packed[:1].hex() or 'nothing'}")
    end = 3 + int.from_bytes(packed[1:3], "big")
    head, newline, body = packed[end:].partition(b"\n")
    parts = FROM_JSON.decode(head.decode("utf-8", "surrogatepass"))
    if not newline or not isinstance(parts, list) or len(parts) != len(Call._fields) - 2:
        raise ValueError("a call of another shape")
    return Call._make((packed[3:end].decode("utf-8", "surrogatepass"), *parts, body))
