"""OpenTelemetry: annotates the current span with events, and counts them.

Celery's own instrumentation makes a span per task. A span in which an outcome is replayed has a link to the span in
which it was made. Names follow the semantic conventions: dotted, lower case, no unit and no ``total`` in a metric's
name. The key is an attribute of spans only, because each value of a metric's attribute costs memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery_idem.core.errors import needs
from celery_idem.engine import events

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider

COUNTER = "celery_idem.events"
SCOPE = "celery_idem"
"""Name of the instrumentation scope."""


def install(meter_provider: MeterProvider | None = None) -> Callable[[], None]:
    """Annotate spans and count events, and return a function that stops it.

    Args:
        meter_provider: without it, the global one.
    """
    with needs("OpenTelemetry needs a package that is not installed", "otel"):
        from opentelemetry import metrics, trace
    meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
    counter = meter.create_counter(COUNTER, unit="{event}", description="Events of intents.")

    def current() -> bytes:
        context = trace.get_current_span().get_span_context()
        if not context.is_valid:
            return b""
        ids = context.trace_id.to_bytes(16, "big") + context.span_id.to_bytes(8, "big")
        return ids + bytes((context.trace_flags,))

    def link(span: trace.Span, parent: str) -> None:
        _, trace_id, span_id, flags = (int(part, 16) for part in parent.split("-"))
        context = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(flags))
        span.add_link(context, {"celery_idem.link": "execution"})

    def annotate(event: events.Event) -> None:
        counter.add(1, {"celery.task_name": event.task, "celery_idem.event": event.kind})
        span = trace.get_current_span()
        if not span.is_recording():
            return
        span.set_attribute("celery_idem.key", event.key)
        span.set_attribute("celery_idem.outcome", event.kind)
        span.add_event(f"celery_idem.{event.kind}", _attributes(event.details))
        if "trace" in event.details:
            link(span, event.details["trace"])

    stop = events.listen(annotate, here=True)  # the current span belongs to the thread
    events.spans.append(current)

    def uninstall() -> None:
        stop()
        events.spans.remove(current)

    return uninstall


def _attributes(details: dict[str, Any]) -> dict[str, Any]:
    """Return values that an attribute can hold, others as text."""
    plain = (str, bool, int, float)
    return {
        f"celery_idem.{name.rstrip('_')}": value if isinstance(value, plain) else str(value)
        for name, value in details.items()
    }
