"""All kinds of tasks and all kinds of endings, with a real worker."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import TimeoutError as CeleryTimeoutError

from celery_idem import FingerprintMismatch, InProgress, IntentError, Ledger, ResultUnavailable
from celery_idem.core.model import State
from tests.celery.apps import Busy, Declined
from tests.celery.conftest import SOON, Kind, Stage
from tests.support.effects import Effects
from tests.support.waiting import wait_for


def state_of(stage: Stage, key: str) -> str | None:
    entry = Ledger.from_app(stage.app).get(key)
    return entry.state if entry else None


# --- kinds of tasks -----------------------------------------------------------------------


def test_autoretry_is_a_retry(stage: Stage, name: str) -> None:
    assert stage.autoretried.delay(name, 2).get(timeout=SOON) == 2
    assert stage.autoretried.delay(name, 0).get(timeout=SOON) == 2
    assert (stage.effects.count(f"try {name}"), stage.effects.count(name)) == (3, 1)
    for _ in range(2):
        with pytest.raises(Busy, match="the 2 time"):
            stage.autoretried.delay(f"{name}-never", 99).get(timeout=SOON)
    assert stage.effects.count(f"try {name}-never") == 3


def test_a_pydantic_model_is_part_of_an_intent(stage: Stage, name: str) -> None:
    from tests.celery.apps import Order

    answer = {"name": name, "cents": 5}
    assert stage.modelled.delay(Order(name=name)).get(timeout=SOON) == answer
    assert stage.modelled.delay({"name": name}).get(timeout=SOON) == answer
    assert stage.modelled.delay(order={"name": name, "cents": 5}).get(timeout=SOON) == answer
    assert stage.app.send_task("modelled", ({"cents": 5, "name": name},)).get(timeout=SOON) == answer
    assert stage.effects.count(name) == 1
    stage.modelled.delay({"name": name, "cents": 6}).get(timeout=SOON)
    assert stage.effects.count(name) == 2


def test_a_class_based_task(stage: Stage, name: str) -> None:
    answers = [stage.shipping.delay(name, note=note).get(timeout=SOON) for note in "ab"]
    assert answers == ["shipped at attempt 1"] * 2
    with pytest.raises(TypeError):
        stage.app.send_task("shipping", (name,), {"unknown": 1}).get(timeout=SOON)
    assert stage.effects.count(name) == 1


def test_a_task_that_has_never_heard_of_us(stage: Stage, name: str) -> None:
    """A task that was not changed is guarded by `task_cls` and `task_annotations` alone."""
    refund = stage.app.tasks["old.refund"]
    assert [refund.delay(name, 5).get(timeout=SOON) for _ in range(2)] == [5, 5]
    with pytest.raises(FingerprintMismatch):
        refund.delay(name, cents=6).get(timeout=SOON)
    assert stage.effects.count(name) == 1


def test_tasks_without_an_intent_stay_ordinary(stage: Stage, name: str) -> None:
    for n in range(2):
        assert stage.told.delay(n, name).get(timeout=SOON) == n
    assert stage.effects.count(name) == 2
    # Celery's own tasks have the same base class.
    assert stage.told.chunks([(1, f"{name}-c"), (1, f"{name}-c")], 1).apply_async().get(timeout=SOON) == [
        [1],
        [1],
    ]
    assert stage.effects.count(f"{name}-c") == 2


def test_guarded_tasks_in_chunks_and_maps(stage: Stage, name: str) -> None:
    chunks = stage.exact.chunks([(name, 1), (name, 1), (name, 2)], 2)
    assert chunks.apply_async().get(timeout=SOON) == [[f"{name} 1", f"{name} 1"], [f"{name} 2"]]
    assert stage.exact.starmap([(name, 1), (name, 2)]).apply_async().get(timeout=SOON) == [
        f"{name} 1",
        f"{name} 2",
    ]
    assert stage.effects.count(name) == 2


def test_the_body_knows_its_claim(stage: Stage, name: str) -> None:
    result = stage.claimed.delay(name)
    claim = result.get(timeout=SOON)
    assert claim["key"] == stage.claimed.intent_key(name)
    assert (claim["attempt"], claim["task_id"], claim["lost"]) == (1, result.id, False)
    assert claim["fence"] > 1_700_000_000_000_000  # the store's clock
    assert claim["downstream"].startswith("charge-")


# --- identity ---------------------------------------------------------------------------------


def test_scope_and_occurrence_make_another_intent(stage: Stage, name: str) -> None:
    calls: list[dict[str, Any]] = [
        {},
        {"scope": "acme"},
        {"scope": "other"},
        {"occurrence": "2026-11"},
        {"scope": "acme", "occurrence": "2026-11"},
    ]
    for _ in range(2):
        for call in calls:
            assert stage.pay.apply_async((name,), **call).get(timeout=SOON)
    assert stage.effects.count(name) == len(calls)


def test_scope_and_occurrence_through_signatures_and_canvas(stage: Stage, name: str) -> None:
    for _ in range(2):
        stage.pay.s(name).set(scope="a").apply_async().get(timeout=SOON)
        stage.pay.signature((name,), occurrence="b").apply_async().get(timeout=SOON)
        stage.pay.s(name).apply_async(scope="a").get(timeout=SOON)
        stage.pay.si(name).clone().set(occurrence="b").delay().get(timeout=SOON)
        steps = chain(stage.plain.si(1), stage.pay.si(name).set(scope="c"), stage.plain.s())
        steps.apply_async().get(timeout=SOON)
        members = [stage.pay.s(name).set(scope="d"), stage.pay.s(name).set(scope="d", occurrence="e")]
        group(members).apply_async().get(timeout=SOON)
        chord(members, stage.plain.s()).apply_async().get(timeout=SOON)
        linked = stage.plain.apply_async((1,), link=stage.pay.si(name).set(scope="f"))
        linked.get(timeout=SOON)
    wait_for(lambda: stage.effects.count(name) >= 6, SOON, lambda: str(stage.effects.counts()))
    assert stage.effects.count(name) == 6  # a, b, c, d, d+e, f


def test_the_callers_key_is_the_identity(stage: Stage, name: str) -> None:
    def pay(intent: str, cents: int) -> Any:
        return stage.pay.apply_async((intent, cents), idempotency_key=f"order-{name}").get(timeout=SOON)

    assert pay(name, 5) == pay(name, 5)
    with pytest.raises(FingerprintMismatch) as caught:
        pay(f"{name}-2", 6)
    assert set(caught.value.differs) == {"name", "cents"}
    assert stage.effects.count(name) == 1
    assert stage.effects.count(f"{name}-2") == 0


def test_an_argument_without_meaning_is_refused_before_it_is_published(stage: Stage) -> None:
    with pytest.raises(IntentError) as caught:
        stage.pay.delay(float("nan"))
    assert caught.value.parameter == "name"


def test_a_call_that_does_not_fit_claims_nothing(stage: Stage, name: str) -> None:
    with pytest.raises(TypeError):
        stage.pay.delay(name, unknown=1)
    result = stage.app.send_task("pay", (name,), {"unknown": 1})
    with pytest.raises(TypeError):
        result.get(timeout=SOON)
    assert stage.pay.delay(name).get(timeout=SOON)
    assert stage.effects.count(name) == 1


def test_headers_of_the_caller_stay_and_are_not_written_to(stage: Stage, name: str) -> None:
    headers = {"tenant": "acme"}
    stage.pay.apply_async((name,), headers=headers).get(timeout=SOON)
    assert headers == {"tenant": "acme"}


def test_a_forged_key_of_another_task_does_not_count(stage: Stage, name: str) -> None:
    stage.pay.delay(name).get(timeout=SOON)
    headers = {"idem-key": stage.pay.intent_key(name)}
    stage.app.send_task("exact", (name,), headers=headers).get(timeout=SOON)
    assert stage.effects.count(name) == 2


# --- endings --------------------------------------------------------------------------------------


def test_a_result_that_no_serializer_takes_is_done_all_the_same(stage: Stage, name: str) -> None:
    first = stage.odd.delay(name)
    with pytest.raises(Exception, match="serializ"):  # the error of Celery's result backend
        first.get(timeout=SOON)
    with pytest.raises(ResultUnavailable) as caught:
        stage.odd.delay(name).get(timeout=SOON)
    assert caught.value.key == stage.odd.intent_key(name)
    assert state_of(stage, stage.odd.intent_key(name)) == "succeeded"
    assert stage.effects.count(name) == 1


def test_a_result_that_is_too_large_is_done_all_the_same(stage: Stage, name: str) -> None:
    assert stage.big.delay(name).get(timeout=SOON) == "x" * 200
    with pytest.raises(ResultUnavailable, match="max_result_bytes"):
        stage.big.delay(name).get(timeout=SOON)
    assert stage.effects.count(name) == 1


@pytest.mark.parametrize("kind", ["ignored", "rejected"])
def test_ignore_and_reject_release(stage: Stage, name: str, kind: str) -> None:
    task = stage.app.tasks[kind]
    for n in range(1, 3):
        task.delay(name)
        stage.effects.wait(name, n)
    wait_for(lambda: state_of(stage, task.intent_key(name)) == "released", SOON, "the release")
    assert stage.effects.count(name) == 2


BOTH = [Kind("prefork", "redis", True), Kind("prefork", "rabbitmq", True)]


@pytest.mark.parametrize("stage", BOTH, indirect=True, ids=str)
def test_a_rejected_message_that_goes_back_to_its_queue_runs_again(stage: Stage, name: str) -> None:
    """The requeued message runs. It is not a duplicate, although its task id is the same."""
    first = stage.requeued.delay(name, 2)
    assert first.get(timeout=SOON) == "done"
    assert (stage.effects.count(f"try {name}"), stage.effects.count(name)) == (3, 1)
    assert stage.requeued.delay(name, 2).get(timeout=SOON) == "done"
    assert (stage.effects.count(f"try {name}"), stage.effects.count(name)) == (3, 1)
    entry = Ledger.from_app(stage.app).get(stage.requeued.intent_key(name, 2))
    assert entry is not None
    assert (entry.record.task_id, entry.record.attempts, entry.record.crashes) == (first.id, 3, 0)


def test_a_duplicate_may_be_told_at_once(stage: Stage, name: str) -> None:
    first = stage.refuses_to_wait.delay(name)
    stage.effects.wait(name)
    with pytest.raises(InProgress) as caught:
        stage.refuses_to_wait.delay(name).get(timeout=SOON)
    assert caught.value.key == stage.refuses_to_wait.intent_key(name)
    assert caught.value.retry_after is not None
    assert 0 < caught.value.retry_after <= 5
    stage.gate(name).open()
    assert first.get(timeout=SOON) == "done"
    assert stage.refuses_to_wait.delay(name).get(timeout=SOON) == "done"
    assert stage.effects.count(name) == 1


def test_other_values_while_it_runs_are_told_at_once(stage: Stage, name: str) -> None:
    """The fingerprint is compared before the state, so a caller does not wait for the result of another call."""
    first = stage.app.tasks["slow_pay"].delay(name, 5)
    stage.effects.wait(name)
    with pytest.raises(FingerprintMismatch):
        stage.app.tasks["slow_pay"].delay(name, 6).get(timeout=SOON)
    assert state_of(stage, stage.app.tasks["slow_pay"].intent_key(name, 5)) == "running"
    stage.gate(name).open()
    assert first.get(timeout=SOON) == 5


def test_a_body_that_calls_itself_does_not_wait_for_itself(stage: Stage, name: str) -> None:
    assert stage.calls_itself.delay(name).get(timeout=SOON) == [name, [name, []]]
    assert stage.effects.count(name) == 3  # its own calls are part of its body
    assert stage.calls_itself.delay(name).get(timeout=SOON) == [name, [name, []]]
    assert stage.effects.count(name) == 3


def test_a_body_that_calls_its_task_with_another_intent_is_guarded(stage: Stage, name: str) -> None:
    assert stage.calls_another.delay(name, 2).get(timeout=SOON) == [2, [1, []]]
    assert stage.calls_another.delay(name, 1).get(timeout=SOON) == [1, []]
    assert [stage.effects.count(f"{name} {deep}") for deep in range(3)] == [1, 1, 1]


def test_a_body_may_call_other_tasks(stage: Stage, name: str) -> None:
    answer = {"paid": 9, "of": [f"{name} inner"]}
    assert stage.calls_the_others.delay(name).get(timeout=SOON) == [answer, answer]
    assert stage.effects.count(f"{name} inner") == 1


def test_a_duplicate_does_not_give_up_while_the_winner_runs_on(stage: Stage, name: str) -> None:
    first = stage.slow.delay(name)
    stage.effects.wait(name)
    duplicate = stage.slow.delay(name)
    with pytest.raises(CeleryTimeoutError):
        duplicate.get(timeout=1.5)
    entry = Ledger.from_app(stage.app).get(stage.slow.intent_key(name))
    assert entry is not None
    assert entry.record.state is State.RUNNING
    assert entry.record.task_id == first.id
    stage.gate(name).open()
    assert stage.answers(first, duplicate) == [f"slow {name}"] * 2
    assert stage.effects.count(name) == 1


def test_a_lease_is_kept_while_the_body_runs_longer(stage: Stage, name: str) -> None:
    """The lease is renewed while the body runs: the lease is 1.5 s and the body takes 3.2 s."""
    task = stage.app.tasks["longer_than_its_lease"]
    results = [task.delay(name) for _ in range(3)]
    assert stage.answers(*results) == ["done"] * 3
    assert stage.effects.count(name) == 1


# --- stored errors and states ------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "builtins.MemoryError",
        "builtins.StopIteration",
        "billiard.exceptions.WorkerLostError",
        "billiard.exceptions.Terminated",
        "billiard.exceptions.TimeLimitExceeded",
    ],
)
def test_a_replayed_error_is_no_message_to_the_workers_main_process(
    stage: Stage, name: str, kind: str
) -> None:
    special = stage.special
    with pytest.raises(Exception, match=f"of {name}"):  # run here: it could end a worker
        special(name, kind)
    assert state_of(stage, special.intent_key(name, kind)) == "failed"
    for _ in range(2):
        with pytest.raises(Exception, match=f"of {name}") as caught:
            special.delay(name, kind).get(timeout=SOON)
        assert type(caught.value).__name__ == kind.rpartition(".")[2]
        assert not isinstance(caught.value, MemoryError)
    assert stage.plain.delay("up").get(timeout=SOON) == "up"
    assert stage.worker.alive
    assert stage.effects.count(name) == 1


def test_a_listener_can_tell_a_replayed_failure(stage: Stage, name: str) -> None:
    for _ in range(2):
        with pytest.raises(Declined):
            stage.declined.delay(name).get(timeout=SOON)
    heard = Effects(stage.folder / "failures.jsonl").wait(name, 2)
    assert [(one["replayed"], one["request"]) for one in heard] == [(False, False), (True, True)]
    assert heard[0]["text"] == heard[1]["text"]


def test_a_state_that_the_body_wrote_itself_is_its_outcome(stage: Stage, name: str) -> None:
    assert [stage.said_done.delay(name).get(timeout=SOON) for _ in range(2)] == [{"paid": name}] * 2
    assert stage.effects.count(name) == 1
