"""What was begun or accepted ends although no caller calls again, and its callers receive an answer.

Where the broker is a Redis database, the tests empty it, as if the broker had lost every message.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from celery import Celery, chain, chord, signature
from celery.exceptions import ChordError

from celery_idem import IdempotentTask, OutcomeUnknown, Receipt
from celery_idem.integration import recovering, submitting
from tests.faults.app import body
from tests.faults.conftest import Stage
from tests.support.servers import RabbitMQServer, RedisServer
from tests.support.waiting import wait_for

SHORT = {"FAULTS_LEASE": "2", "FAULTS_PUBLISHED_WAIT": "2000000"}
ANSWERED_WITHIN = 60.0  # seconds; on a quiet machine it takes the lease and five seconds


class Producer:
    """A producer that has the tasks and calls them with `submit`."""

    def __init__(self, stage: Stage, broker: str = "", **transport: Any) -> None:
        self.app = Celery(
            "producer", broker=broker or stage.broker_url, backend=stage.backend_url, set_as_current=False
        )
        self.app.conf.update(
            idem_store=stage.store_url,
            task_default_queue=stage.queue,
            task_publish_retry=False,
            broker_transport_options=transport,
        )

    def task(self, name: str) -> IdempotentTask:
        if name not in self.app.tasks:
            self.app.task(base=IdempotentTask, bind=True, name=name, intent=("intent",))(body)
        return self.app.tasks[name]

    def submit(self, task: str, intent: str) -> Receipt:
        return self.task(task).submit(intent=intent, policy=task.partition(".")[0])


@pytest.fixture
def stage(
    make_stage: Callable[..., Stage], own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stage]:
    monkeypatch.setattr(submitting, "ACCEPTED_FOR", 2.0)
    yield from without_workers(make_stage("redis", own_redis.url_for(0), own_redis))


@pytest.fixture
def on_rabbitmq(
    make_stage: Callable[..., Stage], own_redis: RedisServer, rabbitmq: RabbitMQServer
) -> Iterator[Stage]:
    yield from without_workers(make_stage("rabbitmq", rabbitmq.url, own_redis))


def without_workers(stage: Stage) -> Iterator[Stage]:
    """Yield the stage, then kill its workers: the next test uses the same store."""
    yield stage
    for worker in stage.workers:
        worker.kill()


def lose_everything(stage: Stage) -> None:
    """Empty the broker's database. Records and results are in other databases."""
    with stage.publisher.connection_for_write() as connection:
        connection.default_channel.client.flushdb()


def queued(stage: Stage) -> int:
    with stage.publisher.connection_for_read() as connection:
        return int(connection.default_channel.queue_declare(stage.queue, passive=True).message_count)


def told(stage: Stage, task: str, intent: str, **how: str) -> signature:
    kwargs = {"intent": intent, "policy": task.partition(".")[0], **how}
    return signature(task, kwargs=kwargs, immutable=True, app=stage.publisher)


def intents(number: int) -> list[str]:
    return [uuid.uuid4().hex[:12] for _ in range(number)]


HANG = {"at": "before effect", "how": "hang"}

KILLED = """
import os, signal, sys
from celery_idem import IdempotentTask
from tests.faults.app import app
IdempotentTask.apply_async = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
app.tasks["in_doubt.early"].submit(intent=sys.argv[1], policy="in_doubt")
"""
"""A process that is killed after it accepts the call and before it publishes the message."""


def environment(stage: Stage) -> dict[str, str]:
    env = {"FAULTS_BROKER": stage.broker_url, "FAULTS_STORE": stage.store_url, "FAULTS_QUEUE": stage.queue}
    return {**os.environ, **env, "FAULTS_BACKEND": stage.backend_url, "FAULTS_FOLDER": str(stage.folder)}


def more_than(stage: Stage, effects: int) -> bool:
    return len(stage.effects.all()) > effects


def recover(stage: Stage, *options: str) -> str:
    command = [sys.executable, "-m", "celery", "-A", "tests.faults.app", "idem", "recover", *options]
    env = environment(stage)
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=60).stdout


