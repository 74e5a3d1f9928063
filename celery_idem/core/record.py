"""Packs a record into one value, and unpacks it.

Version 2, all integers big-endian::

    owner 12 | version 1 | state 1 | parts 2 | attempts 2 | crashes 1 | fence 8 | parts…

``parts`` says which optional parts follow, in the order of the bits below. The last one is the outcome's payload, which
takes the rest. A finished record of a task without ``must_match`` is 27 + 16 bytes and its payload.
``docs/explanation/record.md`` says how to read a record without this package.
"""

from __future__ import annotations

import struct
from functools import lru_cache

from celery_idem.core.errors import StoreError
from celery_idem.core.model import (
    FINGERPRINT_ENTRY,
    SCOPE_SIZE,
    TRACE_SIZE,
    Late,
    Note,
    Noticed,
    Outcome,
    Record,
    Recovery,
    Resolution,
    State,
    Step,
    Would,
)

VERSION = 2
"""Number of the format, in every record. Every change that an older reader would misread increases it. A reader refuses
a newer format: it runs nothing, and says that it is older."""

_HEAD = struct.Struct(">12sBBHHBQ")
_LENGTH = struct.Struct(">I")
_TIME = struct.Struct(">Q")

STATE_AT = 13
"""Offset of the state byte in a packed record, by which a store may filter a scan."""

_LAST_VERSION = 31
"""Greatest number that counts as a format. Most values that are no records have a letter at that offset."""

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
_NOTICED = 1 << 12  # this and the following parts come before the outcome, which is last
_TRACE = 1 << 12  # of an outcome, just before it; the same bit, because a record with an outcome has no mark
_SCOPE = 1 << 13
_REPLACED_BY = 1 << 14  # instead of _MISSING
_OPEN = 1 << 15  # call, place and recovery; before the outcome
_RECOVERY = struct.Struct(">BQ")
_NEITHER = bytes(2 * _LENGTH.size)  # an empty place and an empty call

_RESOLUTIONS = frozenset(Resolution)
"""Values instead of ``Would`` in a note of a decision."""

_LATE = 255
"""Value instead of ``Would`` in a note that is followed by a ``Late``."""


def pack(record: Record) -> bytes:
    """Return a record as bytes for a store."""
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
        call,
        place,
        recovery,
        outcome,
    ) = record  # unpacked at once, because reading a named tuple's fields by name is slow
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
        for at, by, what, evidence, would, differs, late, resolution in notes:
            tail += (_TIME.pack(at), _text(by), _text(what), _text(evidence))
            kind = _LATE if late is not None else would or resolution or 0
            tail += (bytes((kind,)), _LENGTH.pack(len(differs)), *map(_text, differs))
            if late is not None:
                tail += (_text(late.task_id), _TIME.pack(late.fence), _text(late.place))
                tail += (bytes((late.succeeded,)), _blob(late.payload), _text(late.stood_task_id))
                tail += (_TIME.pack(late.stood_fence), _text(late.stood_place), _TIME.pack(late.stood_at))
    if digests:
        parts |= _DIGESTS
        tail.append(_blob(digests))
    if noticed is not None:
        parts |= _NOTICED
        tail += map(_TIME.pack, noticed)
    if scope:
        parts |= _SCOPE
        tail.append(scope)
    if outcome is not None and recovery is not None and not (call or place):  # an answer is owed
        parts |= _OPEN
        tail.append(_RECOVERY.pack(*recovery) + _NEITHER)
    elif call or place or recovery is not None:
        parts |= _OPEN
        tail += (_RECOVERY.pack(*recovery or (0, 0)), _text(place), _blob(call))
    if outcome is not None:
        if outcome.trace:
            parts |= _TRACE
            tail.append(outcome.trace)
        if outcome.replaced_by:
            parts |= _REPLACED_BY
            tail.append(_text(outcome.replaced_by))
        elif outcome.payload is None:
            parts |= _MISSING
            tail.append(_text(outcome.missing))
        else:
            parts |= _PAYLOAD
            tail.append(outcome.payload)
    head = _HEAD.pack(owner, VERSION, state, parts, attempts, crashes, fence)
    return b"".join((head, *tail))


