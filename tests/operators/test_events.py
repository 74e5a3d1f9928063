"""Every documented kind of event is emitted with its documented fields, and no other kind is emitted."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import re
import subprocess
import sys
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from billiard.exceptions import WorkerLostError
from celery import Celery
from celery.exceptions import Reject

from celery_idem import (
    Happened,
    IdempotencyError,
    IdempotentTask,
    LeaseLost,
    Ledger,
    NotHappened,
    OutcomeUnknown,
    StoreError,
)
from celery_idem.core import protocol
from celery_idem.core.errors import FingerprintMismatch
from celery_idem.core.model import Fingerprint, Raised, Request
from celery_idem.core.signatures import parsed
from celery_idem.engine import events, owners
from celery_idem.engine import lease as leases
from celery_idem.engine.claim import Hold
from celery_idem.integration import delivery, messages, recovering
from celery_idem.integration.deaths import IdempotentRequest
from tests.celery.test_going_back import NOWHERE, delivered, make, taken
from tests.celery.test_going_back import run as run_delivery
from tests.operators.intents import claimed
from tests.stores.test_settle_in import Shop
from tests.support.jobs import KEY, Bench, Ended, FakeJob, Left

ROOT = Path(__file__).parents[2]


class Stage:
    """What the functions below use to provoke an event: a runner without Celery, a folder, a monkeypatch."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bench = Bench()
        self.tmp_path = tmp_path
        self.monkeypatch = monkeypatch
        self.run = self.bench.run
        self.store = self.bench.store
        self.ledger = self.bench.ledger

    def ends(self, kind: Raised) -> None:
        with contextlib.suppress(Ended, OutcomeUnknown):
            self.run(Ended(kind))

    def dead_owner(self) -> int:
        """Start a child process that ends, and return its id. The next claims of this process are the child's."""
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait(60)
        minted = owners.prefix(child.pid) + os.urandom(5)
        self.monkeypatch.setattr(owners, "mint", lambda: minted)
        return child.pid


def replayed(stage: Stage) -> None:
    stage.run()
    stage.run()


def told(stage: Stage) -> None:
    task = guarded()
    task.apply(("a",))
    assert task.submit("a").status == "replayed"


def in_a_span(provoke: Callable[[Stage], None]) -> Callable[[Stage], None]:
    def provoked(stage: Stage) -> None:
        with stage.monkeypatch.context() as patched:
            patched.setattr(events, "spans", [lambda: bytes(range(25))])
            provoke(stage)

    return provoked


def guarded(**options: Any) -> Any:
    app = Celery("provoked", set_as_current=False, broker="memory://", backend="cache+memory://")
    app.conf.update(idem_store=f"memory://{uuid.uuid4().hex}")

    @app.task(base=IdempotentTask, shared=False, name="shop.pay", intent=("what",), **options)
    def pay(what: Any) -> None: ...

    return pay


def waiting(stage: Stage) -> None:
    def meanwhile(hold: Hold) -> str:
        with pytest.raises(Left):
            stage.run(task_id="two")
        return "done"

    stage.run(meanwhile)


def mismatch(stage: Stage) -> None:
    stage.run(must_match=b"5")
    with pytest.raises(FingerprintMismatch):
        stage.run(must_match=b"6")


def asked(stage: Stage) -> None:
    stage.run(Ended(Raised.AMBIGUOUS), ask=Happened("it did"))


def still_in_doubt(stage: Stage) -> None:
    stage.ends(Raised.AMBIGUOUS)
    with pytest.raises(OutcomeUnknown):
        stage.run(task_id="two")


def released_after_a_question(stage: Stage) -> None:
    stage.ends(Raised.AMBIGUOUS)
    stage.bench.runner.inquire(FakeJob(ask=NotHappened()))


def taken_over(stage: Stage) -> None:
    """Another execution takes over. The renewal notices it, and settling notices it as well."""

    def body(hold: Hold) -> str:
        stage.bench.lapse()
        stage.run("the second", task_id="two", on_crash="rerun")
        hold.renew()
        return "the first"

    with pytest.raises(LeaseLost):
        stage.run(body, on_crash="rerun")


def clock_ahead(stage: Stage) -> None:
    def body(hold: Hold) -> str:
        stage.bench.clock.advance(3600)
        leases.Renewals().renew(stage.store, [hold])
        return "done"

    stage.run(body)


def clock_back(stage: Stage) -> None:
    def body(hold: Hold) -> str:
        stage.bench.clock.advance(-3600)
        with pytest.raises(Left):
            stage.run(task_id="two")
        return "done"

    stage.run(body)


