"""The in-doubt inbox: a web page for operators who must find out what happened.

::

    from celery_idem.adapters.inbox import inbox

    site.mount("/idem", inbox(celery_app, token=os.environ["IDEM_INBOX_TOKEN"]))

An ASGI application (Starlette), which runs alone or is mounted into another one. It needs ``token`` (people sign in
with it, and give their name for the audit trail) or ``authenticate`` (a function of the host application, from the
request to the user's name or None).

Pages are plain HTML without scripts. Every response forbids scripts, frames and foreign content. A decision needs a
token that only our own form has, and has to come from our own origin. Values of ``secret`` parameters are hidden, and
results of tasks with such parameters are not shown.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import inspect
import json
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from http import HTTPStatus
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs, quote

from celery_idem.core.errors import ConfigurationError, IdempotencyError, StoreError, needs
from celery_idem.core.model import Happened, NotHappened
from celery_idem.engine.entries import WAITING, Entry
from celery_idem.operate.background import Background, Latest
from celery_idem.operate.bulk import Decided, Decision, Line, decide, decide_all, strict_json
from celery_idem.operate.operators import Action, Operator

with needs("The inbox needs Starlette, Jinja2 and itsdangerous", "inbox"):
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.sessions import SessionMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, RedirectResponse, Response
    from starlette.routing import Route

    from celery_idem.adapters.inbox_pages import (
        Overview,
        Sheet,
        Waiting,
        actions_of,
        filtered,
        look,
        look_waiting,
        render,
        sheet,
        timeline,
        which_of,
    )

if TYPE_CHECKING:
    from celery import Celery
    from starlette.types import ASGIApp, Receive, Scope, Send

T = TypeVar("T")
Seen = TypeVar("Seen", "Waiting", "Overview")

Authenticate = Callable[[Request], "str | Awaitable[str | None] | None"]

FRESH = 10.0
"""Seconds for which an overview is shown before the store is read again. Each time, every record is read."""

PATIENCE = 1.0
"""Seconds that a visitor waits while records are read: about 40,000 records. If there are more, the page shows what was
read by then."""

SOON = 0.1
"""Seconds that the first page waits for the figures, which need all records."""

SESSION = 12 * 3600
"""Seconds that a sign-in lasts: a shift."""

MAX_BODY = 64 * 1024
"""Maximum size of a form, in bytes: a result and its evidence, typed by hand."""

MAX_NAME = 100
"""Maximum length of an operator's name. It is in the session cookie, and browsers drop cookies above 4 KiB."""

WRONG_TOKEN_WAIT = 0.5
"""Seconds until a wrong token is refused: it slows guessing down, and a person does not notice it."""

MIN_TOKEN = 16
"""Minimum length of a token or a secret. A shorter one can be guessed."""

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # no-referrer would make the browser hide the origin of our own form
    "cache-control": "no-store",
}

FENCE_DIGITS = 20
"""Digits of the largest fence, which has 64 bits. Python refuses to read numbers with thousands of digits."""

INCOMPLETE = "This page is not complete any more. Look at it again, then decide."

COOKIE = "idem_session"

HOST_SCOPE = "celery_idem.inbox.host"
"""Entry of our ASGI scope with the host application's scope, which has the host's own session."""


def inbox(
    app: Celery,
    *,
    token: str | None = None,
    authenticate: Authenticate | None = None,
    secret: str | None = None,
) -> Starlette:
    """Return the inbox of an application's intents.

    Args:
        token: people sign in with it. 16 characters or more.
        authenticate: a function from a request to the user's name, or to None if the user is not signed in. It may be
            async.
        secret: signs the session cookie, together with the token if there is one. 16 characters or more. Not needed
            with ``token``. With ``authenticate``, each process makes its own secret by default, so several processes
            that serve the inbox need one that they share.

    Raises:
        ConfigurationError: neither or both of ``token`` and ``authenticate`` are given, or a value is too short.
    """
    if (token is None) == (authenticate is None):
        raise ConfigurationError(
            "The inbox is closed: give it token=… (people sign in with it), or authenticate=…, a function from the "
            "request to the user's name, and not both."
        )
    for name, value in (("token", token), ("secret", secret)):
        if value is not None and len(value) < MIN_TOKEN:
            raise ConfigurationError(
                f"The inbox' {name} has {len(value)} characters. Use {MIN_TOKEN} or more: "
                "python -c 'import secrets; print(secrets.token_urlsafe())'"
            )
    return _Inbox(Operator(app), token, authenticate, secret).site()


