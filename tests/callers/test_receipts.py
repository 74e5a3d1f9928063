"""`submit` and its receipt: every status, with a real worker."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from celery import Celery
from kombu.exceptions import OperationalError

import celery_idem
from celery_idem import (
    ConfigurationError,
    IdempotencyError,
    IntentError,
    Receipt,
    StoreError,
    look_up,
    submit,
)
from celery_idem.integration.receipts import ADVICE, Code, Status
from tests.callers import shop as shops
from tests.support.effects import Effects, Gate
from tests.support.servers import RedisServer, free_port
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

pytestmark = pytest.mark.redis

FIELDS = ["status", "key", "task_id", "result", "reason", "code", "differs", "retry_after", "next"]


def test_new_then_known(shop: Celery, worker: CeleryWorker, done: Effects, name: str) -> None:
    pay = shop.tasks["shop.pay"]
    first = pay.submit(name, "7", 4200, note="please")
    assert (first.status, first.result, first.done) == ("accepted", None, False)
    assert first.key == pay.intent_key(name, "7", cents=4200)
    assert "Do NOT call again" in first.next
    answer = first.wait(20)
    assert (answer.status, answer.result) == ("executed", {"paid": 4200, "invoice": "7"})
    assert answer.task_id == first.task_id
    assert first.status == "accepted"  # a receipt is a value: waiting makes a new one

    again = pay.submit(cents=4200, invoice="7", customer=name, note="in other words")
    assert (again.status, again.result) == ("replayed", {"paid": 4200, "invoice": "7"})
    assert again.next == "Already done earlier; nothing was done now. Report it as done."
    assert again.wait(0) is again
    assert done.count(f"pay-{name}-7") == 1


def test_scope_occurrence_and_own_keys_are_other_intents(
    shop: Celery, worker: CeleryWorker, done: Effects, name: str
) -> None:
    pay = shop.tasks["shop.pay"]
    calls: list[dict[str, str]] = [
        {},
        {"scope": "acme"},
        {"occurrence": "second"},
        {"idempotency_key": f"mine-{name}"},
    ]
    receipts = [pay.submit(name, "7", 1, **call) for call in calls]
    assert [receipt.status for receipt in receipts] == ["accepted"] * 4
    assert {receipt.wait(20).status for receipt in receipts} == {"executed"}
    assert {pay.submit(name, "7", 1, **call).status for call in calls} == {"replayed"}
    assert done.count(f"pay-{name}-7") == 4
    # With the caller's own key every argument must match, also a free parameter.
    other = pay.submit(name, "7", 1, note="reworded", idempotency_key=f"mine-{name}")
    assert (other.status, other.differs) == ("conflict", ("note",))


def test_conflict_names_and_never_shows(shop: Celery, worker: CeleryWorker, done: Effects, name: str) -> None:
    pay = shop.tasks["shop.pay"]
    pay.submit(name, "7", 987654).wait(20)
    other = pay.submit(name, "7", 1)
    assert (other.status, other.differs, other.result) == ("conflict", ("cents",), None)
    assert other.next.startswith("Key already used with different cents. If this is a different action")
    assert "987654" not in json.dumps(other.to_dict())
    assert done.count(f"pay-{name}-7") == 1


def test_in_progress_resolves_to_the_winner(
    shop: Celery, worker: CeleryWorker, folder: Path, done: Effects, name: str
) -> None:
    slow = shop.tasks["shop.slow"]
    first = slow.submit(name)
    done.wait(f"slow-{name}")
    second = slow.submit(name)
    assert (second.status, second.task_id) == ("in_progress", first.task_id)
    assert second.retry_after is not None
    assert 0 < second.retry_after <= 5
    assert second.next == "Accepted and running. Do NOT call again, also not with reworded arguments."
    assert second.wait(0.1).status == "in_progress"
    Gate(folder / f"gate-{name}").open()
    assert (second.wait(20).status, second.wait(20).result) == ("replayed", f"slow {name}")
    assert (first.wait(20).status, first.wait(20).result) == ("executed", f"slow {name}")
    assert done.count(f"slow-{name}") == 1


def test_failed_is_final_and_known(shop: Celery, worker: CeleryWorker, done: Effects, name: str) -> None:
    fails = shop.tasks["shop.fails"]
    answers = [fails.submit(name).wait(20), fails.submit(name).wait(20)]
    for answer in answers:
        assert (answer.status, answer.reason, answer.final) == ("failed", "ValueError: error", True)
        assert "calling again unchanged gives this same answer" in answer.next
    assert done.count(f"fails-{name}") == 1


def test_nothing_was_done(shop: Celery, worker: CeleryWorker, done: Effects, name: str) -> None:
    fails = shop.tasks["shop.fails"]
    for count in (1, 2):  # calling again runs the body again
        answer = fails.submit(name, how="brief").wait(20)
        assert (answer.status, answer.reason, answer.final) == ("not_run", "Brief: brief", False)
        assert answer.next == "Nothing was done. Safe to call again unchanged."
        assert done.count(f"fails-{name}") == count


def test_in_doubt(shop: Celery, worker: CeleryWorker, done: Effects, name: str) -> None:
    fails = shop.tasks["shop.fails"]
    answers = [fails.submit(name, how="doubt").wait(20), fails.submit(name, how="doubt")]
    for answer in answers:
        assert answer.status == "in_doubt"
        assert "NoAnswer" in answer.reason
        assert answer.next == "It may have happened. Do not retry; a person must resolve it."
    assert done.count(f"fails-{name}") == 1


def test_done_without_a_kept_value(shop: Celery, worker: CeleryWorker, done: Effects, name: str) -> None:
    large = shop.tasks["shop.large"]
    large.submit(name).wait(20)
    again = large.submit(name)
    assert (again.status, again.result, again.code) == ("replayed", None, "not_kept")
    assert "idem_max_result_bytes" in again.reason
    assert again.next.endswith("Its result was not kept.")
    assert done.count(f"large-{name}") == 1


def test_to_dict_is_plain_json(shop: Celery, worker: CeleryWorker, name: str) -> None:
    pay = shop.tasks["shop.pay"]
    receipt = pay.submit(name, "7", 1)
    for stage in (receipt, receipt.wait(20), pay.submit(name, "7", 2)):
        told = stage.to_dict()
        assert list(told) == FIELDS
        assert json.loads(json.dumps(told)) == told
        assert told == stage.to_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        receipt.status = "executed"


def test_odd_values_become_text() -> None:
    import datetime as dt
    import decimal
    import uuid

    one = uuid.UUID(int=1)
    day = dt.date(2026, 11, 1)
    value = {"a": decimal.Decimal("1.10"), "b": one, "c": day, "d": (1, b"x"), "e": {3}, 5: float("nan")}
    told = Receipt("executed", "k", result=value).to_dict()["result"]
    assert told == {"a": "1.10", "b": str(one), "c": "2026-11-01", "d": [1, "eA=="], "e": [3], "5": "nan"}
    json.dumps(told, allow_nan=False)


def test_every_status_and_code_has_advice_and_a_row_in_the_docs() -> None:
    page = Path(__file__).parents[2].joinpath("docs/reference/callers.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|(.*)", page, re.MULTILINE)
    statuses, codes = typing.get_args(Status), [code for code in typing.get_args(Code) if code]
    assert list(dict.fromkeys(name for name, _ in rows)) == [*statuses, *codes]
    written = {(status, "") for status in statuses}
    for code, row in rows[len(statuses) :]:
        written |= {(status, code) for status in re.findall(r"`(\w+)`", row.split("|")[0])}
    assert written == set(ADVICE)
    for status, code in ADVICE:
        receipt = Receipt(status, "k", code=code, differs=("cents",))
        assert receipt.to_dict()["next"] == receipt.next != ""
        assert (receipt.done, receipt.final) == (
            status in ("executed", "replayed"),
            status in ("executed", "replayed") or (status == "failed" and code != "unsure"),
        )


# --- as a value ------------------------------------------------------------------------


def test_copies_can_wait(shop: Celery, worker: CeleryWorker, folder: Path, done: Effects, name: str) -> None:
    first = shop.tasks["shop.slow"].submit(name)
    copies = [copy.copy(first), copy.deepcopy(first), dataclasses.replace(first, retry_after=2.0)]
    assert copies[:2] == [first, first]
    Gate(folder / f"gate-{name}").open()
    assert [each.wait(20).status for each in copies] == ["executed"] * 3
    answer = first.wait(20)
    assert dataclasses.asdict(answer) == answer.to_dict() | {"differs": ()}
    assert list(dataclasses.asdict(answer)) == FIELDS
    assert copy.deepcopy(answer) == answer


def test_an_unpickled_receipt_says_that_it_cannot_wait(
    shop: Celery, worker: CeleryWorker, folder: Path, name: str
) -> None:
    first = shop.tasks["shop.slow"].submit(name)
    packed = pickle.dumps(first)
    assert shop.conf.broker_url.encode() not in packed
    unpickled = pickle.loads(packed)  # noqa: S301  # ours
    assert (unpickled, unpickled.next) == (first, first.next)
    with pytest.raises(IdempotencyError, match=re.escape(f"look_up(app, {first.key!r}")):
        unpickled.wait(0)
    Gate(folder / f"gate-{name}").open()
    assert first.wait(20).status == "executed"
    found = look_up(shop, unpickled.key)
    assert found is not None
    assert found.wait(20).result == f"slow {name}"
    again = pickle.loads(pickle.dumps(found))  # noqa: S301  # ours
    assert again == found
    assert again.wait() is again  # the status is final


# --- options ---------------------------------------------------------------------------


def test_both_submits_take_the_same_options(redis: RedisServer, folder: Path, name: str) -> None:
    app = shops.make(redis.url, folder)
    options: dict[str, Any] = {"queue": f"q-{name}", "priority": 3, "countdown": 5, "headers": {"x": "y"}}
    options["task_id"] = f"id-{name}"
    by_task = app.tasks["shop.pay"].submit(name, "7", 1, **options)
    by_name = submit(app, "shop.pay", (name, "8", 1), **options)
    assert by_task.task_id == by_name.task_id == f"id-{name}"
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue(f"q-{name}")
        sent = [queue.get(timeout=20) for _ in range(2)]
        queue.clear()
        queue.close()
    for message in sent:
        assert (message.headers["x"], message.headers["id"]) == ("y", f"id-{name}")
        assert message.headers["eta"]
        assert message.properties["priority"] == 3


def test_a_parameter_is_the_tasks_and_never_an_option(redis: RedisServer, folder: Path, name: str) -> None:
    app = shops.make(redis.url, folder)

    @app.task(base=celery_idem.IdempotentTask, name="shop.queued", intent=("queue",))
    def queued(queue: str, *, priority: int = 0) -> None: ...

    @app.task(base=celery_idem.IdempotentTask, name="shop.open", intent=celery_idem.ALL_ARGUMENTS)
    def open_ended(**rest: str) -> None: ...

    with app.connection_for_read() as connection:
        for task, own in ((queued, {"queue": "gold", "priority": 7}), (open_ended, {"eta": "noon"})):
            receipt = submit(app, task.name, kwargs=own, queue=f"q-{name}")
            assert receipt.key == task.intent_key(**own)
            with connection.SimpleQueue(f"q-{name}") as queue:
                message = queue.get(timeout=20)
                message.ack()
            assert message.payload[1] == own
            app.conf.task_default_queue = f"d-{name}-{task.name}"
            app.amqp.queues.clear()
            task.submit(**own, occurrence="by task")
            with connection.SimpleQueue(f"d-{name}-{task.name}") as queue:
                message = queue.get(timeout=20)
                message.ack()
            assert message.payload[1] == own


@pytest.mark.parametrize("wrong", [{"args": {"a": 1}}, {"args": "ab"}, {"args": {1}}, {"kwargs": [1]}])
@pytest.mark.parametrize("task", ["shop.pay", "nobody.has.it"])
def test_submit_refuses_what_is_no_call(shop: Celery, task: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be a"):
        submit(shop, task, **wrong)


def test_a_misspelt_option_is_refused_before_it_makes_another_action(shop: Celery) -> None:
    pay = shop.tasks["shop.pay"]
    for wrong in ("occurence", "occurrance", "scop", "scopes", "idempotent_key", "idempotency_keys"):
        for call in (pay.apply_async, pay.apply, lambda args, **it: pay.signature(args, **it).apply_async()):
            with pytest.raises(TypeError, match=f"there is no option {wrong}="):
                call(("a", "7", 1), **{wrong: "x"})
        for task in ("shop.pay", "nobody.has.it"):
            with pytest.raises(TypeError, match=rf"{task}: submit\(\) has no option {wrong}"):
                submit(shop, task, ("a", "7", 1), **{wrong: "x"})


# --- cost ------------------------------------------------------------------------------


def calls_of(client: Any) -> dict[str, int]:
    """Return the server's count of each command. Commands inside a script are counted too."""
    stats = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): entry["calls"] for name, entry in stats.items()}


