"""The guarantees hold with every pool, with both brokers, and with early and late acknowledgement."""

from __future__ import annotations

import json
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import chain, chord, group
from kombu import Producer

from celery_idem import FingerprintMismatch, Ledger
from tests.celery.apps import Declined
from tests.celery.conftest import KINDS, SOON, Stage
from tests.support.waiting import wait_for

pytestmark = pytest.mark.parametrize("stage", KINDS, indirect=True, ids=str, scope="module")


def test_one_effect_and_the_same_answer_for_everybody(stage: Stage, name: str) -> None:
    answer = {"paid": 5, "of": [name]}
    assert stage.pay.delay(name, 5).get(timeout=SOON) == answer
    again = stage.pay.apply_async(kwargs={"cents": 5, "name": name, "note": "reworded"})
    assert again.get(timeout=SOON) == answer
    assert (again.state, again.retries) == ("SUCCESS", 0)
    assert stage.app.send_task("pay", (name,), {"cents": 5}).get(timeout=SOON) == answer
    assert stage.effects.count(name) == 1


def test_a_failure_is_an_answer_too(stage: Stage, name: str) -> None:
    for again in (False, True):
        call = stage.declined.delay(name)
        with pytest.raises(Declined) as caught:
            call.get(timeout=SOON)
        if sys.version_info >= (3, 11):  # earlier ones have no notes
            assert ("Nothing was run now" in call.traceback) == again
        assert caught.value.args == ("stolen", 7)
        assert caught.value.cents == 7
    assert stage.effects.count(name) == 1


def test_other_values_are_a_mismatch_in_both_directions(stage: Stage, name: str) -> None:
    for cents, other in ((5, 6), (6, 5)):
        intent = f"{name}-{cents}"
        assert stage.pay.delay(intent, cents).get(timeout=SOON)["paid"] == cents
        with pytest.raises(FingerprintMismatch) as caught:
            stage.pay.delay(intent, other).get(timeout=SOON)
        assert caught.value.differs == ("cents",)
        assert caught.value.key == stage.pay.intent_key(intent, cents)
        assert str(other) not in str(caught.value).replace(str(caught.value.key), "")
        assert stage.pay.delay(intent, cents).get(timeout=SOON)["paid"] == cents
        assert stage.effects.count(intent) == 1


def test_duplicates_wait_outside_of_the_slot_and_get_the_winners_answer(stage: Stage, name: str) -> None:
    first = stage.slow.delay(name)
    stage.effects.wait(name)
    duplicates = [stage.slow.delay(name) for _ in range(6)]
    if stage.kind.concurrency > 1:
        # There are more duplicates than slots. If they waited in their slots, no other task could run.
        assert stage.pay.delay(f"{name}-other").get(timeout=SOON)
        wait_for(lambda: all(stage.worker.sent_back(d.id) for d in duplicates), SOON, "all six to go back")
        assert {d.state for d in duplicates} == {"PENDING"}  # no RETRY state is stored
    stage.gate(name).open()
    assert stage.answers(first, *duplicates) == [f"slow {name}"] * 7
    assert [d.retries for d in duplicates] == [0] * 6
    assert stage.effects.count(name) == 1


def test_a_second_delivery_of_the_same_message(stage: Stage, name: str) -> None:
    task_id = str(uuid.uuid4())
    for _ in range(2):
        result = stage.slow.apply_async((name,), task_id=task_id)
    stage.effects.wait(name)
    if stage.kind.concurrency > 1:
        wait_for(lambda: stage.worker.sent_back(task_id), SOON, "the second delivery to go back")
    stage.gate(name).open()
    key = stage.slow.intent_key(name)
    ledger = Ledger.from_app(stage.app)
    wait_for(lambda: (entry := ledger.get(key)) and entry.state == "succeeded", SOON, "the outcome")
    wait_for(lambda: result.state == "SUCCESS", SOON, lambda: result.state)
    assert result.get(timeout=SOON) == f"slow {name}"
    assert stage.pay.delay(f"{name}-after").get(timeout=SOON)
    assert stage.effects.count(name) == 1


def test_a_chord_whose_members_are_duplicates_of_something_running(stage: Stage, name: str) -> None:
    first = stage.slow.delay(name)
    stage.effects.wait(name)
    result = chord([stage.slow.s(name), stage.pay.s(f"{name}-other", 5), stage.slow.s(name)])(stage.plain.s())
    stage.gate(name).open()
    assert result.get(timeout=SOON) == [f"slow {name}", {"paid": 5, "of": [f"{name}-other"]}, f"slow {name}"]
    assert first.get(timeout=SOON) == f"slow {name}"
    assert stage.effects.count(name) == 1