def clock_back_for_an_operator(stage: Stage) -> None:
    claimed(stage.ledger, KEY)
    stage.bench.clock.advance(-3600)
    with pytest.raises(IdempotencyError, match="went back"):
        stage.ledger.resolve(KEY, NotHappened(), by="jo")


def store_away_before(stage: Stage) -> None:
    stage.store.crash("before create")
    with pytest.raises(StoreError):
        stage.run(on_store_error="raise")


def store_away_meanwhile(stage: Stage) -> None:
    def body(hold: Hold) -> str:
        stage.store.crash("before replace_many")
        leases._Keeper(weakref.ref(stage.store))._renew([hold])
        return "done"

    stage.run(body)


def store_away_after(stage: Stage) -> None:
    stage.store.crash("before replace")
    stage.run(patience=5.0)


def unguarded(stage: Stage) -> None:
    stage.store.crash("before create", times=99)
    stage.run(on_store_error="run")


def unsettled(stage: Stage) -> None:
    stage.store.crash("before replace", times=99)
    stage.run()


def broker_away(stage: Stage) -> None:
    stage.monkeypatch.setattr(delivery, "BROKER_PATIENCE", 0.0)
    app = make(NOWHERE, task_acks_late=True)
    job = delivered(app)
    claimed(Ledger.from_app(app), job.key)
    with pytest.raises(Reject):
        run_delivery(job)


def late_error(stage: Stage) -> None:
    shop = Shop(f"sqlite:///{stage.tmp_path}/shop.db")

    def fail(point: str) -> None:
        if point == "committed":
            raise ValueError(point)

    shop.at = fail
    assert shop.call() == {"invoice": "anna"}


def died(stage: Stage) -> None:
    app = make(task_acks_late=True, task_reject_on_worker_lost=True)
    task = app.tasks["shop.pay"]
    task.delay("a")
    pid = stage.dead_owner()
    claimed(Ledger.from_app(app), task.intent_key("a"))
    request = IdempotentRequest(taken(app), app=app, task=task)
    request.worker_pid = pid
    assert request._decide(WorkerLostError()) is False


def lapsed(stage: Stage) -> None:
    with stage.monkeypatch.context() as patched:
        other = Stage(stage.tmp_path, patched)
        other.dead_owner()
        claimed(stage.ledger, KEY)
    with pytest.raises(OutcomeUnknown):
        stage.run(task_id="two")


def recovered(stage: Stage) -> None:
    task = guarded()
    accepted = task.submit("a")
    task.guard.ledger.sent(accepted.key, task.guard.ledger.get(accepted.key).record.owner, 0)
    (found,) = recovering.recover(task.app)
    assert found.published


def given_up_by_recovery(stage: Stage) -> None:
    stage.monkeypatch.setattr(protocol, "GRACE", 0)
    stage.monkeypatch.setattr(protocol, "PUBLISHED_WAIT", 0)
    stage.monkeypatch.setattr(protocol, "JITTER", 1)
    app = make()
    task = app.tasks["shop.pay"]
    call = messages.of_submission(task, task.intent_key("a"), ("a",), {}, "one", {}, {})
    ledger, policy = Ledger.from_app(app), task.guard.options.policy
    request = Request(owners.mint(), "one", Fingerprint(), policy._replace(lease=0), call=call)
    ledger.claim(task.intent_key("a"), request)
    for _ in range(policy.max_attempts + 1):
        list(recovering.recover(app))


def resolved(stage: Stage) -> None:
    stage.ends(Raised.AMBIGUOUS)
    stage.ledger.resolve(KEY, NotHappened(), by="jo")


def forgotten(stage: Stage) -> None:
    stage.run()
    assert stage.ledger.forget(KEY, by="jo")


def shadow(stage: Stage) -> None:
    task = guarded(shadow=True)
    for _ in range(2):
        task.apply(("a",))
    task.apply((object(),))  # has no key


PROVOKED: dict[str, list[Callable[[Stage], None]]] = {
    "settled": [lambda stage: stage.run()],
    "replayed": [replayed, in_a_span(replayed)],
    "told": [told, in_a_span(told)],
    "waiting": [waiting],
    "scheduled": [lambda stage: stage.ends(Raised.RETRY)],
    "released": [lambda stage: stage.ends(Raised.IGNORE), released_after_a_question],
    "mismatch": [mismatch],
    "in_doubt": [lambda stage: stage.ends(Raised.AMBIGUOUS), given_up_by_recovery],
    "still_in_doubt": [still_in_doubt],
    "asked": [asked],
    "lease_lost": [taken_over],
    "clock_stepped": [clock_ahead, clock_back, clock_back_for_an_operator],
    "stale_settle": [taken_over],
    "store_error": [store_away_before, store_away_meanwhile, store_away_after],
    "broker_error": [broker_away],
    "unguarded": [unguarded],
    "unsettled": [unsettled],
    "late_error": [late_error],
    "exited": [lambda stage: stage.ends(Raised.EXIT)],
    "died": [died],
    "lapsed": [lapsed],
    "recovered": [recovered],
    "resolved": [resolved],
    "forgotten": [forgotten],
    "shadow": [shadow],
}


