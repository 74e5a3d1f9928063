"""The billing task as an MCP tool, on standard input and output.

With the guard it is the adapter's server. Without the guard it sends the task and waits for the result.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from mcp.server import Server
from mcp.server.stdio import stdio_server
from mcp_types import CallToolResult, ListToolsResult, TextContent, Tool

import example_project.tasks  # noqa: F401  # the adapter reads the tool's schema from the task
from example_project.app import GUARDED, app
from example_project.orchestrator import PATIENCE

TASK = "billing.send_invoice"
TOOL = "billing_send_invoice"


async def list_tools(context: Any, params: Any) -> ListToolsResult:
    return ListToolsResult(tools=[Tool(name=TOOL, input_schema={"type": "object"})])


async def call_tool(context: Any, params: Any) -> CallToolResult:
    sent = await asyncio.to_thread(app.send_task, TASK, kwargs=params.arguments)
    # Polls instead of waiting in a thread, so that nothing goes on waiting after the client has left.
    for _ in range(int(PATIENCE / 0.05)):
        if await asyncio.to_thread(sent.ready):
            text = json.dumps(sent.result, default=repr)
            return CallToolResult(content=[TextContent(text=text)], is_error=not sent.successful())
        await asyncio.sleep(0.05)
    return CallToolResult(content=[TextContent(text="No answer. Please try again.")], is_error=True)


def main() -> None:
    if GUARDED:
        from celery_idem.adapters.mcp import serve_stdio, server

        serve_stdio(server(app, [TASK]))
        return
    plain: Server[Any] = Server("plain", on_list_tools=list_tools, on_call_tool=call_tool)

    async def serve() -> None:
        async with stdio_server() as (read, write):
            await plain.run(read, write, plain.create_initialization_options())

    asyncio.run(serve())


if __name__ == "__main__":
    main()