def wait_hanging(stage: Stage, *hanging: str) -> None:
    for intent in hanging:
        wait_for((stage.folder / f"hangs-{intent}").exists, message=f"{intent} to hang")


def test_what_a_killed_host_left(stage: Stage) -> None:
    nobodys = f"{stage.queue}-nobodys"
    first = stage.start_worker(concurrency=10, env=SHORT, options=("-Q", f"{stage.queue},{nobodys}"))
    before = {policy: stage.call(f"{policy}.early", **HANG) for policy in ("in_doubt", "resume", "reconcile")}
    stays = stage.call("stays.early", **HANG)
    untold = stage.call("ambiguous.early", at="after settle", how="hang")
    elsewhere, linked, ends, untaken, beside, never = intents(6)
    links, heads = intents(1), intents(2)
    after_chain = chain(
        told(stage, "reconcile.early", links[0], **HANG), told(stage, "rerun.early", linked)
    ).apply_async()
    after_chord = chord(
        [told(stage, "reconcile.early", heads[0], **HANG), told(stage, "reconcile.early", heads[1])],
        told(stage, "rerun.early", ends),
    ).apply_async()
    given_up = chord(
        [
            told(stage, "untaken.early", untaken, **HANG).set(queue=nobodys),
            told(stage, "reconcile.early", beside),
        ],
        told(stage, "rerun.early", never),
    ).apply_async()
    for case in (*before.values(), stays, untold):
        case.wait_hanging()
    wait_hanging(stage, *links, heads[0], untaken)
    retried = stage.call("retried.early")  # the last call, because its retry must not be due before the kill
    retried.wait_state("scheduled")
    first.kill()
    producer, cut_off = Producer(stage), Producer(stage, "redis://127.0.0.1:1/0")
    lost = producer.submit("in_doubt.early", uuid.uuid4().hex[:12])
    not_sent = cut_off.submit("in_doubt.early", uuid.uuid4().hex[:12])
    unknown = producer.submit("unknown.early", elsewhere)
    killed = [sys.executable, "-c", KILLED, "killed-between"]
    assert subprocess.run(killed, env=environment(stage), timeout=60).returncode == -signal.SIGKILL
    lose_everything(stage)
    assert (lost.status, not_sent.status, not_sent.code, unknown.status) == (
        "accepted",
        "accepted",
        "not_sent",
        "accepted",
    )
    wait_for(
        lambda: recover(stage, "--dry-run").count("not published: ") == 3,
        ANSWERED_WITHIN,
        "the unknown task, the task with recover=False, and the doubt that only needs its answer to be overdue",
    )
    assert not stage.publisher.connection_for_read().default_channel.client.exists(stage.queue)
    for _ in range(2):  # both run recovery
        stage.start_worker(concurrency=4, env=SHORT)
    sees = {policy: case.wait_answer(ANSWERED_WITHIN) for policy, case in before.items()}
    assert sees == {"in_doubt": "OutcomeUnknown", "resume": "OutcomeUnknown", "reconcile": "the result"}
    assert {policy: case.effects for policy, case in before.items()} == {
        "in_doubt": 0,
        "resume": 0,
        "reconcile": 1,
    }
    assert (retried.wait_answer(ANSWERED_WITHIN), retried.effects) == ("the result", 1)
    assert (untold.wait_answer(ANSWERED_WITHIN), untold.effects) == ("OutcomeUnknown", 1)
    assert after_chain.get(timeout=ANSWERED_WITHIN) == f"done: {linked}"
    assert after_chord.get(timeout=ANSWERED_WITHIN) == f"done: {ends}"
    for receipt in (lost, not_sent):
        assert receipt.wait(ANSWERED_WITHIN).status in ("executed", "replayed")
    wait_for(lambda: stage.effects.count("killed-between") == 1, ANSWERED_WITHIN, "what was accepted to run")
    wait_for(lambda: given_up.state == "FAILURE", ANSWERED_WITHIN, "what no worker took to be given up")
    assert [type(one.result) for one in (given_up, given_up.parent[0])] == [ChordError, OutcomeUnknown]
    assert (stage.effects.count(untaken), stage.effects.count(never)) == (0, 0)
    once = [links[0], linked, *heads, ends, beside, "killed-between"]
    assert {intent: stage.effects.count(intent) for intent in once} == dict.fromkeys(once, 1)
    assert (stays.state, stays.effects, stays.result.state) == ("lapsed", 0, "STARTED")
    entry = stage.ledger.get(unknown.key)
    assert entry is not None
    assert (entry.state, entry.record.recovery) == ("accepted", None)


