"""An application whose database user has few rights.

RIGHTS_BROKER, RIGHTS_STORE and RIGHTS_FOLDER configure it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from celery import Celery

from celery_idem import IdempotentTask
from tests.support.effects import Effects


def make(broker: str, store: str, folder: Path, **conf: Any) -> Celery:
    effects = Effects(folder / "effects.jsonl")
    backend = "cache+memory://" if broker == "memory://" else broker
    app = Celery("rights", broker=broker, backend=backend, set_as_current=False)
    # The lease is in seconds. The worker notices a dead child at once, so no test waits for the lease.
    app.conf.update(
        task_acks_late=True, task_reject_on_worker_lost=True, idem_store=store, idem_lease=5, **conf
    )
    how: dict[str, Any] = {"base": IdempotentTask, "bind": True, "shared": False, "lazy": False}

    def pay(self: Any, name: str, how: str = "") -> str:
        """Write the record in every way that an execution can write it, depending on `how`."""
        if how == "retry" and not self.request.retries:
            raise self.retry(countdown=0)
        self.step("charge", effects.add, name)
        if how == "die" and not (folder / name).exists():
            (folder / name).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "error":
            raise ValueError(name)
        if how == "doubt":
            raise TimeoutError(name)
        return f"paid {name}"

    app.task(name="rights.pay", intent=("name",), on_crash="resume", ambiguous_errors=(TimeoutError,), **how)(
        pay
    )
    return app


app = make(
    os.environ.get("RIGHTS_BROKER", "memory://"),
    os.environ.get("RIGHTS_STORE", "memory://"),
    Path(os.environ.get("RIGHTS_FOLDER", ".")),
)
