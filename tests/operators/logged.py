"""An application with default settings that logs at INFO. Events for Sentry are written to a file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import after_setup_logger

from celery_idem import IdempotentTask

url = os.environ.get("IDEM_TEST_REDIS", "redis://localhost:1/0")
app = Celery("logged", broker=url, backend=url)
app.conf.update(worker_prefetch_multiplier=1, idem_lease=10)


WORK = 0.7
"""Seconds: longer than a duplicate waits in its worker slot, so the duplicate goes back to the broker."""


class Timeout(Exception):
    """The destination did not answer, so it is unknown whether the effect happened."""


def task(name: str, **options: Any) -> Any:
    options = {"base": IdempotentTask, "shared": False, "intent": ("what",), **options}
    return app.task(name=f"logged.{name}", **options)


@task("pay", must_match=("cents",))
def pay(what: int, cents: int = 5) -> str:
    return f"paid {what}"


@task("slow")
def slow(what: int) -> str:
    time.sleep(WORK)
    return f"paid {what}"


@task("impatient", on_duplicate="raise")
def impatient(what: int) -> str:
    time.sleep(WORK)
    return f"paid {what}"


@task("decline")
def decline(what: int) -> None:
    raise ValueError(f"declined {what}")


@task("expected", throws=(KeyError,))
def expected(what: int) -> None:
    raise KeyError(what)


@task("unsure", ambiguous_errors=(Timeout,))
def unsure(what: int) -> None:
    raise Timeout(f"no answer about {what}")


@app.task(name="logged.ordinary", shared=False)
def ordinary(what: int) -> None:
    raise ValueError(f"ordinary {what}")


if "LOGGED_JSON" in os.environ:
    from logging import FileHandler

    from pythonjsonlogger.json import JsonFormatter

    @after_setup_logger.connect(weak=False)
    def as_json(logger: Any, **_: Any) -> None:
        handler = FileHandler(os.environ["LOGGED_JSON"])
        handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logger.addHandler(handler)


if "LOGGED_SENTRY" in os.environ:
    import sentry_sdk
    from sentry_sdk.integrations.celery import CeleryIntegration
    from sentry_sdk.transport import Transport

    class ToFile(Transport):
        def capture_envelope(self, envelope: Any) -> None:
            event = envelope.get_event()
            if event is not None:
                with Path(os.environ["LOGGED_SENTRY"]).open("a") as file:
                    file.write(json.dumps(event, default=str) + "\n")

    sentry_sdk.init(
        "http://key@127.0.0.1:9/1",
        transport=ToFile,
        integrations=[CeleryIntegration()],
        auto_enabling_integrations=False,  # they import whatever is installed
    )
