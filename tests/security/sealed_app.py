"""An application whose records are sealed.

SEALED_URL, SEALED_QUEUE, SEALED_FOLDER and SEALED_KEYS configure it.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from celery import Celery

from celery_idem import IdempotentTask


def make(url: str, queue: str, folder: Path, keys: list[str]) -> Celery:
    app = Celery("sealed", broker=url, backend=url, set_as_current=False)
    # The message is acknowledged before the body, so that only recovery can publish the call again.
    early = {"task_default_queue": queue, "task_acks_late": False, "idem_lease": 2, "idem_on_crash": "rerun"}
    app.conf.update(idem_seal_keys=keys, **early)

    def pay(what: str, pin: str) -> str:
        began = (folder / "effects").exists()
        with (folder / "effects").open("a") as effects:
            effects.write(f"{'paid' if began else 'began'} {what} {pin}\n")
        if not began:
            threading.Event().wait(120)  # until it is killed
        return f"paid {what} with {pin}"

    how = {"name": "sealed.pay", "intent": ("what",), "secret": ("pin",)}
    app.task(base=IdempotentTask, shared=False, lazy=False, **how)(pay)  # type: ignore[call-overload]
    return app


app = make(
    os.environ.get("SEALED_URL", "redis://127.0.0.1:1/0"),
    os.environ.get("SEALED_QUEUE", "sealed"),
    Path(os.environ.get("SEALED_FOLDER", ".")),
    [key for key in os.environ.get("SEALED_KEYS", "").split(",") if key],
)
