"""An application with faults that `doctor` finds without a store.

The retries of some tasks are too many to be counted one by one.
"""

from __future__ import annotations

import os
from typing import NoReturn

from celery import Celery

from celery_idem import IdempotentTask

url = os.environ.get("IDEM_TEST_REDIS", "redis://localhost:1/0")
app = Celery("wrong", broker=[url, url], backend=url)
app.conf.result_backend_transport_options = {"global_keyprefix": "staging:"}
if "IDEM_TEST_STORE" in os.environ:
    app.conf.idem_store = os.environ["IDEM_TEST_STORE"]


@app.task(base=IdempotentTask, shared=False, name="wrong.send", intent=("customer_id", "request_id"))
def send(customer_id: str, request_id: str) -> None: ...


@app.task(shared=False, name="wrong.endless", max_retries=float("inf"), retry_backoff=True)
def endless() -> None: ...


@app.task(shared=False, name="wrong.patient", max_retries=10**9, retry_backoff=True)
def patient() -> None: ...


class _Odd:
    def __get__(self, *_: object) -> NoReturn:
        raise LookupError("no such tenant")


@app.task(shared=False, name="wrong.odd", default_retry_delay=_Odd())
def odd() -> None: ...
