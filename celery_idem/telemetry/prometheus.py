"""Metrics for Prometheus. Labels are the task's name and the kind of event or state, never a key.

``install`` counts events in the workers. With a prefork pool set ``PROMETHEUS_MULTIPROC_DIR``, so that the children
write their counts to files. ``Intents`` reads the store when it is scraped and reports the number and age of intents by
state. ``celery -A proj idem metrics`` serves both.

==================================  =========  ===========  ==============================
metric                              type       labels       meaning
==================================  =========  ===========  ==============================
``celery_idem_events_total``        counter    task, kind   events (``events.KINDS``), from 0
``celery_idem_intents``             gauge      task, state  open intents in that state now
``celery_idem_oldest_seconds``      gauge      task, state  since the oldest change (``Tally``)
``celery_idem_store_up``            gauge                   1 when the store answered
==================================  =========  ===========  ==============================
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

from celery import signals

from celery_idem.core.errors import StoreError, needs
from celery_idem.engine import events
from celery_idem.engine.entries import OPEN, Tally
from celery_idem.operate.background import Background
from celery_idem.operate.operators import Operator

if TYPE_CHECKING:
    from celery import Celery
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import GaugeMetricFamily

EVENTS = "celery_idem_events"  # Prometheus' client adds _total
INTENTS = "celery_idem_intents"
OLDEST = "celery_idem_oldest_seconds"
STORE_UP = "celery_idem_store_up"

EVERY = 5.0
"""Seconds between readings of the store, however often it is scraped. A reading costs what is open."""

PATIENCE = 5.0
"""Seconds that a scrape waits for a reading: half of Prometheus' default timeout. A longer reading continues in the
background, and a later scrape returns it."""


def _client() -> Any:
    with needs("Prometheus metrics need a package that is not installed", "prometheus"):
        import prometheus_client
    return prometheus_client


class Events:
    """The counter of events. It is 0 from the start for every guarded task and kind.

    Prometheus' ``increase`` of a counter that begins at 1 is 0, so an alert would miss the first event.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._counter = _client().Counter(EVENTS, "Events of intents.", ("task", "kind"), registry=None)

    def count(self, event: events.Event) -> None:
        self._counter.labels(event.task, event.kind).inc()

    def begin(self, sender: Any = None, **_: Any) -> None:
        """Make the missing counters of all tasks of the application. Also a receiver of ``worker_init``."""
        if sender is None or sender.app is self._app:
            for task in Operator(self._app).tasks().values():
                for kind in events.KINDS:
                    self._counter.labels(task.guard.declaration.task, kind)  # the name in events

    def describe(self) -> Any:
        return self._counter.describe()

    def collect(self) -> Any:
        self.begin()
        return self._counter.collect()


def install(app: Celery, registry: CollectorRegistry | None = None) -> Callable[[], None]:
    """Count events, and return a function that stops it.

    Call it before the worker forks, for example in the module that creates the application.

    Args:
        registry: the registry of the counter; without it, Prometheus' default one.
    """
    into: Any = registry or _client().REGISTRY
    counter = Events(app)
    into.register(counter)
    signals.worker_init.connect(counter.begin)
    stop = events.listen(counter.count, here=True)  # fast enough to run in the emitting thread

    def uninstall() -> None:
        stop()
        signals.worker_init.disconnect(counter.begin)
        into.unregister(counter)

    return uninstall


class Intents:
    """A collector that reads the store. Register it in one process only.

    Args:
        every: seconds between two readings.
        patience: seconds that a scrape waits for a reading; None: until it has ended.
    """

    def __init__(self, app: Celery, every: float = EVERY, patience: float | None = PATIENCE) -> None:
        self._operator = operator = Operator(app)
        self._tallies = Background(lambda: iter([operator.stats("open")]), every, patience)
        _client()

    def describe(self) -> list[GaugeMetricFamily]:
        """Return nothing, so that registering the collector does not read the store."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        from prometheus_client.metrics_core import GaugeMetricFamily

        latest = self._tallies.look()
        if latest.error is not None and not isinstance(latest.error, StoreError):
            raise latest.error
        up = latest.error is None
        tallies: dict[tuple[str, str], Tally] = {}
        if latest.whole is not None and up:  # a state without intents is 0, and does not vanish
            tallies = dict.fromkeys(product(self._operator.tasks(), OPEN), Tally(0, 0.0)) | latest.whole
        intents = GaugeMetricFamily(INTENTS, "Open intents by task and state.", labels=("task", "state"))
        oldest = GaugeMetricFamily(
            OLDEST,
            "Seconds since the oldest's last change; in doubt: since its execution began.",
            labels=("task", "state"),
        )
        for (task, state), tally in sorted(tallies.items()):
            intents.add_metric((task, state), tally.intents)
            oldest.add_metric((task, state), tally.oldest)
        yield intents
        yield oldest
        yield GaugeMetricFamily(STORE_UP, "1 if the store answered the last reading.", value=float(up))


def exporter_registry(
    app: Celery, every: float = EVERY, patience: float | None = PATIENCE
) -> CollectorRegistry:
    """Return a registry with the state of the store, and the workers' counts from ``PROMETHEUS_MULTIPROC_DIR``."""
    client = _client()
    registry: CollectorRegistry = client.CollectorRegistry()
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        from prometheus_client.multiprocess import MultiProcessCollector

        MultiProcessCollector(registry)  # type: ignore[no-untyped-call,unused-ignore]
        Events(app).begin()
    registry.register(Intents(app, every, patience))  # type: ignore[arg-type,unused-ignore]
    return registry
