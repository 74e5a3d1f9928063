"""Tasks for tests of other monitoring tools. The tools write what they receive to files in SEEN_FOLDER."""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery, signals

from celery_idem import IdempotentTask
from celery_idem.telemetry import otel
from tests.support.effects import Gate

url = os.environ.get("IDEM_TEST_REDIS", "redis://localhost:1/0")
app = Celery("seen", broker=url, backend=url)
app.conf.task_send_sent_event = True


@app.task(base=IdempotentTask, shared=False, name="seen.pay", intent=("what",), must_match=("cents",))
def pay(what: str, cents: int = 0, gate: str = "") -> str:
    if gate:
        Gate(gate).wait()
    return f"paid {what}"


@app.task(base=IdempotentTask, shared=False, name="seen.fail", intent=("what",))
def fail(what: str) -> None:
    raise ValueError(what)


@app.task(
    base=IdempotentTask, shared=False, name="seen.doubt", intent=("what",), ambiguous_errors=(TimeoutError,)
)
def doubt(what: str) -> None:
    raise TimeoutError(what)


def trace(folder: Path) -> None:
    from opentelemetry.instrumentation.celery import CeleryInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

    provider = TracerProvider()
    out = (folder / f"spans-{os.getpid()}").open("a")
    exporter = ConsoleSpanExporter(out=out, formatter=lambda span: span.to_json(indent=None) + "\n")
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    CeleryInstrumentor().instrument(tracer_provider=provider)
    otel.install()


if "SEEN_FOLDER" in os.environ:
    folder = Path(os.environ["SEEN_FOLDER"])
    signals.worker_process_init.connect(lambda **_: trace(folder), weak=False)