@pytest.mark.rabbitmq
def test_hosts_on_rabbitmq(on_rabbitmq: Stage, own_redis: RedisServer) -> None:
    """Workers of another queue or another broker recover what a killed host left, and do not run it themselves.

    When no worker of the first broker is left, a worker of another broker does run it.
    """
    stage = on_rabbitmq
    first = stage.start_worker(concurrency=8, env=SHORT)
    left = {
        (policy, at): stage.call(f"{policy}.early", at=at, how="hang")
        for policy in ("in_doubt", "resume", "reconcile")
        for at in ("before effect", "after effect")
    }
    asked = stage.call("reconcile.early", at="asked", how="hang")
    for case in (*left.values(), asked):
        first_pid = case.wait_hanging()
    first.kill()
    redis = Producer(stage, own_redis.url_for(3))
    for policy in ("in_doubt", "resume", "reconcile"):
        redis.task(f"{policy}.early")

    def overdue() -> int:
        return [one.why for one in recovering.recover(redis.app, dry_run=True)].count(
            recovering.ITS_OWN_FIRST
        )

    wait_for(lambda: overdue() == len(left) + 1, ANSWERED_WITHIN, "all of them to be overdue")
    assert not any(one.published for one in recovering.recover(redis.app))
    other = stage.start_worker(env=SHORT, options=("-Q", f"{stage.queue}-other"))
    wait_for(lambda: queued(stage) == len(left) + 1, ANSWERED_WITHIN, "their messages in their own queue")
    second = stage.start_worker(concurrency=4, env={**SHORT, "FAULTS_ASK": "100"})
    sees = {key: case.wait_answer(ANSWERED_WITHIN) for key, case in left.items()}
    assert {key for key, answer in sees.items() if answer == "the result"} == {
        ("reconcile", "before effect"),
        ("reconcile", "after effect"),
    }
    assert {answer for (policy, _), answer in sees.items() if policy != "reconcile"} == {"OutcomeUnknown"}
    ran = {("reconcile", "before effect"), *(key for key in left if key[1] == "after effect")}
    assert {key: case.effects for key, case in left.items()} == {key: int(key in ran) for key in left}
    # The worker that asks the destination is killed, and then no worker is left on this broker.
    linked, then = intents(2)
    after = chain(
        told(stage, "reconcile.early", linked, **HANG), told(stage, "rerun.early", then)
    ).apply_async()
    wait_hanging(stage, linked)
    wait_for(lambda: asked.wait_hanging() != first_pid, ANSWERED_WITHIN, "it to be asked about")
    for worker in (second, other):
        worker.kill()
    assert "received" not in other.log_text()
    stage.start_worker(
        concurrency=2, env={**SHORT, "FAULTS_BROKER": own_redis.url_for(3), "FAULTS_ELSEWHERE": "0"}
    )
    assert (asked.wait_answer(ANSWERED_WITHIN), asked.effects) == ("the result", 1)
    assert after.get(timeout=ANSWERED_WITHIN) == f"done: {then}"
    once = [linked, then]
    assert {intent: stage.effects.count(intent) for intent in once} == dict.fromkeys(once, 1)


def test_everything_dies_twice(stage: Stage) -> None:
    """The workers and the broker's messages are lost twice. Every action still has its effect exactly once.

    The environment variable RECOVERY_ACTIONS sets the number of actions.
    """
    number = int(os.environ.get("RECOVERY_ACTIONS", "300"))
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
