"""The answer of a settled intent is owed until Celery has given it: by the backend, to links, a chain, a chord.

Every process of the worker is killed between the settlement and Celery's answer. The message was acknowledged before
the body, so no redelivery comes.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord
from celery.result import AsyncResult

from celery_idem.engine.ledger import Ledger
from celery_idem.stores import open_store
from tests.support.effects import Effects, Gate
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

WITHIN = 60.0  # seconds; on a quiet machine it takes five


class Stage:
    """A producer that has none of the tasks, and workers."""

    def __init__(self, folder: Path, redis: RedisServer, results: int, store: str) -> None:
        self.folder = folder
        folder.mkdir()
        self.effects = Effects(folder / "effects.jsonl")
        store = store.format(redis=redis.url_for(1), folder=folder)
        self.ledger = Ledger(open_store(store))
        self.app = Celery(
            "producer", broker=redis.url_for(0), backend=redis.url_for(results), set_as_current=False
        )
        self.app.conf.task_default_queue = f"owing-{uuid.uuid4().hex}"
        self.environment = {
            "OWED_FOLDER": str(folder),
            "OWED_BROKER": redis.url_for(0),
            "OWED_BACKEND": redis.url_for(results),
            "OWED_STORE": store,
            "OWED_QUEUE": self.app.conf.task_default_queue,
        }
        self.workers: list[CeleryWorker] = []

    def start(self, **options: Any) -> CeleryWorker:
        worker = CeleryWorker("tests.faults.owing", self.folder, env=self.environment, **options)
        self.workers.append(worker)
        return worker

    def signature(self, task: str, intent: str, at: str = "", **more: Any) -> Any:
        kwargs = {"intent": intent, **({"at": at} if at else {}), **more}
        return self.app.signature(task, kwargs=kwargs, immutable=True)

    def wait_stopped(self, *intents: str) -> None:
        for intent in intents:
            wait_for((self.folder / f"stopped-{intent}").exists, WITHIN, f"{intent} to be settled")

    def owed(self) -> list[str]:
        """The settled intents in the index, and those whose records hold a call (and not for people)."""
        self.ledger.store.indexed("idem:")  # a worker's recovery would do so
        listed = {one.key for one in self.ledger.store.open("idem:")}
        return [
            entry.key
            for entry in self.ledger.list()
            if entry.record.outcome is not None
            and (f"idem:{entry.key}" in listed or (entry.record.call and not entry.record.notes))
        ]

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        with self.app.connection_for_write() as connection:
            connection.default_channel.client.flushall()
        self.ledger.store.close()
        self.app.close()


@pytest.fixture
def stage(tmp_path: Path, own_redis: RedisServer) -> Iterator[Callable[..., Stage]]:
    stages: list[Stage] = []

    def make(results: int, store: str = "{redis}") -> Stage:
        stages.append(Stage(tmp_path / "stage", own_redis, results, store))
        return stages[-1]

    yield make
    for one in stages:
        one.close()


ELSEWHERE, TOGETHER = 2, 1  # databases of the results; the store is in 1
PLACES = {
    "elsewhere": (ELSEWHERE, "{redis}"),
    "in the store's database": (TOGETHER, "{redis}"),
    "SQLite": (ELSEWHERE, "sqlite:///{folder}/store.db"),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_worker_is_killed_before_celery_answers(
    stage: Callable[..., Stage], place: tuple[int, str]
) -> None:
    scene = stage(*place)
    first = scene.start(concurrency=12)
    follow = {name: scene.signature("follow", f"after {name}") for name in ("linked", "quiet", "failed")}
    answers: dict[str, AsyncResult] = {
        "linked": scene.signature("early", "linked", "settled").apply_async(link=follow["linked"]),
        "failed": scene.signature("early", "failed", "settled", fails=True).apply_async(
            link_error=follow["failed"]
        ),
        "after chain": chain(
            scene.signature("early", "head", "settled"), scene.signature("follow", "after chain")
        ).apply_async(),
        "after chord": chord(
            [scene.signature("early", f"part {n}", "settled") for n in range(2)],
            scene.signature("follow", "after chord"),
        ).apply_async(),
        "reported": scene.signature("reported", "reported", "settled").apply_async(
            link=scene.signature("follow", "after reported")
        ),
    }
    scene.signature("quiet", "quiet", "settled").apply_async(link=follow["quiet"])
    stopping = ["linked", "failed", "head", "part 0", "part 1", "reported", "quiet"]
    # Celery stores a failure before it calls errbacks, and before it fails the rest of a chain.
    follow["half"] = scene.signature("follow", "after half")
    answers["half"] = scene.signature("early", "half", "failure stored", fails=True).apply_async(
        link_error=follow["half"]
    )
    stopping.append("half")
    plain = {"asked": "asked"}
    if place[0] == ELSEWHERE:
        plain["plain"] = "early"
    if place[1].startswith("sqlite"):
        plain["committed"] = "committed"
    for name, task in plain.items():
        answers[name] = scene.signature(task, name, "settled").apply_async()
        stopping.append(name)
    scene.wait_stopped(*stopping)
    first.kill()
    states = {name: answer.state for name, answer in answers.items()}
    assert states == {**dict.fromkeys(answers, "PENDING"), "half": "FAILURE"}
    assert len(scene.owed()) == len(stopping)
    scene.start(concurrency=2)
    ends = {name: answer.get(timeout=WITHIN, propagate=False) for name, answer in answers.items()}
    assert {type(ends.pop(name)) for name in ("failed", "half")} == {ValueError}
    assert ends == {name: name if name.startswith("after") else f"done: {name}" for name in ends}
    after = [*(f"after {name}" for name in (*follow, "reported")), "after chain", "after chord"]
    for intent in after:
        scene.effects.wait(intent, timeout=WITHIN)
    wait_for(lambda: not scene.owed(), WITHIN, "the calls to be dropped")
    once = [*stopping, *after, "reported is SUCCESS"]
    assert scene.effects.counts() == dict.fromkeys(once, 1)


def test_a_worker_is_killed_before_it_notes_that_celery_has_answered(stage: Callable[..., Stage]) -> None:
    """Recovery looks whether the caller has its answer, and publishes nothing."""
    scene = stage(ELSEWHERE)
    first = scene.start(concurrency=4)
    calls = [
        scene.signature("early", "plain", "answered").apply_async(),
        scene.signature("early", "linked", "answered").apply_async(link=scene.signature("follow", "after")),
        scene.signature("early", "failed", "answered", fails=True).apply_async(),
    ]
    scene.wait_stopped("plain", "linked", "failed")
    scene.effects.wait("after")
    first.kill()
    assert [call.state for call in calls] == ["SUCCESS", "SUCCESS", "FAILURE"]
    assert len(scene.owed()) == len(calls)
    second = scene.start()
    wait_for(lambda: not scene.owed(), WITHIN, "recovery to see that the callers have their answers")
    assert "received" not in second.log_text()
    assert scene.effects.counts() == dict.fromkeys(("plain", "linked", "failed", "after"), 1)


def test_a_live_worker_takes_long_to_answer(stage: Callable[..., Stage]) -> None:
    """Recovery leaves an answer to the process that is giving it, however long that takes."""
    scene = stage(ELSEWHERE)
    worker = scene.start()
    scene.signature("slow", "slow").apply_async(link=scene.signature("follow", "after"))
    (before,) = wait_for(lambda: list(scene.ledger.list("succeeded")), WITHIN, "the outcome")
    wait_for(  # the worker of these tests lets recovery look after two seconds
        lambda: [one for one in scene.ledger.list() if one.changed_at > before.changed_at + 3 * 2],
        WITHIN,
        "the record to be kept fresh",
    )
    Gate(scene.folder / "gate-slow").open()
    wait_for(lambda: not scene.owed(), WITHIN, "the call to be dropped")
    assert worker.log_text().count("received") == 2
    assert scene.effects.counts() == {"slow": 1, "after": 1}


@pytest.mark.parametrize("options", [(), ("--max-tasks-per-child", "1")], ids=["warm", "child by child"])
def test_a_process_notes_the_answers_that_it_gave_before_it_ends(
    stage: Callable[..., Stage], options: tuple[str, ...]
) -> None:
    scene = stage(ELSEWHERE)
    scene.environment["OWED_LEASE"] = "30"  # then it notes them every five seconds
    worker = scene.start(options=options)
    calls = [scene.signature("early", f"n{n}").apply_async() for n in range(4)]
    for call in calls:
        call.get(timeout=WITHIN)
        call.forget()
    if not options:
        worker.stop()
    wait_for(lambda: not scene.owed(), WITHIN if options else 0.0, "the answers to be noted")
    known = [AsyncResult(call.id, app=scene.app).state for call in calls]
    assert known == ["PENDING"] * 4  # nobody stores again what its caller forgot


def test_nothing_is_owed_for_long_when_nothing_breaks(stage: Callable[..., Stage]) -> None:
    scene = stage(ELSEWHERE)
    worker = scene.start(concurrency=2)
    number = 250  # more than are noted at once
    calls = [scene.signature("early", f"n{n}").apply_async() for n in range(number)]
    parts = chord(
        [scene.signature("early", f"part {n}") for n in range(3)], scene.signature("follow", "after")
    ).apply_async()
    for call in (*calls, parts):
        call.get(timeout=WITHIN)
    wait_for(lambda: not scene.owed(), WITHIN, "the calls to be dropped")
    assert worker.log_text().count("received") == number + 3 + 1
    assert list(scene.ledger.list("open")) == []
