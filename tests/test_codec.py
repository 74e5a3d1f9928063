"""Records and outcomes as bytes: what is read back, and that a corrupt or forged value does no harm."""

from __future__ import annotations

import dataclasses
import pickle
import re
import sys
import uuid
from datetime import date, datetime, timezone
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_idem import FingerprintMismatch, StoreError
from celery_idem.core.model import Late, Note, Outcome, Record, Recovery, Resolution, State, Step, Would
from celery_idem.core.record import STATE_AT, VERSION, pack, unpack
from celery_idem.core.results import Codec, NotStorable

# --- records -----------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
data = st.binary(max_size=60)
token = st.binary(min_size=12, max_size=12)
moment = st.integers(0, 2**64 - 1)
LATE = st.builds(Late, text, moment, text, st.booleans(), data, text, moment, text, moment)
COMMON = (Note, moment, text, text, text)
NONE = st.none()
NO_NAMES = st.just(())
NOTES = (
    st.builds(*COMMON, NONE | st.sampled_from(Would), st.lists(text, max_size=2).map(tuple), NONE, NONE)
    | st.builds(*COMMON, NONE, NO_NAMES, LATE, NONE)
    | st.builds(*COMMON, NONE, NO_NAMES, NONE, st.sampled_from(Resolution))
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    state = draw(st.sampled_from(State))
    outcome = None
    if state.settled:
        succeeded, cancelled = state is State.SUCCEEDED, state is State.CANCELLED
        stored = data.map(lambda payload: Outcome(succeeded, payload))
        missing = text.map(lambda why: Outcome(succeeded, None, why, cancelled=cancelled))
        replaced = text.filter(bool).map(lambda task: Outcome(succeeded, None, replaced_by=task))
        outcome = draw(missing if cancelled else stored | missing | replaced)
    return Record(
        state=state,
        owner=draw(token),
        task_id=draw(text | st.uuids().map(str)),
        fence=draw(st.integers(1, 2**64 - 1)),
        attempts=draw(st.integers(0, 65_535)),
        crashes=draw(st.integers(0, 255)),
        lease=draw(moment),
        fingerprint=draw(st.lists(token, max_size=3).map(b"".join)),
        steps=tuple(draw(st.lists(st.builds(Step, text, data), max_size=3))),
        open_steps=tuple(draw(st.lists(text, max_size=3))),
        asking=draw(st.just(b"") | token),
        reason=draw(text),
        notes=tuple(draw(st.lists(NOTES, max_size=3))),
        digests=draw(data),
        call=draw(data),
        place=draw(text),
        recovery=draw(st.none() | st.builds(Recovery, st.integers(1, 255), moment)),
        outcome=outcome,
    )


@given(records())
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    value = pack(record)
    assert unpack(value, 5, "k") == record
    assert value[:12] == record.owner
    assert value[STATE_AT] == record.state


@given(records())
def test_a_record_written_before_anybody_knew_the_time_has_the_stamp_as_its_fence(record: Record) -> None:
    value = pack(record._replace(fence=0))
    assert unpack(value, 5, "k") == record._replace(fence=5)


def unpacked(value: bytes) -> Record | StoreError:
    """The record, checked for consistency, or a StoreError that names the key."""
    error: StoreError | None = None
    try:
        record = unpack(value, 5, "shop.pay:1")
    except StoreError as refusal:
        error = refusal
    if error is None:
        assert (record.outcome is not None) == record.state.settled
        return record
    assert error.key == "shop.pay:1"
    assert "shop.pay:1" in str(error)
    return error


@given(records(), st.data())
def test_a_cut_record_is_an_error_that_names_the_key_or_a_shorter_payload(record: Record, draw: Any) -> None:
    value = pack(record)
    found = unpacked(value[: draw.draw(st.integers(0, len(value) - 1))])
    if isinstance(found, Record):  # only the payload runs to the end, so only it can be shorter
        assert found._replace(outcome=None) == record._replace(outcome=None)


@given(st.binary(max_size=200))
def test_nonsense_is_a_store_error(value: bytes) -> None:
    unpacked(value)


@given(records(), st.data())
def test_a_changed_byte_never_escapes_as_another_error(record: Record, draw: Any) -> None:
    value = bytearray(pack(record))
    at = draw.draw(st.integers(0, len(value) - 1))
    value[at] ^= draw.draw(st.integers(1, 255))
    unpacked(bytes(value))


def test_a_later_version_is_refused_and_not_guessed_at() -> None:
    value = bytearray(pack(Record(State.RELEASED)))
    for version, says in [
        (VERSION + 1, "newer celery_idem"),
        (VERSION - 1, "older celery_idem"),
        (200, "not a record"),
    ]:
        value[12] = version
        with pytest.raises(StoreError, match=says):
            unpack(bytes(value), 5, "k")


def test_state_and_outcome_must_agree() -> None:
    value = bytearray(pack(Record(State.RUNNING)))
    value[STATE_AT] = State.SUCCEEDED
    with pytest.raises(StoreError, match="disagree"):
        unpack(bytes(value), 5, "k")
    value[STATE_AT] = 99
    with pytest.raises(StoreError):
        unpack(bytes(value), 5, "k")


def test_the_format_of_version_2_never_changes() -> None:
    """Records outlive a release: every later release must read and write these bytes."""
    record = Record(
        State.SUCCEEDED,
        owner=b"0123456789ab",
        task_id="00000000-0000-0000-0000-00000000002a",
        fence=7,
        attempts=2,
        crashes=1,
        fingerprint=b"tag.valuedig",
        outcome=Outcome(True, b"j42"),
    )
    parts = ["303132333435363738396162", "02", "04", "080a", "0002", "01", "0000000000000007"]
    parts += ["0000000000000000000000000000002a", "0000000c", "7461672e76616c7565646967", "6a3432"]
    expected = "".join(parts)
    assert pack(record).hex() == expected
    assert unpack(bytes.fromhex(expected), 5, "k") == record


def test_a_finished_record_is_small() -> None:
    record = Record(State.SUCCEEDED, task_id=str(uuid.uuid4()), outcome=Outcome(True, b"j1"))
    assert len(pack(record)) == 27 + 16 + 2


@pytest.mark.parametrize(
    "task_id",
    [
        "",
        "short",
        "3E3FD1C5-1EDC-4998-9BAA-29351F90EE33",
        "{" + "0" * 34 + "}",
        "größe",
        "-" * 36,
        str(uuid.UUID(int=7)),
    ],
)
def test_any_task_id_comes_back(task_id: str) -> None:
    assert unpack(pack(Record(State.RUNNING, task_id=task_id)), 5, "k").task_id == task_id


# --- values -------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"


@dataclasses.dataclass
class Money:
    cents: int


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(json_values)
def test_a_value_comes_back(value: Any) -> None:
    payload, shown = Codec().kept(value)
    assert Codec().decode(payload, "k") == value == shown


@pytest.mark.parametrize(
    "value",
    [
        Decimal("19.99"),
        uuid.UUID(int=1),
        date(2026, 11, 1),
        datetime(2026, 11, 1, tzinfo=timezone.utc),
        b"\x00\xff",
        2**80,
    ],
    ids=lambda v: type(v).__name__,
)
def test_celerys_json_keeps_more_than_json(value: Any) -> None:
    found = Codec().decode(Codec().encode(value))
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(("value", "decoded"), [((1, 2), [1, 2]), ({1: "a"}, {"1": "a"})])
def test_the_first_caller_gets_what_every_later_one_gets(value: Any, decoded: Any) -> None:
    assert Codec().kept(value)[1] == decoded


def _loop() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, Colour.RED, Money(1), lambda: None, _loop(), {(1, 2): 3}],
    ids=lambda v: type(v).__name__,
)
def test_what_the_serializer_refuses_is_not_storable(value: Any) -> None:
    with pytest.raises(NotStorable):
        Codec().encode(value)


