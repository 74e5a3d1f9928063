"""MCP: chosen tasks as tools, with the official SDK (2.0 or later).

::

    from celery_idem.adapters.mcp import serve_stdio, server

    actions = server(celery_app, ["shop.send_invoice"])
    serve_stdio(actions)                                         # for a host that starts this process
    asgi = actions.streamable_http_app(auth=…, token_verifier=…) # for hosts that come over HTTP

Each tool's structured output is the receipt. A duplicate, or an action in progress or in doubt, is an ordinary answer
with a sentence that says what to do. A client that has timed out and calls again, even in other words, asks about the
same intent.

The scope (whose action it is) comes from the authenticated host. The host may also send a key, as
``celery-idem/idempotency-key`` in the request's ``_meta``, which a model cannot write.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery_idem.adapters.tools import OCCURRENCE_MAX, RECEIPT, BadArguments, Offer, Tool, tool_of
from celery_idem.core.errors import ConfigurationError, StoreError, needs
from celery_idem.integration.receipts import PENDING, Receipt

with needs("The MCP adapter needs the official SDK, 2.0 or later", "mcp"):
    from mcp.server import Server
    from mcp.server.auth.middleware.auth_context import get_access_token
    from mcp.server.stdio import stdio_server
    from mcp.shared.exceptions import MCPError
    from mcp_types import (
        INVALID_PARAMS,
        CallToolRequestParams,
        CallToolResult,
        ListToolsResult,
        TextContent,
        ToolAnnotations,
    )
    from mcp_types import Tool as ToolEntry

if TYPE_CHECKING:
    from celery import Celery

WAIT = 20.0
"""Seconds that a call waits for the answer. Hosts give up after 60, some after 30. Before that, they should get the
answer "running, do not call again"."""

KEY_META = "celery-idem/idempotency-key"
OCCURRENCE_META = "celery-idem/occurrence"
STATUS_TOOL = "action_status"

Scope = Callable[[Any], "str | None"]
"""From the SDK's request context to the scope of its calls."""


def authenticated(context: Any) -> str | None:
    """Return the default scope: the caller by the SDK's own authentication; None on stdio."""
    token = get_access_token()
    if token is None:
        return None
    issuer = (token.claims or {}).get("iss")
    # Not joined, because a name may have any separator.
    return json.dumps([token.client_id, issuer, token.subject])


def server(
    app: Celery,
    tasks: Iterable[str],
    *,
    name: str = "actions",
    scope: str | Scope | None = authenticated,
    additive: Iterable[str] = (),
    occurrences: bool = False,
    wait: float = WAIT,
) -> Server[Any]:
    """Return the SDK's server, which can run on any of its transports.

    Args:
        app: the Celery application that the tasks belong to.
        tasks: names of the tasks that become tools. Others cannot be seen. A tool is called like its task, with ``_``
            for ``.``.
        name: name of the server.
        scope: whose actions these are: a text, or a function of the request's context.
        additive: those of the tasks that only add something. All others are announced as destructive.
        occurrences: let the model name an intended repetition (see ``tool_of``).
        wait: seconds to wait for an answer.

    Raises:
        ConfigurationError: a task cannot be offered, or two have the same tool name.
    """
    tools: dict[str, Tool] = {}
    for task in tasks:
        tool = tool_of(app, task, occurrences)
        called = re.sub(r"[^A-Za-z0-9_-]", "_", task)
        if called in tools or called == STATUS_TOOL:
            raise ConfigurationError(f"Two tools would be called {called!r}: rename the task {task}.")
        tools[called] = tool
    unknown = set(additive) - {tool.name for tool in tools.values()}
    if unknown:
        raise ConfigurationError(f"additive= names {unknown.pop()!r}, which is not among the tasks.")
    handlers = _Handlers(Offer(app, tools, wait), scope, frozenset(additive))
    return Server(
        name, instructions=INSTRUCTIONS, on_list_tools=handlers.list_tools, on_call_tool=handlers.call_tool
    )


