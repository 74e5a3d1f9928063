"""An application for two workers with separate queues. A topic and a fanout exchange copy each message to both."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from celery import Celery
from kombu import Exchange, Queue

from celery_idem import IdempotentTask
from tests.support.effects import Effects, Gate


def make(broker: str, store: str, folder: Path, prefix: str) -> Celery:
    app = Celery("exchanges", broker=broker, backend=store, set_as_current=False)
    topic, fanout = Exchange(f"{prefix}-topic", type="topic"), Exchange(f"{prefix}-fanout", type="fanout")
    app.conf.task_queues = [
        queue
        for name in ("one", "two")
        for queue in (
            Queue(f"{prefix}-topic-{name}", topic, routing_key="orders.#" if name == "one" else "*.new"),
            Queue(f"{prefix}-fanout-{name}", fanout, routing_key="k"),
        )
    ]
    effects = Effects(folder / "effects.jsonl")

    @app.task(base=IdempotentTask, shared=False, name="slow", intent=("name",))
    def slow(name: str) -> str:
        effects.add(name)
        Gate(folder / f"gate-{name}").wait(60)
        return f"slow {name}"

    app.finalize()
    return app


if "EXCHANGES_BROKER" in os.environ:
    logging.getLogger("celery_idem").setLevel(logging.DEBUG)  # so that the worker's log has every delivery
    app = make(
        os.environ["EXCHANGES_BROKER"],
        os.environ["EXCHANGES_STORE"],
        Path(os.environ["EXCHANGES_FOLDER"]),
        os.environ["EXCHANGES_PREFIX"],
    )