def test_the_limit_is_the_limit() -> None:
    tight = Codec(max_bytes=10)
    assert tight.encode("x" * 7) == b'j"' + b"x" * 7 + b'"'
    with pytest.raises(NotStorable, match=r"11 bytes.*max_result_bytes"):
        tight.encode("x" * 8)
    # An error is cut, never dropped.
    assert len(Codec(max_bytes=300).encode_error(ValueError("x" * 10_000))) < 3000


@pytest.mark.parametrize("serializer", ["pickle", "yaml", "msgpack"])
def test_other_serializers_work_where_they_are_accepted(serializer: str) -> None:
    if serializer != "pickle":
        pytest.importorskip(serializer)
    both = Codec(serializer, ("json", serializer))
    assert both.decode(both.encode({"a": [1, None]})) == {"a": [1, None]}
    # A value that an earlier configuration wrote is still read.
    assert both.decode(Codec().encode([1])) == [1]


def test_a_serializer_that_could_not_be_read_again_is_not_used() -> None:
    with pytest.raises(NotStorable, match="could not be read again"):
        Codec("pickle", ("json",)).encode(1)
    with pytest.raises(NotStorable):
        Codec("unheard-of", ("json", "unheard-of")).encode(1)


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.path),))


def test_pickle_is_not_read_unless_it_is_accepted(tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    payload = b"p" + pickle.dumps(Bomb(str(mark)))
    with pytest.raises(StoreError, match="does not accept") as caught:
        Codec().decode(payload, "shop.pay:1")
    assert caught.value.key == "shop.pay:1"
    assert not mark.exists()


@pytest.mark.parametrize(
    "payload", [b"", b"j", b"j{", b"j\xff\xfe", b"x1", b"j[1", b'j{"__type__": "no", "__value__": 1']
)
def test_a_corrupt_payload_is_a_store_error_that_names_the_key(payload: bytes) -> None:
    for read in (Codec().decode, Codec().decode_error):
        with pytest.raises(StoreError) as caught:
            read(payload, "shop.pay:1")
        assert caught.value.key == "shop.pay:1"
        assert "shop.pay:1" in str(caught.value)


# --- errors ---------------------------------------------------------------------------------


class Declined(Exception):
    def __init__(self, reason: str, cents: int) -> None:
        super().__init__(reason, cents)
        self.reason = reason


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


class Outer:
    class Nested(Exception):
        pass


def rebuilt(error: BaseException, reader: Codec | None = None) -> BaseException:
    return (reader or Codec()).decode_error(Codec().encode_error(error), "k")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        KeyError("a", 1),
        Declined("stolen", 5),
        Outer.Nested("x"),
        ConnectionError(),
        ValueError(),
    ],
    ids=repr,
)
def test_an_error_comes_back_with_its_class_and_arguments(error: Exception) -> None:
    found = rebuilt(error)
    assert type(found) is type(error)
    assert found.args == error.args
    assert str(found) == str(error)


