"""HTTP: chosen tasks behind ``POST /tasks/{name}``, with ``Idempotency-Key`` as in the IETF draft.

::

    from celery_idem.adapters.http import door

    api.mount("/actions", door(celery_app, ["shop.send_invoice"], token=os.environ["ACTIONS_TOKEN"]))

An ASGI application (Starlette), which runs alone or is mounted into another one. It needs ``token`` or
``authenticate``. A request gets one of these answers:

======  ==========================================================================
status  meaning
======  ==========================================================================
200     done; a repetition gets the same body, and ``Idempotent-Replayed: true``. A ``result`` that
        was not kept is null, and ``not_kept`` says why
202     published by this request, and still running: ask at ``Location``
400     the request is malformed, or has no ``Idempotency-Key`` although it is required
401     unauthorized
404     there is no such task, or nothing is known of that intent
409     another caller's request for it is running (``Retry-After``), or it is in doubt
413     the body is too large
415     the body is not JSON
422     the intent is known with other arguments; the answer names them
500     it was tried and failed; a repetition gets the same answer
503     ``not_run``: nothing was done, or only its finished steps; repeat it (``Retry-After``)
======  ==========================================================================

All answers except 200 and 202 are ``application/problem+json`` (RFC 9457) with the receipt's ``next``, one sentence
that says what to do.
"""

from __future__ import annotations

import hmac
import inspect
import json
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from celery_idem.adapters.tools import OCCURRENCE_MAX, RECEIPT, BadArguments, Offer, Tool, tool_of
from celery_idem.core.errors import ConfigurationError, StoreError, needs
from celery_idem.core.keys import label
from celery_idem.integration.receipts import Receipt, plain

with needs("The HTTP adapter needs Starlette and pydantic", "http"):
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

if TYPE_CHECKING:
    from celery import Celery

MAX_BODY = 1 << 20
"""Maximum size of a request's body, in bytes: the default maximum of a result, and far more than arguments need."""

WAIT = 10.0
"""Seconds that a request waits for the answer. Most proxies give up after 30 or 60."""

PROBLEM = "application/problem+json"

Authenticate = Callable[[Request], "str | Awaitable[str | None] | None"]
"""From a request to the caller's scope ("" for none), or to None to refuse it."""

_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_BARE = re.compile(r"[!#-~]+")
_STATUS = {"conflict": 422, "in_doubt": 409, "in_progress": 409, "failed": 500, "not_run": 503}
_TITLES = {
    "conflict": "Known already, with other arguments",
    "in_doubt": "It may have happened",
    "in_progress": "In progress",
    "failed": "Failed",
    "nothing_done": "Nothing was done",
    "partly_done": "Only a part was done",
    "invalid": "The request cannot be understood",
    "key_required": "Idempotency-Key is required",
    "unauthorized": "Unauthorized",
    "not_found": "Not found",
    "too_large": "The body is too large",
    "not_json": "The body is not JSON",
    "error": "The request failed",
}


def door(
    app: Celery,
    tasks: Iterable[str],
    *,
    token: str | Mapping[str, str] | None = None,
    authenticate: Authenticate | None = None,
    require_key: bool = False,
    wait: float = WAIT,
    max_body: int = MAX_BODY,
) -> Starlette:
    """Return the ASGI application.

    Args:
        app: the Celery application that the tasks belong to.
        tasks: names of the tasks that may be called. Others cannot be seen.
        token: the bearer token; or a mapping from tokens to scopes, which keeps the callers' intents apart.
        authenticate: a function of the host application instead: from a request to a scope, to ``""`` for no scope, or
            to None to refuse. It may be a coroutine function.
        require_key: a request must have an ``Idempotency-Key``. Without one, the task's own intent is the identity.
        wait: seconds to wait for the answer. ``Prefer: wait=5`` in a request shortens it.
        max_body: maximum size of a body, in bytes.

    Raises:
        ConfigurationError: neither ``token`` nor ``authenticate``, or a task that cannot be offered.
    """
    if (
        (token is None) == (authenticate is None)
        or token in ("", {})
        or (
            isinstance(token, Mapping) and not all(token)  # an empty token, from a variable that is not set
        )
    ):
        raise ConfigurationError(
            "The HTTP adapter needs to know who may use it: give either token=… or authenticate=…. "
            "A token cannot be empty."
        )
    check = authenticate if authenticate is not None else _bearer(token or "")
    offer = Offer(app, {name: tool_of(app, name) for name in tasks}, wait)
    endpoints = _Endpoints(offer, check, require_key, max_body, _openapi(offer.tools, require_key))
    return Starlette(
        routes=[
            Route("/tasks/{name}", endpoints.call, methods=["POST"]),
            Route("/intents/{key}", endpoints.look, methods=["GET"]),
            Route("/openapi.json", endpoints.document, methods=["GET"]),
        ],
        exception_handlers={
            _Problem: lambda request, problem: problem.response(),
            HTTPException: _http_problem,
            Exception: _internal_problem,
        },
    )


