"""The application of most operator tests. IDEM_TEST_STORE is the address of its store."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from celery import Celery

from celery_idem import Happened, IdempotentTask, NotHappened, Unknown

app = Celery("shop", broker="memory://", backend="cache+memory://")
app.conf.update(idem_store=os.environ.get("IDEM_TEST_STORE", "memory://operators"), idem_result_ttl=3600)


def destination() -> dict[str, str]:
    """Read what the billing system knows from a file: the invoice id of each customer."""
    path = Path(os.environ["IDEM_TEST_DESTINATION"])
    known: dict[str, str] = json.loads(path.read_text())
    return known


def ask_billing(task: Any, customer_id: str, invoice_id: int, cents: int = 0, note: str = "") -> Any:
    known = destination()
    if customer_id == "nobody-knows":
        return Unknown("the billing system is down")
    return Happened(known[customer_id]) if customer_id in known else NotHappened()


@app.task(
    base=IdempotentTask,
    shared=False,
    name="shop.send_invoice",
    intent=("customer_id", "invoice_id"),
    must_match=("cents",),
    reconcile=ask_billing,
    result_ttl=7200,
)
def send_invoice(customer_id: str, invoice_id: int, cents: int = 0, note: str = "") -> str:
    return f"inv-{customer_id}-{invoice_id}"


@app.task(base=IdempotentTask, shared=False, name="shop.remind", intent=("customer_id",), secret=("token",))
def remind(customer_id: str, token: str = "") -> str:
    return f"reminded {customer_id} with {token}"
