"""Sealed records: the store does not show their values, and without the right key nothing runs or is lost."""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy
from celery import Celery
from starlette.testclient import TestClient

from celery_idem import ConfigurationError, IdempotentTask, Ledger, StoreError, Unknown, look_up
from celery_idem.adapters.inbox import inbox
from celery_idem.core import sealing
from celery_idem.core.model import NO_FINGERPRINT, Policy, Request, State
from celery_idem.core.results import Codec
from celery_idem.core.sealing import Seal
from celery_idem.engine import owners
from celery_idem.integration import messages, recovering
from celery_idem.operate import doctor
from celery_idem.stores import open_store
from celery_idem.stores.memory import MemoryStore
from celery_idem.testing import FakeClock
from tests.security import sealed_app
from tests.security.conftest import command_line
from tests.support import hand
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

OLD, NEW, OTHER = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2, 3))
CARD, PIN = "4111-1111-1111-1111", "pin-of-the-customer"


def shop(url: str, *keys: str, **conf: Any) -> Celery:
    """Return an application that stores the card number in every kind of value. ``app.ran`` has its effects."""
    app = hand.application(idem_store=url, idem_seal_keys=list(keys), idem_lease=0.1, **conf)
    app.ran = []

    def pay(self: Any, order: str, card: str, pin: str = "") -> str:
        app.ran.append((order, pin))
        reference = self.step("bank", lambda: f"bank says {card}")
        if order == "refused":
            raise ValueError(f"no money on {card}")
        if order == "in doubt":
            raise TimeoutError
        if order == "later":
            raise self.retry(countdown=60)
        return f"paid with {reference}"

    options: dict[str, Any] = {"base": IdempotentTask, "bind": True, "shared": False, "lazy": False}
    doubtful = {
        "ambiguous_errors": (TimeoutError,),
        "describe": "{order} with {card}",
        "reconcile": lambda task, *args, **kwargs: Unknown("it cannot tell"),
    }
    app.task(name="shop.pay", intent=("order",), secret=("pin",), **doubtful, **options)(pay)
    return app


