"""Encrypts the application's values in a record, with AES-SIV (RFC 5297) of the package ``cryptography``.

A sealed field is a byte 2, four bytes that name the seal key, and the ciphertext. The intent's key is authenticated
with it, so a field that was moved to another record does not open. There is no nonce: the same bytes of one intent
give the same ciphertext under one seal key. So no nonce can be used twice, and a field that is written again can be
compared (docs/adr/0040).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

from celery_idem.core.calls import Why
from celery_idem.core.errors import ConfigurationError, StoreError, needs
from celery_idem.core.model import Record

KEY_LOST = "the key that it was sealed with is lost"
"""Why a result is missing, for people."""

MARK = b"\x02"
"""First byte of a sealed field. A payload or a call in clear begins with another one."""

_ID = slice(1, 5)
"""Where a sealed field names its key. Four bytes tell the few keys of an application apart."""

_CIPHERTEXT = 5
"""Where the ciphertext begins."""

SIZES = (32, 48, 64)
"""Bytes of a seal key. SIV takes two AES keys: of AES-128, AES-192 or AES-256."""


def key_bytes(text: str) -> bytes:
    """Return a seal key as bytes, from base64 in either alphabet.

    Raises:
        ValueError: the text is not a seal key. The error shows nothing of it.
    """
    try:
        key = base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except ValueError:
        raise ValueError("no base64") from None
    if len(key) not in SIZES:
        raise ValueError("a wrong length")
    return key


class Seal:
    """Encrypts with the first of several keys, and decrypts with any of them."""

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
        self._ciphers = dict(reversed(found))
        self._head = MARK + found[0][0]
        self._cipher = found[0][1]

    @property
    def newest(self) -> str:
        """Id of the first key."""
        return self._head[_ID].hex()

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of all keys."""
        return tuple(one.hex() for one in self._ciphers)

    def __repr__(self) -> str:
        return f"<Seal {self.newest}>"

    def close(self, data: bytes, key: str) -> bytes:
        """Encrypt bytes of the intent ``key`` with the newest seal key."""
        return self._head + self._cipher.encrypt(data, [key.encode("utf-8", "surrogatepass")])

    def open(self, sealed: bytes, key: str) -> bytes:
        """Decrypt what ``close`` returned for the same intent.

        Raises:
            StoreError: this process does not have the seal key, or the field was changed or moved.
        """
        cipher = self._ciphers.get(sealed[_ID])
        if cipher is None:
            raise _no_key(sealed, key, "idem_seal_keys of this process does not have")
        try:
            return cipher.decrypt(sealed[_CIPHERTEXT:], [key.encode("utf-8", "surrogatepass")])
        except (self._invalid, ValueError):
            raise StoreError(
                f"A field of the record at {key} does not open with its key {sealed[_ID].hex()}: it was changed, or "
                "moved from another record. Nothing was run. Find out who can write to the store.",
                key,
            ) from None


@lru_cache(maxsize=16)  # an application has one list of keys; a process of tests has several
def seal_of(keys: tuple[str, ...]) -> Seal | None:
    """Return the seal of these keys; None without keys.

    Raises:
        ConfigurationError: the package ``cryptography`` is missing, or too old.
    """
    return Seal(keys) if keys else None


def opened(seal: Seal | None, field: bytes, key: str | None) -> bytes:
    """Return a field in clear.

    Raises:
        StoreError: the field is sealed, and this process cannot open it.
    """
    if not field.startswith(MARK):
        return field
    if seal is None:
        raise _no_key(field, key or "", "this process does not have, because idem_seal_keys is not set")
    return seal.open(field, key or "")


def sealed_with(record: Record) -> set[str]:
    """Return the ids of the seal keys of a record's fields; "" stands for a field in clear."""
    return {field[_ID].hex() if field.startswith(MARK) else "" for field in _fields(record)}


def check(seal: Seal | None, record: Record, key: str) -> None:
    """Refuse a record with a field whose seal key this process does not have.

    Raises:
        StoreError: the record has such a field.
    """
    for field in _fields(record):
        if field.startswith(MARK) and (seal is None or field[_ID] not in seal._ciphers):
            opened(seal, field, key)


def resealed(record: Record, seal: Seal, key: str, lost: bool) -> Record:
    """Return a record with each field sealed with the newest key.

    Args:
        lost: keys that this process does not have are lost for good. Fields that were sealed with them are dropped.
            The state stays: what was done stays done.

    Raises:
        StoreError: a field cannot be opened, for another reason than a lost key.
    """

    def change(field: bytes) -> bytes:
        if lost and field.startswith(MARK) and field[_ID].hex() not in seal.ids:
            return b""
        return seal.close(opened(seal, field, key), key)

    outcome = record.outcome
    if outcome is not None and outcome.payload:
        payload = change(outcome.payload)
        outcome = outcome._replace(payload=payload or None, missing="" if payload else KEY_LOST)
    notes = tuple(
        note._replace(late=note.late._replace(payload=change(note.late.payload)))
        if note.late is not None and note.late.payload
        else note
        for note in record.notes
    )
    steps = tuple(
        step._replace(payload=change(step.payload)) if step.payload else step for step in record.steps
    )
    call = change(record.call) or Why.KEY_LOST.packed if _holds_call(record) else record.call
    return record._replace(outcome=outcome, notes=notes, steps=steps, call=call)


def _fields(record: Record) -> Iterator[bytes]:
    """Return the fields that hold values of the application, without empty ones and without ``calls.Why``."""
    if _holds_call(record):
        yield record.call
    if record.outcome is not None and record.outcome.payload:
        yield record.outcome.payload
    for step in record.steps:
        if step.payload:
            yield step.payload
    for note in record.notes:
        if note.late is not None and note.late.payload:
            yield note.late.payload


def _holds_call(record: Record) -> bool:
    return len(record.call) > len(Why.OFF.packed)


def _id_of(raw: bytes) -> bytes:
    return hashlib.sha256(b"celery_idem seal key " + raw).digest()[:4]


def _no_key(sealed: bytes, key: str, why: str) -> StoreError:
    return StoreError(
        f"The record at {key} is sealed with the key {sealed[_ID].hex()}, which {why}. Nothing was run, and nothing is "
        "lost. Give this process the keys that the other processes have, the newest first; see "
        "docs/how-to/sealing.md.",
        key,
    )
