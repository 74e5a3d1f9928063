"""``idem retry`` runs failed intents again with the same arguments, and no others."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu.exceptions import OperationalError

from celery_idem import IdempotentTask, Ledger
from celery_idem.integration import messages
from celery_idem.integration.deaths import IdempotentRequest
from tests.celery.test_going_back import taken
from tests.operators.conftest import Idem, command_line
from tests.operators.intents import in_doubt, succeeded
from tests.support.effects import Effects


class Declined(Exception):
    pass


class Shop:
    """An application with tasks whose destination declines until `mended` is true."""

    def __init__(self, effects: Effects, **conf: Any) -> None:
        app = Celery("retried", set_as_current=False, broker="memory://", backend="cache+memory://")
        app.conf.update(idem_store=f"memory://{uuid.uuid4().hex}", task_store_eager_result=True, **conf)
        app.conf.task_default_queue = uuid.uuid4().hex  # memory:// has one broker for a process
        self.app, self.mended, self.effects = app, False, effects

        def charge(order: str, cents: int = 5, card: str = "") -> str:
            if not self.mended:
                raise Declined(order)
            effects.add(order, cents=cents, card=card)
            return f"charged {order}"

        def task(name: str, **options: Any) -> Any:
            return app.task(base=IdempotentTask, shared=False, name=name, intent=("order",), **options)(
                charge
            )

        self.charge = task("shop.charge", must_match=("cents",))
        self.released = task("shop.released", no_effect_errors=(Declined,))
        self.secret = task("shop.secret", secret=("card",), must_match=("card",))
        app.finalize()
        self.idem: Idem = command_line(app)
        self.ledger = Ledger.from_app(app)

    def fails(self, task: Any, *args: Any, **options: Any) -> str:
        assert task.apply(args, **options).state == "FAILURE"
        return str(next(entry.key for entry in self.ledger.list("failed") if entry.task == task.name))

    def works(self) -> None:
        """Execute the published messages, as a worker does, until no intent is accepted."""
        while any(entry.state == "accepted" for entry in self.ledger.list()):
            self.work()

    def work(self) -> None:
        message = taken(self.app)
        task = self.app.tasks[message.headers["task"]]
        IdempotentRequest(message, app=self.app, task=task).execute()


@pytest.fixture
def shop(effects: Effects) -> Iterator[Shop]:
    shop = Shop(effects, result_extended=True)
    yield shop
    shop.app.close()


def test_what_failed_runs_again_with_its_arguments(shop: Shop) -> None:
    key = shop.fails(shop.charge, "o1", 7)
    assert "Declined" in shop.idem("show", key).output
    shop.mended = True
    dry = shop.idem("retry", key, "--dry-run")
    assert "1 would be published, 0 not." in dry.output
    assert [entry.state for entry in shop.ledger.list()] == ["failed"]

    done = shop.idem("retry", key[:20], "--yes", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    assert (said["key"], said["why"]) == (key, "")
    shop.works()
    assert [(one["intent"], one["cents"]) for one in shop.effects.all()] == [("o1", 7)]
    assert shop.charge.AsyncResult(said["task_id"]).get(timeout=30) == "charged o1"
    assert shop.charge.apply(("o1", 7)).get() == "charged o1"  # every later caller receives the same

    again = shop.idem("retry", key, "--yes")
    assert again.exit_code == 1
    assert "it succeeded, and a retry would do it twice" in again.output


def test_all_that_failed_with_a_task_since_then(shop: Shop) -> None:
    for order in ("o1", "o2"):
        shop.fails(shop.charge, order)
    shop.fails(shop.secret, "o3")
    succeeded(shop.ledger, shop.charge.intent_key("o4"))
    shop.mended = True
    assert (
        "0 published, 0 not." in shop.idem("retry", "--task", "shop.charge", "--since", "2999-01-01").output
    )
    assert shop.idem("retry", "--task", "shop.charge", "--since", "yesterday").exit_code == 2
    assert shop.idem("retry").exit_code == 2
    assert shop.effects.count() == 0
    assert shop.idem("retry", "--task", "shop.charge", "--since", "1d", "--yes").exit_code == 0
    shop.works()
    assert shop.effects.counts() == {"o1": 1, "o2": 1}


def test_a_call_with_labels_takes_them(shop: Shop) -> None:
    key = shop.fails(shop.charge, "o1", scope="acme", occurrence="2")
    without = shop.idem("retry", key, "--yes")
    assert without.exit_code == 1
    assert "give --scope" in without.output
    assert [entry.state for entry in shop.ledger.list()] == ["failed"]
    shop.mended = True
    assert shop.idem("retry", key, "--yes", "--scope", "acme", "--occurrence", "2").exit_code == 0
    shop.works()
    assert shop.effects.count("o1") == 1
    assert [(entry.key, entry.state) for entry in shop.ledger.list()] == [(key, "succeeded")]


def test_no_scope_of_the_operators_process_becomes_part_of_it(shop: Shop) -> None:
    key = shop.fails(shop.charge, "o1")
    shop.mended = True
    shop.app.conf.idem_scope, shop.charge.__class__._guard_made = (lambda: "operators"), None
    assert shop.idem("retry", key, "--yes").exit_code == 0
    shop.works()
    assert [(entry.key, entry.state) for entry in shop.ledger.list()] == [(key, "succeeded")]


def test_arguments_that_the_backend_does_not_have_are_given(effects: Effects, tmp_path: Path) -> None:
    shop = Shop(effects)
    key = shop.fails(shop.secret, "o1", 5, "4111")
    unknown = shop.idem("retry", key, "--yes")
    assert "its arguments are not known" in unknown.output
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps({"key": key, "args": ["o2", 5, "4111"]}))
    assert "make another key" in shop.idem("retry", key, "--yes", "--arguments", str(path)).output
    path.write_text(json.dumps({"key": key, "args": ["o1", 5, "(secret)"]}))
    assert "secret values" in shop.idem("retry", key, "--yes", "--arguments", str(path)).output
    path.write_text(json.dumps({"key": key, "args": ["o1", 5, "4111"]}))
    shop.mended = True
    assert shop.idem("retry", key, "--yes", "--arguments", str(path)).exit_code == 0
    shop.works()
    assert [one["card"] for one in shop.effects.all()] == ["4111"]
    shop.app.close()


def unreachable(*_: object) -> None:
    raise OperationalError("connection refused")


def test_an_open_record_has_the_call_itself(shop: Shop) -> None:
    """A released intent is retried with the message of its record, so the waiting caller receives its answer."""
    sent = shop.released.apply_async(("o1", 9), scope="acme")
    shop.work()
    (entry,) = shop.ledger.list()
    assert entry.state == "released"
    shop.mended = True
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(messages, "publish", unreachable)
        refused = shop.idem("retry", entry.key, "--yes")
    assert refused.exit_code == 1
    assert "the broker did not take it (OperationalError)" in refused.output
    done = shop.idem("retry", entry.key, "--yes", "--json")
    assert json.loads(done.output)["task_id"] == sent.id
    shop.work()
    assert [(one["intent"], one["cents"]) for one in shop.effects.all()] == [("o1", 9)]
    assert sent.get(timeout=30) == "charged o1"


def test_a_broker_that_is_away_leaves_it_to_recovery(shop: Shop, tmp_path: Path) -> None:
    key = shop.fails(shop.charge, "o1")
    other = shop.fails(
        shop.secret, "o2", 5, "4111"
    )  # its record does not hold the whole call, so recovery cannot publish it
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps({"key": other, "args": ["o2", 5, "4111"]}))
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(messages, "in_time", unreachable)
        broken.setattr(shop.app.tasks["shop.secret"], "apply_async", unreachable, raising=False)
        done = shop.idem("retry", key, other, "--yes", "--arguments", str(path))
    assert done.exit_code == 1
    for says in (f"accepted       {key}", "0 published, 1 not.", "1 accepted", "Make the call again"):
        assert says in done.output
    assert {entry.key: entry.state for entry in shop.ledger.list()} == {key: "accepted"}


def test_what_is_in_doubt_is_not_run(shop: Shop) -> None:
    key = shop.charge.intent_key("o1")
    in_doubt(shop.ledger, key)
    done = shop.idem("retry", key, "--yes")
    assert done.exit_code == 1
    assert "`idem resolve` first" in done.output