def test_a_duplicate_costs_one_store_command_and_no_message(
    start_redis: Callable[..., RedisServer], start_worker: Callable[..., CeleryWorker], tmp_path: Path
) -> None:
    """A duplicate costs one script call in the store, and no command to the broker or the result backend.

    Broker, results and store are three servers, so that each has its own counts.
    """
    broker, results, store = (start_redis() for _ in range(3))
    app = shops.make(broker.url, tmp_path, result_backend=results.url, idem_store=store.url)
    env = {"CALLERS_URL": broker.url, "CALLERS_FOLDER": str(tmp_path)}
    env |= {"CALLERS_RESULTS": results.url, "CALLERS_STORE": store.url}
    worker = start_worker("tests.callers.apart:app", env=env)
    pay = app.tasks["shop.pay"]
    assert pay.submit("acme", "7", 1).wait(20).status == "executed"
    worker.stop()  # its heartbeats and polls would be counted too
    clients = [redis_py.Redis.from_url(server.url) for server in (broker, results, store)]
    before = [calls_of(client) for client in clients]
    assert pay.submit("acme", "7", 1, note="reworded").status == "replayed"
    assert submit(app, "shop.pay", ("acme", "7", 1)).status == "replayed"
    grown = [
        {
            command: count - old.get(command, 0)
            for command, count in calls_of(client).items()
            if count != old.get(command, 0) and command != "info"
        }
        for client, old in zip(clients, before, strict=True)
    ]
    assert grown[0] == {}
    assert grown[1] == {}
    # Each duplicate runs one script: the one that accepts a new call.
    assert grown[2] == {"evalsha": 2, "get": 2, "set": 2, "time": 2}
    for client in clients:
        client.close()


