"""Encodes the values and errors of outcomes as bytes, and decodes them.

A payload is one byte for the serializer (``_SERIALIZERS``; ``n``: its name follows) and the data; it may be sealed.
Nothing is unpickled unless the application accepts pickle for results.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from kombu import serialization
from kombu.exceptions import KombuError, SerializerNotInstalled

from celery_idem.core.errors import StoreError
from celery_idem.core.json_values import FROM_JSON, to_json
from celery_idem.core.sealing import MARK, Seal, opened
from celery_idem.core.stored_errors import form_of, named, rebuilt, text_of

_SERIALIZERS = {"json": b"j", "pickle": b"p", "yaml": b"y", "msgpack": b"m"}
_NAMES = {code: name for name, code in _SERIALIZERS.items()}
_NAMED = b"n"
"""Code of any other kombu serializer: one byte of length and its name precede the data."""

_SIMPLE = (type(None), bool, str)
"""Types that every serializer returns unchanged, so that a check by decoding is not needed."""

_NULL = b"jnull"


class NotStorable(Exception):
    """A value cannot be stored; the message says why."""


class Codec(NamedTuple):
    """Turns values and errors into payloads and back.

    Attributes:
        serializer: kombu's name of the serializer for new payloads.
        accept: names of serializers that may be read.
        max_bytes: maximum size of a payload.
        kombus_json: "json" is kombu's own serializer, not one that the application registered.
        seal: seals payloads; None: they are kept in clear.
    """

    serializer: str = "json"
    accept: Collection[str] = ("json",)
    max_bytes: int = 1 << 20
    kombus_json: bool = True
    seal: Seal | None = None

    def unusable(self) -> str:
        """Return why no result can be written and read again, by kombu's present registry; "" if it can."""
        try:
            if self.serializer not in serialization.registry.name_to_type:
                raise SerializerNotInstalled
            serialization.dumps(None, self.serializer)
        except SerializerNotInstalled:
            return f"no serializer {self.serializer!r} is registered with kombu in this process"
        except Exception:  # noqa: S110  # registered, but None is no value for it
            pass
        if self.serializer not in self.accept:
            return f"results written with the serializer {self.serializer!r} could not be read again"
        return ""

    def encode(self, value: Any, key: str = "") -> bytes:
        """Return the payload of a value.

        Args:
            key: key of the intent, for the seal.

        Raises:
            NotStorable: the serializer refuses it, it is too large, or its own code fails.
        """
        return self._sealed(self._payload(value), key)

    def _payload(self, value: Any) -> bytes:
        if value is None and self.serializer == "json" and self.kombus_json and "json" in self.accept:
            return _NULL  # what most tasks return
        try:
            payload = self._encoded(value)
        except NotStorable:
            raise
        except Exception:  # of the value's code, or a soft time limit, which comes only once: try again
            try:
                payload = self._encoded(value)
            except NotStorable:
                raise
            except Exception as error:
                raise NotStorable(f"encoding it raised {type(error).__name__}") from None
        if len(payload) > self.max_bytes:
            raise NotStorable(f"{len(payload)} bytes are more than idem_max_result_bytes = {self.max_bytes}")
        return payload

    def _sealed(self, payload: bytes, key: str) -> bytes:
        return payload if self.seal is None else self.seal.close(payload, key)

    def _encoded(self, value: Any) -> bytes:
        name = self.serializer
        if name not in self.accept:
            raise NotStorable(self.unusable())
        # This is the usual case, and kombu's own code takes four times as long.
        json = name == "json" and self.kombus_json
        try:
            data = to_json(value) if json else serialization.dumps(value, name)[2]
        except (KombuError, TypeError, ValueError, RecursionError, AttributeError) as error:
            # JSON's error names the type; YAML's would show the whole value.
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
        """Return the value of a payload.

        Raises:
            StoreError: the payload cannot be read or opened, or its serializer is not accepted.
        """
        if payload == _NULL and "json" in self.accept:
            return None
        name, data = _NAMES.get(payload[:1]), payload[1:]
        if payload[:1] == _NAMED:
            end = 2 + payload[1] if len(payload) > 1 else 1
            name, data = payload[2:end].decode("utf-8", "replace"), payload[end:]
        elif payload[:1] == MARK:
            return self.decode(opened(self.seal, payload, key), key)
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

    def kept(self, value: Any, key: str = "") -> tuple[bytes, Any]:
        """Return a value's payload and its decoded value, so that the first caller gets the same as a replay.

        Raises:
            NotStorable: it cannot be stored, or not read again.
        """
        payload = self._payload(value)
        if type(value) in _SIMPLE:
            return payload if self.seal is None else self._sealed(payload, key), value
        for last in (False, True):  # as in encode
            try:
                shown = self.decode(payload, key)
                return payload if self.seal is None else self._sealed(payload, key), shown
            except Exception:
                if last:  # for example a decoder that does not fit its encoder
                    break
        raise NotStorable(f"what the {self.serializer} serializer makes of it cannot be read again")

    def encode_error(self, error: BaseException, key: str = "") -> bytes:
        """Return the payload of an exception: class, arguments and attributes, always in JSON. See ``encode``."""
        try:
            payload = b"j" + to_json(form_of(error)).encode("utf-8", "surrogatepass")
        except Exception:  # of the exception's own code; its class and text still tell how the body ended
            payload = b""
        if payload and len(payload) <= self.max_bytes:
            return self._sealed(payload, key)
        short = text_of(error)[:1000]
        form = to_json({**named(error), "text": short, "args": [short]})
        return self._sealed(b"j" + form.encode("utf-8", "surrogatepass"), key)

    def decode_error(self, payload: bytes, key: str | None = None) -> Exception:
        """Return the exception of a payload, with ``idem_replayed`` set.

        It has the same class, arguments, attributes and text if the class is loaded. Only exception classes of
        imported modules are used, and their constructors do not run, so a forged record cannot run code. An unknown
        class is replaced by a new one of that name. So is a class that Celery or the interpreter treats specially
        (``_SPECIAL``).
        """
        payload = opened(self.seal, payload, key)
        try:
            return rebuilt(FROM_JSON.decode(payload[1:].decode("utf-8", "surrogatepass")))
        except Exception as error:
            raise StoreError(f"The stored error of {key} cannot be read: {error}.", key) from error
