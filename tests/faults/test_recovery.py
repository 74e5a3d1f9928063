"""Nobody calls again: what had begun or was accepted ends all the same, and its callers receive an answer.

The broker is a Redis database that the tests empty, which is as good as a broker that loses everything.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from celery import Celery, chain, chord, signature

from celery_idem import IdempotentTask, Receipt
from celery_idem.integration import submitting
from tests.faults.app import body
from tests.faults.conftest import Stage
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for

SHORT = {"FAULTS_LEASE": "2", "FAULTS_PUBLISHED_WAIT": "2000000"}
ANSWERED_WITHIN = 60.0  # seconds; lease and five seconds on a quiet machine


class Producer:
    """A process that has the tasks, and calls them with `submit`."""

    def __init__(self, stage: Stage, broker: str = "") -> None:
        self.app = Celery(
            "producer", broker=broker or stage.broker_url, backend=stage.backend_url, set_as_current=False
        )
        self.app.conf.update(
            idem_store=stage.store_url, task_default_queue=stage.queue, task_publish_retry=False
        )

    def submit(self, task: str, intent: str) -> Receipt:
        if task not in self.app.tasks:
            self.app.task(base=IdempotentTask, bind=True, name=task, intent=("intent",))(body)
        return self.app.tasks[task].submit(intent=intent, policy=task.partition(".")[0])


@pytest.fixture
def stage(
    make_stage: Callable[..., Stage], own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stage]:
    monkeypatch.setattr(submitting, "ACCEPTED_FOR", 2.0)
    made = make_stage("redis", own_redis.url_for(0), own_redis)
    yield made
    for worker in made.workers:
        worker.kill()


def lose_everything(stage: Stage) -> None:
    """The broker's database is empty. Records and results are in others."""
    with stage.publisher.connection_for_write() as connection:
        connection.default_channel.client.flushdb()


def more_than(stage: Stage, effects: int) -> bool:
    return len(stage.effects.all()) > effects


def recover(stage: Stage, *options: str) -> str:
    env = {**os.environ, "FAULTS_BROKER": stage.broker_url, "FAULTS_STORE": stage.store_url}
    env["FAULTS_BACKEND"], env["FAULTS_FOLDER"] = stage.backend_url, str(stage.folder)
    command = [sys.executable, "-m", "celery", "-A", "tests.faults.app", "idem", "recover", *options]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=60).stdout


def test_what_a_killed_host_left(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stage.start_worker(concurrency=8, env=SHORT)
    hang = {"at": "before effect", "how": "hang"}
    before = {policy: stage.call(f"{policy}.early", **hang) for policy in ("in_doubt", "resume", "reconcile")}
    stays, retried = stage.call("stays.early", **hang), stage.call("retried.early")
    elsewhere = uuid.uuid4().hex[:12]
    linked, header, ends = (uuid.uuid4().hex[:12] for _ in range(3))

    def told(task: str, intent: str, **how: str) -> signature:
        kwargs = {"intent": intent, "policy": task.partition(".")[0], **how}
        return signature(task, kwargs=kwargs, immutable=True, app=stage.publisher)

    links = [uuid.uuid4().hex[:12], uuid.uuid4().hex[:12]]
    after_chain = chain(told("reconcile.early", links[0], **hang), told("rerun.early", linked)).apply_async()
    heads = [uuid.uuid4().hex[:12], header]
    after_chord = chord(
        [told("reconcile.early", heads[0], **hang), told("reconcile.early", heads[1])],
        told("rerun.early", ends),
    ).apply_async()
    for case in (*before.values(), stays):
        case.wait_hanging()
    for intent in (links[0], heads[0]):
        place = stage.folder / f"hangs-{intent}"
        wait_for(place.exists, message=f"{intent} to hang")
    retried.wait_state("scheduled")
    first.kill()
    producer, cut_off = Producer(stage), Producer(stage, "redis://127.0.0.1:1/0")
    lost = producer.submit("in_doubt.early", uuid.uuid4().hex[:12])
    not_sent = cut_off.submit("in_doubt.early", uuid.uuid4().hex[:12])
    unknown = producer.submit("unknown.early", elsewhere)
    with monkeypatch.context() as dying:
        dying.setattr(IdempotentTask, "apply_async", lambda *_, **__: sys.exit(1))
        with pytest.raises(SystemExit):
            producer.submit("in_doubt.early", "killed-between")
    lose_everything(stage)
    assert (lost.status, not_sent.status, not_sent.code, unknown.status) == (
        "accepted",
        "accepted",
        "not_sent",
        "accepted",
    )
    wait_for(
        lambda: recover(stage, "--dry-run").count("not published: ") == 2,
        ANSWERED_WITHIN,
        "the unknown task and the one that says recover=False to be overdue",
    )
    assert not stage.publisher.connection_for_read().default_channel.client.exists(stage.queue)
    for _ in range(2):  # both look for what is overdue
        stage.start_worker(concurrency=4, env=SHORT)
    sees = {policy: case.wait_answer(ANSWERED_WITHIN) for policy, case in before.items()}
    assert sees == {"in_doubt": "OutcomeUnknown", "resume": "OutcomeUnknown", "reconcile": "the result"}
    assert {policy: case.effects for policy, case in before.items()} == {
        "in_doubt": 0,
        "resume": 0,
        "reconcile": 1,
    }
    assert (retried.wait_answer(ANSWERED_WITHIN), retried.effects) == ("the result", 1)
    assert after_chain.get(timeout=ANSWERED_WITHIN) == f"done: {linked}"
    assert after_chord.get(timeout=ANSWERED_WITHIN) == f"done: {ends}"
    for receipt in (lost, not_sent):
        assert receipt.wait(ANSWERED_WITHIN).status in ("executed", "replayed")
    wait_for(lambda: stage.effects.count("killed-between") == 1, ANSWERED_WITHIN, "what was accepted to run")
    once = [links[0], linked, *heads, ends, "killed-between"]
    assert {intent: stage.effects.count(intent) for intent in once} == dict.fromkeys(once, 1)
    assert (stays.state, stays.effects, stays.result.state) == ("lapsed", 0, "STARTED")
    entry = stage.ledger.get(unknown.key)
    assert entry is not None
    assert (entry.state, entry.record.recovery) == ("accepted", None)


def test_everything_dies_twice(stage: Stage) -> None:
    """`RECOVERY_ACTIONS=300` for the large one."""
    number = int(os.environ.get("RECOVERY_ACTIONS", "60"))
    producer = Producer(stage)
    receipts = {}
    for third in range(3):
        workers = [stage.start_worker(concurrency=2, env=SHORT) for _ in range(2)]
        seen = len(stage.effects.all())
        for n in range(third, number, 3):
            receipts[f"action-{n}"] = producer.submit("reconcile.early", f"action-{n}")
        if third < 2:
            wait_for(partial(more_than, stage, seen), ANSWERED_WITHIN, "the first effects")
            for worker in workers:
                worker.kill()
            lose_everything(stage)
    ends = {intent: receipt.wait(ANSWERED_WITHIN) for intent, receipt in receipts.items()}
    assert {intent: end.result for intent, end in ends.items()} == {
        intent: f"done: {intent}" for intent in receipts
    }
    assert sorted(str(one["intent"]) for one in stage.effects.all()) == sorted(receipts)
