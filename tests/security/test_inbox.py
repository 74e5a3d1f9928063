"""The inbox resists strangers, pages of other sites and crafted records, and it respects its host application."""

from __future__ import annotations

import threading
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from celery_idem import ConfigurationError, Ledger, StoreError
from celery_idem.adapters.inbox import inbox
from tests.operators.forms import form_for, hidden
from tests.operators.intents import in_doubt, succeeded

TOKEN = "a-token-of-enough-characters"
SIGNED_IN = b64encode(b'{"user": "eve", "until": 9e99}').decode()


@pytest.fixture
def app(memory_app: Callable[..., Celery]) -> Celery:
    return memory_app()


@pytest.fixture
def ledger(app: Celery) -> Ledger:
    return Ledger.from_app(app)


@pytest.fixture
def key(app: Celery, ledger: Ledger) -> str:
    """An intent in doubt."""
    key: str = app.tasks["shop.pay"].intent_key("c1")
    in_doubt(ledger, key)
    return key


def state(ledger: Ledger, key: str) -> str:
    entry = ledger.get(key)
    assert entry is not None
    return entry.state


def signed_in(app: Celery, name: str = "ann") -> TestClient:
    pages = TestClient(inbox(app, token=TOKEN))
    form = {**hidden(pages.get("/sign-in")), "name": name, "token": TOKEN}
    assert pages.post("/sign-in", data=form, follow_redirects=False).status_code == 303
    return pages


def decide(pages: TestClient, form: dict[str, str], base: str = "", **headers: str) -> Any:
    return pages.post(
        f"{base}/resolve",
        data={"decision": "not_happened", "evidence": "seen", **form},
        headers=headers,
        follow_redirects=False,
    )


# --- sessions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cookie", ["", "..", "null", "\xff", "x" * 20_000, SIGNED_IN, f"{SIGNED_IN}.ZZZZ.abc", "other key"]
)
def test_a_forged_or_foreign_session_is_nobody(app: Celery, ledger: Ledger, key: str, cookie: str) -> None:
    ours = signed_in(app)
    form = form_for(ours, key)
    if cookie == "other key":
        cookie = ours.cookies["idem_session"]
        site = inbox(app, token=TOKEN, secret="another secret of the host")
    else:
        site = inbox(app, token=TOKEN)
    stranger = TestClient(site, headers={"cookie": b"idem_session=" + cookie.encode("latin-1")})
    assert stranger.get("/", follow_redirects=False).headers["location"] == "/sign-in"
    assert decide(stranger, form).status_code == 401
    assert state(ledger, key) == "in_doubt"


def test_a_session_of_another_user_opens_no_form(app: Celery, ledger: Ledger, key: str) -> None:
    """Mallory puts her cookie into Ann's browser and knows the CSRF token of its forms. She cannot decide as Ann."""
    site = inbox(app, authenticate=lambda request: request.headers.get("x-user"))
    mallory = TestClient(site, headers={"x-user": "mallory"})
    form = form_for(mallory, key)
    ann = TestClient(site, headers={"x-user": "ann"}, cookies=dict(mallory.cookies))
    assert decide(ann, form).status_code == 403
    assert state(ledger, key) == "in_doubt"
    assert decide(ann, form_for(ann, key)).status_code == 303  # her own page works


def test_a_sign_in_begins_a_new_session(app: Celery) -> None:
    site = inbox(app, token=TOKEN)
    pages = TestClient(site)
    before, cookies = hidden(pages.get("/sign-in")), dict(pages.cookies)
    pages.post("/sign-in", data={**before, "name": "ann", "token": TOKEN})
    assert hidden(pages.get("/"))["csrf"] != before["csrf"]
    assert TestClient(site, cookies=cookies).get("/").url.path == "/sign-in"


