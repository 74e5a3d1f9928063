"""The tests of this folder fail if the guard is removed. A test that passes without the guard proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.celery import test_every_stage as every
from tests.celery import test_tasks as tasks
from tests.celery.conftest import Kind, Stage, start
from tests.support.servers import RedisServer

NOTICED_BY: list[Callable[[Stage, str], None]] = [
    every.test_one_effect_and_the_same_answer_for_everybody,
    every.test_a_failure_is_an_answer_too,
    every.test_other_values_are_a_mismatch_in_both_directions,
    every.test_canvas_goes_on_from_a_replay,
    every.test_a_hundred_publishes_at_once_are_one_effect,
    every.test_a_foreign_producer_that_knows_nothing_of_us,
    every.test_a_chord_whose_members_are_duplicates_of_something_running,
    tasks.test_autoretry_is_a_retry,
    tasks.test_a_pydantic_model_is_part_of_an_intent,
    tasks.test_a_class_based_task,
    tasks.test_a_task_that_has_never_heard_of_us,
    tasks.test_scope_and_occurrence_make_another_intent,
    tasks.test_a_result_that_is_too_large_is_done_all_the_same,
    tasks.test_a_lease_is_kept_while_the_body_runs_longer,
]


@pytest.fixture(scope="module")
def stage(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    kind = Kind("prefork", "redis", True)
    stage = start(
        kind,
        redis.url,
        redis.url_for(1),
        tmp_path_factory.mktemp("unguarded"),
        module="tests.celery.unguarded:app",
    )
    yield stage
    stage.worker.kill()


@pytest.mark.parametrize("test", NOTICED_BY, ids=lambda test: test.__name__)
def test_without_the_claim_this_test_fails(
    stage: Stage, name: str, test: Callable[[Stage, str], None]
) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(stage, name)
    again = {
        intent: count for intent, count in stage.effects.counts().items() if name in intent and count > 1
    }
    assert again, "it failed, but not because something happened twice"
