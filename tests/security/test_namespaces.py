"""A namespace sees nothing of another namespace, with any key and through any API, adapter or command."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from celery import Celery
from starlette.testclient import TestClient

from celery_idem import ConfigurationError, IdempotentTask, Ledger, NotHappened, look_up
from celery_idem.adapters.http import door
from celery_idem.adapters.inbox import inbox
from celery_idem.adapters.mcp import server
from celery_idem.adapters.tools import tool_of
from celery_idem.core.errors import IdempotencyError
from celery_idem.core.model import KEY
from celery_idem.integration.settings import of_app
from celery_idem.operate.operators import Operator
from celery_idem.telemetry.prometheus import exporter_registry
from tests.operators.intents import in_doubt
from tests.security.conftest import MARK, application, command_line

TOKEN = "a-token-of-enough-characters"
BEARER = {"authorization": f"Bearer {TOKEN}"}
DOUBTED = "the neighbour's doubt"

# Our namespaces, as an attacker would choose them: patterns, a prefix of "theirs", and "theirs" with a suffix.
OURS = ("ours", "*", "[t]heirs", "their?", "their", "theirs2")


@pytest.fixture
def theirs(shared_url: str) -> Celery:
    """The other application, with a result, an intent in doubt and a shadow record that must not be seen."""
    app = application(shared_url, "theirs")
    pay = app.tasks["shop.pay"]
    assert MARK in pay.apply(("c1", 7)).get()
    in_doubt(Ledger.from_app(app), pay.intent_key("c2"), DOUBTED)
    in_doubt(Ledger.from_app(app).shadow(), pay.intent_key("c3"), DOUBTED)
    return app


def crafted(theirs: Celery) -> list[str]:
    """Return keys for an attacker who knows everything about the other application but cannot access the store."""
    keys = []
    for customer in ("c1", "c2", "c3"):
        key = theirs.tasks["shop.pay"].intent_key(customer)
        keys += [
            key,
            f"theirs:{key}",
            f":{key}",
            f"../theirs:{key}",
            f"\\theirs:{key}",
            f"theirs~shadow:{key}",
            f"~shadow:{key}",
            f"{key}\0",
            f"\n{key}",
            key.replace("shop.pay", "*"),
            key.replace("shop.pay", "theirs:shop.pay"),
        ]
    return [
        *keys,
        "",
        "*",
        "?",
        "[^x]",
        "%",
        "_",
        "theirs",
        "theirs:",
        ":",
        "shop.pay",
        "shop.pay:",
        "\\",
        "\0",
    ]


class Doors:
    """Everything that the APIs, adapters and commands of an application return, by name."""

    def __init__(self, app: Celery) -> None:
        self.app, self.ledger, self.operator = app, Ledger.from_app(app), Operator(app)
        self.http = TestClient(door(app, ["shop.pay"], token=TOKEN), headers=BEARER)
        self.pages = TestClient(inbox(app, authenticate=lambda request: "ann"))
        self.mcp = _mcp_handlers(app)
        self.said: dict[str, list[str]] = defaultdict(list)

    def say(self, name: str, call: Callable[..., Any], *words: Any) -> None:
        try:
            self.said[name].append(repr(call(*words)))
        except IdempotencyError as refusal:
            asked = max(map(str, words), key=len, default="")  # a refusal may repeat the given key
            self.said[name].append(str(refusal).replace(asked, "") if asked else str(refusal))

    def lists(self) -> None:
        """Call everything that takes no key."""
        for words in (
            ("list",),
            ("list", "--state=in_doubt"),
            ("stats",),
            ("audit",),
            ("shadow",),
            ("reconcile", "-y"),
        ):
            self.say("cli", command_line, self.app, *words, "--json")
        self.say("ledger", lambda: [(e.key, e.record) for e in self.ledger.list()])
        self.say("operator", lambda: [self.operator.describe(e) for e in self.operator.list()])
        self.say("stats", lambda: (self.ledger.stats(), self.operator.stats()))
        self.say("doubtful", lambda: list(self.operator.list("waiting")))
        self.say("inbox", lambda: self.pages.get("/").text)
        self.say("metrics", lambda: prometheus_client.generate_latest(exporter_registry(self.app)).decode())

    def look(self, key: str) -> None:
        self.say("ledger", self.ledger.get, key)
        self.say("ledger", lambda task: list(self.ledger.list(task=task)), key)
        self.say("operator", lambda key: self.operator.describe(self.operator.find(key)), key)
        self.say("receipts", lambda key: look_up(self.app, key), key)

    def change(self, key: str) -> None:
        self.say("change", lambda key: self.ledger.resolve(key, NotHappened(), by="mallory"), key)
        self.say("change", lambda key: self.operator.resolve(key, NotHappened(), "mallory", "seen"), key)
        self.say("change", lambda key: (self.ledger.forget(key), self.operator.forget(key)), key)

    def ask(self, key: str) -> None:
        """Ask about a key as ``look`` does, through the adapters and the command line."""
        path = "".join(f"%{byte:02x}" for byte in key.encode())
        self.say("http", lambda: _body(self.http.get(f"/intents/{path}")))
        self.say("inbox", lambda: _body(self.pages.get("/intent", params={"key": key})))
        self.say("mcp", lambda: asyncio.run(self.mcp._status({"key": key}, None)))
        if "\0" not in key:  # no command line can hold one
            self.say("cli", lambda: command_line(self.app, "show", "--json", "--", key).replace(key, ""))
            self.say("cli", lambda: command_line(self.app, "list", "--json", f"--task={key}"))


def _body(answer: Any) -> Any:
    return answer.text if answer.status_code == 200 else answer.status_code


def _mcp_handlers(app: Celery) -> Any:
    made = server(app, ["shop.pay"])
    return made.get_request_handler("tools/call").handler.__self__


@pytest.mark.parametrize("namespace", OURS)
def test_no_door_shows_the_neighbour(theirs: Celery, shared_url: str, namespace: str) -> None:
    ours = Doors(application(shared_url, namespace))
    before = _all(theirs)
    keys = crafted(theirs)
    ours.lists()
    for key in keys:
        ours.look(key)
        ours.change(key)
    for key in (*keys[:3], *keys[-8:]):  # these are slower, and use the same ledger
        ours.ask(key)
    for name, answers in ours.said.items():
        for sign in (MARK, DOUBTED, "in_doubt", "<Entry", "Receipt("):
            # One of our own gauges with the value 0 names the state.
            told = re.sub(r'state="in_doubt",task="[^"]*"} 0\.0', "", "".join(answers))
            assert sign not in told, name
    assert _all(theirs) == before  # nothing was resolved, forgotten or asked about


def _all(app: Celery) -> list[Any]:
    ledger = Ledger.from_app(app)
    return sorted((e.key, e.record, e.changed_at) for one in (ledger, ledger.shadow()) for e in one.list())


def test_the_neighbour_sees_itself(theirs: Celery) -> None:
    """The other application sees its own records. Without this test, the one above would pass for an empty store."""
    doors = Doors(theirs)
    key = theirs.tasks["shop.pay"].intent_key("c1")
    doors.lists()
    doors.look(key)
    doors.ask(key)
    shown = {name: "".join(answers) for name, answers in doors.said.items()}
    for name in ("ledger", "operator", "cli", "http", "inbox", "mcp", "receipts"):
        assert MARK in shown[name], name
    for name in ("stats", "doubtful", "metrics"):
        assert "in_doubt" in shown[name], name


def test_the_same_call_of_two_namespaces_is_two_actions(theirs: Celery, shared_url: str) -> None:
    ours = application(shared_url, "ours")
    pay = ours.tasks["shop.pay"]
    assert pay.intent_key("c1") != theirs.tasks["shop.pay"].intent_key("c1")
    assert pay.apply(("c1", 7)).get() == "paid 7 for c1: ours"


def test_a_key_in_a_header_is_looked_up_in_our_own_namespace(theirs: Celery, shared_url: str) -> None:
    """A producer may choose a key of a task, but not the namespace in which the worker looks it up."""
    ours = application(shared_url, "ours")
    pay = ours.tasks["shop.pay"]
    stolen = theirs.tasks["shop.pay"].intent_key("c1")
    for sent in (stolen, f"theirs:{stolen}", f"../theirs:{stolen}", stolen.replace("shop.pay", "shop.login")):
        request = SimpleNamespace(id="x", headers={KEY: sent})
        key, _ = pay.guard.identify(request, ("c1", 7), {})
        assert Ledger.from_app(ours).get(key) is None


@pytest.mark.parametrize("namespace", ["", "a:b", ":", "theirs~shadow", "theirs:shop.pay", None, 5])
def test_a_namespace_that_would_reach_into_another_is_refused(namespace: Any) -> None:
    with pytest.raises(ConfigurationError, match="colon"):
        of_app({"idem_namespace": namespace})


def test_nothing_of_the_neighbour_is_logged(
    theirs: Celery, shared_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    doors = Doors(application(shared_url, "ours"))
    doors.lists()
    for key in crafted(theirs)[:4]:
        doors.look(key)
        doors.ask(key)
    assert MARK not in caplog.text
    assert DOUBTED not in caplog.text


# --- scopes: callers of one application ----------------------------------------------------------


@pytest.mark.parametrize("audit", [True, False])
def test_a_computed_key_does_not_open_another_scopes_record(
    memory_app: Callable[..., Celery], audit: bool
) -> None:
    """Anyone can compute a key from the names of scope, customer and invoice. It shows only records of one's scope."""
    app = memory_app("theirs", idem_audit=audit)
    pay = app.tasks["shop.pay"]
    tool = tool_of(app, "shop.pay")
    pay.apply(("c1", 7), scope="globex")
    key = pay.intent_key("c1", scope="globex")
    tokens = {"token-of-acme": "acme", "token-of-globex": "globex", "token-of-nobody": ""}
    site = TestClient(door(app, ["shop.pay"], token=tokens))
    handlers = _mcp_handlers(app)
    for token, scope in tokens.items():
        answer = site.get(f"/intents/{key}", headers={"authorization": f"Bearer {token}"})
        told = asyncio.run(handlers._status({"key": key}, scope or None))
        may = scope == "globex"
        assert (answer.status_code == 200) == may, token
        assert told.is_error != may
        assert (MARK in answer.text) == may
    assert tool.submit({"customer": "c1", "cents": 7}, "globex").status == "replayed"


def test_a_call_with_many_parameters_keeps_its_scope(memory_app: Callable[..., Celery]) -> None:
    """A record has room for the digests of some parameters only."""

    def many(self: Any, a: int, **rest: int) -> str:
        return "done"

    task = memory_app().task(
        base=IdempotentTask, bind=True, shared=False, lazy=False, name="shop.many", intent=("a",)
    )(many)
    task.apply((1,), {f"b{n}": n for n in range(40)}, scope="acme")
    key = task.intent_key(1, scope="acme")
    assert look_up(task.app, key, "acme") is not None
    assert look_up(task.app, key, "globex") is None