def test_canvas_goes_on_from_a_replay(stage: Stage, name: str) -> None:
    """After a replay, chains, groups, chords and links continue as they did the first time."""
    answer = {"paid": 5, "of": [name]}
    for n in range(2):
        steps = chain(stage.pay.s(name, 5), stage.told.s(f"{name}-chain-{n}"), stage.plain.s())
        members = group(stage.pay.s(name, 5), stage.pay.s(name, 5), stage.pay.s(f"{name}-2", 6))
        linked = stage.pay.apply_async((name, 5), link=stage.told.s(f"{name}-link-{n}"))
        failed = stage.declined.apply_async(
            (f"{name}-no",), link_error=stage.told_error.s(f"{name}-error-{n}")
        )
        chained, grouped = steps.apply_async(), members.apply_async()
        joined = chord(members, stage.plain.s()).apply_async()
        assert chained.get(timeout=SOON) == answer
        assert grouped.get(timeout=SOON) == [answer, answer, {"paid": 6, "of": [f"{name}-2"]}]
        assert joined.get(timeout=SOON) == [answer, answer, {"paid": 6, "of": [f"{name}-2"]}]
        assert linked.get(timeout=SOON) == answer
        with pytest.raises(Declined):
            failed.get(timeout=SOON)
        assert stage.effects.wait(f"{name}-chain-{n}")[0]["value"] == answer
        assert stage.effects.wait(f"{name}-link-{n}")[0]["value"] == answer
        told = stage.effects.wait(f"{name}-error-{n}")[0]
        assert (told["error"], told["args"]) == ("Declined", ["stolen", 7])
    assert (
        stage.effects.count(name)
        == stage.effects.count(f"{name}-2")
        == stage.effects.count(f"{name}-no")
        == 1
    )


def test_a_failing_member_fails_its_chord_each_time(stage: Stage, name: str) -> None:
    for _ in range(2):
        result = chord([stage.declined.s(name), stage.pay.s(name, 5)])(stage.plain.s())
        with pytest.raises(Exception, match="stolen"):
            result.get(timeout=SOON)
        # The chord fails with its first member, so the other one may run later.
        wait_for(lambda: stage.effects.count(name) >= 2, message="the effects of both members")
    assert stage.effects.count(name) == 2  # one of each task


def test_retries_go_on_and_their_end_is_final(stage: Stage, name: str) -> None:
    result = stage.retried.delay(name, 2)
    assert result.get(timeout=SOON) == [2, 3]
    assert stage.retried.delay(name, 0).get(timeout=SOON) == [2, 3]
    tries = stage.effects.of(f"try {name}")
    assert [t["attempt"] for t in tries] == [1, 2, 3]
    fences = [int(str(t["fence"])) for t in tries]
    assert fences == sorted(set(fences))
    assert stage.effects.count(name) == 1
    for _ in range(2):
        with pytest.raises(Declined) as caught:
            stage.retried.delay(f"{name}-never", 99).get(timeout=SOON)
        assert caught.value.args == ("still no", 99)
    assert stage.effects.count(f"try {name}-never") == 4


def test_a_duplicate_waits_for_a_retry_that_is_scheduled(stage: Stage, name: str) -> None:
    first = stage.retried_slowly.delay(name)
    stage.effects.wait(f"try {name}")
    wait_for(lambda: first.state == "RETRY", SOON, lambda: first.state)
    duplicate = stage.retried_slowly.delay(name)
    assert stage.answers(first, duplicate) == [1, 1]
    assert duplicate.retries == 0
    assert stage.effects.count(f"try {name}") == 2
    assert stage.effects.count(name) == 1


def test_a_hundred_publishes_at_once_are_one_effect(stage: Stage, name: str) -> None:
    with ThreadPoolExecutor(8) as publishers:
        results = list(publishers.map(lambda n: stage.slow.delay(name), range(100)))
    stage.gate(name).open()
    assert stage.answers(*results) == [f"slow {name}"] * 100
    assert stage.effects.count(name) == 1


def test_a_foreign_producer_that_knows_nothing_of_us(stage: Stage, name: str) -> None:
    """A message with only the headers that Celery's protocol requires is guarded."""

    def send(args: list[Any], kwargs: dict[str, Any]) -> str:
        task_id = str(uuid.uuid4())
        with stage.app.connection_for_write() as connection, connection.channel() as channel:
            Producer(channel).publish(
                json.dumps([args, kwargs, None]),
                routing_key=stage.app.conf.task_default_queue,
                headers={"task": "pay", "id": task_id, "lang": "php"},
                content_type="application/json",
                content_encoding="utf-8",
            )
        return task_id

    ids = [send([name], {}), send([], {"name": name, "cents": 5}), send([name, 5], {"note": "x"})]
    answers = [stage.app.AsyncResult(task_id).get(timeout=SOON) for task_id in ids]
    assert answers == [{"paid": 5, "of": [name]}] * 3
    assert stage.pay.delay(name, 5).get(timeout=SOON) == answers[0]
    assert stage.effects.count(name) == 1
    with pytest.raises(FingerprintMismatch):
        stage.app.AsyncResult(send([name], {"cents": 6})).get(timeout=SOON)
