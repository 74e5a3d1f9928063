"""OpenTelemetry: annotates the current span (Celery's own instrumentation makes one per task)
with events, and counts them.

Names follow the semantic conventions: dotted, lower case, no unit and no ``total`` in a metric's
name. The key is an attribute of spans, where it costs nothing, and never of metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery_idem.core.errors import ConfigurationError
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
    try:
        from opentelemetry import metrics, trace
    except ImportError:
        raise ConfigurationError(
            "OpenTelemetry needs a package that is not installed: pip install 'celery_idem[otel]'."
        ) from None
    meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
    counter = meter.create_counter(COUNTER, unit="{event}", description="Events of intents.")

    def annotate(event: events.Event) -> None:
        counter.add(1, {"celery.task_name": event.task, "celery_idem.event": event.kind})
        span = trace.get_current_span()
        if not span.is_recording():
            return
        span.set_attribute("celery_idem.key", event.key)
        span.set_attribute("celery_idem.outcome", event.kind)
        span.add_event(f"celery_idem.{event.kind}", _attributes(event.details))

    return events.listen(annotate, here=True)  # the span is the thread's


def _attributes(details: dict[str, Any]) -> dict[str, Any]:
    """Return values that an attribute can hold, others as text."""
    plain = (str, bool, int, float)
    return {
        f"celery_idem.{name.rstrip('_')}": value if isinstance(value, plain) else str(value)
        for name, value in details.items()
    }
