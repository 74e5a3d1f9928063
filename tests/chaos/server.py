"""The HTTP and MCP adapters of one broker's shop, as one ASGI application for a real server."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.routing import Mount

from celery_idem.adapters.http import door
from celery_idem.adapters.mcp import server
from tests.chaos.doors import TOKEN
from tests.chaos.plan import ACKS, POLICIES
from tests.chaos.shop import app as shop

TASKS = [f"chaos.{policy}.{acks}" for policy in POLICIES for acks in ACKS]
WAIT = 3.0  # seconds that a request waits for its result: agents wait shorter or longer (plan.Call)

# Without a scope, as in all other doors, because all callers mean the same intents.
mcp = server(shop, TASKS, scope=None, wait=WAIT).streamable_http_app(json_response=True, stateless_http=True)
http = door(shop, TASKS, token=TOKEN, wait=WAIT)
app = Starlette(routes=[Mount("/actions", http), *mcp.routes], lifespan=mcp.router.lifespan_context)