# --- servers that are away -------------------------------------------------------------


def test_a_store_that_is_down_accepts_nothing(
    redis: RedisServer, shop: Celery, worker: CeleryWorker, folder: Path, done: Effects, name: str
) -> None:
    away = f"redis://127.0.0.1:{free_port()}/0"
    app = shops.make(redis.url, folder, idem_store=away)
    receipt = app.tasks["shop.pay"].submit(name, "7", 1)
    assert (receipt.status, receipt.code, receipt.task_id) == ("not_run", "store_error", "")
    # With on_store_error "run" the message is published without a record, and the worker guards it.
    app = shops.make(redis.url, folder, idem_store=away, idem_on_store_error="run")
    receipt = app.tasks["shop.pay"].submit(name, "7", 1)
    assert receipt.status == "accepted"
    # The receipt's store does not answer, so its status comes from Celery's result.
    assert (receipt.wait(20).status, receipt.wait(20).result) == ("executed", {"paid": 1, "invoice": "7"})
    assert done.count(f"pay-{name}-7") == 1
    app = shops.make(redis.url, folder, idem_store=away, idem_on_store_error="raise")
    with pytest.raises(StoreError, match="not accepted"):
        app.tasks["shop.pay"].submit(name, "8", 1)


def test_what_the_broker_does_not_take_is_accepted_all_the_same(
    redis: RedisServer, shop: Celery, worker: CeleryWorker, folder: Path, done: Effects, name: str
) -> None:
    away = f"redis://127.0.0.1:{free_port()}/0"
    app = shops.make(away, folder, result_backend=redis.url, **shops.NO_BROKER)
    receipt = app.tasks["shop.pay"].submit(name, "7", 1)
    assert (receipt.status, receipt.code) == ("accepted", "not_sent")
    assert app.tasks["shop.pay"].submit(name, "7", 1).status == "in_progress"
    # The worker reaches its broker and publishes the call from the record.
    assert receipt.wait(30).result == {"paid": 1, "invoice": "7"}
    assert done.count(f"pay-{name}-7") == 1


