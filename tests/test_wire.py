"""The wire format: this package computes the vectors in `spec`, and producers in other languages agree with both."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import unicodedata
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils import json as kombu_json

from celery_idem import IntentError
from celery_idem.core.keys import canonical, declare
from celery_idem.core.model import State
from celery_idem.core.record import VERSION
from spec.make import FILE, charge, notation, parameters, text
from tests.support.languages import LANGUAGES, run, words


def test_the_vectors_are_what_this_package_makes() -> None:
    assert FILE.read_text() == text(), (
        "The wire format has changed. Producers in other languages depend on it, and records of earlier releases. "
        "If the change is meant: `python -m spec.make`, and a line in CHANGELOG.md."
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_vector_in_another_language(language: str) -> None:
    (said,) = run(language, "check", str(FILE))
    counted = json.loads(FILE.read_text())
    number = sum(len(counted[kind]) for kind in ("values", "refused", "calls", "records"))
    assert said == f"{number} vectors, 0 failures"


def test_the_table_of_canonical_forms() -> None:
    page = (FILE.parents[1] / "docs" / "reference" / "wire.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| ", page, re.MULTILINE)
    assert len(rows) > 14
    for value, form in rows:
        assert rfc8785.dumps(canonical(kombu_json.loads(value))).decode() == form


def test_the_page_of_the_record_has_every_state_and_part() -> None:
    page = (FILE.parents[1] / "docs" / "explanation" / "record.md").read_text()
    states = (f"{state:d} {state.name.lower().replace('_', ' ')}" for state in State)
    for said in (f"format version: {VERSION} ", *states, *(f"bit {number}, " for number in range(16))):
        assert said in page


# --- random calls ----------------------------------------------------------------------------

# Languages know different versions of Unicode, and may normalize newer characters differently.
letters = st.characters(exclude_categories=["Cs"]).filter(lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn")
texts = st.text(letters, max_size=8)
zones = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.floats(-100, 100).map(lambda number: round(number, 2))
    | texts
    | st.binary(max_size=8)
    | st.uuids()
    | st.dates()
    | st.times()
    | st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=zones)  # noqa: DTZ001
)
names = texts | st.sampled_from(["$date", "$$", "é", "e\u0301", "😀", "ﬁ", "__proto__"])
values = st.recursive(
    atoms, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=8
)
labels = st.none() | texts.filter(bool)

DECLARATION = declare(
    "shop.charge", inspect.signature(charge), ("customer", "invoice"), ("cents", "currency")
)


@pytest.fixture(scope="module", params=LANGUAGES)
def answer(request: pytest.FixtureRequest) -> Iterator[Callable[[Any], str]]:
    """The key and fingerprint that a producer computes for a call. One process answers all calls."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    with subprocess.Popen([*words(request.param), "keys"], **pipes) as program:  # type: ignore[call-overload]

        def ask(call: Any) -> str:
            program.stdin.write(json.dumps(call) + "\n")
            program.stdin.flush()
            return str(program.stdout.readline().rstrip("\n"))

        yield ask
        program.stdin.close()
        program.wait(60)


@given(st.lists(values, min_size=1, max_size=4), labels, labels, labels)
def test_a_call_has_one_key_in_every_language(
    answer: Callable[[Any], str],
    args: list[Any],
    scope: str | None,
    occurrence: str | None,
    caller_key: str | None,
) -> None:
    own = {"scope": scope, "occurrence": occurrence, "idempotency_key": caller_key}
    call = {
        "namespace": "idem",
        "task": "shop.charge",
        "intent_version": 1,
        "parameters": parameters(charge),
        "intent": DECLARATION.fields,
        "must_match": DECLARATION.must_match,
        "args": notation(args),
        "kwargs": {},
        **{name: value for name, value in own.items() if value is not None},
    }
    received = kombu_json.loads(kombu_json.dumps(args))  # as a worker receives them
    try:
        arguments = DECLARATION.bind(received, {})
        key = DECLARATION.key("idem", arguments, scope, occurrence, caller_key)
        expected = f"{key} {DECLARATION.fingerprint(arguments, caller_key).packed.hex()}"
    except IntentError:
        expected = "refused"
    said = answer(call)
    assert said.startswith("refused: ") if expected == "refused" else said == expected
