"""From arguments to keys: which calls are the same action, and which arguments are refused."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import uuid
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pytest

from celery_idem import ALL_ARGUMENTS, ConfigurationError, IntentError
from celery_idem.core import keys
from celery_idem.core.keys import declare
from tests.support.calls import NOON, Colour, Invoice, Money, a_task, key_for, key_of, send

# --- binding -----------------------------------------------------------------------------


def test_positional_keyword_and_defaulted_calls_agree() -> None:
    task = a_task()
    same = {
        key_of(task, 1, "first"),
        key_of(task, 1),
        key_of(task, customer_id=1),
        key_of(task, invoice_id="first", customer_id=1),
        key_of(task, 1, note="reworded", cents=5),
    }
    assert len(same) == 1
    assert key_of(task, 1, "second") not in same
    assert key_of(task, 2) not in same


def test_none_and_nothing_bind_alike() -> None:
    task = a_task(("a",), lambda a=1: None)
    assert task.bind(None, None) == task.bind((), {}) == {"a": 1}


def test_a_call_that_does_not_fit_is_a_type_error() -> None:
    for args, kwargs in [((), {}), ((1, 2, 3), {}), ((1,), {"unknown": 2}), ((1,), {"customer_id": 2})]:
        with pytest.raises(TypeError):
            a_task().bind(args, kwargs)


def test_open_ended_signatures() -> None:
    def fun(a: int, *rest: int, **more: int) -> None: ...

    task = a_task(("a", "rest", "extra"), fun)
    arguments = task.bind((1, 2, 3), {"extra": 4})
    assert arguments == {"a": 1, "rest": (2, 3), "extra": 4}
    assert key_of(task, 1, 2, 3, extra=4) != key_of(task, 1, 2, extra=4)
    with pytest.raises(IntentError, match="without 'extra'") as caught:
        key_of(task, 1)
    assert caught.value.parameter == "extra"


def test_fields_do_not_run_into_each_other() -> None:
    task = a_task()
    assert key_of(task, "a|b", "c") != key_of(task, "a", "b|c")
    assert key_of(task, '","', "") != key_of(task, "", '","')


def test_a_missing_value_is_not_none() -> None:
    assert len({key_for(value) for value in ([], None, "", "None")}) == 4


# --- what else is part of a key ---------------------------------------------------------------


def test_everything_that_tells_intents_apart_is_in_the_key() -> None:
    arguments = a_task().bind((1,), {})
    variants = [
        a_task().key("idem", arguments),
        a_task().key("other", arguments),
        a_task(version=2).key("idem", arguments),
        a_task().key("idem", arguments, scope="acme"),
        a_task().key("idem", arguments, occurrence="acme"),
        a_task().key("idem", arguments, caller_key="acme"),
        a_task().key("idem", arguments, scope="a", occurrence="b"),
        a_task().key("idem", arguments, scope="b", occurrence="a"),
        a_task().key("idem", arguments, part_of="acme"),
        declare("shop.refund", inspect.signature(send), ("customer_id", "invoice_id")).key("idem", arguments),
        a_task(("customer_id",)).key("idem", arguments),
    ]
    assert len(set(variants)) == len(variants)


def test_labels_are_text_and_numbers() -> None:
    task, arguments = a_task(), a_task().bind((1,), {})
    assert task.key("idem", arguments, scope=7) == task.key("idem", arguments, scope="7")  # type: ignore[arg-type]
    assert task.key("idem", arguments, scope="größe") == task.key("idem", arguments, scope="gro\u0308ße")
    for name in ("scope", "occurrence", "caller_key"):
        with pytest.raises(IntentError, match="must be text") as caught:
            task.key("idem", arguments, **{name: True})  # type: ignore[arg-type]
        assert caught.value.parameter == name.replace("caller_key", "idempotency_key")


def test_the_version_may_be_a_number_or_text() -> None:
    arguments = a_task().bind((1,), {})
    assert a_task(version=2).key("idem", arguments) == a_task(version="2").key("idem", arguments)


def test_a_callers_key_is_the_identity_and_every_argument_must_match() -> None:
    task = a_task()
    one, other = task.bind((1,), {"note": "a"}), task.bind((2,), {"note": "b"})
    assert task.key("idem", one, caller_key="k") == task.key("idem", other, caller_key="k")
    assert task.key("idem", one, caller_key="k") != task.key("idem", one, caller_key="l")
    assert task.fingerprint(one, "k").names == ("cents", "customer_id", "invoice_id", "note")
    assert task.fingerprint(one, "k") != task.fingerprint(other, "k")
    assert task.fingerprint(one).names == ()


def test_all_arguments() -> None:
    task = a_task(ALL_ARGUMENTS)
    assert key_of(task, 1) == key_of(task, 1, "first", cents=0, note="")
    assert key_of(task, 1, note="a") != key_of(task, 1, note="b")
    assert repr(ALL_ARGUMENTS) == "ALL_ARGUMENTS"


def test_an_intent_may_be_computed() -> None:
    task = a_task(lambda arguments: {"customer": str(arguments["customer_id"]).strip().lower()})
    assert key_of(task, " ACME ") == key_of(task, "acme")
    assert key_of(task, "acme") != key_of(task, "other")


def test_a_computed_intent_cannot_change_the_arguments() -> None:
    def compute(arguments: dict[str, Any]) -> dict[str, Any]:
        return {"customer": arguments.pop("customer_id")}

    task = a_task(compute)
    arguments = task.bind((1,), {})
    task.key("idem", arguments)
    assert arguments["customer_id"] == 1


@pytest.mark.parametrize("wrong", [None, {}, [], "customer"])
def test_a_computed_intent_must_say_something(wrong: Any) -> None:
    with pytest.raises(IntentError, match="instead of a dictionary"):
        key_of(a_task(lambda arguments: wrong), 1)


def test_a_computed_field_that_is_refused_is_named() -> None:
    with pytest.raises(IntentError) as caught:
        key_of(a_task(lambda arguments: {"when": datetime(2026, 1, 1)}), 1)  # noqa: DTZ001
    assert caught.value.parameter == "when"


# --- declaration ------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["intent", "must_match", "secret"])
def test_an_unknown_name_lists_the_real_ones(option: str) -> None:
    options: dict[str, Any] = {"intent": ("customer_id",), option: ("customer",)}
    with pytest.raises(ConfigurationError) as caught:
        a_task(**options)
    assert option in str(caught.value)
    assert "'customer'" in str(caught.value)
    assert "customer_id, invoice_id, cents, note" in str(caught.value)


@pytest.mark.parametrize("option", ["intent", "must_match", "secret"])
def test_a_name_that_a_position_may_hide_is_refused(option: str) -> None:
    """Behind a decorator without ``functools.wraps``, a positional ``cents`` would not be compared."""

    def fun(*args: int, **kwargs: int) -> None: ...

    with pytest.raises(ConfigurationError, match=r"names 'cents', .* in \*args it has no name.* signature="):
        declare("shop.pay", inspect.signature(fun), **{"intent": ("args",), option: ("cents",)})


@pytest.mark.parametrize("nothing", [(), [], set()])
def test_an_intent_that_names_nothing_is_refused(nothing: Any) -> None:
    with pytest.raises(ConfigurationError, match="ALL_ARGUMENTS"):
        a_task(nothing)


@pytest.mark.parametrize("wrong", [5, 1.5, True])
def test_an_intent_that_is_no_name_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="parameter names"):
        a_task(wrong)
    with pytest.raises(ConfigurationError):
        a_task((wrong,))


def test_one_name_may_stand_alone() -> None:
    assert a_task("customer_id").fields == ("customer_id",)
    assert a_task("customer_id", must_match="cents").must_match == ("cents",)


def test_the_order_of_names_does_not_matter() -> None:
    one = a_task(("customer_id", "invoice_id"), must_match=("cents", "note"))
    other = a_task(["invoice_id", "customer_id"], must_match=("note", "cents"))
    assert key_of(one, 1) == key_of(other, 1)
    assert one.fingerprint(one.bind((1,), {})) == other.fingerprint(other.bind((1,), {}))


# --- fingerprint --------------------------------------------------------------------------------


def test_a_fingerprint_holds_digests_of_what_must_match() -> None:
    task = a_task(must_match=("cents", "note"))
    one = task.fingerprint(task.bind((1,), {"cents": 5, "note": "visible text"}))
    assert one.names == ("cents", "note")
    assert len(one.packed) == 2 * 12
    assert b"visible" not in one.packed
    other = task.fingerprint(task.bind((1,), {"cents": 6, "note": "visible text"}))
    assert one.packed[:4] == other.packed[:4]
    assert one.packed[4:12] != other.packed[4:12]
    assert one.packed[12:] == other.packed[12:]


def test_equal_arguments_have_equal_fingerprints() -> None:
    task = a_task(must_match=("cents",))
    prints = {
        task.fingerprint(task.bind((1,), {"cents": cents})).packed for cents in (5, 5.0, Decimal("5.00"))
    }
    assert len(prints) == 1


def test_a_fingerprint_names_the_parameter_it_cannot_hold() -> None:
    task = a_task(must_match=("note",))
    with pytest.raises(IntentError) as caught:
        task.fingerprint(task.bind((1,), {"note": object()}))
    assert caught.value.parameter == "note"


# --- the key's form -------------------------------------------------------------------------------


def test_a_key_is_the_tasks_name_and_at_least_128_bits() -> None:
    key = key_for(1)
    assert re.fullmatch(r"shop\.send:[0-9a-f]{32,}", key)
    assert keys.task_of(key) == "shop.send"


def test_task_of() -> None:
    digest = "0" * 32
    assert keys.task_of(f"with:colon:{digest}") == "with:colon"
    for no_key in ("", "shop.send", f":{digest}", f"shop.send:{digest}0", f"shop.send:{digest[1:]}G", digest):
        assert keys.task_of(no_key) is None


def test_a_downstream_key_is_stable_and_fits_a_header() -> None:
    key = key_for(1)
    one = keys.downstream_key(key, "charge")
    assert one == keys.downstream_key(key, "charge")
    assert one != keys.downstream_key(key, "mail")
    assert one != keys.downstream_key(key_for(2), "charge")
    for name in ("charge", "größe \n", "x" * 500, ""):
        text = keys.downstream_key(key, name)
        assert text.isascii()
        assert text.isprintable()
        assert " " not in text
        assert len(text) <= 97
    assert keys.downstream_key(key, "a b") != keys.downstream_key(key, "a_b")


# --- scheme 1 ----------------------------------------------------------------------------------------

# Digests of SCHEME 1. If one of them changes, every intent that is open or done looks new.
# Such a change needs a new SCHEME, and new values here.
GOLDEN = {
    "null": (None, "9738159f340450301bfd24ce1d1fb7dd"),
    "true": (True, "e6acc5bba3f0feae9a1ece8c5c2134a2"),
    "int": (7, "efb9c07cd0e33cb46507634781cb352f"),
    "negative": (-7, "3fd1bf7e71f666acfa795238e2dc7c4b"),
    "big int": (2**64, "03983c88aee44ead251f3e255c5f35e6"),
    "float": (0.1, "05e4b3a05eda25ea6bbc367f92477011"),
    "decimal": (Decimal("19.99"), "00cb9a6183d0f262bc849fbf4fcb99e3"),
    "huge decimal": (Decimal("1E+500"), "7cab63759ea92257ef2f5ef8968706ec"),
    "text": ("größe 💶", "4921a867d2ddb74c9633db786504022e"),
    "bytes": (b"\x00\xff", "dea1767f1534bab08c93e171498c0e5d"),
    "date": (date(2026, 11, 1), "da04c5b25b57dcc55b6a4f4111455164"),
    "datetime": (NOON, "acc4a92d6304b18cd0c225b4380b7a95"),
    "time": (time(12, 30), "c0b8d32cef0fcafdae8d89fdac61ecd5"),
    "timedelta": (timedelta(days=1, microseconds=1), "309deb386e6234248d3ee2747a6d1274"),
    "uuid": (uuid.UUID(int=42), "e7eff92d0f857a0a07e599d1ff65431e"),
    "list": ([1, [2, None]], "e67dfe5ee4e87ac3d76e2153e7ca5f5d"),
    "set": ({3, 1, 2}, "36b329abac8d332362a61a1daeec2c8f"),
    "dict": ({"b": 1, "a": {"$x": 2}, "€": 3}, "1bcdc9ce15f99f40551107baca0dc7d3"),
    "enum": (Colour.RED, "61f7aae3b82b93c2a632bf1cdda9a377"),
    "dataclass": (Money(5), "aef5a3cca441ab883f69859763d73137"),
    "model": (Invoice(id=1, due=date(2026, 11, 1)), "708cb43c4f031832db737641aaf9f409"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_digests_of_scheme_1_never_change(name: str) -> None:
    assert keys.SCHEME == 1
    value, digest = GOLDEN[name]
    assert key_for(value) == f"shop.send:{digest}"


def test_the_labels_and_fingerprints_of_scheme_1_never_change() -> None:
    task = a_task(must_match=("cents",))
    arguments = task.bind((1,), {"cents": 5})
    assert task.key("shop", arguments, "acme", "2026-11") == "shop.send:487b23f2aa45c58fcee3dea185f6447e"
    assert task.key("shop", arguments, caller_key="order-7") == "shop.send:64be8eaff8b5548aae5b64ca1e79cc92"
    assert task.fingerprint(arguments).packed.hex() == "ded9a2fb9d0eb6dba07f96e4"
    assert keys.downstream_key("shop.send:0", "charge") == "charge-28a262361bcf76cac8e90290a5b9f09b"


def test_a_key_is_the_same_in_every_process() -> None:
    """The iteration order of a set differs from process to process."""
    program = "from tests.test_keys import key_for\nprint(key_for({'a', 'b', 'c', 'd', 'e', 'f'}))"
    found = set()
    for seed in ("1", "2"):
        words = [sys.executable, "-c", program]
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path)) or "."}
        found.add(
            subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=True).stdout
        )
    assert len(found) == 1