def test_what_cannot_be_kept_is_not_accepted_without_a_broker(
    redis: RedisServer, shop: Celery, worker: CeleryWorker, folder: Path, done: Effects, name: str
) -> None:
    away = f"redis://127.0.0.1:{free_port()}/0"
    app = shops.make(away, folder, result_backend=redis.url, idem_keep_call=False, **shops.NO_BROKER)
    with pytest.raises(OperationalError):
        app.tasks["shop.pay"].submit(name, "7", 1)
    assert celery_idem.Ledger.from_app(shop).get(shop.tasks["shop.pay"].intent_key(name, "7", 1)) is None
    assert shop.tasks["shop.pay"].submit(name, "7", 1).wait(20).status == "executed"
    assert done.count(f"pay-{name}-7") == 1


# --- by name ---------------------------------------------------------------------------


def test_by_name_with_the_task_at_hand(shop: Celery, worker: CeleryWorker, done: Effects, name: str) -> None:
    first = submit(shop, "shop.pay", kwargs={"customer": name, "invoice": "7", "cents": 1}, scope="acme")
    assert first.key == shop.tasks["shop.pay"].intent_key(name, "7", 1, scope="acme")
    assert first.wait(20).status == "executed"
    assert submit(shop, "shop.pay", (name, "7", 1), scope="acme", priority=3).status == "replayed"
    assert done.count(f"pay-{name}-7") == 1


