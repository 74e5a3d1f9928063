"""The faults of the demo. Each function injects one and checks that it took place.

A fault that did not take place proves nothing, so `DidNotHappen` fails the demo. Invoice ids begin with the fault's
tag, which tells the lines and deliveries of faults apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from example_project.callers import Call, Caller, Heard
from example_project.stage import Stage

Say = Callable[[str], None]
# Kind and invoice id, as in the billing ledger, and the intended number of lines.
Meant = dict[tuple[str, str], int]

# Seconds; longer than the agent's patience of 1.5, shorter than the visibility timeout of 3.
AGENT_STALL = 2.5
# Seconds; the redelivery comes 3 to 5 s after the first, and must find it still running.
VISIBILITY_STALL = 6.5
# Seconds that a worker child is held for its kill: an upper bound, below the client's time limit of 10, so that a
# missed kill does not look like a timeout.
HELD = 9.0


class DidNotHappen(Exception):
    """The fault did not take place."""


@dataclass(frozen=True)
class Fault:
    tag: str
    title: str
    intents: int
    meant: Meant
    run: Callable[[Stage, Say], None]
    needs_redis_broker: bool = False
    ends: str = "done"  # every caller's outcome with the guard; see `orchestrator.Answer`


def lost_response(stage: Stage, say: Say) -> None:
    """Billing commits, then drops the connection or answers too late for the agent, which plans again."""
    goals = [{"customer_id": "acme", "invoice_id": f"lost-{n}", "cents": 4200 + n} for n in range(4)]
    for goal in goals[:2]:
        stage.arm("/invoices", str(goal["invoice_id"]), "drop")
    for goal in goals[2:]:
        stage.arm("/invoices", str(goal["invoice_id"]), "stall", AGENT_STALL)
    # Show one transcript of each kind.
    _pursue(stage, stage.start_agent("7"), goals, say, shown=(0, 2))
    for goal in goals[2:]:
        if len(stage.deliveries(str(goal["invoice_id"]))) < 2:
            raise DidNotHappen(f"the agent of {goal['invoice_id']} did not try again")


def _pursue(
    stage: Stage, agent: Caller, goals: list[dict[str, Any]], say: Say, shown: tuple[int, ...]
) -> None:
    """Let the agent pursue its goals to the end, and record its answers and numbers of calls."""
    agent.tell(goals)
    ended = 0
    while ended < len(goals):
        said = agent.hear()
        if "outcome" in said:
            ended += 1
            call = Call("billing.send_invoice", goals[said["goal"]])
            stage.heard.append(Heard(call, said["outcome"], said["answer"], said["calls"]))
        elif said["goal"] in shown:
            say(f"agent {said['goal']} {said['says']}")


def mcp_timeout(stage: Stage, say: Say) -> None:
    """An agent's MCP client gives up before the tool has answered; the agent rewords its call."""
    goals = [{"customer_id": "gust", "invoice_id": f"mcp-{n}", "cents": 800 + n} for n in range(2)]
    for goal in goals:
        stage.arm("/invoices", str(goal["invoice_id"]), "stall", AGENT_STALL)
    _pursue(stage, stage.start_agent("7", "mcp_agent"), goals, say, shown=(0,))
    # Deliveries do not show it: with the guard, a repeated call does not reach the broker.
    for heard in stage.heard[-len(goals) :]:
        if heard.calls < 2:
            raise DidNotHappen(f"the agent of {heard.call.invoice_id} did not try again")


def two_orchestrators(stage: Stage, say: Say) -> None:
    """Two orchestrators dispatch the same six intents in the same moment."""
    invoices = [
        Call("billing.send_invoice", {"customer_id": "bolt", "invoice_id": f"twice-{n}", "cents": 100 + n})
        for n in range(4)
    ]
    refunds = [
        Call("billing.refund", {"customer_id": "bolt", "invoice_id": f"twice-{n}", "cents": 50 + n})
        for n in range(2)
    ]
    stage.hear(stage.ask(invoices + refunds, by=2))


