"""Signals, logs, OpenTelemetry, Prometheus and monitors show the same events."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.events.state import State

from celery_idem import FingerprintMismatch, Ledger
from celery_idem.engine import events
from celery_idem.telemetry import celery_events, otel, prometheus, signals
from tests.operators.conftest import Idem, use_store
from tests.operators.counted import app as counted
from tests.operators.counted import send
from tests.operators.intents import in_doubt
from tests.operators.shop import send_invoice
from tests.operators.test_alerts import alerts
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

ROOT = Path(__file__).parents[2]


@pytest.fixture
def told() -> Iterator[list[events.Event]]:
    heard: list[events.Event] = []
    stop = events.listen(heard.append, here=True)
    yield heard
    stop()


def test_a_listener_that_fails_disturbs_nobody(app: Celery, told: list[events.Event]) -> None:
    def bad(event: events.Event) -> None:
        raise RuntimeError("a bad listener")

    stop = events.listen(bad, here=True)
    try:
        assert send_invoice.apply(("a", 7)).get() == "inv-a-7"
    finally:
        stop()
    assert [event.kind for event in told] == ["settled"]


def test_signals_filter_by_task(app: Celery) -> None:
    heard: list[Any] = []

    def hear(sender: str, event: events.Event, **_: Any) -> None:
        heard.append((sender, event.kind))

    signals.replayed.connect(hear, sender="shop.send_invoice")
    signals.replayed.connect(hear, sender="shop.remind")
    send_invoice.apply(("a", 7))
    send_invoice.apply(("a", 7))
    wait_for(lambda: heard == [("shop.send_invoice", "replayed")], message=lambda: str(heard))
    with pytest.raises(AttributeError, match="there is no event"):
        _ = signals.reployed
    assert set(signals.SIGNALS) == set(events.LEVELS)


def test_structured_logs(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "celery_idem"):
        send_invoice.apply(("a", 7))
        send_invoice.apply(("a", 7))
    (record,) = [r for r in caplog.records if getattr(r, "idem_event", "") == "replayed"]
    assert vars(record)["idem_key"] == send_invoice.intent_key("a", 7)
    assert vars(record)["idem_task"] == "shop.send_invoice"
    assert vars(record)["idem_details"]["succeeded"] is True


def test_opentelemetry(app: Celery) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    reader, spans = InMemoryMetricReader(), InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    stop = otel.install(MeterProvider([reader]))
    try:
        with tracers.get_tracer("t").start_as_current_span("run/shop.send_invoice"):
            send_invoice.apply(("a", 7))
            send_invoice.apply(("a", 7))
    finally:
        stop()
    assert trace.get_current_span() is trace.INVALID_SPAN
    (span,) = spans.get_finished_spans()
    assert [event.name for event in span.events] == ["celery_idem.settled", "celery_idem.replayed"]
    assert dict(span.attributes or {})["celery_idem.key"] == send_invoice.intent_key("a", 7)
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    assert (metric.name, metric.unit) == (otel.COUNTER, "{event}")
    points = [dict(point.attributes or {}) for point in metric.data.data_points]
    assert {"celery.task_name": "shop.send_invoice", "celery_idem.event": "replayed"} in points
    assert all(set(point) == {"celery.task_name", "celery_idem.event"} for point in points)  # never a key


def test_a_replays_span_links_to_that_of_the_execution(app: Celery, ledger: Ledger) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, tracers = InMemorySpanExporter(), TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    tracer = tracers.get_tracer("t")
    send_invoice.apply(("before", 7))  # no span, so there is none to link to
    stop = otel.install()
    try:
        for name in ("before", "a", "a", "b", "b"):
            with tracer.start_as_current_span(name):
                send_invoice.apply((name, 7))
        with tracer.start_as_current_span("submit"):
            assert send_invoice.submit("a", 7).status == "replayed"
    finally:
        stop()
    send_invoice.apply(("after", 7))
    before, first, second, other, again, told = spans.get_finished_spans()
    assert [list(span.links) for span in (before, first, other)] == [[], [], []]
    for span, execution in ((second, first), (again, other), (told, first)):
        (link,) = span.links
        assert link.context.trace_id == execution.context.trace_id
        assert link.context.span_id == execution.context.span_id
        assert link.context.is_remote
        assert dict(link.attributes or {}) == {"celery_idem.link": "execution"}
    sizes = {}
    for name in ("before", "a", "after"):
        entry = ledger.get(send_invoice.intent_key(name, 7))
        assert entry is not None
        assert entry.record.outcome is not None
        sizes[name] = len(entry.record.outcome.trace)
    assert sizes == {"before": 0, "a": 25, "after": 0}  # no bytes where it is not installed


def test_prometheus_in_one_process(app: Celery, ledger: Ledger) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    stop = prometheus.install(app, registry)
    registry.register(prometheus.Intents(app, every=0))
    try:
        for kind in events.KINDS:  # 0 before the first event: `increase` of a counter that begins at 1 is 0
            count = {"task": "shop.send_invoice", "kind": kind}
            assert registry.get_sample_value("celery_idem_events_total", count) == 0
        send_invoice.apply(("a", 7))
        send_invoice.apply(("a", 7))
        in_doubt(ledger, send_invoice.intent_key("b", 7))
        text = generate_latest(registry).decode()
    finally:
        stop()
    assert 'celery_idem_events_total{kind="replayed",task="shop.send_invoice"} 1.0' in text
    assert 'celery_idem_intents{state="in_doubt",task="shop.send_invoice"} 1.0' in text
    assert "celery_idem_store_up 1.0" in text
    assert send_invoice.intent_key("a", 7).partition(":")[2] not in text


def test_prometheus_says_when_the_store_is_away(app: Celery) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    use_store(app, "redis://localhost:1/0")
    registry = CollectorRegistry()
    registry.register(prometheus.Intents(app))
    assert "celery_idem_store_up 0.0" in generate_latest(registry).decode()


def test_an_installed_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from celery_idem import ConfigurationError

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigurationError, match=r"celery_idem\[prometheus\]"):
        prometheus.install(counted)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigurationError, match=r"celery_idem\[otel\]"):
        otel.install()


# --- a real worker ---------------------------------------------------------------------------


class Monitor:
    """A receiver of events that keeps the state of all tasks, like ``celery events`` and Flower."""

    def __init__(self, app: Celery, state: State | None = None) -> None:
        self.state = state or State()
        self.heard: list[tuple[str, str]] = []
        self.ready = threading.Event()
        self._connection = app.connection()
        self._receiver = app.events.Receiver(self._connection, handlers={"*": self._hear})
        self._thread = threading.Thread(target=self._capture, daemon=True)
        self._thread.start()

    def _hear(self, event: dict[str, Any]) -> None:
        self.heard.append((event["type"], event.get("uuid", "")))
        self.state.event(event)

    @property
    def types(self) -> list[str]:
        return [kind for kind, _ in self.heard]

    def _capture(self) -> None:
        for _ in self._receiver.itercapture(limit=None, timeout=None, wakeup=False):
            pass

    def close(self) -> None:
        self._receiver.should_stop = True
        self._thread.join(5)
        self._connection.release()


def counts(folder: Path) -> dict[str, float]:
    """Return the counters that the worker has written so far, by kind."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    found = MultiProcessCollector(CollectorRegistry(), str(folder)).collect()
    return {sample.labels["kind"]: sample.value for metric in found for sample in metric.samples}


