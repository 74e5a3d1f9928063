"""The broker is killed, or it redelivers a message while the task is running."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import running
from tests.faults.app import POLICIES
from tests.faults.conftest import BROKERS, Case, Stage
from tests.faults.test_recovery import ANSWERED_WITHIN, Producer
from tests.support.servers import RabbitMQServer, RedisServer
from tests.support.waiting import wait_for

BACK_WITHIN = 30.0  # seconds in which a restarted broker redelivers its messages, on a busy machine


@pytest.mark.parametrize("broker", BROKERS)
def test_broker_cut(
    broker: str, make_stage: Callable[..., Stage], own_redis: RedisServer, tmp_path: Path
) -> None:
    """The worker finishes its tasks. What the restarted broker redelivers finds the outcomes."""
    kind: Callable[[], RabbitMQServer | RedisServer] = (
        (lambda: RabbitMQServer(tmp_path / broker))
        if broker == "rabbitmq"
        else (lambda: RedisServer(tmp_path / broker, appendonly=True))
    )
    with running(kind) as server:
        stage = make_stage(broker, server.url, own_redis)
        worker = stage.start_worker(concurrency=9, env={"FAULTS_VISIBILITY": "2"})
        if isinstance(server, RabbitMQServer):
            what_it_does_not_take_is_kept(stage, server)
        cases = {
            (policy, acks): stage.call(f"{policy}.{acks}", at="after effect", how="hang")
            for policy in POLICIES
            for acks in ("early", "late")
        }
        for case in cases.values():
            case.wait_hanging()
        server.kill()
        for case in cases.values():
            case.gate.open()
        for case in cases.values():
            assert case.wait_answer() == "the result"
        server.restart()
        # Like a supervisor: with some versions of kombu a worker does not survive the loss of its Redis.
        worker.kill()
        worker = stage.start_worker(concurrency=8, env={"FAULTS_VISIBILITY": "2"})
        late = [case for (_, acks), case in cases.items() if acks == "late"]
        wait_for(
            # The first worker may have reconnected in time and received the redeliveries itself.
            lambda: all(received(stage, case) > 1 for case in late),
            BACK_WITHIN,
            lambda: f"redeliveries of what could not be acknowledged\n{worker.log_tail()}",
        )
        for (_, acks), case in cases.items():
            assert case.again().wait_answer(BACK_WITHIN) == "the result"
            assert (case.effects, case.state) == (1, "succeeded"), case.task
            case.row("broker cut after effect, back with its data", acks, "the result")
        worker.kill()


def what_it_does_not_take_is_kept(stage: Stage, server: RabbitMQServer) -> None:
    with server.memory_alarm():
        receipt = Producer(stage, confirm_publish=True).submit("in_doubt.early", "alarm")
        assert (receipt.status, receipt.code) == ("accepted", "not_sent")
    assert receipt.wait(ANSWERED_WITHIN).result == "done: alarm"
    assert stage.effects.count("alarm") == 1


@pytest.fixture
def stage(make_stage: Callable[..., Stage], own_redis: RedisServer) -> Stage:
    return make_stage("redis", own_redis.url_for(0), own_redis)


def received(stage: Stage, case: Case) -> int:
    return sum(worker.log_text().count(f"[{case.result.id}] received") for worker in stage.workers)


def test_visibility_timeout_shorter_than_the_task(stage: Stage) -> None:
    """Redis redelivers the message several times while the body runs. The body runs once."""
    for _ in range(2):
        stage.start_worker(concurrency=4, env={"FAULTS_VISIBILITY": "1"})
    cases = {policy: stage.call(f"{policy}.late", at="after effect", how="hang") for policy in POLICIES}
    for case in cases.values():
        case.wait_hanging()
        wait_for(lambda case=case: received(stage, case) > 1, message="a second delivery")  # type: ignore[misc]
    for case in cases.values():
        case.gate.open()
    for case in cases.values():
        sees = case.wait_answer()
        assert (sees, case.effects, case.wait_state("succeeded")) == ("the result", 1, "succeeded"), case.task
        case.row("visibility timeout shorter than the task", "late", sees)


def test_eta_longer_than_the_visibility_timeout(stage: Stage) -> None:
    """Redelivered copies of a message wait for the same ETA in two workers. The body runs once."""
    for _ in range(2):
        stage.start_worker(concurrency=4, env={"FAULTS_VISIBILITY": "1"})
    cases = {policy: stage.call(f"{policy}.late", countdown=4) for policy in POLICIES}
    for case in cases.values():
        sees = case.wait_answer()
        assert received(stage, case) > 1
        assert case.again().wait_answer() == "the result"
        assert (sees, case.effects, case.state) == ("the result", 1, "succeeded"), case.task
        case.row("ETA beyond the visibility timeout", "late", sees)