INSTRUCTIONS = (
    "Every action here takes effect once, however often it is called. Each answer has a `status`, and a `next` "
    f"that says what to do. After a timeout, call again unchanged, or ask {STATUS_TOOL} with the key."
)


def serve_stdio(actions: Server[Any]) -> None:
    """Serve one host on standard input and output until it closes them."""

    async def serve() -> None:
        async with stdio_server() as (read, write):
            await actions.run(read, write, actions.create_initialization_options())

    asyncio.run(serve())


@dataclass(frozen=True)
class _Handlers:
    offer: Offer
    scope: str | Scope | None
    additive: frozenset[str]

    async def list_tools(self, context: Any, params: Any) -> ListToolsResult:
        entries = [self._entry(called, tool) for called, tool in self.offer.tools.items()]
        return ListToolsResult(tools=[*entries, _STATUS_ENTRY])

    def _entry(self, called: str, tool: Tool) -> ToolEntry:
        return ToolEntry(
            name=called,
            description=tool.description,
            input_schema=tool.schema(),
            output_schema=RECEIPT,
            annotations=ToolAnnotations(
                read_only_hint=False,
                destructive_hint=tool.name not in self.additive,
                idempotent_hint=tool.idempotent,
            ),
        )

    async def call_tool(self, context: Any, params: CallToolRequestParams) -> CallToolResult:
        arguments = params.arguments or {}
        if params.name == STATUS_TOOL:
            return await self._status(arguments, self._scope_of(context))
        tool = self.offer.tools.get(params.name)
        if tool is None:
            raise MCPError(INVALID_PARAMS, f"There is no tool called {params.name}.")
        meta = context.meta or {}
        scope = self._scope_of(context)
        occurrence, key = _from_host(meta, OCCURRENCE_META), _from_host(meta, KEY_META)
        try:
            return _result(await self.offer.call(tool, json.dumps(arguments), scope, occurrence, key))
        except BadArguments as error:
            return _refusal(f"Nothing was done. Correct the arguments: {error}")

    def _scope_of(self, context: Any) -> str | None:
        return self.scope(context) if callable(self.scope) else self.scope

    async def _status(self, arguments: Mapping[str, Any], scope: str | None) -> CallToolResult:
        key = arguments.get("key")
        if not isinstance(key, str) or set(arguments) != {"key"}:
            return _refusal('Give one argument, "key", as an earlier answer named it.')
        try:
            receipt = await self.offer.look(key, scope)
        except StoreError:
            return _refusal("It cannot be looked up right now. Ask again in a few seconds.")
        if receipt is None:
            return _refusal("Nothing is known of that key: either it is wrong, or nothing was done.")
        return _result(receipt)


def _from_host(meta: Mapping[str, Any], name: str) -> str | None:
    value = meta.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= OCCURRENCE_MAX:
        raise MCPError(INVALID_PARAMS, f"{name} in _meta must be text of 1 to {OCCURRENCE_MAX} characters.")
    return value


def _result(receipt: Receipt) -> CallToolResult:
    told = receipt.to_dict()
    if receipt.status in PENDING and receipt.key:
        told["next"] += f" Ask {STATUS_TOOL} with this key for the answer."
    return CallToolResult(
        content=[TextContent(text=json.dumps(told))],
        structured_content=told,
        is_error=receipt.status in ("failed", "not_run"),
    )


def _refusal(words: str) -> CallToolResult:
    return CallToolResult(content=[TextContent(text=words)], is_error=True)


_STATUS_ENTRY = ToolEntry(
    name=STATUS_TOOL,
    description="Where an action stands that was called earlier. Only looks; does nothing.",
    input_schema={
        "type": "object",
        "properties": {"key": {"type": "string", "description": "The key that an answer named."}},
        "required": ["key"],
        "additionalProperties": False,
    },
    output_schema=RECEIPT,
    annotations=ToolAnnotations(read_only_hint=True),
)
