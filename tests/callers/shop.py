"""A shop whose tasks have counted effects. Workers and callers read `CALLERS_URL` and `CALLERS_FOLDER`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Celery

from celery_idem import IdempotentTask, Ledger
from tests.callers import forgetful
from tests.support.effects import Effects, Gate

URL = os.environ.get("CALLERS_URL", "memory://")
FOLDER = Path(os.environ.get("CALLERS_FOLDER", "."))
if os.environ.get("CALLERS_FORGET"):
    Ledger.accept = forgetful.accept  # type: ignore[method-assign,assignment]


NO_BROKER = {"task_publish_retry": False, "broker_transport_options": {"max_retries": 1, "interval_start": 0}}
"""Settings for an application whose broker cannot be reached. Without them kombu retries for six seconds."""


class Brief(Exception):
    """The service refused before it did anything."""


class NoAnswer(Exception):
    """The service did not answer, so the effect may have happened."""


def make(url: str, folder: Path, name: str = "shop", **conf: Any) -> Celery:
    """Return the shop's application, with one Redis for broker, results and store unless ``conf`` says otherwise."""
    app = Celery(name, broker=url, backend=url, set_as_current=False)
    app.conf.update(
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        idem_lease=5,
        **conf,
    )
    effects = Effects(folder / "effects.jsonl")

    @app.task(
        base=IdempotentTask,
        shared=False,
        name="shop.pay",
        intent=("customer", "invoice"),
        must_match=("cents", "currency"),
    )
    def pay(customer: str, invoice: str, cents: int, currency: str = "EUR", note: str = "") -> dict[str, Any]:
        """Pay one invoice of a customer."""
        effects.add(f"pay-{customer}-{invoice}", note=note)
        return {"paid": cents, "invoice": invoice}

    @app.task(base=IdempotentTask, shared=False, name="shop.slow", intent=("name",))
    def slow(name: str) -> str:
        effects.add(f"slow-{name}")
        Gate(folder / f"gate-{name}").wait()
        return f"slow {name}"

    @app.task(
        base=IdempotentTask,
        shared=False,
        name="shop.fails",
        intent=("name",),
        no_effect_errors=(Brief,),
        ambiguous_errors=(NoAnswer,),
    )
    def fails(name: str, how: str = "error") -> None:
        effects.add(f"fails-{name}")
        raise {"error": ValueError, "brief": Brief, "doubt": NoAnswer}[how](how)

    @app.task(base=IdempotentTask, shared=False, name="shop.large", intent=("name",), max_result_bytes=100)
    def large(name: str) -> str:
        effects.add(f"large-{name}")
        return "x" * 1000

    @app.task(base=IdempotentTask, shared=False, name="shop.number", intent=("name", "value"))
    def number(name: str, value: int) -> int:
        effects.add(f"number-{name}-{value}")
        return value

    @app.task(
        base=IdempotentTask,
        shared=False,
        name="shop.greet",
        aliases=("shop.hello", "shop.hi"),
        intent=("name",),
    )
    def greet(name: str, note: str = "") -> str:
        effects.add(f"greet-{name}")
        return f"greeted {name}"

    @app.task(base=IdempotentTask, shared=False, name="shop.total", intent=("name",))
    def total(values: list[int], name: str) -> int:
        effects.add(f"total-{name}")
        return sum(values)

    @app.task(base=IdempotentTask, shared=False, name="shop.after", intent=("name",))
    def after(result: Any, name: str) -> Any:
        effects.add(f"after-{name}")
        return result

    @app.task(shared=False, name="shop.plain")
    def plain(name: str) -> str:
        effects.add(f"plain-{name}")
        return f"plain {name}"

    @app.task(base=IdempotentTask, shared=False, bind=True, name="shop.hands_over", intent=("name",))
    def hands_over(self: Any, name: str, to: str) -> Any:
        args = (name, 1) if to == "shop.number" else (name,)
        return self.replace(app.signature(to, args=args))

    return app


app = make(URL, FOLDER)
