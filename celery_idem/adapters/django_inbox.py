"""The in-doubt inbox in a Django site, by WSGI or ASGI, with the site's users.

::

    from celery_idem.adapters.django_inbox import inbox_urls

    urlpatterns = [path("ops/idem/", include(inbox_urls(celery_app)))]

The inbox is an ASGI application. A view passes the request to it, and returns its response.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.exceptions import PermissionDenied
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse
from django.urls import re_path

from celery_idem.adapters.inbox import inbox
from celery_idem.core.errors import ConfigurationError

if TYPE_CHECKING:
    from celery import Celery

USER = "celery_idem.django.user"
"""Entry of the ASGI scope with the name of Django's user. Our view makes the scope, so no request can set it."""


def is_superuser(user: Any) -> bool:
    """Whether a user may do everything. That is the default, because decisions here may move money."""
    return bool(user.is_active and user.is_superuser)


def inbox_urls(app: Celery, *, allowed: Callable[[Any], bool] = is_superuser) -> list[Any]:
    """Return the inbox as URL patterns for ``include``.

    Args:
        allowed: which of Django's users may look and decide, for example
            ``lambda user: user.has_perm("orders.settle")``.
    """
    site = inbox(
        app,
        authenticate=lambda request: request.scope.get(USER),
        secret=settings.SECRET_KEY,  # all processes of the site share it
    )

    def user_of(request: HttpRequest) -> str | None:
        """Return the user's name; None if nobody is signed in. Reads Django's database."""
        user = getattr(request, "user", None)
        if user is None:
            raise ConfigurationError(
                "The inbox asks Django who signed in: INSTALLED_APPS and MIDDLEWARE need Django's sessions and auth."
            )
        if not user.is_authenticated:
            return None
        if not allowed(user):
            raise PermissionDenied("You may not use this inbox.")
        return str(user.get_username())

    async def view(request: HttpRequest, path: str) -> HttpResponse:
        from django.contrib.auth.views import redirect_to_login  # needs Django's applications to be loaded

        user = await sync_to_async(user_of)(request)
        if user is not None:
            return await _answer(site, _scope(request, path, user), request)
        if request.method not in ("GET", "HEAD"):
            raise PermissionDenied("Sign in first.")
        return redirect_to_login(request.get_full_path())

    view.csrf_exempt = True  # type: ignore[attr-defined]  # the inbox' forms have a token of their own
    # ATOMIC_REQUESTS refuses async views, and a decision is not in the site's database.
    for database in connections:
        transaction.non_atomic_requests(using=database)(view)
    return [re_path(r"^(?P<path>.*)$", view, name="celery_idem_inbox")]


def _scope(request: HttpRequest, path: str, user: str) -> dict[str, Any]:
    """Return the ASGI scope of a request, mounted where the URL patterns are."""
    root = request.path.removesuffix(path).rstrip("/")
    # The host by Django's rules (USE_X_FORWARDED_HOST), because forms have to come from there.
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1", "replace"))
        for name, value in {**request.headers, "Host": request.get_host()}.items()
    ]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.scheme,
        "path": request.path,
        "raw_path": request.path.encode(),
        "root_path": root,
        "query_string": request.META.get("QUERY_STRING", "").encode("latin-1", "replace"),
        "headers": headers,
        "client": None,
        "server": None,
        USER: user,
    }


async def _answer(site: Any, scope: dict[str, Any], request: HttpRequest) -> HttpResponse:
    """Hand a request to an ASGI application, and return its response."""
    body = request.body
    status, headers, parts = 500, [], []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], message["headers"]
        else:
            parts.append(message.get("body", b""))

    await site(scope, receive, send)
    response = HttpResponse(b"".join(parts), status=status)
    for name, value in headers:
        if name.lower() == b"set-cookie":
            response.cookies.load(value.decode("latin-1"))  # Django's middleware looks for cookies here
        else:
            response[name.decode("latin-1")] = value.decode("latin-1")
    return response
