"""A broker, a worker and a store in this process. The test decides when messages are delivered."""

from __future__ import annotations

import uuid
from typing import Any

from celery import Celery
from celery.app.trace import build_tracer
from kombu import Connection

from celery_idem import IdempotentTask, Ledger
from celery_idem.engine.entries import Entry


class InProcess:
    """An application with broker and store in memory. The test takes the place of the worker."""

    def __init__(self, **conf: Any) -> None:
        name = uuid.uuid4().hex
        self.app = Celery(
            "here",
            broker=f"memory://{name}",
            backend="cache+memory://",
            task_cls=IdempotentTask,
            set_as_current=False,
        )
        self.app.conf.update(task_default_queue=name, idem_store=f"memory://{name}", idem_audit=False, **conf)
        self.queue = name
        self.effects: list[Any] = []
        self.headers: list[dict[str, Any]] = []

    def task(self, name: str, **options: Any) -> Any:
        return self.app.task(name=name, shared=False, bind=True, **{"intent": ("name",), **options})

    def deliver(self, most: int = 20) -> list[str]:
        """Run all messages, those that they publish too, without waiting for ETAs. Return the state of each.

        Raises:
            AssertionError: there are more than ``most`` messages.
        """
        states = []
        with Connection(self.app.conf.broker_url) as connection, connection.SimpleQueue(self.queue) as queue:
            for _ in range(most):
                try:
                    message = queue.get(block=False)
                except queue.Empty:
                    return states
                message.ack()
                states.append(self.run(message))
        raise AssertionError(f"after {most} messages: {states}")

    def run(self, message: Any) -> str:
        headers = message.headers
        self.headers.append(headers)
        args, kwargs, embed = message.payload
        request = {**headers, **embed, "delivery_info": {"exchange": "", "routing_key": self.queue}}
        trace = build_tracer(headers["task"], self.app.tasks[headers["task"]], app=self.app)
        result = trace(headers["id"], args, kwargs, request)
        return result.info.state if result.info else "SUCCESS"

    @property
    def entries(self) -> list[Entry]:
        return list(Ledger.from_app(self.app).list())

    @property
    def states(self) -> list[str]:
        return [entry.state for entry in self.entries]
