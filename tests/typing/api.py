"""The public names as a type checker sees them. Checked by mypy in `make check`, never run.

A line with `type: ignore` must be an error: mypy reports an ignore that is not needed.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from typing_extensions import assert_type

import celery_idem
from celery_idem import ALL_ARGUMENTS, Happened, IdempotentTask, Ledger, NotHappened, Receipt, Unknown

app = Celery("typing")


@celery_idem.idempotent_task(app, intent=("customer_id", "invoice_id"), must_match=("cents",), lease=10)
def send_invoice(customer_id: str, invoice_id: str, cents: int, note: str = "") -> dict[str, int]:
    return {"cents": cents}


@celery_idem.idempotent_task(app, bind=True, intent=ALL_ARGUMENTS, on_crash="resume")
def charge(self: IdempotentTask, cents: int) -> str:
    assert_type(self.claim.key, str)
    assert_type(self.claim.fence, int)
    assert_type(self.claim.lost, bool)
    assert_type(self.claim.downstream_key("charge"), str)
    return str(self.step("charge", len, "x"))


def reconcile(task: Any, cents: int) -> Happened | NotHappened | Unknown:
    return Happened({"cents": cents})


assert_type(send_invoice("acme", "7", 4200), dict[str, int])
assert_type(send_invoice("acme", "7", cents=4200, note="please"), dict[str, int])
assert_type(charge(5), str)
send_invoice.delay("acme", "7", 4200)
charge.delay(cents=5)
charge.si(5)

send_invoice("acme", "7")  # type: ignore[call-arg]
send_invoice("acme", "7", "4200")  # type: ignore[arg-type]
send_invoice.delay("acme", "7", note=4)  # type: ignore[call-arg, arg-type]
charge.delay("5")  # type: ignore[arg-type]
charge.delay(5, self=charge)  # type: ignore[call-arg]
celery_idem.idempotent_task(app)  # type: ignore[call-overload]

assert_type(send_invoice.intent_key("acme", "7", 4200, scope="eu"), str)
receipt = send_invoice.submit("acme", "7", 4200, occurrence="2026-11")
assert_type(receipt, Receipt)
assert_type(celery_idem.submit(app, "shop.send_invoice", kwargs={"cents": 1}, scope="eu"), Receipt)
assert_type(receipt.wait(5), Receipt)
assert_type(receipt.wait(timeout=5).to_dict(), dict[str, Any])


async def awaits() -> None:
    receipt = await send_invoice.asubmit("acme", "7", 4200, occurrence="2026-11", queue="bills")
    assert_type(receipt, Receipt)
    assert_type(await receipt.async_wait(timeout=5), Receipt)
    assert_type(
        await celery_idem.asubmit(app, "shop.send_invoice", ("acme",), {"cents": 1}, scope="eu"), Receipt
    )
    send_invoice.asubmit("acme", "7", 4200).wait(5)  # type: ignore[attr-defined]
    await send_invoice.asubmit("acme", "7", 4200, scope=4)  # type: ignore[arg-type]
    await celery_idem.asubmit(app)  # type: ignore[call-arg]


assert_type(receipt.differs, tuple[str, ...])
assert_type(receipt.retry_after, float | None)
receipt.status = "failed"  # type: ignore[misc]
finished = receipt.status == "finished"  # type: ignore[comparison-overlap]

ledger = Ledger.from_app(app)
for entry in ledger.list(state="in_doubt"):
    ledger.resolve(entry.key, NotHappened(), by="ada", evidence="no such invoice")