def still_running(stage: Stage, say: Say) -> None:
    """Redis redelivers an unacknowledged message while the first worker still waits for its answer."""
    calls = [
        Call("billing.send_invoice", {"customer_id": "crane", "invoice_id": f"slow-{n}", "cents": 900})
        for n in range(2)
    ]
    for call in calls:
        stage.arm("/invoices", call.invoice_id, "stall", VISIBILITY_STALL)
    stage.hear(stage.ask(calls))
    for call in calls:
        if len(stage.deliveries(call.invoice_id)) < 2:
            raise DidNotHappen(f"the broker did not redeliver {call.invoice_id}")


def killed_after_effect(stage: Stage, say: Say) -> None:
    """A worker child is killed after billing has committed and before the task has returned."""
    calls = [
        Call("billing.send_invoice", {"customer_id": "dune", "invoice_id": f"killed-{n}", "cents": 700})
        for n in range(2)
    ]
    _ask_and_kill(stage, calls, "/invoices")


def _ask_and_kill(stage: Stage, calls: list[Call], path: str) -> None:
    """Hold each call's worker child in its request to `path`, kill it there, and wait for the caller's answer."""
    for call in calls:
        stage.arm(path, call.invoice_id, "stall", HELD)
    asked = stage.ask(calls)
    for call in calls:
        stage.kill_child(path, call.invoice_id)
    stage.hear(asked)


def killed_and_nobody_to_ask(stage: Stage, say: Say) -> None:
    """A worker child is killed as above, in a task without `reconcile`. The callers must receive "in doubt"."""
    calls = [
        Call("billing.send_reminder", {"customer_id": "dune", "invoice_id": f"doubt-{n}"}, "first")
        for n in range(2)
    ]
    _ask_and_kill(stage, calls, "/reminders")


def meant_twice(stage: Stage, say: Say) -> None:
    """The first and the second reminder for the same invoice are two actions; each is dispatched twice."""
    calls = [
        Call("billing.send_reminder", {"customer_id": "echo", "invoice_id": f"remind-{n}"}, occurrence)
        for n in range(2)
        for occurrence in ("first", "second")
    ]
    stage.hear(stage.ask(calls, by=2))


def killed_between_steps(stage: Stage, say: Say) -> None:
    """A task with two effects is killed after its invoice and before its e-mail."""
    calls = [
        Call("billing.invoice_and_email", {"customer_id": "fern", "invoice_id": f"steps-{n}", "cents": 300})
        for n in range(2)
    ]
    _ask_and_kill(stage, calls, "/letters")


def untouched_task(stage: Stage, say: Say) -> None:
    """A task that is guarded by configuration only, dispatched by two orchestrators."""
    calls = [Call("legacy.issue_refund", {"order_id": f"legacy-{n}", "cents": 1500}) for n in range(2)]
    stage.hear(stage.ask(calls, by=2))


def _each(tag: str, kind: str, intents: int, times: int = 1) -> Meant:
    return {(kind, f"{tag}-{n}"): times for n in range(intents)}


FAULTS = [
    Fault("lost", "agent retries a lost reply", 4, _each("lost", "invoice", 4), lost_response),
    Fault(
        "twice",
        "two orchestrators at once",
        6,
        _each("twice", "invoice", 4) | _each("twice", "refund", 2),
        two_orchestrators,
    ),
    Fault(
        "slow",
        "redelivered while running",
        2,
        _each("slow", "invoice", 2),
        still_running,
        needs_redis_broker=True,
    ),
    Fault("killed", "worker killed after effect", 2, _each("killed", "invoice", 2), killed_after_effect),
    Fault(
        "doubt",
        "same, billing is not asked",
        2,
        _each("doubt", "reminder", 2),
        killed_and_nobody_to_ask,
        ends="in_doubt",
    ),
    Fault("remind", "reminder meant twice", 4, _each("remind", "reminder", 2, times=2), meant_twice),
    Fault(
        "steps",
        "killed between two steps",
        2,
        _each("steps", "invoice", 2) | _each("steps", "email", 2),
        killed_between_steps,
    ),
    Fault("legacy", "untouched task, by config", 2, _each("legacy", "refund", 2), untouched_task),
    Fault("mcp", "MCP client loses patience", 2, _each("mcp", "invoice", 2), mcp_timeout),
]
