"""A module whose task is guarded without changing its code.

In `app.py`, `task_cls` gives all tasks the guarded class, and `task_annotations` declares the intent of this one.
"""

from __future__ import annotations

from typing import Any

from celery import shared_task

from example_project import billing_client


@shared_task(name="legacy.issue_refund")
def issue_refund(order_id: str, cents: int, memo: str = "") -> dict[str, Any]:
    return billing_client.post(
        "/refunds", reference=f"order {order_id}", invoice_id=order_id, cents=cents, memo=memo
    )
