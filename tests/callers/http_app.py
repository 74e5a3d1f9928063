"""The HTTP adapter inside a FastAPI application, for a real server."""

from __future__ import annotations

import fastapi

from celery_idem.adapters.http import door
from tests.callers.shop import app as shop

TASKS = ["shop.pay", "shop.slow", "shop.fails", "shop.large"]

app = fastapi.FastAPI()
app.mount("/actions", door(shop, TASKS, token={"secret-a": "a", "secret-b": "b"}, wait=5, max_body=10_000))
app.mount(
    "/strict", door(shop, TASKS, authenticate=lambda request: request.headers.get("x-user"), require_key=True)
)