def test_every_documented_kind_is_provoked_here() -> None:
    assert set(PROVOKED) == set(events.KINDS)


@pytest.mark.parametrize("kind", PROVOKED)
def test_what_is_emitted_is_as_documented(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[events.Event] = []
    stop = events.listen(heard.append, here=True)
    try:
        with caplog.at_level(logging.DEBUG, "celery_idem"):
            for provoke in PROVOKED[kind]:
                before = len(heard)
                provoke(Stage(tmp_path, monkeypatch))
                assert kind in [event.kind for event in heard[before:]], provoke
    finally:
        stop()
    for event in heard:
        said = events.KINDS[event.kind]
        assert set(said.fields) <= set(event.details) <= {*said.fields, *said.optional}, event
        for name, value in event.details.items():
            assert type(value) is {**said.fields, **said.optional}[name], (event, name)
        assert event.task, "the key names its task"
    optional = {name for event in heard if event.kind == kind for name in event.details}
    assert optional == {*events.KINDS[kind].fields, *events.KINDS[kind].optional}
    logged = [record for record in caplog.records if vars(record).get("idem_event") == kind]
    said = events.KINDS[kind]
    assert {(record.levelno, record.msg) for record in logged} == {
        (said.level, f"{kind} %s: {said.says} [%s]")
    }
    for record in logged:  # the text and the fields name the intent, the task and the process
        line, data = record.getMessage(), vars(record)
        assert data["idem_key"] in line
        assert f"host={data['idem_host']} pid={os.getpid()}]" in line
        assert data["idem_task_id"] == data["idem_details"].get("task_id", "")
    assert [vars(record)["idem_details"] for record in logged] == [
        event.details for event in heard if event.kind == kind
    ]


# --- the source code and the documentation ----------------------------------------------------


def calls(function: str) -> list[ast.Call]:
    """Return the calls of ``events.<function>`` in the package."""
    return [
        node
        for path in (ROOT / "celery_idem").rglob("*.py")
        for node in ast.walk(parsed(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"events.{function}"
    ]


def test_every_call_says_a_documented_kind_and_its_fields() -> None:
    """Checked in the source, because no test reaches some of the branches."""
    found = set()
    for call in calls("emit"):
        kind = ast.literal_eval(call.args[0])
        said = events.KINDS[kind]
        given = {keyword.arg for keyword in call.keywords if keyword.arg} - {"cause", "repeats"}
        assert set(said.fields) <= given <= {*said.fields, *said.optional}, ast.unparse(call)
        found.add(kind)
    assert found == set(events.KINDS)


def test_nothing_else_writes_to_a_log() -> None:
    """The command line is an exception: it switches logging off while it prints."""
    for path in (ROOT / "celery_idem").rglob("*.py"):
        text = path.read_text()
        if path.name != "events.py" and "cli" not in path.parts:
            assert not re.search(
                r"getLogger|events\._|logging\.(debug|info|warning|error|exception)\(", text
            ), path
    assert calls("diagnose")


def test_a_diagnostic_is_no_event(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[events.Event] = []
    stop = events.listen(heard.append, here=True)
    try:
        with caplog.at_level(logging.DEBUG, "celery_idem"):
            events.diagnose(logging.WARNING, "%s did not work", "it", error=ValueError("why"))
    finally:
        stop()
    (record,) = caplog.records
    assert heard == []
    assert (record.name, record.getMessage()) == ("celery_idem.diagnostics", "celery_idem: it did not work")
    assert "ValueError: why" in caplog.text
    assert not hasattr(record, "idem_event")


def test_the_page_names_the_fields() -> None:
    page = (ROOT / "docs" / "reference" / "events.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    said = {row[0].strip(" `"): re.findall(r"`(\w+)`(\?)?", row[2]) for row in rows}
    assert said == {
        kind: [(name, "") for name in one.fields] + [(name, "?") for name in one.optional]
        for kind, one in events.KINDS.items()
    }
