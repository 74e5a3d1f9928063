"""The in-doubt inbox: a web page for whoever must find out what happened.

::

    from celery_idem.adapters.inbox import inbox

    site.mount("/idem", inbox(celery_app, token=os.environ["IDEM_INBOX_TOKEN"]))

An ASGI application (Starlette), by itself or mounted into another one. It does not open without
``token`` (people sign in with it, and give their name for the audit trail) or ``authenticate``
(the host's own: it is given the request, and returns the user's name or None).

Pages are plain HTML without a script. Every answer forbids scripts, frames and foreign content;
a decision needs a token that only our own form has, and comes from our own origin. Argument
values are nowhere: a record holds none. Results of tasks with ``secret`` parameters are not shown.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import inspect
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit

from celery_idem.adapters import inbox_pages as pages
from celery_idem.adapters.inbox_overview import Overview, look
from celery_idem.core.errors import ConfigurationError, IdempotencyError, StoreError
from celery_idem.core.model import Happened, NotHappened
from celery_idem.operate.background import Background
from celery_idem.operate.operators import Operator

try:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, RedirectResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ConfigurationError("The inbox needs Starlette: pip install 'celery_idem[http]'.") from error

if TYPE_CHECKING:
    from celery import Celery

Authenticate = Callable[[Request], "str | Awaitable[str | None] | None"]

FRESH = 10.0
"""Seconds an overview is shown before the store is read again: a reading looks at every record."""

PATIENCE = 1.0
"""Seconds a visitor waits for a reading: 40,000 records or so. Of more, they see what is there by then."""

SESSION = 12 * 3600
"""Seconds a sign-in lasts: a shift."""

MAX_BODY = 64 * 1024
"""Bytes of a form: a result and its evidence, typed by hand."""

WRONG_TOKEN_WAIT = 0.5
"""Seconds until a wrong token is refused: enough against guessing, not noticed by a person."""

MIN_TOKEN = 16
"""Characters of a token at least. Shorter ones are passwords, and get guessed."""

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # no-referrer would make the browser hide the origin of our own form
    "cache-control": "no-store",
}

FENCE_DIGITS = 20
"""Digits of the largest fence: 64 bits. Python refuses to read a number of thousands of them."""

SESSION_COOKIE = "idem_session"
CSRF_COOKIE = "idem_csrf"


def inbox(app: Celery, *, token: str | None = None, authenticate: Authenticate | None = None) -> Starlette:
    """The inbox of an application's intents.

    Args:
        token: people sign in with it. 16 characters or more.
        authenticate: from a request to the name of its user, None for nobody; may be async.

    Raises:
        ConfigurationError: neither or both are given, or the token is too short.
    """
    if (token is None) == (authenticate is None):
        raise ConfigurationError(
            "The inbox is closed: give it token=… (people sign in with it), or authenticate=…, a function from the "
            "request to the user's name, and not both."
        )
    if token is not None and len(token) < MIN_TOKEN:
        raise ConfigurationError(
            f"The inbox' token has {len(token)} characters. Use {MIN_TOKEN} or more: "
            "python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return _Inbox(Operator(app), token, authenticate).site()


class _Inbox:
    def __init__(self, operator: Operator, token: str | None, authenticate: Authenticate | None) -> None:
        self._operator = operator
        self._token = token
        self._authenticate = authenticate
        self._session_key = hashlib.sha256(f"celery_idem inbox session\0{token}".encode()).digest()
        self._overviews = Background(lambda: look(operator), FRESH, PATIENCE)
        self._decided: dict[str, float] = {}  # intents that were settled here, and when
        self._css = files("celery_idem.adapters").joinpath("inbox.css").read_text()

    def site(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self._guarded(self._show_overview)),
                Route("/intent", self._guarded(self._show_intent)),
                Route("/resolve", self._guarded(self._resolve), methods=["POST"]),
                Route("/sign-in", self._sign_in, methods=["GET", "POST"]),
                Route("/sign-out", self._guarded(self._sign_out), methods=["POST"]),
                Route("/inbox.css", self._style),
            ]
        )

    # --- pages --------------------------------------------------------------------------

    async def _show_overview(self, request: Request, user: str) -> Response:
        overview = await run_in_threadpool(self._look)
        settled = request.query_params.get("settled", "")
        if settled:
            try:
                entry = await run_in_threadpool(self._operator.find, settled)
                settled = f"{entry.key} is {entry.state} now."
            except IdempotencyError:
                settled = ""
        return self._page(request, "In doubt", pages.overview(overview, settled, _base(request)), user)

    def _look(self) -> Overview:
        """What is known; less what was decided since the reading began."""
        latest = self._overviews.look()
        if latest.error is not None:
            raise latest.error
        shown = latest.whole or latest.unfinished or Overview()
        if latest.whole is not None and latest.unfinished is not None:
            shown = replace(shown, newer=latest.unfinished.records)
        for key, at in list(self._decided.items()):
            if at < latest.began:
                self._decided.pop(key, None)
        return shown.without(self._decided)

    async def _show_intent(self, request: Request, user: str) -> Response:
        key = request.query_params.get("key", "").strip()
        return await self._intent_page(request, user, key)

    async def _intent_page(
        self, request: Request, user: str, key: str, problem: str = "", typed: dict[str, str] | None = None
    ) -> Response:
        try:
            entry = await run_in_threadpool(self._operator.find, key)
        except IdempotencyError as error:
            return self._page(request, "Not found", pages.problem(str(error)), user, 404)
        body = pages.intent(self._operator, entry, _csrf(request), problem, typed or {}, _base(request))
        return self._page(request, entry.key, body, user, 400 if problem else 200)

    async def _resolve(self, request: Request, user: str) -> Response:
        form = await _form(request)
        refused = _foreign(request, form)
        if refused:
            return self._page(request, "Refused", pages.problem(refused), user, 403)
        key, evidence, result = form.get("key", ""), form.get("evidence", "").strip(), form.get("result", "")
        answer: Happened | NotHappened
        problem = "" if evidence else "Say what you saw, and where: the evidence is kept with the decision."
        if form.get("decision") == "not_happened":
            answer = NotHappened()
        else:
            answer = Happened()
            try:
                answer = Happened(json.loads(result or "null"))
            except (ValueError, RecursionError):  # the second: nested without end
                problem = 'The result is not JSON. Text needs quotes: "inv_7". No value is null.'
        fence = form.get("fence", "")
        if not problem and not (fence.isdecimal() and len(fence) <= FENCE_DIGITS):
            problem = "This page is not complete any more. Look at it again, then decide."
        if problem:
            return await self._intent_page(request, user, key, problem, form)
        try:
            await run_in_threadpool(self._operator.resolve, key, answer, user, evidence, int(fence))
        except IdempotencyError as error:
            form.pop("fence")  # the page shows what stands there now, and a decision is about that
            return await self._intent_page(request, user, key, str(error), form)
        self._decided[key] = time.monotonic()  # the list must not show it any more
        self._overviews.outdate()
        return RedirectResponse(f"{_base(request)}/?settled={quote(key)}", 303, headers=HEADERS)

    async def _style(self, request: Request) -> Response:
        return Response(
            self._css, media_type="text/css", headers={**HEADERS, "cache-control": "max-age=3600"}
        )

    def _page(self, request: Request, title: str, body: str, user: str, status: int = 200) -> Response:
        csrf = _csrf(request)
        text = pages.frame(title, body, _base(request), user, csrf if self._token else "")
        response = HTMLResponse(text, status, headers=HEADERS)
        self._set_cookie(request, response, CSRF_COOKIE, csrf)
        return response

    # --- who is it ------------------------------------------------------------------------

    def _guarded(
        self, handler: Callable[[Request, str], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            user = await self._user(request)
            if not user:
                if self._token is not None and request.method == "GET":
                    return RedirectResponse(f"{_base(request)}/sign-in", 303, headers=HEADERS)
                return HTMLResponse(
                    pages.frame("Closed", pages.problem("Sign in first."), _base(request)),
                    401,
                    headers=HEADERS,
                )
            try:
                return await handler(request, user)
            except StoreError as error:
                return self._page(request, "The store is away", pages.problem(str(error)), user, 503)

        return guarded

    async def _user(self, request: Request) -> str | None:
        if self._authenticate is None:
            return self._session_user(request.cookies.get(SESSION_COOKIE, ""))
        user = self._authenticate(request)
        return await user if inspect.isawaitable(user) else user

    def _session_user(self, cookie: str) -> str | None:
        payload, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(self._sign(payload).encode(), signature.encode()):
            return None
        expires, _, name = payload.partition(".")
        if float(expires) < time.time():
            return None
        return base64.urlsafe_b64decode(name).decode()

    def _sign(self, payload: str) -> str:
        return hmac.new(self._session_key, payload.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    async def _sign_in(self, request: Request) -> Response:
        if self._token is None:
            return HTMLResponse(pages.frame("Closed", pages.problem("There is no sign-in here."), ""), 404)
        problem = ""
        if request.method == "POST":
            form = await _form(request)
            name = form.get("name", "").strip()
            problem = _foreign(request, form)
            if not problem and not name:
                problem = "Give your name: it is kept with every decision you make."
            if not problem and not hmac.compare_digest(form.get("token", "").encode(), self._token.encode()):
                await asyncio.sleep(WRONG_TOKEN_WAIT)
                problem = "That is not the token."
            if not problem:
                payload = f"{int(time.time()) + SESSION}.{base64.urlsafe_b64encode(name.encode()).decode()}"
                response = RedirectResponse(f"{_base(request)}/", 303, headers=HEADERS)
                self._set_cookie(request, response, SESSION_COOKIE, f"{payload}.{self._sign(payload)}")
                return response
        return self._page(
            request,
            "Sign in",
            pages.sign_in(_csrf(request), problem, _base(request)),
            "",
            401 if problem else 200,
        )

    async def _sign_out(self, request: Request, user: str) -> Response:
        if _foreign(request, await _form(request)):
            return self._page(request, "Refused", pages.problem("That form was not ours."), user, 403)
        response = RedirectResponse(f"{_base(request)}/sign-in", 303, headers=HEADERS)
        response.delete_cookie(SESSION_COOKIE, path=_base(request) or "/")
        return response

    @staticmethod
    def _set_cookie(request: Request, response: Response, name: str, value: str) -> None:
        response.set_cookie(
            name,
            value,
            max_age=SESSION,
            path=_base(request) or "/",
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )


def _base(request: Request) -> str:
    """Where the inbox is mounted."""
    return str(request.scope.get("root_path", "")).rstrip("/")


def _csrf(request: Request) -> str:
    """The browser's own token, in a cookie that other sites cannot read or send, and in our forms."""
    known: Any = getattr(request.state, "csrf", "") or request.cookies.get(CSRF_COOKIE, "")
    request.state.csrf = known if len(known) >= MIN_TOKEN else secrets.token_urlsafe()
    return str(request.state.csrf)


def _foreign(request: Request, form: dict[str, str]) -> str:
    """Why a form was not ours; "" when it was."""
    cookie, sent = request.cookies.get(CSRF_COOKIE, ""), form.get("csrf", "")
    origin = request.headers.get("origin")
    same = origin is None or urlsplit(origin).netloc == request.headers.get("host", "")
    if len(cookie) >= MIN_TOKEN and hmac.compare_digest(cookie.encode(), sent.encode()) and same:
        return ""
    return "That form was not ours, or it was too old. Nothing was changed. Go back, reload the page and try again."


async def _form(request: Request) -> dict[str, str]:
    """A form's fields; nothing when it is too large."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            return {}
    fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
    return {name: values[0] for name, values in fields.items()}
