"""The guard works in a worker whose task and request classes come from another package."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator

import pytest
from celery import Celery

from celery_idem import OutcomeUnknown
from tests.celery import apps, foreign
from tests.celery.conftest import SOON
from tests.support.effects import Effects
from tests.support.servers import RedisServer
from tests.support.workers import CeleryWorker

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def work(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Celery, Effects]]:
    folder = tmp_path_factory.mktemp("foreign")
    place = {
        "broker": redis.url,
        "backend": redis.url_for(1),
        "folder": str(folder),
        "queue": f"q-{uuid.uuid4().hex}",
        "conf": {},
    }
    worker = CeleryWorker("tests.celery.foreign:app", folder, env={apps.ENV: json.dumps(place)})
    app = foreign.make(**place)
    yield app, Effects(folder / "effects.jsonl")
    worker.kill()
    app.close()


@pytest.mark.parametrize("task", ["charge", "late"])
def test_a_base_class_that_calls_run_runs_once(work: tuple[Celery, Effects], task: str, name: str) -> None:
    app, effects = work
    assert [app.tasks[task].delay(name).get(timeout=SOON) for _ in range(3)] == [name] * 3
    assert effects.count(name) == 1


def test_the_death_of_a_process_is_known_and_told(work: tuple[Celery, Effects], name: str) -> None:
    """The worker's main process reports the death of a pool process. The lease would lapse only after the test."""
    app, effects = work
    with pytest.raises(OutcomeUnknown):
        app.tasks["dies"].delay(name).get(timeout=SOON)
    assert effects.count(name) == 1
    assert effects.count("loss seen") == 1
    assert app.tasks["dies"].submit(name).status == "in_doubt"
