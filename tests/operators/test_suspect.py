"""An effect that may have happened twice: what the record keeps about it, and where an operator sees it."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
import redis
from celery import Celery
from starlette.testclient import TestClient

from celery_idem import LeaseLost, Ledger
from celery_idem.adapters.inbox import inbox
from celery_idem.core import protocol
from celery_idem.core.model import MICROSECONDS, Done, Note, Outcome, Raised, Refused, State
from celery_idem.core.record import pack, unpack
from celery_idem.engine import events
from celery_idem.engine.claim import Hold
from celery_idem.stores import open_store
from celery_idem.stores.base import Announcement
from celery_idem.stores.memory import MemoryStore
from celery_idem.testing import FakeClock
from tests.operators.conftest import Idem
from tests.operators.intents import KEEP, claimed, suspected
from tests.operators.shop import remind, send_invoice
from tests.support.jobs import KEY, Bench, Ended
from tests.support.records import DEADLINE, OTHER, OUTCOME, OWN, STAMP, held


def key(customer: str) -> str:
    return send_invoice.intent_key(customer, 7)


def note_in(ledger: Ledger, key: str) -> Note:
    entry = ledger.get(key)
    assert entry is not None
    (note,) = entry.suspicions
    return note


# --- the rule --------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
def test_a_refused_end_is_noted_once_and_changes_nothing_else(state: State) -> None:
    stands = held(state, owner=OTHER, task_id="second", fence=99, place="there")
    late = held(State.RUNNING, owner=OWN, task_id="first", place="here")
    assert stands is not None
    assert late is not None
    decision, noted = protocol.settle(stands, late, OUTCOME, True, STAMP, STAMP + 5)
    assert decision == Refused(stands)
    assert noted is not None
    lease = stands.lease - 5 if state is State.SCHEDULED else stands.lease  # its retry is not delayed
    assert noted._replace(notes=stands.notes) == stands._replace(lease=lease)
    (note,) = noted.notes
    assert (note.at, note.by) == (STAMP + 5, OWN.hex())
    assert note.late == ("first", late.fence, "here", True, OUTCOME.payload, "second", 99, "there", STAMP)
    assert unpack(pack(noted), STAMP, "") == noted
    assert protocol.settle(noted, late, OUTCOME, True, STAMP, STAMP + 6) == (Refused(noted), None)


def test_a_retry_is_due_no_later() -> None:
    stands, late = held(State.SCHEDULED, owner=OTHER), held(State.RUNNING, owner=OWN)
    assert stands is not None
    assert late is not None
    _, noted = protocol.settle(stands, late, OUTCOME, True, STAMP, DEADLINE + 9)
    assert noted is not None
    assert protocol.left(noted, DEADLINE + 9, DEADLINE + 9) == 0


def test_nothing_is_suspected_where_no_other_execution_stands() -> None:
    late = held(State.RUNNING, owner=OWN)
    assert late is not None
    _, settled = protocol.settle(late, late, OUTCOME)
    other = Outcome(True, b"j2")
    assert protocol.settle(settled, late, other, True, STAMP, STAMP) == (Refused(settled), None)
    # Without suspicion: in the author's transaction the effect is rolled back.
    stands = late._replace(owner=OTHER)
    assert protocol.settle(stands, late, OUTCOME) == (Refused(stands), None)


def test_a_large_result_is_left_out() -> None:
    stands, late = held(State.RUNNING, owner=OTHER), held(State.RUNNING, owner=OWN)
    assert late is not None
    _, noted = protocol.settle(stands, late, Outcome(True, b"j" * 1025), True, STAMP, STAMP)
    assert noted is not None
    assert noted.notes[0].late is not None
    assert noted.notes[0].late.payload == b""


# --- in a store ------------------------------------------------------------------------


def test_a_settled_record_is_kept_as_long_as_without_the_note() -> None:
    clock = FakeClock()
    ledger = Ledger(MemoryStore(clock))
    for waits in (0, 1000, KEEP // MICROSECONDS - 1):
        late = claimed(ledger, KEY, lease=0, on_crash="rerun")
        claimed(ledger, KEY, on_crash="rerun").settle(OUTCOME, 0.0)
        clock.advance(waits)
        assert isinstance(late.settle(OUTCOME, 0.0), Refused)
        assert note_in(ledger, KEY)
        clock.advance(KEEP / MICROSECONDS - waits - 0.5)
        assert ledger.get(KEY) is not None
        clock.advance(1)
        assert ledger.get(KEY) is None


def test_a_record_of_another_policy_is_not_deleted_early() -> None:
    """The late writer's policy has a shorter retention. The record is kept for at least that time after the note."""
    clock = FakeClock()
    ledger = Ledger(MemoryStore(clock))
    late = claimed(ledger, KEY, lease=0, on_crash="rerun")
    stands = claimed(ledger, KEY, on_crash="rerun")
    stands.policy = stands.policy._replace(result_ttl=10 * KEEP)
    stands.settle(OUTCOME, 0.0)
    clock.advance(2 * KEEP / MICROSECONDS)
    late.settle(OUTCOME, 0.0)
    clock.advance(KEEP / MICROSECONDS - 1)
    assert note_in(ledger, KEY)