class _Sessions:
    """Starlette's sessions, in a cookie for the path at which this request found the inbox, and for HTTPS if used."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sessions = SessionMiddleware(
            self._app,
            self._key,
            COOKIE,
            SESSION,
            path=_base(scope) or "/",
            # Not strict, so that a user who follows a link from a chat is signed in. A GET changes nothing.
            same_site="lax",
            https_only=scope.get("scheme") == "https",
        )
        # A copy, because our session would overwrite the host's session, which has the same name.
        await sessions({**scope, HOST_SCOPE: scope}, receive, send)


class _Inbox:
    def __init__(
        self, operator: Operator, token: str | None, authenticate: Authenticate | None, secret: str | None
    ) -> None:
        self._operator = operator
        self._token = token
        self._authenticate = authenticate
        self._shared = bool(token or secret)
        self._key = _signing_key(token, secret)
        self._waiting = Background(lambda: look_waiting(operator), FRESH, PATIENCE)
        self._figures = Background(lambda: look(operator), FRESH, PATIENCE)
        self._decided: dict[str, float] = {}  # intents that were settled here, and when
        self._css = files("celery_idem.adapters").joinpath("templates").joinpath("inbox.css").read_text()

    def site(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self._guarded(self._show_waiting)),
                Route("/figures", self._guarded(self._show_figures)),
                Route("/decisions", self._guarded(self._show_decisions)),
                Route("/intent", self._guarded(self._show_intent)),
                Route("/resolve", self._guarded(self._resolve), methods=["POST"]),
                Route("/cancel", self._guarded(self._cancel), methods=["POST"]),
                Route("/resolve-all", self._guarded(self._resolve_all), methods=["POST"]),
                Route("/sign-in", self._sign_in, methods=["GET", "POST"]),
                Route("/sign-out", self._guarded(self._sign_out), methods=["POST"]),
                Route("/inbox.css", self._style),
            ],
            middleware=[Middleware(_Sessions, key=self._key)],
            exception_handlers={HTTPException: self._refusal, StoreError: self._store_away},
        )

    # --- pages --------------------------------------------------------------------------

    async def _show_waiting(self, request: Request) -> Response:
        settled = None
        if request.query_params.get("settled"):
            try:
                settled = await run_in_threadpool(self._operator.find, request.query_params["settled"])
                if settled.state not in WAITING:
                    self._settled_here(settled.key)  # another process of the site may have written it
            except StoreError:
                raise
            except IdempotencyError:
                pass  # it was deleted since, or never existed: report nothing
        return await self._waiting_page(request, request.query_params, settled=settled)

    async def _waiting_page(
        self,
        request: Request,
        form: Mapping[str, str],
        problem: str = "",
        typed: Mapping[str, str] | None = None,
        settled: Entry | None = None,
    ) -> Response:
        which = which_of(form)

        def read() -> tuple[Waiting, list[Entry], list[str], list[Entry], Sheet[Entry], dict[str, Action]]:
            latest = self._waiting.look()
            seen = _shown(latest, Waiting())
            for key, at in list(self._decided.items()):
                if at < latest.began:
                    self._decided.pop(key, None)
            seen = seen.without(self._decided)
            asked = self._operator.as_in_keys(which)
            fitting = [entry for entry in seen.entries if self._operator.fits(entry, asked)]
            tasks = sorted({*self._operator.tasks(), *(entry.task for entry in seen.entries)})
            rows = sheet(fitting, form)
            suspect = _shown(self._figures.look(SOON), Overview()).suspect
            return seen, fitting, tasks, suspect, rows, actions_of(self._operator, [*rows.rows, *suspect])

        seen, fitting, tasks, suspect, rows, actions = await run_in_threadpool(read)
        return self._page(
            request,
            "waiting.html",
            "In doubt",
            problem,
            seen=seen,
            settled=settled,
            which=which,
            # Without a filter, this also counts intents beyond the ``KEPT`` oldest.
            fitting=len(fitting) if filtered(which) else seen.total,
            until=seen.read_at - which.older_than,
            tasks=tasks,
            sheet=rows,
            actions=actions,
            suspect=suspect,
            typed=typed or {},
        )

    async def _show_figures(self, request: Request) -> Response:
        seen = await run_in_threadpool(lambda: _shown(self._figures.look(), Overview()))
        return self._page(request, "figures.html", "Figures", seen=seen)

    async def _show_decisions(self, request: Request) -> Response:
        seen = await run_in_threadpool(lambda: _shown(self._figures.look(), Overview()))
        decisions = sheet(seen.decisions, request.query_params)
        return self._page(request, "decisions.html", "Decisions", seen=seen, sheet=decisions)

    async def _show_intent(self, request: Request) -> Response:
        return await self._intent_page(request, request.query_params.get("key", "").strip())

    async def _intent_page(
        self, request: Request, key: str, problem: str = "", typed: Mapping[str, str] | None = None
    ) -> Response:
        def read() -> tuple[Entry, dict[str, Any]]:
            entry = self._operator.find(key)
            return entry, self._operator.describe(entry)

        try:
            entry, form = await run_in_threadpool(read)
        except StoreError:
            raise
        except IdempotencyError as error:
            raise HTTPException(404, str(error)) from None
        return self._page(
            request,
            "intent.html",
            entry.key,
            problem,
            entry=entry,
            form=form,
            timeline=timeline(entry),
            typed=typed or {},
        )

    async def _resolve(self, request: Request) -> Response:
        form = await self._form(request)
        key, evidence, fence = form.get("key", ""), form.get("evidence", "").strip(), form.get("fence", "")
        answer, problem = _answer(form)
        if not problem and not (fence.isdecimal() and len(fence) <= FENCE_DIGITS):
            problem = INCOMPLETE
        if problem:
            return await self._intent_page(request, key, problem, form)
        run = form.get("decision") == "run"
        decision = Decision(key, answer, _user(request), evidence, run, int(fence))
        decided = await self._changed(decide, self._operator, decision)
        if decided.stands:
            self._settled_here(key)
        if decided.why:
            del form["fence"]  # the page shows the record as it is now, so the next decision is about that
            return await self._intent_page(request, key, decided.why, form)
        return _redirect(request, f"/?settled={quote(key)}")

    async def _cancel(self, request: Request) -> Response:
        form = await self._form(request)
        key, evidence, fence = form.get("key", ""), form.get("evidence", "").strip(), form.get("fence", "")
        if not evidence or not (fence.isdecimal() and len(fence) <= FENCE_DIGITS):
            return await self._intent_page(request, key, INCOMPLETE if evidence else "Say why.", form)
        try:
            await self._changed(self._operator.cancel, key, _user(request), evidence, int(fence))
        except IdempotencyError as error:
            del form["fence"]
            return await self._intent_page(request, key, str(error), form)
        self._settled_here(key)
        return _redirect(request, f"/intent?key={quote(key)}")

    async def _changed(self, change: Callable[..., T], *arguments: Any) -> T:
        """Make a change, and return its result. Raises ``HTTPException``: the store does not answer."""
        try:
            return await run_in_threadpool(change, *arguments)
        except StoreError as error:
            again = "Go back and send it again: if it was written already, the second one is refused."
            raise HTTPException(503, f"{error} {again}") from None

    async def _resolve_all(self, request: Request) -> Response:
        """Make one decision about all intents that a filter shows, and that have not changed since then."""
        form = await self._form(request)
        answer, problem = _answer(form)
        try:
            which = which_of(form)._replace(older_than=0.0, until=float(form.get("until", "")))
        except ValueError:
            problem = problem or INCOMPLETE
        if problem:
            return await self._waiting_page(request, form, problem, form)

        def decide() -> tuple[str, Counter[str], list[Decided]]:
            fences = [(entry.key, entry.record.fence) for entry in self._operator.select(which)]
            if form.get("number", "").replace(",", "").strip() != str(len(fences)):
                problem = (
                    f"Nothing was changed: {len(fences)} intents are still as this page showed them, and you typed "
                    f"{form.get('number') or 'nothing'}. Look at them, then type their number."
                )
                return problem, Counter(), []
            evidence = form["evidence"].strip()
            counts: Counter[str] = Counter()
            others = []
            decisions = (
                Line(0, Decision(key, answer, _user(request), evidence, fence=fence)) for key, fence in fences
            )
            for _, decided in decide_all(self._operator, decisions):
                counts[decided.verdict] += 1
                if decided.stands:
                    self._settled_here(decided.key)
                else:
                    others.append(decided)
            return "", counts, others

        problem, counts, others = await run_in_threadpool(decide)
        if problem:
            self._waiting.outdate()
            return await self._waiting_page(request, form, problem, form)
        return self._page(
            request,
            "settled.html",
            "Settled",
            settled=counts["settled"] + counts["already"],
            happened=isinstance(answer, Happened),
            others=others,
        )

    def _settled_here(self, key: str) -> None:
        """Remove a decided intent from the list."""
        self._decided[key] = time.monotonic()
        self._waiting.outdate()
        self._figures.outdate()

    async def _style(self, request: Request) -> Response:
        headers = {**HEADERS, "cache-control": "max-age=3600"}
        return Response(self._css, media_type="text/css", headers=headers)

    async def _refusal(self, request: Request, error: Exception) -> Response:
        """Return the page for a refused request, also for Starlette's own 404 and 405."""
        assert isinstance(error, HTTPException)
        title = HTTPStatus(error.status_code).phrase
        response = self._page(request, "layout.html", title, error.detail, error.status_code)
        response.headers.update(error.headers or {})
        return response

    async def _store_away(self, request: Request, error: Exception) -> Response:
        return await self._refusal(request, HTTPException(503, str(error)))

    def _page(
        self, request: Request, template: str, title: str, problem: str = "", status: int = 0, **values: Any
    ) -> Response:
        user = _user(request)
        text = render(
            template,
            title=title,
            problem=problem,
            base=_base(request.scope),
            user=user,
            sign_out=self._token is not None,
            csrf=lambda: _csrf(request),
            **values,
        )
        # A result or an error's text may have half of a surrogate pair. That must not be an error of the page.
        status = status or (400 if problem else 200)
        return HTMLResponse(text.encode("utf-8", "replace"), status, HEADERS)

    # --- sign-in --------------------------------------------------------------------------

    def _guarded(
        self, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            user = await self._signed_in(request)
            if user:
                request.scope[COOKIE] = user
                return await handler(request)
            if self._token is not None and request.method == "GET":
                return _redirect(request, "/sign-in")
            raise HTTPException(401, "Sign in first.")

        return guarded

    async def _signed_in(self, request: Request) -> str | None:
        if self._authenticate is None:
            session = request.session
            return session.get("user") if session.get("until", 0) > time.time() else None
        user = self._authenticate(Request(request.scope[HOST_SCOPE], request.receive))
        return await user if inspect.isawaitable(user) else user

    async def _sign_in(self, request: Request) -> Response:
        if self._token is None:
            raise HTTPException(404, "There is no sign-in here.")
        problem = ""
        if request.method == "POST":
            form = await self._form(request)
            name = form.get("name", "").strip()
            if not 1 <= len(name) <= MAX_NAME:
                problem = (
                    f"Give your name, at most {MAX_NAME} characters: it is kept with every decision you make."
                )
            elif not hmac.compare_digest(form.get("token", "").encode(), self._token.encode()):
                await asyncio.sleep(WRONG_TOKEN_WAIT)
                problem = "That is not the token."
            else:
                request.session.clear()  # also the token of forms that were shown before the sign-in
                request.session.update(user=name, until=time.time() + SESSION)
                return _redirect(request, "/")
        status = 401 if problem else 200
        return self._page(request, "sign_in.html", "Sign in", problem, status, name_max=MAX_NAME)

    async def _sign_out(self, request: Request) -> Response:
        await self._form(request)
        request.session.clear()
        return _redirect(request, "/sign-in")

    async def _form(self, request: Request) -> dict[str, str]:
        """Return the fields of a form that one of our pages sent.

        Raises:
            HTTPException: the form is too large, incomplete, or not ours.
        """
        body = b""
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise HTTPException(413, f"The form has more than {MAX_BODY} bytes. Nothing was changed.")
        except ClientDisconnect:
            raise HTTPException(400, "The request ended early.") from None
        fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
        form = {name: values[0] for name, values in fields.items()}
        session = request.session
        ours = session.get("csrf_of") == _user(request) and hmac.compare_digest(
            session.get("csrf", "").encode(), form.get("csrf", "").encode()
        )
        if ours and not _from_another_site(request):
            return form
        words = "That form is not ours, or it is too old. Nothing was changed. Go back, reload the page and try again."
        hint = " If that does not help, several processes serve this: give them one secret=…."
        raise HTTPException(403, words if self._shared else words + hint)


def _shown(latest: Latest[Seen], nothing: Seen) -> Seen:
    """Return what is known. Raises ``Exception``: the latest reading ended with it."""
    if latest.error is not None:
        raise latest.error
    shown = latest.whole or latest.unfinished or nothing
    if latest.whole is not None and latest.unfinished is not None:
        shown = replace(shown, newer=latest.unfinished.records)
    return shown


def _answer(form: Mapping[str, str]) -> tuple[Happened | NotHappened, str]:
    """Return the decision in a form, and what is wrong with it; "" for nothing."""
    if not form.get("evidence", "").strip():
        return NotHappened(), "Say what you saw, and where: the evidence is kept with the decision."
    if form.get("decision") in ("not_happened", "run"):
        return NotHappened(), ""
    if form.get("decision") != "happened":
        return NotHappened(), INCOMPLETE
    if not form.get("result", "").strip():
        return NotHappened(), "Give the result that every caller receives, as JSON. For no value write null."
    try:
        return Happened(strict_json(form["result"])), ""
    except ValueError:
        return NotHappened(), 'The result is not JSON. Text needs quotes: "inv_7". No value is null.'


def _signing_key(token: str | None, secret: str | None) -> str:
    """Return the key that signs sessions. Another token or secret ends all sessions."""
    if token is None and secret is None:
        return secrets.token_hex()
    # A visitor of the sign-in form gets a signature by this key, and could try tokens on it without our server. With
    # scrypt, each try takes 16 MiB and a twentieth of a second.
    given = json.dumps([token, secret]).encode()
    return hashlib.scrypt(given, salt=b"celery_idem inbox session", n=2**14, r=8, p=1).hex()


def _user(request: Request) -> str:
    """Return the name of the user who is signed in; "" for none."""
    return str(request.scope.get(COOKIE, ""))


def _base(scope: Scope) -> str:
    """Return the path at which the inbox is mounted. It never begins with two slashes, which would name a host."""
    path = quote(str(scope.get("root_path", "")).strip("/"))
    return f"/{path}" if path else ""


def _redirect(request: Request, path: str) -> Response:
    return RedirectResponse(_base(request.scope) + path, 303, HEADERS)


def _csrf(request: Request) -> str:
    """Return the token of our forms, which is also in the signed session. Starlette has no such protection.

    The token belongs to one user. An attacker who plants another user's session into a browser cannot use it to send
    a form of this user.
    """
    session, user = request.session, _user(request)
    if session.get("csrf_of") != user:
        session.update(csrf=secrets.token_urlsafe(), csrf_of=user)
    return str(session["csrf"])


def _from_another_site(request: Request) -> bool:
    """Whether the browser says that a form comes from another site. If it says nothing, only the token decides."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:  # better than the origin, which differs from Host if a proxy changes Host
        return site not in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is not None and origin.partition("://")[2] != request.headers.get("host", "")
