"""The HTTP adapter, the inbox and the command line resist strangers, crafted records and pages of other sites."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from starlette.testclient import TestClient

from celery_idem import ConfigurationError, Ledger, NotHappened
from celery_idem.adapters.http import door
from celery_idem.adapters.inbox import inbox
from celery_idem.adapters.tools import BadArguments, tool_of
from celery_idem.core.model import Outcome
from celery_idem.engine import owners
from celery_idem.integration.delivery import CARRIED
from tests.operators.forms import form_for, hidden
from tests.operators.intents import claimed, in_doubt
from tests.security.conftest import command_line

TOKEN = "a-token-of-enough-characters"
BEARER = {"authorization": f"Bearer {TOKEN}"}
BAD = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x1b[2J\x1b]52;c;ZXZpbA==\x07\x9b31m\x00"


# --- HTTP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "", {}, {"": "acme"}, {"a-token": "x", "": ""}, {None: "acme"}])
def test_no_empty_token_opens_the_door(memory_app: Callable[..., Celery], token: Any) -> None:
    with pytest.raises(ConfigurationError, match="cannot be empty"):
        door(memory_app(), ["shop.pay"], token=token)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": TOKEN},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Bearer {TOKEN.upper()}"},
        {"authorization": "Bearer \u00e9".encode("latin-1")},
    ],
    ids=range(9),
)
def test_a_stranger_gets_no_further_than_the_door(memory_app: Callable[..., Celery], headers: Any) -> None:
    app = memory_app()
    site = TestClient(door(app, ["shop.pay"], token=TOKEN))
    for method, path in (
        ("POST", "/tasks/shop.pay"),
        ("POST", "/tasks/none"),
        ("GET", "/intents/x"),
        ("GET", "/openapi.json"),
    ):
        answer = site.request(method, path, headers=headers, content=b"{}" if method == "POST" else None)
        assert answer.status_code == 401, path
        assert "shop" not in answer.text


def test_only_what_is_offered_can_be_called(memory_app: Callable[..., Celery]) -> None:
    app = memory_app()
    site = TestClient(door(app, ["shop.pay"], token=TOKEN), headers=BEARER)
    for name in (
        "shop.login",
        "celery.backend_cleanup",
        "shop.pay ",
        "SHOP.PAY",
        "shop.*",
        "..%2ftasks%2fshop.login",
    ):
        assert site.post(f"/tasks/{name}", json={"user": "a", "token": "b"}).status_code == 404, name
    key = app.tasks["shop.login"].intent_key("ann", token="x")
    in_doubt(Ledger.from_app(app), key)
    assert site.get(f"/intents/{key}").status_code == 404


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"idempotency-key": "k" * 256}, b'{"customer": "a"}', 400),
        ({"idempotency-key": '""'}, b'{"customer": "a"}', 400),
        ({"idempotency-key": "a b"}, b'{"customer": "a"}', 400),
        ({"idempotency-key": "\u00e9".encode("latin-1")}, b'{"customer": "a"}', 400),
        ({"idem-occurrence": "o" * 256}, b'{"customer": "a"}', 400),
        ({}, b'{"customer": "' + b"x" * 2000 + b'"}', 413),
        ({}, b'{"customer": ' + b"[" * 900 + b"]" * 900 + b"}", 400),
        ({}, b'{"customer": "\\ud800"}', 400),
        ({}, b'{"customer": 1' + b"0" * 900 + b"}", 400),
        ({}, b'{"customer": "a", "idempotency_key": "b"}', 400),
        ({}, b'{"customer": "a", "scope": "b"}', 400),
    ],
    ids=range(11),
)
def test_what_is_too_much_for_the_door(
    memory_app: Callable[..., Celery], headers: Any, body: bytes, status: int
) -> None:
    app = memory_app()
    site = TestClient(door(app, ["shop.pay"], token=TOKEN, max_body=1900, wait=0), headers=BEARER)
    answer = site.post(
        "/tasks/shop.pay", content=body, headers={"content-type": "application/json", **headers}
    )
    assert answer.status_code == status, answer.text
    fits = site.post("/tasks/shop.pay", json={"customer": "a"}, headers={"idempotency-key": "k" * 255})
    assert fits.status_code == 202  # so the requests above were refused for their size or form alone


def test_an_agents_arguments_name_no_option_of_ours(memory_app: Callable[..., Celery]) -> None:
    """The arguments that a model writes cannot set the scope, the idempotency key or an option of Celery."""
    tool = tool_of(memory_app(), "shop.pay")
    for name in (
        "scope",
        "idempotency_key",
        "occurrence",
        "task_id",
        "headers",
        "queue",
        "countdown",
        "link",
    ):
        with pytest.raises(BadArguments, match=name):
            tool.parse(json.dumps({"customer": "c1", name: "x"}))


# --- the broker ----------------------------------------------------------------------------------


def test_a_guessed_owner_takes_over_nothing(memory_app: Callable[..., Celery]) -> None:
    """A message may carry the owner of a claim whose reply was lost. Only the exact owner takes the claim up."""
    app = memory_app(idem_on_duplicate="raise")
    task = app.tasks["shop.pay"]
    claim = claimed(Ledger.from_app(app), task.intent_key("c1"))
    real = claim.owner
    for guess in (
        b"",
        b"\0" * 12,
        real[:11],
        real[:-1] + bytes([real[-1] ^ 1]),
        real[:7] + b"\0" * 5,
        real * 2,
    ):
        answer = task.apply(("c1",), headers={CARRIED: [guess.hex()]})
        assert type(answer.result).__name__ == "InProgress"
    assert (
        task.apply(("c1",), headers={CARRIED: [real.hex()]}).state == "SUCCESS"
    )  # the real owner works, so the refusals above are due to the guesses


def test_owner_tokens_share_nothing_that_tells_the_next() -> None:
    tokens = [owners.mint() for _ in range(2000)]
    assert len(set(tokens)) == 2000
    assert len({token[:7] for token in tokens}) == 1  # they name this process
    for at in range(7, 12):
        assert len({token[at] for token in tokens}) > 200  # of 256; a counter would have fewer


# --- the inbox -----------------------------------------------------------------------------------


def crafted(app: Celery) -> str:
    """Write records with markup and terminal codes in every text. Return the key of one of them."""
    ledger = Ledger.from_app(app)
    key = app.tasks["shop.pay"].intent_key("c1")
    in_doubt(ledger, key, BAD)
    for name in ("k<b>\x1b[31m", key[:-1]):
        claim = claimed(ledger, f"shop.<script>alert(3)</script>\x1b[2J{name}:{'0' * 32}")
        claim.doubt(BAD, 0.0)
    ledger.resolve(key, NotHappened(), by=BAD, evidence=BAD)
    claimed(ledger, key).doubt(BAD, 0.0)
    failed = claimed(ledger, app.tasks["shop.pay"].intent_key("c2"))
    failed.settle(Outcome(False, ledger.codec.encode_error(ValueError(BAD))), 0.0)
    return key


def inert(text: str) -> bool:
    return not re.search(r"<script|<img|onerror=alert\(2\)>|'><|[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_no_page_runs_what_a_record_says(memory_app: Callable[..., Celery]) -> None:
    app = memory_app()
    crafted(app)
    pages = TestClient(inbox(app, authenticate=lambda request: BAD))
    keys = [entry.key for entry in Ledger.from_app(app).list()]
    answers = [
        pages.get("/"),
        pages.get("/", params={"settled": BAD}),
        pages.get("/", params={"settled": keys[0]}),
        pages.get("/", params={"task": BAD, "scope": BAD, "reason": BAD, "page": BAD, "older_than": BAD}),
        pages.get("/figures"),
        pages.get("/decisions", params={"page": BAD}),
        pages.get("/intent", params={"key": BAD}),
        *(pages.get("/intent", params={"key": key}) for key in keys),
    ]
    ours = next(form for form in map(hidden, answers) if "key" in form)
    form = {**ours, "decision": "happened", "evidence": BAD, "result": BAD, "fence": BAD}
    for path in ("/resolve", "/resolve-all"):
        answers.append(pages.post(path, data={**form, "until": BAD, "number": BAD, "reason": BAD}))
        assert answers[-1].status_code == 400
    for answer in answers:
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", answer.text)  # browsers ignore these characters
        assert inert(text), text
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "script-src" not in policy
    assert any("alert(1)" in answer.text for answer in answers)  # the pages did show the text


FORM = {"decision": "not_happened", "evidence": "seen"}


@pytest.mark.parametrize(
    ("change", "headers"),
    [
        ({"csrf": ""}, {}),
        ({"csrf": "x" * 43}, {}),
        ({}, {"origin": "https://evil.example"}),
        ({}, {"origin": "null"}),
        ({}, {"origin": "http://testserver.evil.example"}),
        ({}, {"origin": "http://testserver:8080"}),
        ({}, {"cookie": ""}),
    ],
    ids=range(7),
)
def test_another_sites_page_decides_nothing(
    memory_app: Callable[..., Celery], change: dict[str, str], headers: dict[str, str]
) -> None:
    app = memory_app()
    key = app.tasks["shop.pay"].intent_key("c1")
    in_doubt(Ledger.from_app(app), key)
    pages = TestClient(inbox(app, authenticate=lambda request: "ann"))
    form = {**form_for(pages, key), **FORM, **change}
    if "cookie" in headers:
        pages.cookies.clear()
    answer = pages.post("/resolve", data=form, headers={n: v for n, v in headers.items() if n != "cookie"})
    assert answer.status_code == 403
    assert Ledger.from_app(app).get(key).state == "in_doubt"  # type: ignore[union-attr]


def test_our_own_page_decides(memory_app: Callable[..., Celery]) -> None:
    """The form of our own page works. Without this test, the test above would pass if no form worked."""
    app = memory_app()
    key = app.tasks["shop.pay"].intent_key("c1")
    in_doubt(Ledger.from_app(app), key)
    pages = TestClient(inbox(app, authenticate=lambda request: "ann"))
    form = {**form_for(pages, key), **FORM}
    answer = pages.post(
        "/resolve", data=form, headers={"origin": "http://testserver"}, follow_redirects=False
    )
    assert answer.status_code == 303
    assert Ledger.from_app(app).get(key).state == "released"  # type: ignore[union-attr]


@pytest.mark.parametrize("fence", ["9" * 5000, "\u0661", "-1", "1e3", ""])
def test_a_crafted_fence_decides_nothing(memory_app: Callable[..., Celery], fence: str) -> None:
    app = memory_app()
    key = app.tasks["shop.pay"].intent_key("c1")
    in_doubt(Ledger.from_app(app), key)
    pages = TestClient(inbox(app, authenticate=lambda request: "ann"))
    form = {**form_for(pages, key), **FORM, "fence": fence}
    assert pages.post("/resolve", data=form).status_code == 400
    assert Ledger.from_app(app).get(key).state == "in_doubt"  # type: ignore[union-attr]


@pytest.mark.parametrize("result", ["[" * 20_000, "{", "'x'", "1" + "0" * 60_000])
def test_a_crafted_result_is_told_to_be_none(memory_app: Callable[..., Celery], result: str) -> None:
    app = memory_app()
    key = app.tasks["shop.pay"].intent_key("c1")
    in_doubt(Ledger.from_app(app), key)
    pages = TestClient(inbox(app, authenticate=lambda request: "ann"))
    form = {**form_for(pages, key), "decision": "happened", "evidence": "x", "result": result}
    assert pages.post("/resolve", data=form).status_code == 400
    assert Ledger.from_app(app).get(key).state == "in_doubt"  # type: ignore[union-attr]


def test_a_sign_in_ends(memory_app: Callable[..., Celery], monkeypatch: pytest.MonkeyPatch) -> None:
    """A session ends after twelve hours, and when the token is replaced."""
    app = memory_app()
    pages = TestClient(inbox(app, token=TOKEN))
    form = {**hidden(pages.get("/sign-in")), "name": "ann", "token": TOKEN}
    assert pages.post("/sign-in", data=form).url.path == "/"
    session = {"idem_session": pages.cookies["idem_session"]}
    renewed = TestClient(inbox(app, token=TOKEN.upper()), cookies=session)
    assert renewed.get("/").url.path == "/sign-in"
    now = time.time()
    for hours, path in ((11.9, "/"), (12.1, "/sign-in")):
        monkeypatch.setattr("celery_idem.adapters.inbox.time.time", lambda at=now + hours * 3600: at)
        assert TestClient(inbox(app, token=TOKEN), cookies=session).get("/").url.path == path


# --- the terminal ----------------------------------------------------------------------------------


def test_a_record_gives_no_orders_to_the_terminal(memory_app: Callable[..., Celery]) -> None:
    app = memory_app()
    key = crafted(app)
    keys = [entry.key for entry in Ledger.from_app(app).list()]
    shown = [
        command_line(app, "list"),
        command_line(app, "stats"),
        command_line(app, "audit"),
        *(command_line(app, "show", one) for one in keys),
        *(command_line(app, "show", "--json", one) for one in keys),
        command_line(app, "show", BAD.replace("\0", "")),
        command_line(app, "show", "shop."),
        command_line(app, "resolve", "--yes", key, "--not-happened", f"--evidence={BAD}", f"--by={BAD}"),
        *(command_line(app, "forget", "--yes", one) for one in keys),
    ]
    for text in shown:
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), repr(text)
    assert any(r"\x1b[2J" in text for text in shown)
