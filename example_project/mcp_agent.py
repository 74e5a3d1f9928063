"""The scripted agent over MCP: its client gives up before the tool has answered, and it calls again.

Input and output are those of `agent`. The SDK's client starts and ends the server process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
from typing import Any

from mcp import Client, MCPError, StdioServerParameters

from example_project import witness
from example_project.agent import MAX_CALLS, PARAMETERS, PATIENCE, plan
from example_project.mcp_server import TOOL


def tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


async def pursue(client: Client, number: int, goal: dict[str, Any], seed: str) -> None:
    """Call and plan again until there is an answer."""
    random_ = random.Random(f"{seed}-{number}")
    for count in range(1, MAX_CALLS + 1):
        args, kwargs = plan(goal, random_)
        # MCP passes all arguments by name.
        arguments = {**kwargs, **dict(zip(PARAMETERS, args, strict=False))}
        tell(goal=number, says=f"calls {TOOL}({json.dumps(arguments)})")
        try:
            answer = await client.call_tool(TOOL, arguments, read_timeout_seconds=PATIENCE)
        except MCPError as error:
            tell(goal=number, says=f"sees  {error}")
            continue
        answer_data = json.loads(answer.content[0].text)  # type: ignore[union-attr]
        tell(goal=number, says=f"sees  {answer.content[0].text}")  # type: ignore[union-attr]
        # The guard's tool answers with a receipt, the plain one with the task's own value.
        result = answer_data["result"] if "status" in answer_data and "next" in answer_data else answer_data
        outcome = "failed" if answer.is_error or result is None else "done"
        tell(goal=number, outcome=outcome, answer=result, calls=count)
        return
    tell(goal=number, outcome="no_answer", answer=None, calls=MAX_CALLS)


async def pursue_all(goals: list[dict[str, Any]], seed: str) -> None:
    words = ["-m", "example_project.mcp_server"]
    server = StdioServerParameters(command=sys.executable, args=words, env=dict(os.environ))
    async with Client(server) as client:
        await asyncio.gather(*(pursue(client, number, goal, seed) for number, goal in enumerate(goals)))


def main() -> int:
    parser = argparse.ArgumentParser(description="The example's scripted agent, over MCP.")
    parser.add_argument("--seed", default="7")
    seed = parser.parse_args().seed
    witness.note("ready", who="mcp_agent")
    asyncio.run(pursue_all(json.loads(sys.stdin.readline()), seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