def unpack(value: bytes, stamp: int, key: str) -> Record:
    """Return the record in a stored value.

    Args:
        stamp: the store's time of the last write. It is the fence of a record that was written before the worker knew
            the store's time.
        key: for the error message.

    Raises:
        StoreError: the value is not a record that this version can read.
    """
    try:
        return _unpack(value, stamp)
    except _OtherVersionError as other:
        raise StoreError(_other_version(other.args[0], key), key) from None
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise StoreError(
            f"The store holds something at {key} that is not a record of celery_idem ({error}). Nothing was "
            "run. Look at the value; if it is not needed, remove it with `celery -A proj idem forget`.",
            key,
        ) from None


def _other_version(version: int, key: str) -> str:
    if version > VERSION:
        return (
            f"The record at {key} has format {version}: a newer celery_idem than this one wrote it, which reads format "
            f"{VERSION}. Nothing was run. Upgrade this process; see docs/how-to/upgrade.md."
        )
    return (
        f"The record at {key} has format {version}, of an older celery_idem; this one reads format {VERSION}. Nothing "
        "was run. See docs/how-to/upgrade.md."
    )


def _unpack(value: bytes, stamp: int) -> Record:
    owner, version, state, parts, attempts, crashes, fence = _HEAD.unpack_from(value)
    if version != VERSION:
        if 1 <= version <= _LAST_VERSION:
            raise _OtherVersionError(version)
        raise ValueError("no record")
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
        notes = tuple(read.note() for _ in range(read.count()))
    digests = read.blob() if parts & _DIGESTS else b""
    noticed = Noticed(read.time(), read.time()) if parts & _NOTICED and not state.settled else None
    scope = read.take(SCOPE_SIZE) if parts & _SCOPE else b""
    call, place, recovery = b"", "", None
    if parts & _OPEN:
        tries, wait = _RECOVERY.unpack(read.take(_RECOVERY.size))
        recovery = Recovery(tries, wait) if tries or wait else None
        place, call = read.text(), read.blob()
    outcome = None
    succeeded, trace = state is State.SUCCEEDED, b""
    if parts & _TRACE and state.settled:
        trace = read.take(TRACE_SIZE)
    if parts & _REPLACED_BY:
        outcome = Outcome(succeeded, None, "", read.text(), trace)
    elif parts & _MISSING:
        outcome = Outcome(succeeded, None, read.text(), "", trace, state is State.CANCELLED)
    elif parts & _PAYLOAD:
        outcome = Outcome(succeeded, read.rest(), "", "", trace)
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
        call=call,
        place=place,
        recovery=recovery,
        outcome=outcome,
    )


class _OtherVersionError(ValueError):
    """The record has another format."""


class _Reader:
    """Reads parts one after the other. Raises ``ValueError`` if a part is cut short."""

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
        # Each entry takes at least a byte; this prevents a huge loop for a wrong value.
        if count > len(self._value):
            raise ValueError("count too large")
        return count

    def blob(self) -> bytes:
        return self.take(int.from_bytes(self.take(4), "big"))

    def text(self) -> str:
        return self.blob().decode("utf-8", "surrogatepass")

    def note(self) -> Note:
        at, by, what, evidence = self.time(), self.text(), self.text(), self.text()
        kind = self.take(1)[0]
        differs = tuple(self.text() for _ in range(self.count()))
        if kind == _LATE:
            return Note(at, by, what, evidence, None, differs, self.late())
        if kind in _RESOLUTIONS:
            return Note(at, by, what, evidence, None, differs, None, Resolution(kind))
        return Note(at, by, what, evidence, Would(kind) if kind else None, differs)

    def late(self) -> Late:
        late = self.text(), self.time(), self.text(), self.take(1) != b"\0", self.blob()
        return Late(*late, self.text(), self.time(), self.text(), self.time())

    def rest(self) -> bytes:
        return self.take(len(self._value) - self._at)

    def at_end(self) -> bool:
        return self._at == len(self._value)


def _blob(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


def _text(text: str) -> bytes:
    return _blob(text.encode("utf-8", "surrogatepass"))


@lru_cache(maxsize=256)  # a record is packed for its claim and its end; enough for all that run at once
def _uuid_bytes(task_id: str) -> bytes | None:
    """Return the 16 bytes of a task id in the usual spelling of a UUID; None for any other id."""
    if len(task_id) != 36:
        return None
    try:
        packed = bytes.fromhex(task_id.replace("-", ""))
    except ValueError:
        return None
    usual = len(packed) == 16 and task_id[8:24:5] == "----" and task_id == task_id.lower()
    return packed if usual else None


def _uuid_text(packed: bytes) -> str:
    """Return ``str(uuid.UUID(bytes=packed))``, in a sixth of the time."""
    h = packed.hex()
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"