def test_by_name_without_any_task(redis: RedisServer, worker: CeleryWorker, done: Effects, name: str) -> None:
    app = Celery("orchestrator", broker=redis.url, backend=redis.url, set_as_current=False)
    call: dict[str, Any] = {"kwargs": {"customer": name, "invoice": "7", "cents": 1}, "occurrence": "x"}
    receipts = [submit(app, "shop.pay", **call) for _ in range(3)]
    assert {receipt.status for receipt in receipts} == {"accepted"}
    assert {receipt.key for receipt in receipts} == {""}  # this process does not know the signature
    answers = [receipt.wait(20) for receipt in receipts]
    assert {answer.status for answer in answers} == {"executed"}
    assert [answer.result for answer in answers] == [{"paid": 1, "invoice": "7"}] * 3
    assert done.count(f"pay-{name}-7") == 1

    other = submit(app, "shop.pay", (name, "7", 2), occurrence="x").wait(20)
    assert (other.status, other.differs) == ("conflict", ("cents",))
    assert other.key.startswith("shop.pay:")  # the worker returned it
    doubtful = submit(app, "shop.fails", (name, "doubt")).wait(20)
    assert doubtful.status == "in_doubt"
    assert submit(app, "shop.fails", (f"{name}-2",)).wait(20).status == "failed"


def test_by_name_a_failure_may_not_be_final(
    redis: RedisServer, worker: CeleryWorker, done: Effects, name: str
) -> None:
    """A failure that is known only from Celery's result is not final: a new call may run the body again."""
    app = Celery("orchestrator", broker=redis.url, backend=redis.url, set_as_current=False)
    for how, count in (("brief", 2), ("error", 1)):
        for _ in range(2):
            answer = submit(app, "shop.fails", (f"{name}-{how}", how)).wait(20)
            assert (answer.status, answer.code, answer.final) == ("failed", "unsure", False)
            assert "Safe to call again unchanged, once" in answer.next
        assert done.count(f"fails-{name}-{how}") == count


def test_celerys_own_failure_is_not_final(shop: Celery, done: Effects, name: str) -> None:
    """A failure that Celery stored before the task began is not final, because there is no record.

    Celery does this, for example, if its connection to the result backend breaks.
    """
    receipt = submit(shop, "shop.pay", (name, "7", 1), queue="nobody")
    shop.backend.mark_as_failure(receipt.task_id, ConnectionError("Connection reset by peer"))
    answer = receipt.wait(20)
    assert (answer.status, answer.code, answer.final) == ("failed", "unsure", False)
    assert answer.reason == "ConnectionError: Connection reset by peer"
    assert "Safe to call again unchanged, once" in answer.next


# --- mistakes --------------------------------------------------------------------------


def test_mistakes_are_told(shop: Celery) -> None:
    with pytest.raises(TypeError):
        shop.tasks["shop.pay"].submit("acme")
    with pytest.raises(IntentError, match="customer"):
        shop.tasks["shop.pay"].submit(object(), "7", 1)
    with pytest.raises(ConfigurationError, match=r"shop\.plain declares no intent"):
        submit(shop, "shop.plain", ("x",))

    @shop.task(base=celery_idem.IdempotentTask, name="shop.scoped", intent=("scope",))
    def scoped(scope: str) -> None: ...

    try:
        with pytest.raises(ConfigurationError, match="parameter called 'scope'"):
            shop.tasks["shop.scoped"].submit("x")
    finally:
        del shop.tasks["shop.scoped"]


def test_waiting_is_bounded_without_a_worker(start_redis: Callable[..., RedisServer], tmp_path: Path) -> None:
    app = shops.make(start_redis().url, tmp_path)
    assert app.tasks["shop.pay"].submit("a", "1", 1).wait(0.3).status == "accepted"


def test_revoked(shop: Celery, worker: CeleryWorker, done: Effects, name: str) -> None:
    receipt = submit(shop, "shop.pay", (name, "7", 1), countdown=2)
    shop.control.revoke(receipt.task_id)
    answer = receipt.wait(20)
    assert (answer.status, answer.reason) == ("not_run", "revoked")
    assert answer.next == "Nothing was done. Safe to call again unchanged."
    assert submit(shop, "shop.pay", (name, "7", 1)).wait(20).status == "executed"
    assert wait_for(lambda: done.count(f"pay-{name}-7")) == 1
