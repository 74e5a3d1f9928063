"""Seals what a record holds of an application's values, with AES-SIV (RFC 5297) of the package ``cryptography``.

A sealed field is a byte 2, four bytes that name the key, and the box. The intent's key is bound into the box, so a
field that is moved to another record does not open. The same bytes of one intent make the same box under one key:
there is no nonce that could come twice, and what is written again can be compared (docs/adr/0040).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

from celery_idem.core.calls import Why
from celery_idem.core.errors import ConfigurationError, StoreError, needs
from celery_idem.core.model import Record

MARK = b"\x02"
"""First byte of a sealed field. No payload begins with it, and a call says with it that it is sealed."""

_ID = slice(1, 5)
"""Where a sealed field names its key: enough to tell the few keys of an application apart."""

_BOX = 5
"""Offset of the box."""

SIZES = (32, 48, 64)
"""Bytes of a key: for AES-128, AES-192 and AES-256, of which SIV takes two."""


def key_bytes(text: str) -> bytes:
    """Return a key as bytes, from base64 in either alphabet.

    Raises:
        ValueError: it is no key. The error's text shows nothing of it.
    """
    try:
        key = base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except ValueError:
        raise ValueError("no base64") from None
    if len(key) not in SIZES:
        raise ValueError("a wrong length")
    return key


class Seal:
    """Seals with the first of several keys, and opens with any of them.

    Attributes:
        newest: id of the first key.
        ids: of all keys.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        with needs("idem_seal_keys needs the package cryptography", "seal"):
            from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
            from cryptography.hazmat.primitives.ciphers.aead import AESSIV
        self._invalid = InvalidTag
        try:
            found = [(_id_of(raw), AESSIV(raw)) for raw in map(key_bytes, keys)]
        except UnsupportedAlgorithm as error:
            raise ConfigurationError(
                f"idem_seal_keys needs AES-SIV, which this cryptography was built without ({error}). Install "
                "cryptography from its wheel, or with OpenSSL 3.0 or later."
            ) from None
        self._boxes = dict(reversed(found))
        self._head = MARK + found[0][0]
        self._box = found[0][1]

    @property
    def newest(self) -> str:
        return self._head[_ID].hex()

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(one.hex() for one in self._boxes)

    def __repr__(self) -> str:
        return f"<Seal {self.newest}>"

    def close(self, data: bytes, key: str) -> bytes:
        """Return bytes of an intent, sealed with the newest key."""
        return self._head + self._box.encrypt(data, [key.encode("utf-8", "surrogatepass")])

    def open(self, sealed: bytes, key: str) -> bytes:
        """Return what ``close`` was given.

        Raises:
            StoreError: this process does not have the key, or the field is not what was sealed for this intent.
        """
        box = self._boxes.get(sealed[_ID])
        if box is None:
            raise _no_key(sealed, key, "idem_seal_keys of this process does not have")
        try:
            return box.decrypt(sealed[_BOX:], [key.encode("utf-8", "surrogatepass")])
        except (self._invalid, ValueError):
            raise StoreError(
                f"What the record at {key} holds does not open with its key {sealed[_ID].hex()}: it was changed, or "
                "moved from another record. Nothing was run. Look at who can write to the store.",
                key,
            ) from None


@lru_cache(maxsize=16)  # an application has one list of keys; tests have some
def seal_of(keys: tuple[str, ...]) -> Seal | None:
    """Return what seals with these keys; None where there are none.

    Raises:
        ConfigurationError: the package ``cryptography`` is missing, or too old.
    """
    return Seal(keys) if keys else None


def opened(seal: Seal | None, field: bytes, key: str | None) -> bytes:
    """Return a field in clear.

    Raises:
        StoreError: it is sealed, and cannot be opened here.
    """
    if not field.startswith(MARK):
        return field
    if seal is None:
        raise _no_key(field, key or "", "this process does not have, because idem_seal_keys is not set")
    return seal.open(field, key or "")


def sealed_with(record: Record) -> set[str]:
    """Return the ids of the keys that a record's fields are sealed with; "" for a field in clear."""
    return {field[_ID].hex() if field.startswith(MARK) else "" for field in _fields(record)}


def check(seal: Seal | None, record: Record, key: str) -> None:
    """Refuse a record that holds something sealed with a key that is not here, as one of a newer format is refused.

    Raises:
        StoreError: it does.
    """
    for field in _fields(record):
        if field.startswith(MARK) and (seal is None or field[_ID] not in seal._boxes):
            opened(seal, field, key)


def resealed(record: Record, seal: Seal, key: str, lost: bool) -> Record:
    """Return a record with each field sealed with the newest key.

    Args:
        lost: keys that are not here are lost: what was sealed with them is given up. What was done stays done.

    Raises:
        StoreError: a field cannot be opened, and that is no lost key's.
    """

    def change(field: bytes) -> bytes:
        if lost and field.startswith(MARK) and field[_ID].hex() not in seal.ids:
            return b""
        return seal.close(opened(seal, field, key), key)

    outcome, notes = record.outcome, record.notes
    if outcome is not None and outcome.payload:
        payload = change(outcome.payload)
        outcome = outcome._replace(payload=payload or None, missing="" if payload else KEY_LOST)
    if any(note.late is not None for note in notes):
        notes = tuple(
            note._replace(late=note.late._replace(payload=change(note.late.payload)))
            if note.late is not None and note.late.payload
            else note
            for note in notes
        )
    steps = tuple(
        step._replace(payload=change(step.payload)) if step.payload else step for step in record.steps
    )
    call = (change(record.call) or Why.KEY_LOST.packed) if len(record.call) > 2 else record.call
    return record._replace(outcome=outcome, notes=notes, steps=steps, call=call)


KEY_LOST = "the key that it was sealed with is lost"


def _fields(record: Record) -> Iterator[bytes]:
    """Fields that hold values of the application. Empty ones, and why a call is not kept, say nothing."""
    if len(record.call) > 2:
        yield record.call
    if record.outcome is not None and record.outcome.payload:
        yield record.outcome.payload
    for step in record.steps:
        if step.payload:
            yield step.payload
    for note in record.notes:
        if note.late is not None and note.late.payload:
            yield note.late.payload


def _id_of(raw: bytes) -> bytes:
    return hashlib.sha256(b"celery_idem seal key " + raw).digest()[:4]


def _no_key(sealed: bytes, key: str, why: str) -> StoreError:
    return StoreError(
        f"The record at {key} is sealed with the key {sealed[_ID].hex()}, which {why}. Nothing was run, and nothing is "
        "lost. Give this process the keys of the others, the newest first; see docs/how-to/sealing.md.",
        key,
    )