@pytest.mark.redis
def test_a_prefork_worker_is_seen_by_monitors_and_counted(
    redis_url: str, start_worker: Callable[..., CeleryWorker], tmp_path: Path
) -> None:
    folder = tmp_path / "multiproc"
    folder.mkdir()
    environment = {"IDEM_TEST_REDIS": redis_url, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    counted.conf.update(broker_url=redis_url, result_backend=redis_url)
    use_store(counted, redis_url)
    monitor = Monitor(counted)
    start_worker("tests.operators.counted", concurrency=2, env=environment, options=("-E",))
    assert counts(folder) == dict.fromkeys(events.KINDS, 0.0)  # written before the pool forked
    try:
        assert send.delay("a", 5).get(timeout=20) == send.delay("a", 5).get(timeout=20)
        with pytest.raises(FingerprintMismatch):
            send.delay("a", 6).get(timeout=20)
        wait_for(
            lambda: {"task-idem-replayed", "task-idem-mismatch"} <= set(monitor.types),
            message=lambda: str(monitor.types),
        )
        # Our events do not change the states that Flower shows: those come from Celery's own events.
        wait_for(
            lambda: (
                sorted(str(task.state) for _, task in monitor.state.itertasks())
                == ["FAILURE", "SUCCESS", "SUCCESS"]
            ),
            message=lambda: str(list(monitor.state.itertasks())),
        )
    finally:
        monitor.close()

    words = [sys.executable, "-m", "celery", "-A", "tests.operators.counted", "idem", "metrics", "--once"]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = {sample: set(labels) for sample, labels in exported(done.stdout)}
    assert found == METRICS  # the dashboard and the alerts are compared with METRICS below
    for kind in ("settled", "replayed", "mismatch"):
        assert f'celery_idem_events_total{{kind="{kind}",task="counted.send"}} 1.0' in done.stdout
    assert 'celery_idem_intents{state="running",task="counted.send"} 0.0' in done.stdout


# --- dashboard and alerts ----------------------------------------------------------------------

METRICS = {
    prometheus.EVENTS + "_total": {"task", "kind"},
    prometheus.INTENTS: {"task", "state"},
    prometheus.OLDEST: {"task", "state"},
    prometheus.STORE_UP: set(),
}


def exported(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the name and the labels of each series that an exporter serves."""
    from prometheus_client.parser import text_string_to_metric_families

    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels


def queries() -> dict[str, str]:
    dashboard = json.loads((ROOT / "docs/ops/grafana-dashboard.json").read_text())
    found = {f"panel {p['title']}": t["expr"] for p in dashboard["panels"] for t in p["targets"]}
    return {**found, **{f"alert {name}": rule["expr"] for name, rule in alerts().items()}}


@pytest.mark.parametrize("where", queries())
def test_dashboard_and_alerts_ask_for_what_there_is(where: str) -> None:
    from celery_idem.engine.entries import STATES

    query = queries()[where]
    names = re.findall(r"\bcelery_idem_\w+", query)
    assert names
    assert set(names) <= set(METRICS)
    for name, inside in re.findall(r"(celery_idem_\w+)\{([^}]*)\}", query):
        for label, value in re.findall(r'(\w+)[=!]~?"([^"]*)"', inside):
            assert label in METRICS[name]
            known = {"kind": set(events.LEVELS), "state": set(STATES), "task": {"$task"}}[label]
            assert set(value.split("|")) <= known


def test_celery_events_are_not_installed_twice(app: Celery, idem: Idem) -> None:
    stop = celery_events.install(app)
    assert celery_events.install(app) is stop
    stop()
