"""An application with two faults that need no store to be seen."""

from __future__ import annotations

import os

from celery import Celery

from celery_idem import IdempotentTask

url = os.environ.get("IDEM_TEST_REDIS", "redis://localhost:1/0")
app = Celery("wrong", broker=url, backend=url)


@app.task(base=IdempotentTask, shared=False, name="wrong.send", intent=("customer_id", "request_id"))
def send(customer_id: str, request_id: str) -> None: ...
