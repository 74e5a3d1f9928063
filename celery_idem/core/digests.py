"""Digests of a call's arguments, for finding out later which of them vary. Not part of any decision.

Six bytes per parameter: a tag of its name and a keyed digest of its value. They tell whether
two calls had the same value and nothing else: a digest is keyed with the namespace, or with
``idem_audit_key``, and is too short to be searched for. A parameter declared ``secret`` has one
only when there is an ``idem_audit_key``, because a namespace can be guessed.

Values are taken as they arrived and not in canonical form, which would cost ten times as much:
two spellings of one value (``1`` and ``1.0``) count as two here, and as one in the key.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from celery_idem.core.keys import Declaration

TAG = 2
"""Bytes of a name's tag. Fifteen bits tell a task's parameters apart; the first bit is VARIED."""

VALUE = 4
"""Bytes of a value's digest. One pair in four thousand million agrees by chance, which moves no statistic."""

ENTRY = TAG + VALUE

VARIED = 0x80
"""Set in the first byte of a tag: a later call of the same intent brought another value."""

MAX_ENTRIES = 24
"""Parameters digested at most, 144 bytes: half of what a whole record without a result takes in Redis."""


def tag_of(name: str) -> bytes:
    """The tag of a parameter's name."""
    return (zlib.crc32(name.encode()) & 0x7FFF).to_bytes(TAG, "big")


def label_tag(name: str) -> bytes:
    """The tag of a label; no parameter can have it by its name, which holds no space."""
    return tag_of(f"label {name}")


class Digester:
    """Makes the digests of one task's calls.

    Args:
        key: what digests are keyed with, beside the namespace; "" for nothing.
    """

    def __init__(self, declaration: Declaration, namespace: str, key: str = "") -> None:
        secret = hashlib.sha256(f"{namespace}\0{key}".encode()).digest()
        self._base = hashlib.blake2b(digest_size=VALUE, key=secret)
        hidden = set() if key else set(declaration.secret)
        positional, defaults = [], {}
        for name, parameter in declaration.signature.parameters.items():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                positional.append(name)
            if parameter.default is not parameter.empty:
                defaults[name] = parameter.default
        self._positional = tuple(positional)
        self._hidden = frozenset(hidden)
        self._tags = {name: tag_of(name) for name in (*positional, *defaults) if name not in hidden}
        self._defaults = {
            name: self._entry(name, value) for name, value in defaults.items() if name not in hidden
        }

    def of(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], labels: Mapping[str, Any] | None = None
    ) -> bytes:
        """The digests of a call, packed."""
        entries = {**self._labels(labels), **self._defaults} if labels else dict(self._defaults)
        hidden = self._hidden
        for name, value in zip(self._positional, args):  # noqa: B905  # *args may be longer; it has no names
            if name not in hidden:
                entries[name] = self._entry(name, value)
        for name, value in kwargs.items():
            if name not in hidden:
                entries[name] = self._entry(name, value)
        return b"".join(entries.values())[: MAX_ENTRIES * ENTRY]

    def _labels(self, labels: Mapping[str, Any]) -> dict[str, bytes]:
        """First of all: a call with more parameters than are kept must not lose its scope."""
        return {f"label {name}": self.label(name, value) for name, value in labels.items()}

    def label(self, name: str, value: Any) -> bytes:
        """The entry of a label."""
        return self._entry(f"label {name}", value)

    def _entry(self, name: str, value: Any) -> bytes:
        tag = self._tags.get(name)
        if tag is None:
            tag = tag_of(name)
        digest = self._base.copy()
        try:
            text = (
                b"s" + value.encode("utf-8", "surrogatepass")
                if type(value) is str
                else b"r" + repr(value).encode()
            )
        except Exception:  # an object that cannot be shown: it has no digest that means anything
            text = b""
        digest.update(tag + text)
        return tag + digest.digest()


def entries(packed: bytes) -> dict[bytes, bytes]:
    """Digests by tag, without the mark."""
    return {
        bytes((packed[i] & ~VARIED, packed[i + 1])): packed[i + TAG : i + ENTRY]
        for i in range(0, len(packed) - ENTRY + 1, ENTRY)
    }


def varied(packed: bytes) -> set[bytes]:
    """Tags of parameters that a later call of the same intent brought with another value."""
    return {
        bytes((packed[i] & ~VARIED, packed[i + 1]))
        for i in range(0, len(packed) - ENTRY + 1, ENTRY)
        if packed[i] & VARIED
    }


def differing(stored: bytes, packed: bytes) -> set[bytes]:
    """Tags of parameters that both know, with different values."""
    ours = entries(packed)
    return {tag for tag, value in entries(stored).items() if ours.get(tag, value) != value}


def marked(stored: bytes, packed: bytes) -> bytes:
    """``stored`` with a mark at every parameter that ``packed`` has another value of."""
    if stored == packed or not stored or not packed:
        return stored
    tags = differing(stored, packed)
    if not tags:
        return stored
    new = bytearray(stored)
    for i in range(0, len(stored) - ENTRY + 1, ENTRY):
        if bytes((stored[i] & ~VARIED, stored[i + 1])) in tags:
            new[i] |= VARIED
    return bytes(new)