@pytest.mark.parametrize(("scheme", "secure"), [("https", True), ("http", False)])
def test_the_cookie_is_for_this_place_alone(app: Celery, scheme: str, secure: bool) -> None:
    site = Starlette(routes=[Mount("/x", inbox(app, token=TOKEN))])
    cookie = TestClient(site, base_url=f"{scheme}://host").get("/x/sign-in").headers["set-cookie"].lower()
    assert {"path=/x", "httponly", "samesite=lax"} <= set(cookie.split("; "))
    assert ("secure" in cookie.split("; ")) is secure


def test_one_secret_serves_several_processes(app: Celery, key: str) -> None:
    """With the host's sign-in, several processes need one secret. Without it each process makes another one."""

    def served(secret: str | None) -> TestClient:
        return TestClient(inbox(app, authenticate=lambda request: "ann", secret=secret))

    alone, other = served(None), served(None)
    form = form_for(alone, key)
    other.cookies = alone.cookies
    refused = decide(other, form)
    assert refused.status_code == 403
    assert "secret=" in refused.text
    one, another = served("a secret that all share"), served("a secret that all share")
    form = form_for(one, key)
    another.cookies = one.cookies
    assert decide(another, form).status_code == 303
    with pytest.raises(ConfigurationError, match="secret has 5"):
        served("short")


@pytest.mark.parametrize("name", ["a\r\nSet-Cookie: x=y", "ann\x00", "\u202eann", "\U0001f600" * 100])
def test_a_name_is_text_in_one_cookie(app: Celery, name: str) -> None:
    pages = TestClient(inbox(app, token=TOKEN))
    form = {**hidden(pages.get("/sign-in")), "token": TOKEN}
    answer = pages.post("/sign-in", data={**form, "name": name}, follow_redirects=False)
    assert answer.status_code == 303
    (cookie,) = answer.headers.get_list("set-cookie")
    assert len(cookie) < 4096  # browsers silently drop a larger cookie
    form = {**hidden(pages.get("/sign-in")), "token": TOKEN}
    refused = pages.post("/sign-in", data={**form, "name": "n" * 101}, follow_redirects=False)
    assert refused.status_code == 401
    assert "at most 100 characters" in refused.text


def test_the_hosts_own_session_is_left_alone(app: Celery, ledger: Ledger, key: str) -> None:
    async def sign_in(request: Request) -> JSONResponse:
        request.session["user"] = "carl"
        return JSONResponse({})

    async def session(request: Request) -> JSONResponse:
        return JSONResponse(request.session)

    mounted = Mount("/x", inbox(app, authenticate=lambda request: request.session.get("user")))
    routes = [Route("/sign-in", sign_in), Route("/session", session), mounted]
    pages = TestClient(Starlette(routes=routes, middleware=[Middleware(SessionMiddleware, "the host's")]))
    assert pages.get("/x/").status_code == 401
    pages.get("/sign-in")
    assert decide(pages, form_for(pages, key, "/x"), "/x").headers["location"].startswith("/x/?settled=")
    assert pages.get("/session").json() == {"user": "carl"}


# --- forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://["}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": "http://testserver"}, 403),
        ({"sec-fetch-site": "same-origin", "origin": "https://ops.example"}, 303),  # a proxy changed Host
    ],
    ids=range(5),
)
def test_the_browser_says_where_a_form_is_from(
    app: Celery, key: str, headers: dict[str, str], status: int
) -> None:
    pages = signed_in(app)
    assert decide(pages, form_for(pages, key), **headers).status_code == status


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"csrf": "\u00e9"}, 403),
        ({"decision": ""}, 400),
        ({"decision": "HAPPENED"}, 400),
        ({"result": "NaN"}, 400),
        ({"fence": "9" * 20}, 400),
        ({"key": "x" * 60_000}, 404),
        ({"key": "\0"}, 404),
        ({"key": ""}, 404),
        ({"evidence": "x" * 70_000}, 413),
    ],
    ids=range(9),
)
def test_odd_fields_decide_nothing(
    app: Celery, ledger: Ledger, key: str, change: dict[str, str], status: int
) -> None:
    pages = signed_in(app)
    form = {**form_for(pages, key), "decision": "happened", "result": "1", **change}
    assert decide(pages, form).status_code == status
    assert state(ledger, key) == "in_doubt"


