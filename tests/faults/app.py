"""The application of the fault tests: one task per policy. The arguments of a call name a crash point.

The body itself crashes at a point inside the body. A `CrashingStore` crashes at a point around a write of
the record. An intent crashes only once, so that the test sees what follows the crash.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from celery import Celery
from celery.signals import task_prerun

from celery_idem import Happened, IdempotentTask, LeaseLost, NotHappened, Unknown
from celery_idem.core import protocol
from celery_idem.stores import open_store
from celery_idem.testing import CrashingStore, use_store
from tests.support.effects import Effects, Gate

# The tests import this module without the environment, for its names and to compute keys.
FOLDER = Path(os.environ.get("FAULTS_FOLDER", "."))
STORE_URL = os.environ.get("FAULTS_STORE", "memory://faults")
BROKER = os.environ.get("FAULTS_BROKER", "memory://")

EFFECTS = Effects(FOLDER / "effects.jsonl")
STORE = CrashingStore(open_store(STORE_URL))
use_store(STORE_URL, STORE)

if "FAULTS_PUBLISHED_WAIT" in os.environ:  # microseconds; the default is too long for a test
    protocol.PUBLISHED_WAIT, protocol.JITTER = int(os.environ["FAULTS_PUBLISHED_WAIT"]), 1 << 16
protocol.ELSEWHERE = int(os.environ.get("FAULTS_ELSEWHERE", protocol.ELSEWHERE))

LEASE = 60.0  # seconds

POLICIES = ("in_doubt", "resume", "rerun", "reconcile")

# When a message is acknowledged: the choices that Celery offers.
ACKS = {
    "early": {"acks_late": False},
    "late": {"acks_late": True},
    "late+reject": {"acks_late": True, "reject_on_worker_lost": True},
}

# A crash around a write of the record, and where in the store it happens. The claim is the create. The
# outcome is the last replace; a body with a step replaces the record twice before it.
AROUND = {
    "before claim": "before create",
    "after claim": "after create",
    "before settle": "before replace",
    "after settle": "after replace",
}
STEP_WRITES = 2

app = Celery("faults", broker=BROKER, backend=os.environ.get("FAULTS_BACKEND"), set_as_current=False)
app.conf.update(
    idem_store=STORE_URL,
    idem_lease=float(os.environ.get("FAULTS_LEASE", LEASE)),
    idem_recover=os.environ.get("FAULTS_RECOVER", "1") == "1",
    idem_reconcile_timeout=float(os.environ.get("FAULTS_ASK", "10")),
    idem_settle_patience=float(os.environ.get("FAULTS_PATIENCE", "30")),
    task_default_queue=os.environ.get("FAULTS_QUEUE", "faults"),
    task_track_started=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_transport_options={
        "visibility_timeout": float(os.environ.get("FAULTS_VISIBILITY", "3600")),
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }
    if BROKER.startswith("redis")
    else {},
)


def first(intent: str, what: str) -> bool:
    """Return True for the first call with these arguments, in whichever process."""
    try:
        os.close(os.open(FOLDER / f"{what}-{intent}".replace(" ", "-"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def gate(intent: str) -> Gate:
    return Gate(FOLDER / f"gate-{intent}")


def crash(intent: str, how: str) -> None:
    """Crash this process.

    `how` is "kill", "exit", "soft" (what a soft time limit does), or "hang" until the intent's gate opens.
    """
    if how == "kill":
        (FOLDER / f"died-{intent}").write_text(f"{os.getpid()} {time.time()}")
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exit":
        raise SystemExit(1)
    elif how == "soft":
        os.kill(os.getpid(), signal.SIGUSR1)
    else:
        assert how == "hang", how
        (FOLDER / f"hangs-{intent}").write_text(str(os.getpid()))
        gate(intent).wait(120)


@task_prerun.connect
def set_crash(kwargs: dict[str, str], **_: object) -> None:
    """Prepare a crash around a write of the record, just before Celery calls the task."""
    point, how = kwargs.get("at", ""), kwargs.get("how", "")
    STORE.heal()
    if point in AROUND and first(kwargs["intent"], "crash"):
        intent = kwargs["intent"]
        steps = STEP_WRITES if kwargs["policy"] == "resume" and "settle" in point else 0
        STORE.crash(AROUND[point], lambda: crash(intent, how), skip=steps)


def effect(self: IdempotentTask, intent: str, at: str, how: str) -> str:
    crashes = at in ("before effect", "after effect", "asked") and first(intent, "crash")
    if crashes and at != "after effect":
        crash(intent, how)
        if self.claim.lost:  # as an author checks before an effect that begins after a long time
            raise LeaseLost("another worker may have taken over", self.claim.key)
    EFFECTS.add(intent)
    if crashes and at == "after effect":
        crash(intent, how)
    return f"done: {intent}"


def ask(
    _task: object, intent: str, at: str = "", how: str = "", **_: object
) -> Happened | NotHappened | Unknown:
    """Reconcile: report what the destination knows."""
    if at == "asked" and first(intent, "ask"):  # the body has crashed; now the question crashes as well
        crash(intent, how)
    return Happened(f"done: {intent}") if EFFECTS.count(intent) else NotHappened()


def body(self: IdempotentTask, intent: str, policy: str, at: str = "", how: str = "") -> str:
    if policy == "resume":
        done: str = self.step("effect", effect, self, intent, at, how)
        return done
    return effect(self, intent, at, how)


for policy in POLICIES:
    for acks, options in ACKS.items():
        crashes = {"reconcile": ask} if policy == "reconcile" else {"on_crash": policy}
        app.task(
            base=IdempotentTask, bind=True, name=f"{policy}.{acks}", intent=("intent",), **crashes, **options
        )(body)


@app.task(base=IdempotentTask, bind=True, name="retried.early", intent=("intent",))
def retried(self: IdempotentTask, intent: str, policy: str, at: str = "", how: str = "") -> str:
    if first(intent, "retry"):
        raise self.retry(countdown=5)
    return effect(self, intent, at, how)


@app.task(
    base=IdempotentTask,
    bind=True,
    name="ambiguous.early",
    intent=("intent",),
    ambiguous_errors=(ConnectionError,),
)
def ambiguous(self: IdempotentTask, intent: str, policy: str, at: str = "", how: str = "") -> None:
    effect(self, intent, at, how)
    raise ConnectionError("the destination did not answer")


# Recovery publishes this task once, then gives it up.
app.task(
    base=IdempotentTask, bind=True, name="untaken.early", intent=("intent",), max_attempts=1, reconcile=ask
)(body)

# Recovery does not publish this task.
app.task(
    base=IdempotentTask, bind=True, name="stays.early", intent=("intent",), recover=False, reconcile=ask
)(body)