@pytest.fixture(params=["redis", "sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/idem.db"
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid.uuid4().hex}"


def stored_bytes(url: str, tmp_path: Path) -> bytes:
    """Return everything that the store holds: keys, values and the index."""
    if url.startswith("sqlite"):
        return b"".join(path.read_bytes() for path in tmp_path.glob("idem.db*"))
    if url.startswith("redis"):
        client = redis.Redis.from_url(url)
        read = {b"string": client.get, b"zset": lambda key: repr(client.zrange(key, 0, -1)).encode()}
        return b"".join(b"%b %b" % (key, read[client.type(key)](key)) for key in client.keys("*"))
    import psycopg

    with psycopg.connect(url) as connection:
        tables = connection.execute(
            "SELECT tablename FROM pg_tables WHERE tablename LIKE 'celery_idem%'"
        ).fetchall()
        assert tables
        rows = [
            row
            for (name,) in tables
            for row in connection.execute(f'SELECT * FROM "{name}"', binary=True)  # noqa: S608
        ]
    return b"".join(
        value if isinstance(value, bytes) else str(value).encode() for row in rows for value in row
    )


def run_all_kinds(app: Celery) -> Any:
    """Make intents that succeeded, failed, are in doubt, and are accepted but not begun. Return the task."""
    pay = app.tasks["shop.pay"]
    for order in ("fine", "refused", "in doubt"):
        pay.submit(order, CARD, PIN)
        hand.drain(app)
    lost, ledger = pay.submit("accepted", CARD, PIN).key, Ledger.from_app(app)
    assert hand.take(app) is not None  # the message is lost
    entry = ledger.get(lost)
    assert entry is not None
    ledger.sent(lost, entry.record.owner, 0)  # recovery need not wait
    return pay


def test_no_value_is_in_the_store_and_each_is_given_back(url: str, tmp_path: Path) -> None:
    app = shop(url, NEW)
    pay = run_all_kinds(app)
    found = stored_bytes(url, tmp_path)
    assert b"shop.pay" in found
    for value in (CARD, PIN, "bank says", "no money", "ValueError"):
        assert value.encode() not in found
        assert value.encode().hex().encode() not in found
    # All four records have sealed values.
    states = {entry.state: entry for entry in Ledger.from_app(app).list()}
    assert set(states) == {"succeeded", "failed", "in_doubt", "accepted"}
    assert all(sealing.sealed_with(entry.record) == {Seal([NEW]).newest} for entry in states.values())

    assert pay.submit("fine", CARD, PIN).result == f"paid with bank says {CARD}"
    hand.drain(app)
    assert pay.delay("fine", CARD, PIN).id
    (message,) = [hand.take(app)]
    assert hand.deliver(app, message) == f"paid with bank says {CARD}"
    assert pay.submit("refused", CARD, PIN).status == "failed"
    shown = command_line(app, "show", states["in_doubt"].key)
    assert f"in doubt with {CARD}" in shown
    assert PIN not in shown


def test_without_keys_the_same_search_finds_them(url: str, tmp_path: Path) -> None:
    """Without keys the same search finds the values, except that of the secret parameter."""
    app = shop(url)
    run_all_kinds(app)
    found = stored_bytes(url, tmp_path)
    for value in (CARD, "bank says", "no money", "ValueError"):
        assert value.encode() in found
    assert PIN.encode() not in found


def test_without_keys_what_needs_the_secrets_says_that_they_are_not_there(memory: str) -> None:
    app = shop(memory)
    pay = run_all_kinds(app)
    app.ran.clear()
    doubtful, says = pay.intent_key("in doubt", ""), "its secret values are not in the record"
    run = ("resolve", doubtful, "--not-happened", "--run", "--evidence", "seen", "--yes")
    for words in (("show", doubtful), run, ("reconcile", "--yes"), ("recover", "--dry-run"), ("recover",)):
        assert says in " ".join(command_line(app, *words).split()), words
    page = TestClient(inbox(app, authenticate=lambda request: "ann")).get("/intent", params={"key": doubtful})
    assert says in page.text
    command_line(app, "resolve", doubtful, "--not-happened", "--evidence", "seen", "--yes")
    assert says in " ".join(command_line(app, "retry", doubtful, "--yes").split())
    assert app.ran == []


def test_a_call_with_secrets_is_recovered_and_run_again_by_hand(memory: str) -> None:
    app = shop(memory, NEW)
    pay = run_all_kinds(app)
    app.ran.clear()
    doubtful, lost = pay.intent_key("in doubt", ""), pay.intent_key("accepted", "")
    assert "released" in command_line(
        app, "resolve", doubtful, "--not-happened", "--run", "--evidence", "nothing at the bank", "--yes"
    )
    hand.drain(app)
    assert app.ran == [("in doubt", PIN)]
    assert [(found.entry.key, found.published) for found in recovering.recover(app)] == [(lost, True)]
    hand.drain(app)
    assert app.ran == [("in doubt", PIN), ("accepted", PIN)]


def test_a_retry_and_a_call_of_a_transaction_keep_their_secrets_sealed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/idem.db"
    app = shop(url, NEW)
    pay, ledger = app.tasks["shop.pay"], Ledger.from_app(app)
    pay.delay("later", CARD, PIN)
    hand.deliver(app, hand.take(app))
    with sqlalchemy.create_engine(url).begin() as connection:
        assert pay.submit_in(connection, "in a transaction", CARD, PIN).status == "accepted"
    entries = {entry.state: entry for entry in ledger.list()}
    assert set(entries) == {"scheduled", "accepted"}
    found = stored_bytes(url, tmp_path)
    assert not [value for value in (CARD, PIN) if value.encode() in found]
    for entry in entries.values():
        call, _ = messages.call_in(app, entry.key, entry.record.call)
        assert call is not None
        assert call.publishable
        assert PIN.encode() in call.body


# --- keys ------------------------------------------------------------------------------------------


def test_a_box_opens_with_its_key_for_its_intent_and_unchanged() -> None:
    seal = Seal([NEW, OLD])
    box = seal.close(b"a value", "shop.pay:1")
    assert b"value" not in box
    assert seal.open(box, "shop.pay:1") == Seal([OTHER, NEW]).open(box, "shop.pay:1") == b"a value"
    assert Seal([OLD]).close(b"a value", "shop.pay:1") != box
    assert NEW not in repr(seal)
    for changed, key in (
        (box, "shop.pay:2"),
        (box[:-1] + bytes([box[-1] ^ 1]), "shop.pay:1"),
        (box[:9], "shop.pay:1"),
    ):
        with pytest.raises(StoreError, match="does not open with its key"):
            seal.open(changed, key)
    with pytest.raises(
        StoreError, match=f"sealed with the key {seal.newest}, which idem_seal_keys of this process"
    ):
        Seal([OLD]).open(box, "shop.pay:1")


def test_keys_are_the_applications_and_are_not_shown() -> None:
    app = hand.application(idem_seal_keys=[NEW])
    assert NEW not in str(app.conf.table(censored=True)) + repr(Ledger.from_app(app).codec)
    with pytest.raises(
        ConfigurationError, match=r"seal_keys is no option of a task. Set app.conf.idem_seal_keys"
    ):
        app.task(base=IdempotentTask, shared=False, lazy=False, seal_keys=[OLD], intent=())(shop)


def test_without_the_package_the_error_names_the_extra(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    sealing.seal_of.cache_clear()
    app = hand.application(idem_store=memory, idem_seal_keys=[OTHER])
    says = "pip install 'celery_idem[seal]'"
    with pytest.raises(ConfigurationError, match=re.escape(says)):
        Ledger.from_app(app)
    assert says in " ".join(command_line(app, "doctor").split())


@pytest.mark.parametrize("keys", [(), (OTHER,)], ids=["none", "another"])
@pytest.mark.parametrize("policy", ["retry", "raise", "run"])
def test_without_the_key_a_worker_runs_nothing_and_loses_nothing(
    memory: str, keys: tuple[str, ...], policy: str
) -> None:
    run_all_kinds(shop(memory, NEW))
    store = open_store(memory)
    before = dict(store.scan(""))
    app = shop(memory, *keys, idem_on_store_error=policy)
    pay = app.tasks["shop.pay"]
    for order in ("fine", "refused", "in doubt", "accepted"):
        result = pay.delay(order, CARD, PIN)
        hand.deliver(app, hand.take(app))
        if policy == "retry":
            assert hand.take(app).headers["id"] == result.id  # the message was published again
        else:
            with pytest.raises(
                StoreError, match=f"sealed with the key {Seal([NEW]).newest}.*Nothing was run"
            ):
                result.get(timeout=5)
    assert app.ran == []
    assert dict(store.scan("")) == before


@pytest.fixture
def locked(memory: str) -> Iterator[tuple[Celery, Any]]:
    """An application that does not have the key of the stored records, and its task."""
    run_all_kinds(shop(memory, NEW))
    store = open_store(memory)
    before = dict(store.scan(""))
    app = shop(memory, OTHER)
    yield app, app.tasks["shop.pay"]
    assert dict(store.scan("")) == before
    assert app.ran == []


SAYS = f"sealed with the key {Seal([NEW]).newest}, which idem_seal_keys of this process does not have"


def test_without_the_key_callers_are_told(locked: tuple[Celery, Any]) -> None:
    app, pay = locked
    for order, status in (
        ("fine", "replayed"),
        ("refused", "failed"),
        ("in doubt", "not_run"),
        ("accepted", "not_run"),
    ):
        receipt = pay.submit(order, CARD, PIN)
        if order in ("fine", "refused"):
            assert (receipt.status, receipt.result) == (status, None)
            assert SAYS in receipt.reason
            found = look_up(app, receipt.key)
            assert found is not None
            assert SAYS in found.reason
    (many,) = pay.submit_many([("refused", CARD, PIN)])
    assert (many.status, SAYS in many.reason) == ("failed", True)


def test_without_the_key_what_was_released_is_not_accepted_again(memory: str) -> None:
    """A finished step of the record is sealed, so no worker with these keys could continue the call."""
    first = shop(memory, NEW)
    key = run_all_kinds(first).intent_key("in doubt", "")
    ledger = Ledger.from_app(first)
    assert ledger.forget(key)
    before = ledger.store.read(f"{ledger.namespace}:{key}").stored
    app = shop(memory, OTHER)
    receipt = app.tasks["shop.pay"].submit("in doubt", CARD, PIN)
    assert (receipt.status, receipt.code) == ("not_run", "store_error")
    assert SAYS in receipt.reason
    assert hand.take(app) is None
    assert ledger.store.read(f"{ledger.namespace}:{key}").stored == before


def test_without_the_key_commands_say_so(locked: tuple[Celery, Any], tmp_path: Path) -> None:
    app, pay = locked
    doubtful, failed = pay.intent_key("in doubt", ""), pay.intent_key("refused", "")
    file = tmp_path / "calls.jsonl"
    file.write_text(json.dumps({"key": failed, "args": ["refused", CARD, PIN]}))
    evidence = ("--evidence", "seen", "--yes")
    for words in (
        ("show", doubtful),
        ("resolve", doubtful, "--happened", "1", *evidence),
        ("resolve", doubtful, "--not-happened", "--run", *evidence),
        ("reconcile", "--yes"),
        ("reconcile", "--yes", "--without-arguments"),
        ("retry", failed, "--yes", "--arguments", str(file)),
    ):
        said = " ".join(command_line(app, *words).split())
        assert SAYS in said.replace("│ ", ""), (words, said)
    assert doubtful in command_line(app, "list", "--json")


def test_recovery_leaves_what_it_cannot_open(locked: tuple[Celery, Any]) -> None:
    app, pay = locked
    (found,) = recovering.recover(app)
    assert (found.entry.key, found.published, SAYS in found.why) == (
        pay.intent_key("accepted", ""),
        False,
        True,
    )
    assert SAYS in command_line(app, "recover", "--dry-run", "--json")


def test_a_message_names_the_key_of_the_record_that_it_continues(memory: str) -> None:
    """The claim does not read the record. Without this check it would overwrite a record that others can open."""
    caller = shop(memory, NEW)
    caller.tasks["shop.pay"].submit("fine", CARD, PIN)
    message = hand.take(caller)
    for worker in (shop(memory), shop(memory, OTHER)):
        hand.deliver(caller, message, by=worker)
        assert worker.ran == []
        assert hand.take(worker).headers["id"] == message.headers["id"]
    worker = shop(memory, OLD, NEW)
    assert hand.deliver(caller, message, by=worker) == f"paid with bank says {CARD}"


def test_pages_hide_what_is_secret_and_say_what_is_not_readable(
    locked: tuple[Celery, Any], memory: str
) -> None:
    app, pay = locked
    page = {"key": pay.intent_key("in doubt", "")}
    for each, text in ((app, SAYS), (shop(memory, NEW), f"in doubt with {CARD}")):
        shown = TestClient(inbox(each, authenticate=lambda request: "ann")).get("/intent", params=page).text
        assert text in shown
        assert PIN not in shown


# --- other keys ------------------------------------------------------------------------------------


def used(app: Celery) -> set[str]:
    return set().union(*(sealing.sealed_with(entry.record) for entry in Ledger.from_app(app).list()))


def resealed(app: Celery, *options: str) -> dict[str, int]:
    found: dict[str, int] = json.loads(command_line(app, "reseal", "--json", *options))
    return found


def codes(app: Celery) -> dict[str, str]:
    snapshot = doctor.gather(app)
    return {finding.code: finding.wrong for finding in doctor.examine(snapshot)}


def test_a_rotation(url: str) -> None:
    run_all_kinds(shop(url))  # records from before there were keys
    assert "not-sealed" in codes(shop(url))
    assert "in-clear" in codes(shop(url, OLD))
    assert resealed(shop(url, OLD))["resealed"] == 4
    app = shop(url, NEW, OLD)
    app.tasks["shop.pay"].delay("second", CARD, PIN)
    hand.drain(app)
    old, new = Seal([OLD]).newest, Seal([NEW]).newest
    assert used(app) == {old, new}
    assert old in codes(app)["old-key"]
    counts = {"current": 1, "running": 0, "locked": 0}
    assert resealed(app, "--dry-run") == {"resealed": 4, **counts, "dry_run": True}
    assert used(app) == {old, new}
    before = {entry.key: entry.record for entry in Ledger.from_app(app).list()}
    assert resealed(app) == {"resealed": 4, **counts, "dry_run": False}
    assert resealed(app) == {"resealed": 0, **counts, "current": 5, "dry_run": False}
    assert used(app) == {new}
    assert not {"old-key", "in-clear", "key-missing", "not-sealed"} & set(codes(app))
    for entry in Ledger.from_app(app).list():  # only the sealed fields were changed
        then, now = before[entry.key], entry.record
        assert (now.state, now.owner, now.fence) == (then.state, then.owner, then.fence)
        assert now.lease <= then.lease
    rotated = shop(url, NEW)
    assert rotated.tasks["shop.pay"].submit("fine", CARD, PIN).result == f"paid with bank says {CARD}"


def test_an_outcome_is_kept_no_longer_than_without_it() -> None:
    clock = FakeClock()
    ledger = Ledger(MemoryStore(clock), codec=Codec(seal=Seal([OLD])))
    policy = Policy(10**6, 100 * 10**6, 100 * 10**6)
    _, hold = ledger.claim("shop.pay:1", Request(owners.mint(), "task", NO_FINGERPRINT, policy))
    assert hold is not None
    hold.settle(ledger.outcome_of("done", "shop.pay:1"), 0.0)
    clock.advance(60)
    ledger.codec = Codec(seal=Seal([NEW, OLD]))
    (entry,) = ledger.list()
    assert ledger.reseal(entry, policy) == "resealed"
    clock.advance(30)
    ledger.codec = Codec(seal=Seal([OLD, NEW]))
    (entry,) = ledger.list()
    assert ledger.reseal(entry, policy) == "resealed"  # a second time, too
    clock.advance(9)
    assert ledger.get("shop.pay:1") is not None
    clock.advance(2)
    assert ledger.get("shop.pay:1") is None


def test_a_record_that_changes_meanwhile_is_decided_on_as_it_is_then(memory: str) -> None:
    run_all_kinds(shop(memory, OLD))
    app = shop(memory, NEW, OLD)
    ledger, policy = Ledger.from_app(app), app.tasks["shop.pay"].guard.options.policy
    (entry,) = ledger.list("in_doubt")
    ledger.forget(entry.key)
    assert ledger.reseal(entry, policy) == "resealed"
    found = ledger.get(entry.key)
    assert found is not None
    assert found.record.state is State.RELEASED
    assert [step.name for step in found.record.steps] == ["bank"]
    assert sealing.sealed_with(found.record) == {Seal([NEW]).newest}


def test_what_runs_is_left_to_its_execution(memory: str) -> None:
    app, key = shop(memory, NEW, OLD), "shop.pay:1"
    ledger, policy = Ledger.from_app(app), app.tasks["shop.pay"].guard.options.policy
    call = Seal([OLD]).close(b"a call", key)
    _, held = ledger.claim(key, Request(owners.mint(), "task", NO_FINGERPRINT, policy, call=call))
    assert held is not None
    before = held.written
    assert resealed(app)["running"] == 1
    assert ledger.store.read(f"{ledger.namespace}:{key}").stored == before
    held.settle(ledger.outcome_of("done", key), 0.0)
    assert resealed(app)["current"] == 1


def test_a_lost_key(memory: str) -> None:
    """If a key is lost, outcomes and doubts stay, without their values. An accepted call runs when it is made again."""
    run_all_kinds(shop(memory, OLD))
    app = shop(memory, NEW)
    pay = app.tasks["shop.pay"]
    assert Seal([OLD]).newest in codes(app)["key-missing"]
    assert resealed(app, "--dry-run", "--lost")["resealed"] == resealed(app)["locked"] == 4
    assert resealed(app, "--lost", "--yes")["resealed"] == 4
    assert "key-missing" not in codes(app)
    receipt = pay.submit("fine", CARD, PIN)
    assert (receipt.status, receipt.code) == ("replayed", "not_kept")
    assert "the key that it was sealed with is lost" in receipt.reason
    assert pay.submit("refused", CARD, PIN).status == "failed"
    doubtful = look_up(app, pay.intent_key("in doubt", ""))
    assert doubtful is not None
    assert doubtful.status == "in_doubt"
    shown = command_line(app, "show", doubtful.key)
    assert "the key that it was sealed with is lost" in " ".join(shown.split())
    assert app.ran == []
    pay.delay("accepted", CARD, PIN)
    hand.drain(app)
    assert app.ran == [("accepted", PIN)]


def test_a_killed_workers_call_with_secrets_runs_in_a_worker_with_new_keys(
    redis_url: str, start_worker: Callable[..., CeleryWorker], tmp_path: Path, queue_name: str
) -> None:
    env = {"SEALED_URL": redis_url, "SEALED_QUEUE": queue_name, "SEALED_FOLDER": str(tmp_path)}
    effects = tmp_path / "effects"
    first = start_worker("tests.security.sealed_app", env={**env, "SEALED_KEYS": OLD})
    producer = sealed_app.make(redis_url, queue_name, tmp_path, [OLD])
    result = producer.tasks["sealed.pay"].delay("rent", PIN)
    wait_for(effects.exists)
    first.kill()
    (entry,) = Ledger.from_app(producer).list()
    assert sealing.sealed_with(entry.record) == {Seal([OLD]).newest}
    start_worker("tests.security.sealed_app", env={**env, "SEALED_KEYS": f"{NEW},{OLD}"})
    assert result.get(timeout=60) == f"paid rent with {PIN}"
    assert effects.read_text().splitlines() == [f"began rent {PIN}", f"paid rent {PIN}"]
    rotated = sealed_app.make(redis_url, queue_name, tmp_path, [NEW])
    assert rotated.tasks["sealed.pay"].submit("rent", PIN).result == f"paid rent with {PIN}"
