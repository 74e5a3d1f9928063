"""`idem doctor --against` shows what a new release does to the intents of the release before it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_idem import ALL_ARGUMENTS, IdempotentTask, Ledger
from celery_idem.core.model import Fingerprint, Policy, Request
from celery_idem.engine import owners
from tests.operators.conftest import command_line


def first(customer_id: str, invoice_id: int, cents: int = 0) -> str:
    return f"{customer_id} {invoice_id}"


def fewer(customer_id: str, cents: int = 0) -> None: ...
def more(customer_id: str, invoice_id: int, currency: str, cents: int = 0) -> None: ...
def swapped(invoice_id: int, customer_id: str, cents: int = 0) -> None: ...
def by_name(customer_id: str, *, invoice_id: int, cents: int = 0) -> None: ...
def inserted(customer_id: str, invoice_id: int, note: str = "", cents: int = 0) -> None: ...
def with_default(customer_id: str, invoice_id: int = 1, cents: int = 0) -> None: ...
def other_default(customer_id: str, invoice_id: int = 2, cents: int = 0) -> None: ...
def computed(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"customer": arguments["customer_id"]}


def release(
    store: str, body: Callable[..., Any] = first, *, conf: dict[str, Any] | None = None, **options: Any
) -> Celery:
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(idem_store=store, **(conf or {}))
    options = {"name": "shop.send", "intent": ("customer_id", "invoice_id"), **options}
    app.task(base=IdempotentTask, shared=False, **options)(body)
    app.finalize()
    for name in [name for name in app.tasks if not name.startswith(("celery.", "shop."))]:
        app.tasks.pop(name)  # shared tasks of other tests
    return app


def claimed(app: Celery, *args: Any) -> None:
    """Claim an intent, as if a message of this release were being executed."""
    (task,) = (task for name, task in app.tasks.items() if name == "shop.send")
    request = Request(owners.mint(), "task", Fingerprint(), Policy(10**9, 10**9, 10**9))
    Ledger.from_app(app).claim(task.intent_key(*args), request)


def against(app: Celery, *words: str) -> tuple[int, dict[str, dict[str, str]]]:
    answer = command_line(app)("doctor", "--against", *words, "--json")
    return answer.exit_code, {found["code"]: found for found in json.loads(answer.output)}


@pytest.fixture
def store() -> str:
    """A store that the first release has used: one intent is open, two are remembered."""
    url = f"memory://{uuid.uuid4().hex}"
    app = release(url)
    for customer in "ab":
        app.tasks["shop.send"].apply((customer, 7), throw=True)
    claimed(app, "c", 7)
    assert command_line(app)("doctor", "--against").exit_code != 0, "nothing is kept yet"
    command_line(app)("doctor", "--save")
    return url


def test_the_same_release(store: str) -> None:
    assert against(release(store)) == (0, {})
    assert against(release(store, result_ttl=60.0)) == (0, {}), "what keys do not depend on"


NARROW = {"intent": ("customer_id",)}
CHANGES: dict[str, tuple[dict[str, Any], str, str, int]] = {
    "narrower": (NARROW, "intent-changed", "differ in invoice_id alone become one action", 1),
    "wider": (
        {"intent": ("customer_id", "invoice_id", "cents")},
        "intent-changed",
        "differ in cents alone become several actions",
        1,
    ),
    "all": ({"intent": ALL_ARGUMENTS}, "intent-changed", "differ in cents alone become several actions", 1),
    "computed": (
        {"intent": computed},
        "intent-changed",
        "is computed by tests.operators.test_declared:computed",
        1,
    ),
    "meant": ({**NARROW, "intent_version": 2}, "intent-changed", "intent_version was 1 and is 2", 0),
    "version": ({"intent_version": 2}, "intent-changed", "1 open and 2 remembered intents", 0),
    "scope": ({"scope": "shop.tenants:current"}, "intent-changed", "idem_scope was none", 1),
    "renamed": ({"name": "shop.post"}, "renamed", "1 open and 2 remembered intents", 1),
    "renamed with its alias": ({"name": "shop.post", "aliases": ("shop.send",)}, "", "", 0),
    "replaced": ({"name": "shop.post", "body": fewer, **NARROW}, "removed", "1 of its intents are open", 1),
    "parameter removed": (
        {"body": fewer, **NARROW},
        "calls-do-not-fit",
        "'invoice_id' is no parameter any more",
        1,
    ),
    "parameter added": ({"body": more}, "calls-do-not-fit", "'currency' has to be given", 1),
    "parameters swapped": ({"body": swapped}, "parameters-moved", "'customer_id', 'invoice_id'", 1),
    "parameter inserted": ({"body": inserted}, "parameters-moved", "'cents'", 1),
    "parameter by name": ({"body": by_name}, "calls-do-not-fit", "'invoice_id' has to be given by name", 1),
    "default given": ({"body": with_default}, "", "", 0),
    "must_match": ({"must_match": ("cents",)}, "must-match-changed", "was () and is (cents)", 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_does(store: str, change: str) -> None:
    options, code, says, status = CHANGES[change]
    exit_status, found = against(release(store, **options))
    assert exit_status == status
    assert bool(found) is bool(code)
    if code:
        assert says in found[code]["wrong"]


@pytest.mark.parametrize("name", ["shop.other", "shop.send"], ids=["unguarded", "taken by another task"])
def test_a_name_that_stays_without_its_intents(store: str, name: str) -> None:
    """Messages with the old name reach a task that does not know the old records. That is an error."""
    app = release(store, name="shop.other")
    command_line(app)("doctor", "--save")
    if name == "shop.other":
        app.tasks.pop("shop.other")
        app.task(shared=False, name="shop.send")(first)
    else:
        app = release(store, name="shop.send", aliases=("shop.other",))
    status, found = against(app)
    assert status == 1
    assert (
        "2 remembered intents are not found, and 1 that are open stay so" in found["guard-removed"]["wrong"]
    )


def test_a_change_of_what_nothing_is_stored_of_is_a_note() -> None:
    app = release(f"memory://{uuid.uuid4().hex}")
    command_line(app)("doctor", "--save")
    status, found = against(release(app.conf.idem_store, **NARROW))
    assert (status, found["intent-changed"]["severity"]) == (0, "note")


def test_a_default_in_the_intent(store: str) -> None:
    command_line(release(store, with_default))("doctor", "--save")
    status, found = against(release(store, other_default))
    assert status == 1
    assert "the default of 'invoice_id' has changed" in found["intent-changed"]["wrong"]


def test_a_namespace_is_seen_by_a_file(store: str, tmp_path: Path) -> None:
    """A change of namespace is found with a file only: another namespace of the store has no declarations."""
    path = str(tmp_path / "declared.json")
    command_line(release(store))("doctor", "--save", path)
    assert against(release(store), path) == (0, {})
    moved = release(store, conf={"idem_namespace": "other"})
    status, found = against(moved, path)
    assert status == 1
    assert "idem_namespace was idem and is other" in found["intent-changed"]["wrong"]
    assert "1 open and 2 remembered" in found["intent-changed"]["wrong"]
    for wrong in ("[]", "{", '{"a": {}}'):
        Path(path).write_text(wrong)
        answer = command_line(moved)("doctor", "--against", path)
        assert answer.exit_code == 1
        assert "no file of `idem doctor --save`" in answer.output


def test_a_task_of_another_worker_stays_until_its_outcomes_have_expired(store: str) -> None:
    other = {"name": "shop.other", "intent": ("customer_id",)}
    command_line(release(store, **other))("doctor", "--save")
    assert against(release(store))[1].keys() == {"removed"}
    command_line(release(store, **other, result_ttl=0.0, failure_ttl=0.0))("doctor", "--save")
    command_line(release(store))("doctor", "--save")
    assert against(release(store)) == (0, {})
