"""The MCP adapter: `python -m tests.callers.mcp_app SCOPE` serves stdio, `app` is for a real HTTP server."""

from __future__ import annotations

import sys

from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings

from celery_idem.adapters.mcp import serve_stdio, server
from tests.callers.shop import app as shop

TASKS = ["shop.pay", "shop.slow", "shop.fails"]


class Tokens:
    """The tokens of two hosts. The first host has two users."""

    async def verify_token(self, token: str) -> AccessToken | None:
        known = {"token-a": ("host-a", "ann"), "token-b": ("host-a", "bob"), "token-c": ("host-c", None)}
        if token not in known:
            return None
        host, user = known[token]
        return AccessToken(token=token, client_id=host, scopes=[], subject=user)


actions = server(shop, TASKS, additive=["shop.pay"], occurrences=True, wait=8)
app = actions.streamable_http_app(
    auth=AuthSettings(
        issuer_url="http://127.0.0.1:1",
        resource_server_url="http://127.0.0.1:1/mcp",
        validate_token_resource=False,
    ),
    token_verifier=Tokens(),
)

if __name__ == "__main__":
    serve_stdio(server(shop, TASKS, scope=sys.argv[1], wait=8))
