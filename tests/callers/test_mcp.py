"""The MCP adapter with the SDK's client over stdio and HTTP, and a real worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from celery import Celery
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from celery_idem import ConfigurationError, IdempotentTask
from celery_idem.adapters.mcp import server
from tests.support.effects import Effects, Gate
from tests.support.workers import ROOT

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("worker")]

FIRST_HOST = "token-a"
Session = Callable[[Client], Awaitable[None]]


@contextlib.asynccontextmanager
async def over_http(url: str, token: str = FIRST_HOST) -> AsyncIterator[Client]:
    headers = {"authorization": f"Bearer {token}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=30) as http,
        Client(streamable_http_client(url, http_client=http)) as client,
    ):
        yield client


def over_stdio(env: dict[str, str], scope: str = "desk") -> Client:
    words = ["-m", "tests.callers.mcp_app", scope]
    env = {**env, "PYTHONPATH": str(ROOT)}
    return Client(StdioServerParameters(command=sys.executable, args=words, env=env, cwd=ROOT))


@pytest.fixture(params=["stdio", "http"])
def connect(request: pytest.FixtureRequest) -> Callable[[Session], None]:
    """Return a function that runs a session with a client connected over this transport."""

    def run(session: Session) -> None:
        async def main() -> None:
            if request.param == "stdio":
                async with over_stdio(request.getfixturevalue("shop_env")) as client:
                    await session(client)
            else:
                async with over_http(request.getfixturevalue("mcp_url")) as client:
                    await session(client)

        asyncio.run(asyncio.wait_for(main(), 60))

    return run


async def call(
    client: Client, tool: str, meta: dict[str, Any] | None = None, **arguments: Any
) -> dict[str, Any]:
    answer = await client.call_tool(tool, arguments, meta=meta)
    told = answer.structured_content
    assert isinstance(told, dict), answer
    assert json.loads(answer.content[0].text) == told  # for hosts that show text only
    assert answer.is_error == (told["status"] in ("failed", "not_run"))
    return told


@pytest.mark.parametrize("connect", ["http"], indirect=True)  # one transport is enough
def test_a_tool_tells_what_it_is(connect: Callable[[Session], None]) -> None:
    async def session(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"shop_pay", "shop_slow", "shop_fails", "action_status"}
        pay = tools["shop_pay"]
        assert pay.description.startswith("Pay one invoice of a customer.")
        properties = pay.input_schema["properties"]
        assert properties["cents"]["type"] == "integer"
        assert properties["note"]["description"].startswith("Free: other words here")
        assert "idempotency_key" not in properties  # the model does not choose it
        assert pay.output_schema["required"][0] == "status"
        assert pay.annotations.idempotent_hint
        assert not pay.annotations.read_only_hint
        assert tools["action_status"].annotations.read_only_hint

    connect(session)


def test_repeated_in_other_words(connect: Callable[[Session], None], done: Effects, name: str) -> None:
    async def session(client: Client) -> None:
        first = await call(client, "shop_pay", customer=name, invoice="7", cents=1, note="please")
        assert (first["status"], first["result"]) == ("executed", {"paid": 1, "invoice": "7"})
        again = await call(
            client, "shop_pay", note="once more", cents=1, currency="EUR", invoice="7", customer=name
        )
        assert (again["status"], again["result"]) == ("replayed", {"paid": 1, "invoice": "7"})
        assert again["next"] == "Already done earlier; nothing was done now. Report it as done."
        other = await call(client, "shop_pay", customer=name, invoice="7", cents=2)
        assert (other["status"], other["differs"]) == ("conflict", ["cents"])
        looked = await call(client, "action_status", key=first["key"])
        assert (looked["status"], looked["result"]) == ("replayed", {"paid": 1, "invoice": "7"})

    connect(session)
    assert done.count(f"pay-{name}-7") == 1


def test_a_client_that_times_out(
    connect: Callable[[Session], None], done: Effects, folder: Path, name: str
) -> None:
    async def session(client: Client) -> None:
        with pytest.raises(MCPError):
            await client.call_tool("shop_slow", {"name": name}, read_timeout_seconds=0.5)
        await asyncio.to_thread(done.wait, f"slow-{name}")
        later = asyncio.create_task(call(client, "shop_slow", name=name))
        Gate(folder / f"gate-{name}").open()
        told = await later
        assert (told["status"], told["result"]) == ("replayed", f"slow {name}")

    connect(session)
    assert done.count(f"slow-{name}") == 1


@pytest.mark.parametrize("connect", ["http"], indirect=True)  # one transport is enough
def test_what_went_wrong_is_an_answer(connect: Callable[[Session], None], done: Effects, name: str) -> None:
    async def session(client: Client) -> None:
        for how, status, words in [
            ("error", "failed", "calling again unchanged gives this same answer"),
            ("doubt", "in_doubt", "a person must resolve it"),
            ("brief", "not_run", "Safe to call again unchanged"),
        ]:
            for _ in range(2):
                told = await call(client, "shop_fails", name=f"{name}-{how}", how=how)
                assert told["status"] == status
                assert words in told["next"]

    connect(session)
    assert [done.count(f"fails-{name}-{how}") for how in ("error", "doubt", "brief")] == [1, 1, 2]


def test_the_host_may_bring_the_key(connect: Callable[[Session], None], done: Effects, name: str) -> None:
    async def session(client: Client) -> None:
        meta = {"celery-idem/idempotency-key": f"turn-{name}"}
        bill = {"customer": name, "invoice": "7", "cents": 1}
        told = [await call(client, "shop_pay", meta, **bill) for _ in range(2)]
        assert [each["status"] for each in told] == ["executed", "replayed"]
        assert (await call(client, "shop_pay", meta, **bill, note="other"))["differs"] == ["note"]
        meta = {"celery-idem/occurrence": "second"}
        assert (await call(client, "shop_pay", meta, **bill))["status"] == "executed"
        with pytest.raises(MCPError, match="1 to 255"):
            await client.call_tool("shop_pay", bill, meta={"celery-idem/idempotency-key": 5})

    connect(session)
    assert done.count(f"pay-{name}-7") == 2


@pytest.mark.parametrize("connect", ["http"], indirect=True)  # one transport is enough
def test_mistakes_are_told(connect: Callable[[Session], None], name: str) -> None:
    async def session(client: Client) -> None:
        for arguments, words in [
            ({"customer": name}, "invoice: Field required"),
            ({"customer": name, "invoice": "7", "cents": "1"}, "cents: Input should be a valid integer"),
            (
                {"customer": name, "invoice": "7", "cents": 1, "idempotency_key": "x"},
                "idempotency_key: Extra inputs",
            ),
        ]:
            answer = await client.call_tool("shop_pay", arguments)
            assert answer.is_error
            assert words in answer.content[0].text
            assert "Nothing was done" in answer.content[0].text
        answer = await client.call_tool("action_status", {"key": "shop.number:" + "0" * 32})
        assert answer.is_error
        with pytest.raises(MCPError, match="no tool called"):
            await client.call_tool("shop_number", {})

    connect(session)


def test_in_progress_names_the_key(
    shop_env: dict[str, str], shop: Celery, folder: Path, done: Effects, name: str
) -> None:
    """An unfinished call names the key to look up. The server runs in this process, so that its wait is short."""

    async def session() -> None:
        async with Client(server(shop, ["shop.slow"], wait=0.2)) as client:
            told = await call(client, "shop_slow", name=name)
            assert told["status"] == "accepted"
            assert told["next"].endswith("Ask action_status with this key for the answer.")
            await asyncio.to_thread(done.wait, f"slow-{name}")
            assert (await call(client, "shop_slow", name=name))["status"] == "in_progress"
            assert (await call(client, "action_status", key=told["key"]))["status"] == "in_progress"
            Gate(folder / f"gate-{name}").open()
            await asyncio.to_thread(shop.tasks["shop.slow"].submit(name).wait, 20)
            assert (await call(client, "action_status", key=told["key"]))["result"] == f"slow {name}"

    asyncio.run(asyncio.wait_for(session(), 60))
    assert done.count(f"slow-{name}") == 1


def test_the_scope_is_the_host(mcp_url: str, shop_env: dict[str, str], done: Effects, name: str) -> None:
    """Each user of a host, a host without users, and a stdio server have separate scopes: four in this test."""

    async def pay(client: Client, **more: Any) -> str:
        return str((await call(client, "shop_pay", customer=name, invoice="7", cents=1, **more))["status"])

    async def main() -> None:
        for token, status in [
            ("token-a", "executed"),
            ("token-b", "executed"),
            ("token-c", "executed"),
            ("token-a", "replayed"),
        ]:
            async with over_http(mcp_url, token) as client:
                assert await pay(client) == status
        async with over_http(mcp_url) as client:
            assert await pay(client, occurrence="second") == "executed"
            assert await pay(client, occurrence="second") == "replayed"
        async with over_stdio(shop_env) as client:
            assert await pay(client) == "executed"

    asyncio.run(asyncio.wait_for(main(), 60))
    assert done.count(f"pay-{name}-7") == 5


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}])
def test_closed_without_a_token(mcp_url: str, headers: dict[str, str]) -> None:
    hello = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    assert httpx2.post(mcp_url, json=hello, headers=headers).status_code == 401


def test_what_cannot_be_offered() -> None:
    app = Celery("mistakes", set_as_current=False)
    app.conf.idem_store = "memory://"

    def task(name: str, **options: Any) -> None:
        @app.task(base=IdempotentTask, shared=False, name=name, intent=("first",), **options)
        def body(first: int, occurrence: str = "") -> None: ...

    task("m.one")
    task("m_one")
    task("m.shadow", shadow=True)
    with pytest.raises(ConfigurationError, match="Two tools would be called 'm_one'"):
        server(app, ["m.one", "m_one"])
    with pytest.raises(ConfigurationError, match="parameter called 'occurrence'"):
        server(app, ["m.one"], occurrences=True)
    with pytest.raises(ConfigurationError, match="additive= names 'm_one'"):
        server(app, ["m.one"], additive=["m_one"])

    async def hints() -> list[tuple[bool, bool]]:
        async with Client(server(app, ["m.one", "m.shadow"], additive=["m.one"])) as client:
            tools = (await client.list_tools()).tools
            return [(t.annotations.destructive_hint, t.annotations.idempotent_hint) for t in tools[:2]]

    assert asyncio.run(asyncio.wait_for(hints(), 20)) == [(False, True), (True, False)]