class _Problem(Exception):
    """An answer that is no success, in the form of RFC 9457."""

    def __init__(
        self, status: int, kind: str, detail: str = "", headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = dict(headers or {})
        body = {"type": f"urn:celery-idem:{kind}", "title": _TITLES[kind], "status": status, "detail": detail}
        self.body = {**body, **more}

    def response(self) -> Response:
        return _Json(self.body, self.status, self.headers, media_type=PROBLEM)


async def _http_problem(request: Request, error: Exception) -> Response:
    """Answer for Starlette's own 404 and 405."""
    assert isinstance(error, HTTPException)
    kind = "not_found" if error.status_code == 404 else "error"
    return _Problem(error.status_code, kind, str(error.detail), error.headers).response()


async def _internal_problem(request: Request, error: Exception) -> Response:
    """Answer for an error of our own, which the server logs. Calling again is safe, because the intent is guarded."""
    return _Problem(500, "error", "Something went wrong here. It is safe to call again unchanged.").response()


@dataclass(frozen=True)
class _Endpoints:
    offer: Offer
    authenticate: Authenticate
    require_key: bool
    max_body: int
    openapi: dict[str, Any]

    async def call(self, request: Request) -> Response:
        """POST /tasks/{name}"""
        scope = await self._scope(request)
        tool = self.offer.tools.get(request.path_params["name"])
        if tool is None:
            raise _Problem(404, "not_found", "There is no such task here.")
        key = _text_header(request, "idempotency-key")
        if key is None and self.require_key:
            raise _Problem(
                400, "key_required", "Send Idempotency-Key: a new one per action, the same one per retry."
            )
        occurrence = _text_header(request, "idem-occurrence")
        body = await self._body(request)
        try:
            receipt = await self.offer.call(tool, body, scope, occurrence, key, _preferred_wait(request))
        except BadArguments as error:
            raise _Problem(
                400, "invalid", "The arguments do not fit the task.", errors=list(error.problems)
            ) from None
        return _response(receipt, request)

    async def look(self, request: Request) -> Response:
        """GET /intents/{key}"""
        scope = await self._scope(request)
        try:
            receipt = await self.offer.look(request.path_params["key"], scope)
        except StoreError:
            raise _Problem(
                503, "error", "It cannot be looked up right now. Ask again.", {"Retry-After": "1"}
            ) from None
        if receipt is None:
            raise _Problem(404, "not_found", "Nothing is known of that intent.")
        return _Json(receipt.to_dict(), headers={"Cache-Control": "no-store"})

    async def document(self, request: Request) -> Response:
        """GET /openapi.json"""
        await self._scope(request)
        base = str(request.scope.get("root_path", "")) or "/"
        return _Json({**self.openapi, "servers": [{"url": base}]})

    async def _scope(self, request: Request) -> str | None:
        scope = self.authenticate(request)
        if inspect.isawaitable(scope):
            scope = await scope
        if scope is None:
            raise _Problem(
                401, "unauthorized", "Send Authorization: Bearer …", {"WWW-Authenticate": "Bearer"}
            )
        return label("scope", None if scope == "" else scope)

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise _Problem(415, "not_json", "Send the arguments as application/json.")
        parts = []
        size = 0
        try:
            async for part in request.stream():
                size += len(part)
                if size > self.max_body:
                    raise _Problem(
                        413, "too_large", f"At most {self.max_body} bytes.", {"Connection": "close"}
                    )
                parts.append(part)
        except ClientDisconnect:
            raise _Problem(400, "invalid", "The request ended early.") from None
        return b"".join(parts)


class _Json(JSONResponse):
    """JSON in UTF-8. A text with half of a surrogate pair, as in a cut emoji, has no form there, and is ASCII."""

    def render(self, content: Any) -> bytes:
        try:
            return super().render(content)
        except UnicodeEncodeError:
            return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def _bearer(token: str | Mapping[str, str]) -> Authenticate:
    known = {token: ""} if isinstance(token, str) else dict(token)

    def check(request: Request) -> str | None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        found = None
        for secret, scope in known.items():  # all of them, so that the time does not tell which one fits
            if hmac.compare_digest(secret.encode(), given.strip().encode("utf-8", "replace")):
                found = scope
        return found if kind.lower() == "bearer" else None

    return check


def _text_header(request: Request, name: str) -> str | None:
    """Return a header with a text: quoted as in the draft, or bare, as most clients send it."""
    values = request.headers.getlist(name)
    if not values:
        return None
    value = values[0].strip()
    quoted = _QUOTED.fullmatch(value)
    if quoted:
        value = re.sub(r"\\(.)", r"\1", quoted[1])
    if len(values) > 1 or not value or len(value) > OCCURRENCE_MAX or not (quoted or _BARE.fullmatch(value)):
        raise _Problem(
            400, "invalid", f"{name} must be one text of 1 to {OCCURRENCE_MAX} printable characters."
        )
    return value


def _preferred_wait(request: Request) -> float:
    """Return the seconds in ``Prefer: wait=…`` (RFC 7240)."""
    found = re.search(
        r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})", request.headers.get("prefer", ""), re.IGNORECASE
    )
    return float(found[1]) if found else math.inf


