"""The tasks. Each declares which arguments are the intent, and which must match."""

from __future__ import annotations

from typing import Any

from example_project import billing_client as billing
from example_project.app import BASE, app


def find_invoice(task: Any, *args: Any, **kwargs: Any) -> Any:
    """Ask billing whether this intent's invoice exists, after a worker died or no answer came."""
    # Imported here because the unguarded run does not import celery_idem.
    from celery_idem import Happened, NotHappened

    found = billing.get("/invoices", reference=task.claim.key)
    return Happened(found[0]) if found else NotHappened()


@app.task(
    base=BASE,
    bind=True,
    name="billing.send_invoice",
    intent=("customer_id", "invoice_id"),
    must_match=("cents", "currency"),
    no_effect_errors=(billing.NotReached,),
    ambiguous_errors=(billing.NoAnswer,),
    reconcile=find_invoice,
)
def send_invoice(
    self: Any, customer_id: str, invoice_id: str, cents: int, currency: str = "EUR", note: str = ""
) -> dict[str, Any]:
    """Send one invoice per customer and invoice id. `note` is free text and may change."""
    return billing.post(
        "/invoices",
        reference=self.claim.key,
        invoice_id=invoice_id,
        customer_id=customer_id,
        cents=cents,
        currency=currency,
        note=note,
    )


@app.task(
    base=BASE,
    bind=True,
    name="billing.send_reminder",
    intent=("customer_id", "invoice_id"),
    no_effect_errors=(billing.NotReached,),
    ambiguous_errors=(billing.NoAnswer,),
)
def send_reminder(self: Any, customer_id: str, invoice_id: str, text: str = "") -> dict[str, Any]:
    """Send one reminder per invoice and occurrence, such as `occurrence="second"`."""
    return billing.post(
        "/reminders", reference=self.claim.key, invoice_id=invoice_id, customer_id=customer_id, text=text
    )


@app.task(
    base=BASE,
    bind=True,
    name="billing.refund",
    intent=("customer_id", "invoice_id"),
    must_match=("cents",),
    no_effect_errors=(billing.NotReached,),
    ambiguous_errors=(billing.NoAnswer,),
)
def refund(self: Any, customer_id: str, invoice_id: str, cents: int, reason: str = "") -> dict[str, Any]:
    """Refund an invoice once."""
    return billing.post(
        "/refunds",
        reference=self.claim.key,
        invoice_id=invoice_id,
        customer_id=customer_id,
        cents=cents,
        reason=reason,
    )


@app.task(
    base=BASE,
    bind=True,
    name="billing.invoice_and_email",
    intent=("customer_id", "invoice_id"),
    must_match=("cents",),
    on_crash="resume",
)
def invoice_and_email(
    self: Any, customer_id: str, invoice_id: str, cents: int, note: str = ""
) -> dict[str, Any]:
    """Send an invoice and an e-mail. Each is a step, so an attempt after a crash continues at the first missing one."""
    invoice = self.step(
        "invoice",
        billing.post,
        "/invoices",
        reference=self.claim.downstream_key("invoice"),
        invoice_id=invoice_id,
        customer_id=customer_id,
        cents=cents,
        note=note,
    )
    letter = billing.get("/letters", invoice_id=invoice_id)  # it only reads, so it needs no step
    email = self.step(
        "email",
        billing.post,
        "/emails",
        reference=self.claim.downstream_key("email"),
        invoice_id=invoice_id,
        customer_id=customer_id,
        text=letter["text"],
    )
    return {"number": invoice["number"], "email": email["number"]}
