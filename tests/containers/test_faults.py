"""Every intent takes effect once if a worker container dies half way or a broker container freezes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from pytest_celery import CELERY_REDIS_BROKER, CeleryTestSetup

from celery_idem import OutcomeUnknown
from tests.containers.shop import VISIBILITY, Shop
from tests.support.waiting import wait_for

# Seconds. The worker's image is built once, in about 40. A test takes 10 to 25.
pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(300)]

# Seconds to wait for a result. Redelivery takes up to 6, the restart of a worker 3, a lapsed lease 2.
ANSWER_WITHIN = 60


def send(setup: CeleryTestSetup, task: str, invoice: str, hold: str = "") -> AsyncResult:
    """Send a task by name, as an orchestrator without task classes does. The worker derives the key."""
    return setup.app.send_task(task, kwargs={"invoice": invoice, "hold": hold})


def insist(setup: CeleryTestSetup, task: str, invoice: str) -> AsyncResult:
    """Send a task and send it again after an error, as an agent does."""
    deadline = time.monotonic() + ANSWER_WITHIN
    while True:
        try:
            return send(setup, task, invoice)
        except OperationalError:  # after four seconds, Celery's connection timeout
            if time.monotonic() > deadline:
                raise


# tests/faults/test_worker_ended.py shows the same on RabbitMQ, without containers.
@pytest.mark.parametrize("celery_broker", [CELERY_REDIS_BROKER], indirect=True)
def test_a_worker_container_killed_half_way(celery_setup: CeleryTestSetup, destination: Shop) -> None:
    half_way = [
        ("shop.charge", "charged", "after"),
        ("shop.charge", "not yet charged", "before"),
        ("shop.charge_blindly", "nobody to ask", "after"),
    ]
    first = {invoice: send(celery_setup, task, invoice, hold) for task, invoice, hold in half_way}
    wait_for(
        lambda: (
            destination.charges("charged")
            and destination.bodies("not yet charged")
            and destination.charges("nobody to ask")
        ),
        ANSWER_WITHIN,
        "all three to be half way",
    )

    celery_setup.worker.kill()
    destination.open_gate()
    celery_setup.worker.restart()
    again = {invoice: send(celery_setup, task, invoice) for task, invoice, _ in half_way}

    for answers in (first, again):
        for invoice in ("charged", "not yet charged"):
            assert answers[invoice].get(timeout=ANSWER_WITHIN) == f"receipt for {invoice}"
        with pytest.raises(OutcomeUnknown):
            answers["nobody to ask"].get(timeout=ANSWER_WITHIN)
    assert {invoice: destination.charges(invoice) for invoice in first} == dict.fromkeys(first, 1)
    # With a reconcile function, only the intent that the destination did not know ran a second time.
    assert {invoice: destination.bodies(invoice) for invoice in first} == {
        "charged": 1,
        "not yet charged": 2,
        "nobody to ask": 1,
    }


@pytest.fixture
def publishers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=2) as threads:
        yield threads


def test_a_broker_container_frozen_and_thawed(
    celery_setup: CeleryTestSetup, destination: Shop, publishers: ThreadPoolExecutor
) -> None:
    held = [f"held {number}" for number in range(3)]
    running = {invoice: send(celery_setup, "shop.charge", invoice, "after") for invoice in held}
    wait_for(lambda: all(map(destination.charges, held)), ANSWER_WITHIN, "three charges, held")

    broker = celery_setup.broker.container._container  # pytest-celery's own wrapper cannot pause
    broker.pause()
    frozen_at = time.monotonic()
    try:
        # Running tasks end, but their messages cannot be acknowledged. A caller that publishes now waits, receives an
        # error, or cannot know whether the message arrived.
        late = [publishers.submit(insist, celery_setup, "shop.charge", "late") for _ in range(2)]
        destination.open_gate()
        for invoice, result in running.items():
            assert result.get(timeout=ANSWER_WITHIN) == f"receipt for {invoice}"
        # Long enough for a Redis broker to redeliver what was not acknowledged.
        wait_for(lambda: time.monotonic() - frozen_at > VISIBILITY + 1, ANSWER_WITHIN, "the freeze to last")
    finally:
        broker.unpause()

    again = {invoice: [send(celery_setup, "shop.charge", invoice)] for invoice in held}
    again["late"] = [future.result(timeout=ANSWER_WITHIN) for future in late]
    for invoice, results in again.items():
        for result in results:
            assert result.get(timeout=ANSWER_WITHIN) == f"receipt for {invoice}"
    assert {invoice: destination.charges(invoice) for invoice in again} == dict.fromkeys(again, 1)
