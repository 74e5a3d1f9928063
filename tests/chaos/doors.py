"""One function for each way to call a task ("door"). It takes an intent and returns what its caller received.

All of them run in a process of agents (`agents`), with the application of one broker.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import httpx
from celery import Celery
from celery.result import AsyncResult

import celery_idem
from celery_idem import OutcomeUnknown
from celery_idem.adapters.agents import function
from celery_idem.core.model import CALLER_KEY
from celery_idem.integration.receipts import Receipt
from tests.chaos import shop
from tests.chaos.plan import Intent

# What a caller may receive. The first three are answers. The last one means: call again.
VALUE, DECLINED, IN_DOUBT, WRONG, AGAIN = "value", "declined", "in doubt", "wrong", "again"

# Errors after which a caller calls again with the same key: nothing happened, another execution has the intent, or
# Celery lost the message. The last three come from Celery, whether the effect happened or not: it marks a task as
# failed if its connection to the result backend or the broker is cut at that moment.
PASSING = ("NotNow", "LeaseLost", "InProgress", "StoreError", "WorkerLostError", "TaskRevokedError")
PASSING += ("ConnectionError", "TimeoutError", "OperationalError")

LOOK_EVERY = (0.02, 0.5)  # seconds between two looks at a Celery result: the first pause and the longest

URL = os.environ.get("CHAOS_DOOR", "")
TOKEN = "chaos"  # of the HTTP adapter, which is on loopback and runs for one test

# The application of an orchestrator. Celery shares tasks among the applications of a process, so it has the tasks too,
# and `submit` accepts its calls in the workers' store.
stranger = Celery("stranger", broker=shop.BROKER, backend=shop.BACKEND, set_as_current=False)
stranger.conf.update(
    task_default_queue="chaos",
    broker_transport_options=shop.app.conf.broker_transport_options,
    idem_store=shop.STORE,
)


class Told(NamedTuple):
    """What a caller received: one of the words above, the value, and details for the story."""

    kind: str
    value: Any = None
    detail: str = ""


def arguments(intent: Intent, note: str) -> dict[str, Any]:
    # With the caller's key every argument must match. Without it the note is free.
    return {"ref": intent.ref, "cents": intent.cents, "note": "" if intent.key else note}


def own_key(intent: Intent) -> dict[str, str]:
    return {"idempotency_key": intent.key} if intent.key else {}


# -- what was told ------------------------------------------------------------------------------------------
def of_error(name: str, text: str) -> Told:
    if name == "Declined":
        return Told(DECLINED)
    return Told(AGAIN if name in PASSING else WRONG, detail=f"{name}: {text}")


def of_result(result: AsyncResult, patience: float) -> Told:
    deadline = time.monotonic() + patience
    pause = LOOK_EVERY[0]
    while True:
        state = result.state
        if state == "SUCCESS":
            return Told(VALUE, result.result)
        if state in ("FAILURE", "REVOKED"):
            error = result.result
            if isinstance(error, OutcomeUnknown):
                return Told(IN_DOUBT, detail=str(error))
            return of_error(type(error).__name__, str(error))
        if time.monotonic() > deadline:
            return Told(AGAIN, detail=f"no result, {state}")
        time.sleep(pause)
        pause = min(pause * 1.5, LOOK_EVERY[1])


def of_receipt(told: dict[str, Any]) -> Told:
    """Return what the caller of this receipt, given as its dictionary, received."""
    if told["status"] in ("executed", "replayed"):
        return Told(VALUE, told["result"])
    if told["status"] == "in_doubt":
        return _doubt(told)
    if told["status"] == "not_run" and told["code"] in ("", "not_sent"):
        return Told(AGAIN, detail=told["reason"])
    if told["status"] in ("failed", "not_run"):
        name, _, text = told["reason"].partition(":")
        return of_error(name, text)
    return Told(WRONG if told["status"] == "conflict" else AGAIN, detail=told["status"])


def _doubt(told: dict[str, Any]) -> Told:
    # With the code "undecided" the receipt advises to call again once, and the agent does.
    kind = AGAIN if told["code"] == "undecided" else IN_DOUBT
    return Told(kind, detail=f"{told['reason']} {told['next']}")


# -- the doors ----------------------------------------------------------------------------------------------
def delay(intent: Intent, note: str, patience: float) -> Told:
    task = shop.app.tasks[intent.task]
    return of_result(task.apply_async(kwargs=arguments(intent, note), **own_key(intent)), patience)


def send_task(intent: Intent, note: str, patience: float) -> Told:
    headers = {CALLER_KEY: intent.key} if intent.key else {}
    sent = stranger.send_task(intent.task, kwargs=arguments(intent, note), headers=headers)
    return of_result(sent, patience)


def submit(intent: Intent, note: str, patience: float) -> Told:
    receipt: Receipt = shop.app.tasks[intent.task].submit(**arguments(intent, note), **own_key(intent))
    return of_receipt(receipt.wait(patience).to_dict())


def submit_by_name(intent: Intent, note: str, patience: float) -> Told:
    receipt = celery_idem.submit(
        stranger, intent.task, kwargs=arguments(intent, note), idempotency_key=intent.key or None
    )
    return of_receipt(receipt.wait(patience).to_dict())


def chain(intent: Intent, note: str, patience: float) -> Told:
    first = shop.app.tasks[intent.task].si(**arguments(intent, note))
    sent = (first | shop.app.tasks["chaos.after"].s()).apply_async()
    told = of_result(sent, patience)
    if (
        told.kind == AGAIN and sent.parent is not None
    ):  # if the first task failed, the last one of the chain never ends
        first_told = of_result(sent.parent, 0)
        return first_told if first_told.kind != VALUE else told
    return told


@cache
def _function(task: str) -> Callable[..., dict[str, Any]]:
    return function(shop.app, task, wait=3.0)


def tool(intent: Intent, note: str, patience: float) -> Told:
    return of_receipt(_function(intent.task)(**arguments(intent, note)))


@cache
def _client() -> httpx.Client:
    # As many connections as agents (`agents.THREADS`), so that no agent waits for another.
    return httpx.Client(
        limits=httpx.Limits(max_connections=None), headers={"authorization": f"Bearer {TOKEN}"}
    )


def http(intent: Intent, note: str, patience: float) -> Told:
    url = f"{URL}/actions/tasks/{intent.task}"
    headers = {"idempotency-key": intent.key} if intent.key else {}
    reply = _client().post(url, json=arguments(intent, note), headers=headers, timeout=patience)
    told = reply.json()
    if reply.status_code == 200:
        return Told(VALUE, told["result"])
    if reply.status_code in (202, 503):
        return Told(AGAIN, detail=f"{reply.status_code}")
    kind = str(told.get("type", "")).rpartition(":")[2]
    if kind == "in_progress":
        return Told(AGAIN, detail=kind)
    if kind == "in_doubt":
        return _doubt(told)
    if kind == "failed":
        name, _, text = str(told["reason"]).partition(":")
        return of_error(name, text)
    return Told(WRONG, detail=f"{reply.status_code} {told}")


def mcp(intent: Intent, note: str, patience: float) -> Told:
    from mcp import Client
    from mcp.client.streamable_http import streamable_http_client

    async def call() -> dict[str, Any]:
        async with Client(streamable_http_client(f"{URL}/mcp")) as client:
            reply = await client.call_tool(intent.task.replace(".", "_"), arguments(intent, note))
            told = reply.structured_content
            assert isinstance(told, dict), reply
            return told

    return of_receipt(asyncio.run(asyncio.wait_for(call(), patience + 2.0)))


DOORS: dict[str, Callable[[Intent, str, float], Told]] = {
    door.__name__: door for door in (delay, send_task, submit, submit_by_name, chain, tool, http, mcp)
}
