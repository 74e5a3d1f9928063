"""An outcome's value or error as bytes, and back.

A payload is one byte that names a serializer (``_SERIALIZERS``; ``n``: its name follows) and its
data. Nothing is unpickled unless the application accepts pickle for results.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from kombu import serialization
from kombu.exceptions import KombuError, SerializerNotInstalled

from celery_idem.core.errors import StoreError
from celery_idem.core.json_values import FROM_JSON, to_json
from celery_idem.core.stored_errors import form_of, named, rebuilt, text_of

_SERIALIZERS = {"json": b"j", "pickle": b"p", "yaml": b"y", "msgpack": b"m"}
_NAMES = {code: name for name, code in _SERIALIZERS.items()}
_NAMED = b"n"
"""Any other serializer of kombu's registry: a byte of length and its name come before the data."""

_SIMPLE = (type(None), bool, str)
"""Types that every serializer gives back as they are: no need to decode what was just encoded."""


_NULL = b"jnull"


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
            data = to_json(value) if json else serialization.dumps(value, name)[2]
        except (KombuError, TypeError, ValueError, RecursionError, AttributeError) as error:
            # Only JSON's own error says what it is about; YAML's would show the whole value.
            why = text_of(error) if json else type(error).__name__
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
                return FROM_JSON.decode(data.decode("utf-8", "surrogatepass"))
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
            payload = b"j" + to_json(form_of(error)).encode("utf-8", "surrogatepass")
        except (
            Exception
        ):  # an author's property, group or number that fails: the end of the body is known all the same
            payload = b""
        if payload and len(payload) <= self.max_bytes:
            return payload
        short = text_of(error)[:1000]
        return b"j" + to_json({**named(error), "text": short, "args": [short]}).encode(
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
            return rebuilt(FROM_JSON.decode(payload[1:].decode("utf-8", "surrogatepass")))
        except Exception as error:
            raise StoreError(f"The stored error of {key} cannot be read: {error}.", key) from error
