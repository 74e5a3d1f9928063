"""The Celery application of the soak: one task for each policy and time of acknowledgement.

=========  ==================================================================================
policy     its body
=========  ==================================================================================
reconcile  one charge; after a crash the destination is asked by reference
in_doubt   one charge; there is no reconcile function, so a person decides (Celery IDem's default)
resume     a charge and a mail as two steps; the destination can be asked about the charge only
rerun      one charge with an idempotency key, so the destination does not do it twice
retry      one charge; after "not now" the body calls `self.retry`
=========  ==================================================================================
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Celery

from celery_idem import ALL_ARGUMENTS, Happened, IdempotentTask, NotHappened
from celery_idem.core import protocol
from celery_idem.integration import submitting
from tests.chaos import destination
from tests.chaos.plan import ACKS, POLICIES, Intent, Plan

# Without these variables the module only provides its names.
FOLDER = Path(os.environ.get("CHAOS_FOLDER", "."))
BROKER = os.environ.get("CHAOS_BROKER", "memory://")
STORE = os.environ.get("CHAOS_STORE", "memory://chaos")
BACKEND = os.environ.get("CHAOS_BACKEND", "cache+memory://")
DESTINATION = int(os.environ.get("CHAOS_DESTINATION", "0"))
PLAN = Plan.from_json(os.environ["CHAOS_PLAN"]) if "CHAOS_PLAN" in os.environ else Plan(0, 0, 0)

# Seconds. Some frozen processes (plan.FROZEN) sleep longer, and a part of it passes while the store restarts.
LEASE = 2.0
# Seconds until Redis delivers an unacknowledged message again: short, so that it happens often.
VISIBILITY = 5.0

# Recovery publishes open intents after some seconds, because a run may last less than a minute.
submitting.ACCEPTED_FOR = 5.0
protocol.PUBLISHED_WAIT, protocol.JITTER = 5_000_000, 1_000_000

app = Celery("chaos", broker=BROKER, backend=BACKEND, set_as_current=False)
app.conf.update(
    idem_store=STORE,
    idem_lease=LEASE,
    task_default_queue="chaos",
    task_track_started=True,
    worker_prefetch_multiplier=2,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,  # the limit of retries is not tested here
    result_expires=3600,
    beat_scheduler="celery_idem.adapters.beat:Scheduler",
    beat_schedule={"tick": {"task": "chaos.tick", "schedule": 1.0}},
    beat_max_loop_interval=1,
    broker_transport_options={
        "visibility_timeout": VISIBILITY,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }
    if BROKER.startswith("redis")
    else {},
)


class Declined(Exception):
    """The destination refuses for good. This is an outcome and is replayed."""


class NotNow(Exception):
    """The destination did not take the request, so nothing happened."""


def intent_of(ref: str) -> Intent:
    return PLAN.intent(int(ref[1:]))


def meet_fate(ref: str, what: str) -> None:
    """Kill or freeze this process if that is planned for the intent's first execution here (see `monkey.Waker`)."""
    if not ref.startswith("i") or intent_of(ref).fate != what:
        return
    try:
        file = os.open(FOLDER / f"{what.replace(' ', '-')}-{ref}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return
    os.write(file, f"{os.getpid()}".encode())
    os.close(file)
    os.kill(os.getpid(), signal.SIGKILL if what.startswith("killed") else signal.SIGSTOP)


def effect(self: IdempotentTask, ref: str, part: str = "charge", key: str = "") -> int:
    """Send one request to the destination and return its receipt.

    Raises:
        NotNow: the destination did not take the request.
        Declined: the destination refused for good.
    """
    meet_fate(ref, "frozen before")
    told = destination.tell(
        DESTINATION,
        {
            "do": "effect",
            "ref": ref,
            "part": part,
            "fence": self.claim.fence,
            "key": key,
            "task_id": self.request.id,
            "attempt": self.claim.attempt,
            "worker": self.request.hostname,
            "body_pid": os.getpid(),
            "record": self.claim.key,
        },
    )
    meet_fate(ref, "frozen after")
    if told.get("refused") == "declined":
        raise Declined(ref)
    if "refused" in told:
        raise NotNow(f"{ref}: {told['refused']}")
    receipt: int = told["receipt"]
    return receipt


def ask(ref: str, part: str, void_below: int) -> int | None:
    """Return the receipt of the effect, or None. Requests with an older fence are void from now on."""
    told = destination.tell(DESTINATION, {"do": "ask", "ref": ref, "part": part, "void_below": void_below})
    receipt: int | None = told["receipt"]
    return receipt


def answer(ref: str, cents: int, receipts: dict[str, int]) -> dict[str, Any]:
    """Return the result that every caller receives."""
    return {"ref": ref, "cents": cents, "receipts": receipts}


def reconcile(task: IdempotentTask, ref: str, cents: int, note: str = "") -> Happened | NotHappened:
    # The claim has the fence of the execution that the question is about. Void that one too.
    receipt = ask(ref, "charge", task.claim.fence + 1)
    return NotHappened() if receipt is None else Happened(answer(ref, cents, {"charge": receipt}))


def reconcile_step(self: IdempotentTask, ref: str) -> Happened | NotHappened:
    # This execution took over and has a new fence. Void the earlier ones.
    receipt = ask(ref, "charge", self.claim.fence)
    return NotHappened() if receipt is None else Happened(receipt)


def one_charge(self: IdempotentTask, ref: str, cents: int, note: str = "") -> dict[str, Any]:
    """Charge a customer."""
    intent = intent_of(ref)
    time.sleep(intent.before)
    meet_fate(ref, "killed before")
    receipt = effect(self, ref, key=self.claim.downstream_key("charge") if intent.policy == "rerun" else "")
    meet_fate(ref, "killed after")
    time.sleep(intent.after)
    return answer(ref, cents, {"charge": receipt})


def charge_and_mail(self: IdempotentTask, ref: str, cents: int, note: str = "") -> dict[str, Any]:
    """Charge a customer, and say so in a mail."""
    intent = intent_of(ref)
    time.sleep(intent.before)
    charge = self.step(
        "charge", lambda: effect(self, ref, "charge"), reconcile=lambda: reconcile_step(self, ref)
    )
    meet_fate(ref, "killed before")
    time.sleep(intent.after)
    mail = self.step("mail", lambda: effect(self, ref, "mail"))
    meet_fate(ref, "killed after")
    return answer(ref, cents, {"charge": charge, "mail": mail})


def charge_or_retry(self: IdempotentTask, ref: str, cents: int, note: str = "") -> dict[str, Any]:
    """Charge a customer, later if need be."""
    try:
        return one_charge(self, ref, cents, note)
    except NotNow as error:
        raise self.retry(exc=error, countdown=0.3, max_retries=20) from None


BODIES = {"resume": charge_and_mail, "retry": charge_or_retry}
CRASHES: dict[str, dict[str, Any]] = {
    "reconcile": {"reconcile": reconcile},
    "retry": {"reconcile": reconcile},
    "in_doubt": {"on_crash": "in_doubt"},
    "resume": {"on_crash": "resume"},
    "rerun": {"on_crash": "rerun"},
}
for policy in POLICIES:
    for acks in ACKS:
        app.task(
            base=IdempotentTask,
            bind=True,
            name=f"chaos.{policy}.{acks}",
            intent=("ref",),
            must_match=("cents",),
            no_effect_errors=(NotNow,),
            throws=(NotNow, Declined),  # expected: no traceback in the log
            acks_late=acks == "late",
            reject_on_worker_lost=acks == "late",
            **CRASHES[policy],
        )(BODIES.get(policy, one_charge))


@app.task(base=IdempotentTask, name="chaos.after", intent=ALL_ARGUMENTS, acks_late=True, on_crash="rerun")
def after(result: dict[str, Any]) -> dict[str, Any]:
    """The second link of a chain. It returns the result of the first."""
    return result


def reconcile_tick(task: IdempotentTask) -> Happened | NotHappened:
    receipt = ask(task.claim.key, "tick", task.claim.fence + 1)
    return NotHappened() if receipt is None else Happened(receipt)


@app.task(
    base=IdempotentTask,
    bind=True,
    name="chaos.tick",
    intent=ALL_ARGUMENTS,
    acks_late=True,
    reject_on_worker_lost=True,
    no_effect_errors=(NotNow,),
    throws=(NotNow,),
    reconcile=reconcile_tick,
)
def tick(self: IdempotentTask) -> int:
    """The task that two beats send: one effect each second."""
    return effect(self, self.claim.key, "tick")
