"""What other monitoring tools show of a replay, a wait and a doubt, as in ``docs/reference/what-others-show.md``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from celery.events.state import State
from celery.exceptions import TimeoutError as NoAnswerError
from celery.result import AsyncResult

from celery_idem import IdempotencyError
from tests.operators import seen
from tests.operators.conftest import use_store
from tests.operators.test_telemetry import Monitor
from tests.support.effects import Gate
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/what-others-show.md").read_text()

# The events that celery-exporter (danihodovic/celery-exporter) counts; it receives no other event of a task.
EXPORTED = {
    f"task-{what}" for what in ("sent", "received", "started", "succeeded", "failed", "rejected", "revoked")
}
EXPORTED.add("task-retried")


class Seen(NamedTuple):
    """What is visible of one call.

    Attributes:
        events: types of the events of its task. Two processes send them, so they come in any order.
        state: of the task in monitors.
        result: state of its result.
        spans: for each span of its execution in a worker: the events in it, its status, and its links.
    """

    events: set[str]
    state: str
    result: str
    spans: list[dict[str, Any]]

    @property
    def says(self) -> tuple[set[str], str, str, list[str]]:
        """Return the row of the page's table."""
        last = self.spans[-1]
        said = [event["name"].removeprefix("celery_idem.") for event in last["events"]]
        said = [*dict.fromkeys(name for name in said if name != "exception")]
        said += ["link"] * bool(last["links"]) + ["ERROR"] * (last["status"]["status_code"] == "ERROR")
        return self.events, self.state, self.result, said


def rows() -> dict[str, tuple[set[str], str, str, list[str]]]:
    """Return the page's first table: by the first cell, the words in backticks of the other cells."""
    found = {}
    for line in PAGE.partition("| call |")[2].partition("\n\n")[0].splitlines()[2:]:
        name, *cells = (cell.strip() for cell in line.strip("| ").split(" | "))
        events, state, result, span = (re.findall(r"`([^`]*)`", cell) for cell in cells)
        found[name] = (set(events), state[0], result[0], span)
    return found


def flowers_state() -> State:
    """Return Flower's state of events if Flower is installed, else Celery's."""
    try:
        from flower.events import EventsState
    except ImportError:
        return State()
    return EventsState(max_tasks_in_memory=100)


@pytest.fixture
def look(
    redis_url: str, start_worker: Callable[..., CeleryWorker], tmp_path: Path
) -> Iterator[Callable[[AsyncResult], Seen]]:
    pytest.importorskip("opentelemetry.instrumentation.celery")
    seen.app.conf.update(broker_url=redis_url, result_backend=redis_url)
    use_store(seen.app, redis_url)
    monitor = Monitor(seen.app, flowers_state())
    environment = {"IDEM_TEST_REDIS": redis_url, "SEEN_FOLDER": str(tmp_path)}
    start_worker("tests.operators.seen", concurrency=2, env=environment, options=("-E",))

    def spans(task_id: str) -> list[dict[str, Any]]:
        lines = [line for path in tmp_path.glob("spans-*") for line in path.read_text().splitlines()]
        found = [span for span in map(json.loads, lines) if span["name"].startswith("run/")]
        mine = [span for span in found if task_id in span["attributes"].values()]
        return sorted(mine, key=lambda span: str(span["start_time"]))

    def what(result: AsyncResult) -> Seen:
        task = monitor.state.tasks.get(result.id)
        kinds = [kind for kind, uuid in monitor.heard if uuid == result.id]
        return Seen(set(kinds) - {"task-sent"}, str(task and task.state), result.state, spans(result.id))

    yield what
    monitor.close()


def end(result: AsyncResult) -> AsyncResult:
    """Wait for the answer of a call, and return its result object."""
    try:
        result.get(timeout=60)
    except NoAnswerError:
        raise
    except (IdempotencyError, ValueError):
        pass
    return result


@pytest.mark.redis
def test_what_others_show_is_as_the_page_says(look: Callable[[AsyncResult], Seen], gate: Gate) -> None:
    calls = {
        "the execution": end(seen.pay.delay("a")),
        "its replay": end(seen.pay.delay("a")),
        "a failure": end(seen.fail.delay("a")),
        "the replay of a failure": end(seen.fail.delay("a")),
        "in doubt": end(seen.doubt.delay("a")),
        "other values": end(seen.pay.delay("a", 5)),
    }
    first = seen.pay.delay("slow", gate=str(gate.path))
    wait_for(
        lambda: look(first).events == {"task-received", "task-started"}, message=lambda: str(look(first))
    )
    second = seen.pay.delay("slow", gate=str(gate.path))
    expected = rows()

    def compare(name: str, call: AsyncResult) -> None:
        wait_for(
            lambda: bool(look(call).spans) and look(call).says == expected[name],
            20,
            lambda: f"{name}: {look(call)}, page: {expected[name]}",
        )

    for name, call in {**calls, "a duplicate that waits": second}.items():
        compare(name, call)
    gate.open()
    end(first)
    end(second)
    wait_for(lambda: look(second).state == "SUCCESS", message=lambda: str(look(second)))
    assert set(expected) == {*calls, "a duplicate that waits"}

    # The span of a replay has a link to the span of the execution, which is in another trace.
    for replay, execution in (
        (calls["its replay"], calls["the execution"]),
        (calls["the replay of a failure"], calls["a failure"]),
        (second, first),
    ):
        (link,) = look(replay).spans[-1]["links"]
        context = look(execution).spans[-1]["context"]
        assert (link["context"]["trace_id"], link["context"]["span_id"]) == (
            context["trace_id"],
            context["span_id"],
        )
    assert len(look(second).spans) > 1  # one for each round

    # celery-exporter counts a replay as a success and each round of a wait as a reception; it ignores our events.
    assert look(second).events & EXPORTED == {"task-received", "task-started", "task-succeeded"}


def test_flower_counts_them_by_type() -> None:
    """Flower's counter has the name and the labels that the page gives."""
    events = pytest.importorskip("flower.events")
    metrics = events.get_prometheus_metrics()
    (family,) = metrics.events.describe()
    assert f"{family.name}_total" == "flower_events_total"
    assert set(metrics.events._labelnames) == {"worker", "type", "task"}
    for label in ('type="task-idem-replayed"', "flower_events_total"):
        assert label in PAGE


DJANGO = """
import django
from django.conf import settings
settings.configure(INSTALLED_APPS=["django_celery_results"], USE_TZ=True, CELERY_RESULT_BACKEND="django-db",
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "%s"}})
django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from tests.operators.seen import app, doubt, pay
app.conf.update(result_backend="django-db", task_store_eager_result=True, idem_store="memory://django")
app.__dict__.pop("backend", None)
app._local = type(app._local)()
from django_celery_results.models import TaskResult
for task in (pay, pay, doubt):
    id = task.apply(("a",)).id
    row = TaskResult.objects.get(task_id=id)
    print(row.status, row.result)
"""


def test_django_celery_results_has_a_row_for_each_call(tmp_path: Path) -> None:
    pytest.importorskip("django_celery_results")
    done = subprocess.run(
        [sys.executable, "-c", DJANGO % (tmp_path / "db.sqlite3")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    ran, replayed, doubtful = done.stdout.splitlines()
    assert ran == replayed == 'SUCCESS "paid a"'
    assert doubtful.startswith("FAILURE")
    assert "OutcomeUnknown" in doubtful
