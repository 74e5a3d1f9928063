"""Executions that are cut short: the store does not answer, or an interrupt comes at a bad moment."""

from __future__ import annotations

import pytest

from celery_idem import OutcomeUnknown, StoreError
from celery_idem.core.model import State
from celery_idem.engine.claim import Hold
from tests.support.jobs import KEY, Bench, FakeJob, Left


def test_down_before_the_body_it_comes_back_with_its_owner(bench: Bench) -> None:
    bench.store.crash("before create", times=99)
    job = FakeJob()
    with pytest.raises(Left):
        bench.runner.run(job)
    assert job.ran == 0
    ((seconds, carried, _),) = job.came_back
    assert seconds == 0
    assert len(carried) == 1


def test_a_claim_whose_reply_got_lost_is_taken_up_by_the_message_that_carries_it(bench: Bench) -> None:
    bench.store.crash("after create")
    lost = FakeJob()
    with pytest.raises(Left):
        bench.runner.run(lost)
    assert bench.state is State.RUNNING
    with pytest.raises(Left):  # no other execution takes it
        bench.run(task_id="two")
    carried = lost.came_back[0][1]
    job = FakeJob("taken up", carried=carried)
    assert bench.runner.run(job) == "taken up"
    assert job.claims[0].attempt == 1
    assert bench.run(carried=carried) == "taken up"


def test_in_doubt_or_not_a_carried_claim_is_taken_up(bench: Bench) -> None:
    bench.store.crash("after create")
    lost = FakeJob()
    with pytest.raises(Left):
        bench.runner.run(lost)
    bench.lapse()
    with pytest.raises(OutcomeUnknown):
        bench.run(task_id="two")
    assert bench.run("taken up", carried=lost.came_back[0][1]) == "taken up"


def test_a_wait_in_place_carries_too(bench: Bench) -> None:
    bench.store.crash("after create", times=3)
    job = FakeJob(wait=lambda: None)
    assert bench.runner.run(job) == "done"
    assert job.ran == 1
    assert [len(carried) for _, carried, _ in job.came_back] == [1, 2, 3]


def test_what_is_carried_is_bounded(bench: Bench) -> None:
    bench.store.crash("before create", times=40)
    job = FakeJob(wait=lambda: None)
    bench.runner.run(job)
    assert max(len(carried) for _, carried, _ in job.came_back) == 16


def test_or_it_raises_or_runs_unguarded(bench: Bench) -> None:
    bench.store.crash("before create", times=99)
    raising, running = FakeJob(on_store_error="raise"), FakeJob(on_store_error="run")
    with pytest.raises(StoreError, match="Nothing was run"):
        bench.runner.run(raising)
    assert raising.ran == 0
    assert bench.runner.run(running) == "done"
    assert (running.ran, running.claims[0].guarded) == (1, False)
    assert "unguarded" in bench.kinds


def test_down_after_the_body_its_caller_gets_the_truth_and_nobody_a_second_run(bench: Bench) -> None:
    bench.store.crash("before replace", times=99)
    assert bench.run() == "done"
    assert "unsettled" in bench.kinds
    bench.store.heal()
    bench.lapse()
    job = FakeJob()
    with pytest.raises(OutcomeUnknown):
        bench.runner.run(job)
    assert job.ran == 0


def test_after_the_body_it_keeps_trying_for_as_long_as_it_should(bench: Bench) -> None:
    bench.store.crash("before replace", times=2)
    assert bench.run(patience=5.0) == "done"
    assert bench.state is State.SUCCEEDED


def test_an_outcome_whose_reply_got_lost_is_settled_once(bench: Bench) -> None:
    bench.store.crash("after replace")
    assert bench.run(patience=5.0) == "done"
    assert bench.kinds.count("settled") == 1
    assert bench.run() == "done"


def test_a_record_that_the_store_lost_is_written_again(bench: Bench) -> None:
    def body(claim: Hold) -> str:
        assert bench.ledger.forget(KEY)
        return "done"

    assert bench.run(body) == "done"
    assert bench.run() == "done"


# --- interrupts ---------------------------------------------------------------------------------------------


def test_a_soft_time_limit_while_the_outcome_is_written_does_not_lose_it(bench: Bench) -> None:
    class SoftTimeLimit(Exception):
        pass

    def interrupt() -> None:
        raise SoftTimeLimit

    for point in ("before replace", "after replace"):
        other = Bench()
        other.store.crash(point, interrupt)
        job = FakeJob()
        assert other.runner.run(job) == "done"
        assert other.state is State.SUCCEEDED
        assert other.run() == "done"


def test_an_exit_while_the_outcome_is_written_goes_on_and_the_outcome_is_kept(bench: Bench) -> None:
    def leave() -> None:
        raise SystemExit(1)

    bench.store.crash("before replace", leave)
    with pytest.raises(SystemExit):
        bench.run()
    assert bench.state is State.SUCCEEDED


@pytest.mark.parametrize("point", ["before create", "after create"])
def test_an_interrupt_around_the_claim_lets_go_of_it(bench: Bench, point: str) -> None:
    def leave() -> None:
        raise SystemExit(1)

    bench.store.crash(point, leave)
    job = FakeJob()
    with pytest.raises(SystemExit):
        bench.runner.run(job)
    assert job.ran == 0
    assert bench.run("later") == "later"
