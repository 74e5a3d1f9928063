"""A guarded task whose events go to Prometheus. The test sets PROMETHEUS_MULTIPROC_DIR."""

from __future__ import annotations

import os

from celery import Celery

from celery_idem import IdempotentTask
from celery_idem.telemetry import prometheus

url = os.environ.get("IDEM_TEST_REDIS", "redis://localhost:1/0")
app = Celery("counted", broker=url, backend=url)
if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
    prometheus.install(app)


@app.task(
    base=IdempotentTask, shared=False, name="counted.send", intent=("customer_id",), must_match=("cents",)
)
def send(customer_id: str, cents: int = 0) -> str:
    return f"sent to {customer_id}"
