"""An application with its own task and request classes, for the worker of `test_placing_worker.py`."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from celery import Celery, Task
from celery.worker.request import Request

from celery_idem import IdempotentTask
from tests.celery import apps
from tests.support.effects import Effects


def make(broker: str, backend: str, folder: str, queue: str, conf: Mapping[str, Any]) -> Celery:
    app = Celery("foreign", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(task_default_queue=queue, broker_connection_retry_on_startup=True, idem_lease=600, **conf)
    effects = Effects(Path(folder) / "effects.jsonl")

    class Counting(Request):
        def on_failure(self, *args: Any, **kwargs: Any) -> None:
            effects.add("loss seen")
            super().on_failure(*args, **kwargs)

    class Base(Task):
        abstract = True
        Request = Counting

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            effects.add("opened")
            return self.run(*args, **kwargs)

    class Guarded(IdempotentTask, Base):
        abstract = True

    @app.task(base=Guarded, name="charge", intent=("name",), shared=False)
    def charge(name: str) -> str:
        effects.add(name)
        return name

    @app.task(base=Guarded, name="dies", intent=("name",), shared=False)
    def dies(name: str) -> None:
        effects.add(name)
        os.kill(os.getpid(), signal.SIGKILL)

    @app.task(base=Guarded, name="late", intent=("name",), shared=False)
    def late(name: str) -> str:
        effects.add(name)
        return name

    type(late._get_current_object()).__call__ = Base.__call__
    return app


if apps.ENV in os.environ:
    app = make(**json.loads(os.environ[apps.ENV]))