def test_half_a_surrogate_pair_costs_no_page(app: Celery, ledger: Ledger, key: str) -> None:
    """A lone surrogate in JSON or in the text of an error cannot be encoded, but no page fails because of it."""
    other = app.tasks["shop.pay"].intent_key("c2")
    in_doubt(ledger, other, "\ud800")
    pages = signed_in(app)
    assert pages.get("/").status_code == 200
    assert pages.get("/intent", params={"key": other}).status_code == 200
    form = {**form_for(pages, key), "decision": "happened", "result": '"\\ud800"'}
    assert decide(pages, form).status_code == 303
    assert pages.get("/intent", params={"key": key}).status_code == 200


def test_one_of_two_who_decide_at_once_is_refused(app: Celery, ledger: Ledger) -> None:
    ann, bob = signed_in(app), signed_in(app, "bob")
    for n in range(10):
        one = app.tasks["shop.pay"].intent_key(f"c{n}")
        in_doubt(ledger, one)
        ready = threading.Barrier(2, timeout=60)
        answers: dict[str, int] = {}

        def send(pages: TestClient, form: dict[str, str], ready: Any = ready, answers: Any = answers) -> None:
            ready.wait()
            answers[form["decision"]] = decide(pages, form).status_code

        threads = [
            threading.Thread(target=send, args=(pages, {**form_for(pages, one), "decision": decision}))
            for pages, decision in ((ann, "happened"), (bob, "not_happened"))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(answers.values()) == [303, 400]
        won = "succeeded" if answers["happened"] == 303 else "released"
        assert state(ledger, one) == won


# --- the store and the host application --------------------------------------------------------------


def test_a_store_that_is_away_is_a_503(
    app: Celery, ledger: Ledger, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = signed_in(app)
    form = form_for(pages, key)

    def away(*args: Any) -> Any:
        raise StoreError("it is <away>")

    for primitive in ("read", "scan", "replace"):
        monkeypatch.setattr(ledger.store, primitive, away)
    for answer in (pages.get("/"), pages.get("/intent", params={"key": key}), decide(pages, form)):
        assert answer.status_code == 503
        assert "it is &lt;away&gt;" in answer.text
    monkeypatch.undo()
    assert decide(pages, form).status_code == 303  # the same form can be sent again


@pytest.mark.parametrize("path", ["//evil.example/", "/;a=b/", "/\\evil.example/", "/%2f%2fevil.example/"])
def test_no_path_leads_to_another_host(app: Celery, path: str) -> None:
    pages = TestClient(Starlette(routes=[Mount("/{any:path}/x", inbox(app, token=TOKEN))]))
    target = pages.get(f"http://testserver{path}x/", follow_redirects=False).headers["location"]
    assert target.endswith("/x/sign-in")
    assert target[1] not in "/\\"
    cookie = pages.get(f"http://testserver{path}x/sign-in").headers["set-cookie"]
    assert "a=b" not in cookie


@pytest.mark.parametrize(("path", "status"), [("/nope", 404), ("/resolve", 405), ("/sign-out", 405)])
def test_every_answer_forbids_scripts(app: Celery, path: str, status: int) -> None:
    answer = TestClient(inbox(app, token=TOKEN)).get(path)
    assert answer.status_code == status
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_a_long_result_is_cut(app: Celery, ledger: Ledger) -> None:
    one = app.tasks["shop.pay"].intent_key("c3")
    succeeded(ledger, one, "<b>" * 100_000)
    page = signed_in(app).get("/intent", params={"key": one}).text
    assert "<b>" not in page
    assert len(page) < 100_000
