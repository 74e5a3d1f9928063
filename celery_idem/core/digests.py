"""Digests of a call's arguments for ``idem audit``, which finds parameters that vary. No decision uses them.

A parameter takes six bytes: a tag of its name and a keyed digest of its value. They only show whether two calls had the
same value. The digest is keyed with the namespace or ``idem_audit_key``, and too short for a search of the value. A
``secret`` parameter has a digest only with ``idem_audit_key``, because a namespace can be guessed.

Values are digested as they arrive. The canonical form would cost ten times as much. So ``1`` and ``1.0`` are two values
here, and one in the key.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from celery_idem.core.keys import Declaration

TAG = 2
"""Bytes of a name's tag: 15 bits of the name, and VARIED in the first bit."""

VALUE = 4
"""Bytes of a value's digest. By chance one pair in 4e9 agrees, which does not change the statistics."""

ENTRY = TAG + VALUE

VARIED = 0x80
"""Bit in a tag's first byte: a later call of the same intent had another value."""

MAX_ENTRIES = 24
"""Maximum of digested parameters: 144 bytes, half of a record without a result in Redis."""


def tag_of(name: str) -> bytes:
    """Return the tag of a parameter's name."""
    return (zlib.crc32(name.encode()) & 0x7FFF).to_bytes(TAG, "big")


def label_tag(name: str) -> bytes:
    """Return the tag of a label. The space keeps it apart from parameter names."""
    return tag_of(f"label {name}")


class Digester:
    """Makes the digests of one task's calls. ``key``: ``idem_audit_key``; "" for none."""

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
        """Return the packed digests of a call."""
        entries = {**self._labels(labels), **self._defaults} if labels else dict(self._defaults)
        hidden = self._hidden
        for name, value in zip(self._positional, args):  # noqa: B905  # *args may be longer
            if name not in hidden:
                entries[name] = self._entry(name, value)
        for name, value in kwargs.items():
            if name not in hidden:
                entries[name] = self._entry(name, value)
        return b"".join(entries.values())[: MAX_ENTRIES * ENTRY]

    def _labels(self, labels: Mapping[str, Any]) -> dict[str, bytes]:
        """Return the entries of labels. They come first, so that a call with many parameters keeps its scope."""
        return {f"label {name}": self.label(name, value) for name, value in labels.items()}

    def label(self, name: str, value: Any) -> bytes:
        """Return the entry of a label."""
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
        except Exception:  # its repr fails: the digest of empty text stands for it
            text = b""
        digest.update(tag + text)
        return tag + digest.digest()


def entries(packed: bytes) -> dict[bytes, bytes]:
    """Return digests by tag, without VARIED."""
    return {
        bytes((packed[i] & ~VARIED, packed[i + 1])): packed[i + TAG : i + ENTRY]
        for i in range(0, len(packed) - ENTRY + 1, ENTRY)
    }


def varied(packed: bytes) -> set[bytes]:
    """Return tags of parameters for which a later call of the same intent had another value."""
    return {
        bytes((packed[i] & ~VARIED, packed[i + 1]))
        for i in range(0, len(packed) - ENTRY + 1, ENTRY)
        if packed[i] & VARIED
    }


def differing(stored: bytes, packed: bytes) -> set[bytes]:
    """Return tags of parameters that are in both with different values."""
    ours = entries(packed)
    return {tag for tag, value in entries(stored).items() if ours.get(tag, value) != value}


def marked(stored: bytes, packed: bytes) -> bytes:
    """Return ``stored`` with VARIED set for every parameter of which ``packed`` has another value."""
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