def test_the_one_that_has_it_goes_on_and_its_outcome_keeps_the_note() -> None:
    clock = FakeClock()
    ledger = Ledger(MemoryStore(clock))
    late = claimed(ledger, KEY, lease=0, on_crash="rerun")
    stands = claimed(ledger, KEY, on_crash="rerun")
    clock.advance(20)
    late.settle(OUTCOME, 0.0)
    clock.advance(20)  # 40 s after the claim with a lease of 30 s: the note has extended the lease
    stands.renew()
    stands.begin_step("charge")
    stands.end_step("charge", b"j1", 0.0)
    assert isinstance(stands.settle(OUTCOME, 0.0), Done)
    assert not stands.taken_over
    assert note_in(ledger, KEY)


@pytest.mark.parametrize("kind", [Raised.AMBIGUOUS, Raised.DOUBTFUL_RETRY, Raised.EXIT])
def test_a_late_body_that_does_not_know_its_effect_is_suspected_too(kind: Raised) -> None:
    bench = Bench()
    heard: list[events.Event] = []
    stop = events.listen(heard.append, here=True)

    def body(hold: Hold) -> str:
        bench.lapse()
        bench.run("the second", task_id="two", on_crash="rerun")
        raise Ended(kind)

    try:
        with pytest.raises(LeaseLost if kind is Raised.AMBIGUOUS else Ended):
            bench.run(body, on_crash="rerun")
    finally:
        stop()
    assert "stale_settle" in [event.kind for event in heard]
    assert "in_doubt" not in [event.kind for event in heard]
    note = note_in(bench.ledger, KEY)
    assert note.late is not None
    assert (note.late.task_id, note.late.succeeded, note.late.payload) == ("one", False, b"")


@pytest.mark.redis
def test_in_redis(redis_url: str) -> None:
    store = open_store(redis_url)
    ledger = Ledger(store, uuid.uuid4().hex)
    late = claimed(ledger, KEY, lease=0, on_crash="rerun")
    claimed(ledger, KEY, on_crash="rerun").settle(OUTCOME, 0.0)
    with redis.Redis.from_url(redis_url) as client:
        (name,) = client.keys(f"{ledger.namespace}:*")
        before = client.pttl(name)
        late.settle(OUTCOME, 0.0, Announcement(b"answer", b"of the late one", 60))
        assert note_in(ledger, KEY)
        assert client.get("answer") is None
        assert 0 < client.pttl(name) <= before + 1  # a millisecond is rounded up
    store.close()


# --- for an operator -------------------------------------------------------------------


def test_it_is_listed_shown_and_audited(app: Celery, idem: Idem, ledger: Ledger) -> None:
    late, stands = suspected(ledger, key("a"))
    claimed(ledger, key("b")).settle(OUTCOME, 0.0)
    listed = idem("list", "--suspect")
    assert listed.exit_code == 0
    assert "customer_id='a'" in listed.output
    assert [line.split()[2] for line in listed.output.splitlines() if "TWICE" in line] == [key("a")]
    (row,) = [json.loads(line) for line in idem("list", "--suspect", "--json").output.splitlines()]
    (suspicion,) = row["suspicions"]
    one, two = suspicion["late"], suspicion["stood"]
    assert (one["task_id"], two["task_id"]) == (late.task_id, stands.task_id)
    assert (one["place"], two["place"]) == ("shop@web-1, process 11", "shop@web-2, process 22")
    assert (one["result"], two["result"]) == ('"inv-1"', '"inv-2"')
    assert one["claimed_at"] <= two["claimed_at"] <= two["ended_at"] <= one["ended_at"]
    shown = idem("show", key("a")).output
    for what in (
        "TWICE",
        '"inv-1"',
        '"inv-2"',
        "shop@web-1, process 11",
        "shop@web-2, process 22",
        one["ended_at"],
        "Compare at the destination",
    ):
        assert what in shown
    assert "TWICE" not in idem("show", key("b")).output
    assert "double: shop.send_invoice" in idem("audit").output


def test_results_of_a_task_with_secrets_are_not_shown(app: Celery, idem: Idem, ledger: Ledger) -> None:
    suspected(ledger, remind.intent_key("a"), "s3cret", "s3cret")
    for words in (("show", remind.intent_key("a")), ("list", "--json")):
        assert "s3cret" not in idem(*words).output


def test_the_inbox_shows_both_attempts(app: Celery, ledger: Ledger) -> None:
    late, stands = suspected(ledger, key("a"))
    client = TestClient(inbox(app, authenticate=lambda request: "ann"))
    overview = client.get("/").text
    assert "May have happened twice" in overview
    assert key("a") in overview
    page = client.get(f"/intent?key={key('a')}").text
    for what in (
        late.task_id,
        stands.task_id,
        "shop@web-1, process 11",
        "shop@web-2, process 22",
        "inv-1",
        "inv-2",
        "Compare at the destination",
    ):
        assert what in page


# --- what waits for a person -----------------------------------------------------------


def test_one_filter_for_all_that_waits(app: Celery, idem: Idem, ledger: Ledger) -> None:
    """The alert's command lists the same intents that `stats` and the inbox count."""
    claimed(ledger, key("lapsed"), lease=0)
    claimed(ledger, key("doubt")).doubt("why", 0.0)
    claimed(ledger, key("runs"))
    listed = [
        json.loads(line)["key"] for line in idem("list", "--state", "waiting", "--json").output.splitlines()
    ]
    assert sorted(listed) == sorted([key("lapsed"), key("doubt")])
    assert "2 of them wait" in idem("stats").output
    page: Any = TestClient(inbox(app, authenticate=lambda request: "ann")).get("/")
    assert "2 intents wait for a decision" in page.text
