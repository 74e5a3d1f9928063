"""The parts of the example project, each tested alone."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from example_project import billing_client as billing
from example_project import witness
from example_project.billing_service import make_server
from tests.support.workers import ROOT


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sqlite3.Connection]:
    """The ledger of a running billing service, which the client is configured to call."""
    server = make_server(tmp_path / "ledger.sqlite3", "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("IDEM_DEMO_BILLING", f"http://127.0.0.1:{server.server_address[1]}")
    db = sqlite3.connect(tmp_path / "ledger.sqlite3", timeout=5)
    yield db
    db.close()
    server.shutdown()
    thread.join()
    server.server_close()


def count(ledger: sqlite3.Connection) -> int:
    return int(ledger.execute("SELECT COUNT(*) FROM lines").fetchone()[0])


def test_billing_does_not_deduplicate_and_can_be_asked_by_reference(ledger: sqlite3.Connection) -> None:
    first = billing.post("/invoices", reference="r", invoice_id="i", cents=1)
    second = billing.post("/invoices", reference="r", invoice_id="i", cents=1)
    assert first != second
    assert count(ledger) == 2
    assert billing.get("/invoices", reference="r") == [first, second]
    assert billing.get("/invoices", reference="other") == []
    assert billing.get("/refunds", reference="r") == []


def test_a_dropped_connection_comes_after_the_commit_and_only_once(ledger: sqlite3.Connection) -> None:
    billing.arm("/invoices", "i", "drop")
    with pytest.raises(billing.NoAnswer):
        billing.post("/invoices", reference="r", invoice_id="i", cents=1)
    assert count(ledger) == 1
    billing.post("/invoices", reference="r", invoice_id="i", cents=1)
    assert count(ledger) == 2


def test_a_stalled_answer_is_no_answer_to_an_impatient_client(
    ledger: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(billing, "TIMEOUT", 0.2)
    billing.arm("/invoices", "i", "stall", 2)
    with pytest.raises(billing.NoAnswer):
        billing.post("/invoices", reference="r", invoice_id="i", cents=1)
    assert count(ledger) == 1


def test_refused_and_not_reached_leave_nothing_in_the_ledger(
    ledger: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(billing.Refused, match="404"):
        billing.post("/nothing", reference="r", invoice_id="i")
    with pytest.raises(billing.Refused, match="400"):
        billing.arm("/invoices", "i", "explode")
    # Port 1 of loopback is privileged, and nothing listens on it here.
    monkeypatch.setenv("IDEM_DEMO_BILLING", "http://127.0.0.1:1")
    with pytest.raises(billing.NotReached):
        billing.post("/invoices", reference="r", invoice_id="i")
    assert count(ledger) == 0


# Run in a separate process: the agent's module makes an app, and the environment decides if it is guarded.
AGENT_PLANS = """
import json, random
from example_project.agent import plan
goal = {"customer_id": "acme", "invoice_id": "i", "cents": 5}
dice = random.Random("7")
print(json.dumps([plan(goal, dice) for _ in range(50)]))
"""


def test_the_agent_says_the_same_in_many_ways_and_always_the_same_ways() -> None:
    def plans() -> list[tuple[list[object], dict[str, object]]]:
        out = subprocess.run(
            [sys.executable, "-c", AGENT_PLANS],
            env={"PYTHONPATH": str(ROOT), "IDEM_DEMO_GUARD": "0"},
            capture_output=True,
            check=True,
            timeout=60,
        )
        result: list[tuple[list[object], dict[str, object]]] = json.loads(out.stdout)
        return result

    def send_invoice(
        customer_id: str, invoice_id: str, cents: int, currency: str = "EUR", note: str = ""
    ) -> tuple[object, ...]:
        return customer_id, invoice_id, cents, currency

    first = plans()
    assert first == plans()
    assert {send_invoice(*args, **kwargs) for args, kwargs in first} == {("acme", "i", 5, "EUR")}  # type: ignore[arg-type]
    assert len({json.dumps(plan) for plan in first}) > 20
    assert {"currency" in kwargs for _, kwargs in first} == {True, False}
    assert {len(args) for args, _ in first} == {0, 1, 2, 3}


def test_the_guard_switched_off_imports_nothing_of_celery_idem() -> None:
    code = "import sys, example_project.tasks, example_project.legacy; sys.exit('celery_idem' in sys.modules)"
    env = {"PYTHONPATH": str(ROOT), "IDEM_DEMO_GUARD": "0"}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60).returncode == 0


def test_the_untouched_task_is_guarded_by_configuration_alone() -> None:
    code = (
        "from example_project.app import app; app.loader.import_default_modules(); app.finalize()\n"
        "task = app.tasks['legacy.issue_refund']\n"
        "assert task.intent_key('o-1', 5) == task.intent_key(memo='x', cents=5, order_id='o-1')"
    )
    env = {"PYTHONPATH": str(ROOT), "IDEM_DEMO_GUARD": "1"}
    subprocess.run([sys.executable, "-c", code], env=env, timeout=60, check=True)


def test_the_witness_tells_deliveries_that_acted_from_those_that_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "witness.jsonl"
    assert list(witness.read(journal)) == []
    monkeypatch.setenv("IDEM_DEMO_WITNESS", str(journal))
    task = type("T", (), {"name": "t"})
    for acts in (True, False):
        witness._start(task_id="1", task=task, args=["acme", "i"], kwargs={})
        witness.note("call", method="GET", path="/letters", invoice_id="i")
        if acts:
            witness.note("call", method="POST", path="/invoices", invoice_id="i")
        witness._end(retval=None, state="SUCCESS")
    witness._start(task_id="2", task=task, args=[], kwargs={"order_id": "j"})
    with journal.open("a") as file:
        file.write('{"event": "half a li')
    assert witness.deliveries(journal) == [
        witness.Delivery("1", "i", "SUCCESS", None, ["/invoices"]),
        witness.Delivery("1", "i", "SUCCESS", None, []),
        witness.Delivery("2", "j", None, None, []),
    ]
