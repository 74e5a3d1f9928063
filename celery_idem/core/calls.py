"""The call in an open record: enough to publish the same message again, and to say which action it is.

A packed call begins with a byte for its kind. In a call in clear follow two bytes with the length of the task id, the
task id, one line of kombu's JSON about the message, and the message's body as it was on the wire. Nothing here reads
the body, because only Celery knows its serializer.

Without ``from __future__ import annotations``, as in ``model``: a named tuple would compile its fields' types.
"""

import json
import struct
from contextlib import suppress
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

from celery_idem.core.json_values import FROM_JSON, to_json

MISSING, CLEAR, SEALED = range(3)
"""First byte of a packed call: how it is kept. ``MISSING`` is followed by the reason (``Why``) only."""

_LENGTH = struct.Struct(">H")

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode


class Why(IntEnum):
    """Why a record does not hold its call. The numbers are part of the stored format: never reuse one."""

    OFF = 1  # keep_call=False
    TOO_LARGE = 2  # above max_call_bytes
    UNWRITABLE = 3  # its serializer refuses an argument or a header
    KEY_LOST = 4  # it was sealed, and an operator gave its key up (`idem reseal`)

    @property
    def packed(self) -> bytes:
        return bytes((MISSING, self))


def missing(packed: bytes) -> Why | None:
    """Return why a call is not kept; None if it is kept, and for empty bytes."""
    return Why(packed[1]) if len(packed) == 2 and packed[0] == MISSING else None


class Call(NamedTuple):
    """A message, as it can be published again.

    Attributes:
        task_id: Celery's id of the call.
        headers: headers of the message, without those that can be derived from the rest.
        properties: properties of the message that its sender chose (``priority``, ``reply_to``, …).
        content_type: names the serializer of the body; "" for a direct or an eager call, which had no message.
        content_encoding: encoding of the body.
        exchange: exchange that the message came through.
        routing_key: with an empty exchange, the name of the queue.
        broker: digest of the address of the broker that the message came from; "" if any broker will do.
        hidden: values of ``secret`` parameters are hidden in the body: it can be shown, and not published.
        options: options of ``apply_async``, if the call was accepted before its message was made; None for a message.
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
        """Whether a message can be made of the call."""
        routed = self.exchange or self.routing_key or self.options is not None
        return bool(self.content_type and routed and not self.hidden)


def pack(call: Call, alike: bool = False) -> bytes:
    """Return a call as bytes.

    Args:
        alike: most calls of this producer differ only in the id and the body, so the head comes from a cache. True is
            equal to 1 there: not for values of the author.

    Raises:
        TypeError, ValueError: kombu's JSON has no form for a header's value.
    """
    task_id, headers, properties, *rest, options, body = call
    if alike:
        try:
            given = None if options is None else tuple(options.items())
            head = _head(tuple(headers.items()), tuple(properties.items()), given, *rest)
        except TypeError:  # a list or a mapping inside cannot be a key of the cache
            alike = False
    if not alike:
        head = _encoded((headers, properties, *rest, options))
    named = task_id.encode("utf-8", "surrogatepass")
    return b"".join((b"\x01", _LENGTH.pack(len(named)), named, head, b"\n", body))


@lru_cache(maxsize=256)
def _head(headers: Any, properties: Any, options: Any, *rest: Any) -> bytes:
    return _encoded((dict(headers), dict(properties), *rest, options if options is None else dict(options)))


def _encoded(parts: Any) -> bytes:
    text = ""
    with suppress(TypeError):  # a date, bytes, …
        text = _encode(parts)
    if not text or '"__type__"' in text:
        text = to_json(parts)
    return text.encode("utf-8", "surrogatepass")


def unpack(packed: bytes) -> Call:
    """Return the call in bytes that are in clear.

    Raises:
        ValueError: the bytes are no call in clear.
    """
    if packed[:1] != b"\x01" or len(packed) < 3:
        raise ValueError(f"a call of kind {packed[:1].hex() or 'nothing'}")
    end = 3 + int.from_bytes(packed[1:3], "big")
    head, newline, body = packed[end:].partition(b"\n")
    parts = FROM_JSON.decode(head.decode("utf-8", "surrogatepass"))
    if not newline or not isinstance(parts, list) or len(parts) != len(Call._fields) - 2:
        raise ValueError("a call of another shape")
    return Call._make((packed[3:end].decode("utf-8", "surrogatepass"), *parts, body))
