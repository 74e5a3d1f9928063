"""Processes that call tasks. Each reads one order per line, makes its calls and writes the results.

    {"door": "http", "calls": [{"args": […], "kwargs": {…}}], "gate": "/tmp/…/go"}
    [{"paid": 1, "invoice": "7"}, …]

A "door" is one way to call a task. Each returns the result that its caller receives at the end. An order's calls
start together, in several threads, when its gate file appears.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TextIO

from celery import Celery

import celery_idem
from tests.callers.shop import URL
from tests.callers.shop import app as shop
from tests.support.effects import Gate

WITHIN = float(os.environ.get("CALLERS_WITHIN", "30"))  # seconds to wait for one result
NAMES = ("customer", "invoice", "cents", "currency", "note")
pay = shop.tasks["shop.pay"]
stranger = Celery("stranger", broker=URL, backend=URL, set_as_current=False)  # knows no task

Args = list[Any]
Kwargs = dict[str, Any]


def named(args: Args, kwargs: Kwargs) -> Kwargs:
    """Return the call as named arguments only, in the caller's order. Adapters that take JSON objects need this."""
    return {**kwargs, **dict(zip(NAMES, args, strict=False))}


def submit(args: Args, kwargs: Kwargs) -> Any:
    return pay.submit(*args, **kwargs).wait(WITHIN).to_dict()["result"]


def submit_by_name(args: Args, kwargs: Kwargs) -> Any:
    return celery_idem.submit(stranger, "shop.pay", args, kwargs).wait(WITHIN).result


def delay(args: Args, kwargs: Kwargs) -> Any:
    return pay.delay(*args, **kwargs).get(WITHIN)


def send_task(args: Args, kwargs: Kwargs) -> Any:
    return stranger.send_task("shop.pay", args, kwargs).get(WITHIN)


def chain(args: Args, kwargs: Kwargs) -> Any:
    after = shop.tasks["shop.after"]
    return (pay.si(*args, **kwargs) | after.s(named(args, kwargs)["customer"])).apply_async().get(WITHIN)


def http(args: Args, kwargs: Kwargs) -> Any:
    import httpx

    url = f"{os.environ['CALLERS_HTTP']}/actions/tasks/shop.pay"
    headers = {"authorization": "Bearer secret-a"}
    until = time.monotonic() + WITHIN
    while True:  # 202 and 409 with Retry-After mean: call again later
        answer = httpx.post(url, json=named(args, kwargs), headers=headers, timeout=WITHIN)
        if answer.status_code not in (202, 409) or time.monotonic() > until:
            return answer.json()["result"]


def mcp(args: Args, kwargs: Kwargs) -> Any:
    from tests.callers.test_mcp import over_http

    async def call() -> Any:
        async with over_http(os.environ["CALLERS_MCP"]) as client:
            answer = await client.call_tool("shop_pay", named(args, kwargs))
            return answer.structured_content["result"]

    return asyncio.run(asyncio.wait_for(call(), WITHIN))


@cache
def tool() -> Callable[..., Any]:
    from celery_idem.adapters.agents import function

    return function(shop, "shop.pay", wait=WITHIN)


def langgraph(args: Args, kwargs: Kwargs) -> Any:
    from langchain_core.tools import StructuredTool

    return StructuredTool.from_function(tool()).invoke(named(args, kwargs))["result"]


def openai_agents(args: Args, kwargs: Kwargs) -> Any:
    from agents import function_tool
    from agents.tool_context import ToolContext

    text = json.dumps(named(args, kwargs))
    context = ToolContext(
        context=None, tool_name="shop_pay", tool_call_id="new every time", tool_arguments=text
    )
    answer = asyncio.run(asyncio.wait_for(function_tool(tool()).on_invoke_tool(context, text), WITHIN))
    return answer["result"]


def pydantic_ai(args: Args, kwargs: Kwargs) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart
    from pydantic_ai.models.function import FunctionModel

    answers: list[Any] = []

    def model(messages: Any, info: Any) -> ModelResponse:
        returned = [part for part in messages[-1].parts if part.part_kind == "tool-return"]
        answers.extend(part.content for part in returned)
        if returned:
            return ModelResponse(parts=[TextPart("done")])
        return ModelResponse(parts=[ToolCallPart(info.function_tools[0].name, named(args, kwargs))])

    asyncio.run(asyncio.wait_for(Agent(FunctionModel(model), tools=[tool()]).run("Pay."), WITHIN))
    return answers[0]["result"]


DOORS = {
    door.__name__: door
    for door in (
        submit,
        submit_by_name,
        delay,
        send_task,
        chain,
        http,
        mcp,
        langgraph,
        openai_agents,
        pydantic_ai,
    )
}
FRAMEWORKS = ("langgraph", "openai_agents", "pydantic_ai")


def main() -> None:
    """Fork one process for each pair of file descriptors: the first for its orders, the second for its results."""
    for door in ("httpx", "tests.callers.test_mcp"):
        importlib.import_module(door)
    pairs = [[int(file) for file in word.split(",")] for word in sys.argv[1:]]
    for orders, answers in pairs:
        if os.fork() == 0:
            with os.fdopen(orders) as lines, os.fdopen(answers, "w") as out:
                serve(lines, out)
            os._exit(0)
    for _ in pairs:
        os.wait()


def serve(orders: Iterable[str], answers: TextIO) -> None:
    with ThreadPoolExecutor(4) as threads:
        for line in orders:
            order = json.loads(line)
            knock = DOORS[order["door"]]
            Gate(order["gate"]).wait()
            said = [threads.submit(knock, call["args"], call["kwargs"]) for call in order["calls"]]
            print(json.dumps([_said(answer.result) for answer in said]), file=answers, flush=True)


def _said(result: Callable[[], Any]) -> Any:
    try:
        return result()
    except BaseException as error:  # the failing assertion of the test shows it
        return repr(error)


if __name__ == "__main__":
    main()
