"""A worker in this process: it takes messages from a broker in memory and runs them with Celery's tracer."""

from __future__ import annotations

import socket
import uuid
from typing import Any

from celery import Celery, _state
from celery.app.trace import build_tracer


def application(**conf: Any) -> Celery:
    """An application with its own broker queue, result backend and store, all in memory."""
    app = Celery("hand", broker="memory://", backend="cache+memory://", set_as_current=False)
    own = {"task_default_queue": f"hand-{uuid.uuid4().hex}", "idem_store": f"memory://{uuid.uuid4().hex}"}
    app.conf.update({**own, **conf})
    return app


def take(app: Celery) -> Any:
    """Takes the next message from the queue. None if there is none."""
    with app.connection_for_read() as connection:
        return connection.default_channel.basic_get(app.conf.task_default_queue)


def deliver(app: Celery, message: Any, by: Celery | None = None) -> Any:
    """Handles a message as a worker of `by` does: runs the task, and publishes its follow-ups."""
    worker = by or app
    args, kwargs, embedded = message.payload
    task = worker.tasks[message.headers["task"]]
    request = {
        **message.headers,
        **embedded,
        "args": args,
        "kwargs": kwargs,
        "properties": message.properties,
        "delivery_info": {"exchange": "", "routing_key": worker.conf.task_default_queue},
        "called_directly": False,
        "hostname": socket.gethostname(),
    }
    trace = build_tracer(task.name, task, app=worker)
    before = _state.get_current_app()
    worker.set_current()  # as a worker does: Celery's own tasks use the current application
    try:
        return trace(message.headers["id"], args, kwargs, request).retval
    finally:
        before.set_current()


def drain(app: Celery, by: Celery | None = None) -> list[dict[str, Any]]:
    """Delivers all messages, and returns their headers in order."""
    seen = []
    while (message := take(app)) is not None:
        seen.append(dict(message.headers))
        deliver(app, message, by)
    return seen
