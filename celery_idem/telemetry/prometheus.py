"""Metrics for Prometheus. Labels are the task's name and the kind of event or state, never a key.

Two sources. ``install`` counts events where they happen, in the workers; with a prefork pool set
``PROMETHEUS_MULTIPROC_DIR``, so that children write what they count to files. ``Intents`` looks
at the store when it is scraped: how many intents stand in which state, and for how long.
``celery -A proj idem metrics`` serves both.

==================================  =========  ===========  ==============================
metric                              type       labels       meaning
==================================  =========  ===========  ==============================
``celery_idem_events_total``        counter    task, kind   what happened (``events.KINDS``)
``celery_idem_intents``             gauge      task, state  intents in that state now
``celery_idem_oldest_seconds``      gauge      task, state  how long the oldest stands
``celery_idem_store_up``            gauge                   1 when the store answered
==================================  =========  ===========  ==============================
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.engine import events
from celery_idem.operate.background import Background
from celery_idem.operate.operators import Desk

if TYPE_CHECKING:
    from celery import Celery
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import GaugeMetricFamily

EVENTS = "celery_idem_events"  # Prometheus' client adds _total
INTENTS = "celery_idem_intents"
OLDEST = "celery_idem_oldest_seconds"
STORE_UP = "celery_idem_store_up"

EVERY = 30.0
"""Seconds between readings of the store, however often it is scraped: a reading goes through every record."""

PATIENCE = 5.0
"""Seconds that a scrape waits for a look: half of what Prometheus waits by default. A look at more
records than can be read in that goes on in the background, and the next scrape finds it."""


def _client() -> Any:
    try:
        import prometheus_client
    except ImportError:
        raise ConfigurationError(
            "Prometheus metrics need a package that is not installed: pip install 'celery_idem[prometheus]'."
        ) from None
    return prometheus_client


def install(registry: CollectorRegistry | None = None) -> Callable[[], None]:
    """Count events; returns a function that stops it. Call it before the worker forks, for
    example in the module that makes the application.

    Args:
        registry: where the counter is registered; Prometheus' default one without it.
    """
    client = _client()
    counter = client.Counter(
        EVENTS, "What happened to intents.", ("task", "kind"), registry=registry or client.REGISTRY
    )

    def count(event: events.Event) -> None:
        counter.labels(event.task, event.kind).inc()

    stop = events.listen(count, here=True)  # adds to a number in memory

    def uninstall() -> None:
        stop()
        (registry or client.REGISTRY).unregister(counter)

    return uninstall


class Intents:
    """A collector that looks at the store. Register it in one process only.

    Args:
        every: seconds between looks.
        patience: seconds that a scrape waits for a look; None: until it has ended.
    """

    def __init__(self, app: Celery, every: float = EVERY, patience: float | None = PATIENCE) -> None:
        desk = Desk(app)
        self._tallies = Background(lambda: iter([desk.stats()]), every, patience)
        _client()

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing is looked at when the collector is registered."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        from prometheus_client.metrics_core import GaugeMetricFamily

        latest = self._tallies.look()
        if latest.error is not None and not isinstance(latest.error, StoreError):
            raise latest.error
        up = latest.error is None
        tallies = latest.whole or {} if up else {}
        intents = GaugeMetricFamily(INTENTS, "Intents by task and state.", labels=("task", "state"))
        oldest = GaugeMetricFamily(
            OLDEST, "Seconds since the last change of the oldest intent.", labels=("task", "state")
        )
        for (task, state), tally in sorted(tallies.items()):
            intents.add_metric((task, state), tally.intents)
            oldest.add_metric((task, state), tally.oldest)
        yield intents
        yield oldest
        yield GaugeMetricFamily(STORE_UP, "1 when the store answered at the last look.", value=float(up))


def exporter_registry(
    app: Celery, every: float = EVERY, patience: float | None = PATIENCE
) -> CollectorRegistry:
    """Everything there is to scrape: what the workers counted, where they write it to
    ``PROMETHEUS_MULTIPROC_DIR``, and the state of the store."""
    client = _client()
    registry: CollectorRegistry = client.CollectorRegistry()
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        from prometheus_client.multiprocess import MultiProcessCollector

        MultiProcessCollector(registry)  # type: ignore[no-untyped-call,unused-ignore]
    registry.register(Intents(app, every, patience))  # type: ignore[arg-type,unused-ignore]
    return registry