def _response(receipt: Receipt, request: Request) -> Response:
    headers = {"Cache-Control": "no-store"}
    if receipt.key:
        headers["Location"] = f"{request.scope.get('root_path', '')}/intents/{quote(receipt.key)}"
    if receipt.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(receipt.retry_after)))
    if receipt.done:
        if receipt.status == "replayed":
            headers["Idempotent-Replayed"] = "true"
        # The body is the same for every caller, so it does not tell who was first.
        body = {"key": receipt.key, "result": plain(receipt.result)}
        if receipt.reason:
            body["not_kept"] = receipt.reason
        return _Json(body, headers=headers)
    if receipt.status == "accepted":
        return _Json(receipt.to_dict(), 202, headers)
    kind: str = receipt.status
    if receipt.status == "not_run":
        kind = "partly_done" if receipt.code == "partly_done" else "nothing_done"
        headers["Retry-After"] = "1"
    told = {name: value for name, value in receipt.to_dict().items() if name not in ("status", "result")}
    raise _Problem(_STATUS[receipt.status], kind, receipt.reason or receipt.next, headers, **told)


# --- the document ----------------------------------------------------------------------


def _openapi(tools: Mapping[str, Tool], require_key: bool) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the offered tasks."""
    problem = {"description": "Says what to do next.", "content": {PROBLEM: {"schema": _ref("Problem")}}}
    receipt = {"content": {"application/json": {"schema": _ref("Receipt")}}}
    text = {"type": "string", "minLength": 1, "maxLength": OCCURRENCE_MAX, "pattern": "^[!#-~]+$"}
    parameters = [
        {"name": "Idempotency-Key", "in": "header", "required": require_key, "schema": text},
        {
            "name": "Idem-Occurrence",
            "in": "header",
            "schema": text,
            "description": "Only for a meant repetition of the same action, such as second-reminder.",
        },
    ]
    schemas = {"Receipt": RECEIPT, "Problem": _PROBLEM}
    paths: dict[str, Any] = {}
    for name, tool in tools.items():
        schema = tool.schema()
        for inner, definition in schema.pop("$defs", {}).items():
            schemas[f"{name}.{inner}"] = _moved(definition, name)
        done = {
            "type": "object",
            "properties": {"key": {"type": "string"}, "result": {}, "not_kept": {"type": "string"}},
            "required": ["key", "result"],
        }
        paths[f"/tasks/{name}"] = {
            "post": {
                "operationId": name,
                "description": tool.description,
                "parameters": parameters,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": _moved(schema, name)}},
                },
                "responses": {
                    "200": {"description": "Done.", "content": {"application/json": {"schema": done}}},
                    "202": {"description": "Published, and running.", **receipt},
                    **dict.fromkeys(("400", "401", "409", "413", "415", "422", "500", "503"), problem),
                },
            }
        }
    paths["/intents/{key}"] = {
        "get": {
            "operationId": "intent",
            "parameters": [{"name": "key", "in": "path", "required": True, "schema": {"type": "string"}}],
            "responses": {
                "200": {"description": "Where it stands.", **receipt},
                **dict.fromkeys(("401", "404", "503"), problem),
            },
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Actions that happen once", "version": "1"},
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _moved(schema: Any, name: str) -> Any:
    """Return the same schema with its definitions as components, under the task's name."""
    text = json.dumps(schema).replace('"#/$defs/', f'"#/components/schemas/{name}.')
    return json.loads(text)


_PROBLEM = {
    "type": "object",
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "next": {"type": "string"},
        "errors": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["type", "title", "status", "detail"],
}