def test_our_own_errors_come_back_with_their_attributes() -> None:
    found = rebuilt(FingerprintMismatch("differs", "shop.pay:1", ["cents"]))
    assert isinstance(found, FingerprintMismatch)
    assert (found.key, found.differs) == ("shop.pay:1", ("cents",))


def test_an_error_that_its_arguments_do_not_rebuild_keeps_class_and_text() -> None:
    found = rebuilt(KeywordOnly(code=7))
    assert type(found) is KeywordOnly
    assert found.args == ("code 7",)


def test_arguments_that_no_serializer_takes_become_text() -> None:
    found = rebuilt(Declined("stolen", object()))  # type: ignore[arg-type]
    assert isinstance(found, Declined)
    assert "stolen" in str(found)


def test_an_error_with_a_broken_text_is_still_stored() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    assert type(rebuilt(Mute("a"))).__name__ == "Mute"


def test_a_class_that_is_not_here_becomes_one_of_its_name() -> None:
    payload = Codec().encode_error(Declined("stolen", 5)).replace(b"Declined", b"Departed")
    found = Codec().decode_error(payload, "k")
    assert isinstance(found, Exception)
    assert type(found).__name__ == "Departed"
    assert found.args == ("stolen", 5)


def forged(module: str, name: str, args: list[Any]) -> bytes:
    import json

    return b"j" + json.dumps({"module": module, "type": name, "text": "", "args": args}).encode()


@pytest.mark.parametrize(
    ("module", "name", "args"),
    [
        ("os", "system", ["exit 1"]),
        ("subprocess", "Popen", [["touch", "x"]]),
        ("pathlib", "Path", ["x"]),
        ("builtins", "eval", ["1/0"]),
        ("builtins", "SystemExit", [3]),
        ("builtins", "KeyboardInterrupt", []),
        ("tests.test_codec", "Bomb", ["x"]),
        ("", "", []),
        ("builtins", "object.__class__", []),
    ],
)
def test_a_forged_error_can_only_be_an_exception(module: str, name: str, args: list[Any]) -> None:
    found = Codec().decode_error(forged(module, name, args), "k")
    assert isinstance(found, Exception)
    assert not isinstance(found, (SystemExit, KeyboardInterrupt))


def test_a_stored_error_imports_nothing() -> None:
    assert "antigravity" not in sys.modules
    Codec().decode_error(forged("antigravity", "Error", []), "k")
    assert "antigravity" not in sys.modules


def test_no_error_message_shows_a_value() -> None:
    with pytest.raises(StoreError) as caught:
        Codec().decode(b"j{hunter2", "k")
    assert not re.search("hunter2", str(caught.value))
