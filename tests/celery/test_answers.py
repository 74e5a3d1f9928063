"""The Celery result that the guard writes together with the outcome has exactly the bytes that Celery writes."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import pytest
import redis as redis_py
from celery import Celery, Task, group
from celery.app.trace import build_tracer
from celery.backends import base
from celery.backends.cache import CacheBackend
from celery.backends.redis import RedisBackend

from celery_idem import IdempotentTask
from celery_idem.integration import answers
from celery_idem.integration.delivery import Delivery
from tests.support import hand

pytestmark = pytest.mark.redis

NOON = datetime(2026, 11, 28, 12, tzinfo=timezone.utc)


class Shop:
    """An application without a worker. The test traces each task as a worker does."""

    def __init__(self, url: str, options: dict[str, Any], **conf: Any) -> None:
        self_ = self
        self.app = Celery("answers", broker="memory://", backend=url, set_as_current=False)
        self.app.conf.update(conf)
        self.app.now = lambda: NOON  # type: ignore[method-assign]
        self.client = redis_py.Redis.from_url(url)
        self.seen: list[Any] | None = None  # the stored result at the start of each body

        @self.app.task(
            base=IdempotentTask, name="shop.pay", shared=False, bind=True, **{"intent": ("order",), **options}
        )
        def pay(self: Any, order: Any, result: Any = None) -> Any:
            if self_.seen is not None:
                self_.seen.append(self_.stored(self.request.id))
            if isinstance(result, Exception):
                raise result
            return result

        @self.app.task(name="shop.mail", shared=False)
        def mail(*args: Any) -> None: ...

        self.task = pay

    def run(self, order: Any, result: Any = None, task_id: str = "", **request: Any) -> str:
        task_id = task_id or str(uuid.uuid4())
        given = {
            "id": task_id,
            "task": "shop.pay",
            "args": (order, result),
            "kwargs": {},
            "hostname": "w1@here",
            "delivery_info": {"exchange": "", "routing_key": "celery"},
            "called_directly": False,
            "headers": {},
            **request,
        }
        build_tracer("shop.pay", self.task, app=self.app)(task_id, (order, result), {}, given)
        return task_id

    def stored(self, task_id: str) -> tuple[bytes | None, int]:
        """Return the stored result and its TTL, rounded up to minutes because the looks differ by some seconds."""
        key = self.app.backend.get_key_for_task(task_id)
        ttl: Any = self.client.ttl(key)
        return self.client.get(key), -(-ttl // 60) * 60 if ttl > 0 else ttl  # type: ignore[return-value]


class Clock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return NOON


@pytest.fixture(autouse=True)
def noon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freeze the time of results for Celery before 5.5, which does not use ``app.now``."""
    monkeypatch.setattr(base, "datetime", Clock, raising=False)


@contextmanager
def commands(client: Any) -> Iterator[Callable[[], list[str]]]:
    """Record the names of the commands that the server executes meanwhile.

    Commands within a script are left out. So are those of a new connection and of a deleted result of an earlier test.
    """
    seen: list[str] = []
    with client.monitor() as monitor:

        def names() -> list[str]:
            mark = uuid.uuid4().hex
            client.echo(mark)
            for command in monitor.listen():
                if command["command"] == f"ECHO {mark}":
                    return seen
                name = command["command"].split()[0].upper()
                if command["client_type"] != "lua" and name not in (
                    "HELLO",
                    "CLIENT",
                    "SELECT",
                    "UNSUBSCRIBE",
                ):
                    seen.append(name)
            return seen

        yield names


@pytest.fixture
def shop(redis_url: str) -> Callable[..., Shop]:
    return lambda options=(), **conf: Shop(redis_url, dict(options), **conf)


CONFS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "extended": {"result_extended": True},
    "for ever": {"result_expires": None},
    "no expiry": {"result_expires": 0},
    "an hour": {"result_expires": 3600},
    "pickle": {
        "result_serializer": "pickle",
        "result_accept_content": ["pickle", "json"],
        "accept_content": ["json"],
    },
    "yaml": {"result_serializer": "yaml", "result_accept_content": ["yaml"]},
    "compressed": {"result_compression": "gzip"},
    "prefix": {"result_backend_transport_options": {"global_keyprefix": "prod_"}},
    "local time": {"enable_utc": False, "timezone": "Europe/Rome"},
    "chord retries": {"result_chord_retry_interval": 2.0},
}
VALUES: dict[str, Any] = {
    "none": None,
    "text": "für Zoë",
    "list": [1, 2.5, True],
    "tuple": (1, 2),
    "nested": {"a": {"b": [None]}},
    "time": NOON,
    "uuid": uuid.UUID(int=7),
}
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "in a group": {"group": "g1"},
    "of a parent": {"parent_id": "p1", "root_id": "r1"},
    "stamped": {"stamped_headers": ["tenant"], "stamps": {"tenant": ["acme"]}},
    "retried": {"retries": 2},
}


def both(
    shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch, conf: dict[str, Any], run: Any
) -> list[Any]:
    """Return the stored result after Celery's own write and after the guard's."""
    found = []
    task_id = str(uuid.uuid4())
    for ours in (False, True):
        with monkeypatch.context() as patch:
            there = shop(**conf)
            there.client.flushdb()
            if not ours:
                patch.setattr(answers, "announcement", lambda *_: None)
            with commands(there.client) as executed:
                run(there, task_id)
                names = executed()
            assert ("SETEX" in names or "SET" in names) is not ours, names
            found.append(there.stored(task_id))
    return found


@pytest.mark.parametrize("conf", CONFS.values(), ids=CONFS)
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_the_bytes_are_celerys(
    shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch, conf: dict[str, Any], request_: dict[str, Any]
) -> None:
    celerys, ours = both(shop, monkeypatch, conf, lambda s, task_id: s.run("o1", [1], task_id, **request_))
    assert celerys == ours
    assert ours[0] is not None


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_the_bytes_of_any_value_are_celerys(
    shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    celerys, ours = both(shop, monkeypatch, {}, lambda s, task_id: s.run("o1", value, task_id))
    assert celerys == ours


def test_a_task_that_succeeds_is_two_exchanges(shop: Callable[..., Shop]) -> None:
    there = shop()
    there.run("warm")
    with commands(there.client) as executed:
        there.run("o1")
        assert executed() == ["EVALSHA", "EVALSHA"]


@pytest.mark.parametrize("conf", CONFS.values(), ids=CONFS)
def test_started_is_celerys_to_the_byte(
    shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch, conf: dict[str, Any]
) -> None:
    found: list[Any] = []
    for ours in (False, True):
        with monkeypatch.context() as patch:
            there = shop(**conf, task_track_started=True)
            there.client.flushdb()
            there.seen = found
            if not ours:
                patch.setattr(answers, "_left_to_the_claim", lambda *_: False)
            for name, request in REQUESTS.items():
                if name != "retried":
                    there.run(name, [1], f"of {name}", **request)
    half = len(found) // 2
    assert found[:half] == found[half:]
    assert all(b"STARTED" in there.app.backend.decode(value)["status"].encode() for value, _ in found)


def test_started_rides_with_the_claim(shop: Callable[..., Shop]) -> None:
    there = shop(task_track_started=True)
    there.run("warm")
    with commands(there.client) as executed:
        there.run("o1")
        assert executed() == ["EVALSHA", "EVALSHA"]


def test_started_rides_with_the_claim_of_an_accepted_call(shop: Callable[..., Shop]) -> None:
    there = shop(task_track_started=True, task_default_queue=uuid.uuid4().hex)
    there.run("warm")
    receipt = there.task.submit("o1")
    message = hand.take(there.app)
    with commands(there.client) as executed:
        hand.deliver(there.app, message)
        assert executed() == ["EVALSHA", "EVALSHA"]
    assert receipt.wait(10).status == "executed"


WRITTEN = ["MULTI", "SETEX", "PUBLISH", "EXEC"]


@pytest.mark.parametrize(
    ("request_", "before"),
    [
        ({"delivery_info": {"redelivered": True}}, ["EVALSHA", "GET", *WRITTEN]),
        ({"retries": 1}, ["EVALSHA", "GET", *WRITTEN]),
    ],
    ids=["redelivered", "retried"],
)
def test_where_a_state_may_stand_celery_writes_started(
    shop: Callable[..., Shop], request_: dict[str, Any], before: list[str]
) -> None:
    """Celery writes STARTED itself if the message was delivered before, because it must keep a stored success.

    It does so after the claim, so a duplicate never becomes STARTED.
    """
    there = shop(task_track_started=True)
    there.run("warm")
    with commands(there.client) as executed:
        there.run("o1", **request_)
        assert executed() == [*before, "EVALSHA"]
    with commands(there.client) as executed:
        there.run("o1", **request_)
        assert executed()[0] == "EVALSHA"
        assert executed().count("PUBLISH") == 1, "only the result is published"


def test_a_state_of_the_authors_own_is_not_put_off(shop: Callable[..., Shop]) -> None:
    there = shop()

    @there.app.task(base=IdempotentTask, name="shop.say", shared=False, bind=True, intent=("when",))
    def say(self: Any, when: str) -> Any:
        self.update_state(state="STARTED", meta={"by": "the body"})
        return there.app.backend.get_task_meta(self.request.id, cache=False)["result"]

    request = {"id": "s1", "task": "shop.say", "headers": {}, "delivery_info": {}, "called_directly": False}
    for track in (False, True):
        say.track_started = track
        there.client.flushdb()
        build_tracer("shop.say", say, app=there.app)("s1", ("now",), {}, {**request, "id": "s1"})
        assert there.app.backend.get_task_meta("s1", cache=False)["result"] == {"by": "the body"}


def test_a_task_with_a_backend_of_its_own_has_no_answer_elsewhere(shop: Callable[..., Shop]) -> None:
    there = shop(task_track_started=True)
    own = {"backend": CacheBackend(there.app, backend="memory://"), "base": IdempotentTask, "intent": ("n",)}

    @there.app.task(name="shop.own", shared=False, **own)
    def apart(n: int) -> int:
        return n

    request = {"id": "a1", "task": "shop.own", "headers": {}, "delivery_info": {}, "called_directly": False}
    build_tracer("shop.own", there.app.tasks["shop.own"], app=there.app)("a1", (1,), {}, request)
    assert own["backend"].get_state("a1") == "SUCCESS"
    assert not there.client.exists(there.app.backend.get_key_for_task("a1"))


WAYS: dict[str, Callable[[Any], Any]] = {
    "the backend": lambda self: self.backend.store_result(self.request.id, "the body's", "SUCCESS"),
    "then another state": lambda self: (
        self.update_state(state="SUCCESS", meta="the body's"),
        self.update_state(state="PROGRESS", meta="too late"),
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_success_that_the_body_wrote_stays(shop: Callable[..., Shop], way: Callable[[Any], Any]) -> None:
    there = shop()
    for kind in (Task, IdempotentTask):
        options = {} if kind is Task else {"intent": ("n",)}

        @there.app.task(base=kind, name="shop.said", shared=False, bind=True, **options)
        def said(self: Any, n: int) -> str:
            way(self)
            return "returned"

        request = {"id": kind.__name__, "task": "shop.said", "headers": {}, "delivery_info": {}}
        trace = build_tracer("shop.said", there.app.tasks["shop.said"], app=there.app)
        trace(kind.__name__, (1,), {}, {**request, "called_directly": False})
        assert there.app.AsyncResult(kind.__name__).result == "the body's"
        there.app.tasks.pop("shop.said")


@pytest.mark.parametrize("name", ["set", "_set", "store_result", "encode"])
def test_a_method_that_a_program_replaced_is_called(shop: Callable[..., Shop], name: str) -> None:
    there, called = shop(), []
    before = getattr(there.app.backend, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        called.append(args)
        return before(*args, **kwargs)

    setattr(there.app.backend, name, replaced)
    task_id = there.run("o1", "paid")
    assert called
    assert there.app.AsyncResult(task_id).result == "paid"


def test_a_hook_before_the_claim_sees_started(shop: Callable[..., Shop]) -> None:
    there, seen = shop(task_track_started=True), []

    class Hooked(IdempotentTask):
        abstract = True

        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            seen.append(there.app.backend.get_task_meta(task_id, cache=False)["status"])

    @there.app.task(base=Hooked, name="shop.hooked", shared=False, intent=("n",))
    def hooked(n: int) -> int:
        return n

    request = {
        "id": "h1",
        "task": "shop.hooked",
        "headers": {},
        "delivery_info": {},
        "called_directly": False,
    }
    build_tracer("shop.hooked", there.app.tasks["shop.hooked"], app=there.app)("h1", (1,), {}, request)
    assert seen == ["STARTED"]


def test_a_caller_who_listens_is_told(shop: Callable[..., Shop]) -> None:
    there = shop()
    task_id = str(uuid.uuid4())
    result = there.app.AsyncResult(task_id)
    there.app.backend.result_consumer.consume_from(task_id)
    there.run("o1", "paid", task_id)
    assert result.get(timeout=10) == "paid"


def test_where_celery_has_more_to_do_it_writes_itself(shop: Callable[..., Shop]) -> None:
    there = shop()
    mail = there.app.tasks["shop.mail"]
    for request in ({"callbacks": [mail.s()]}, {"chain": [mail.s()]}):
        task_id = there.run("o1", "paid", **request)
        meta = there.app.backend.get_task_meta(task_id)
        assert meta["status"] == "SUCCESS"
        assert len(meta["children"]) == 1, "links are children"
        there.client.flushdb()


def test_a_call_in_the_body_is_not_the_answer(shop: Callable[..., Shop]) -> None:
    there = shop()

    @there.app.task(base=IdempotentTask, name="shop.count", shared=False, bind=True, intent=("deep",))
    def count(self: Any, deep: int) -> list[Any]:
        return [deep, self(deep - 1)] if deep else []

    request = {"id": "c1", "task": "shop.count", "headers": {}, "delivery_info": {}, "called_directly": False}
    with commands(there.client) as executed:
        build_tracer("shop.count", count, app=there.app)("c1", (1,), {}, request)
        assert [name for name in executed() if name != "EVAL"] == ["EVALSHA"] * 4, (
            "no second write of the result"
        )
    assert there.app.backend.get_task_meta("c1")["result"] == [1, []]


def test_what_the_caller_gets_is_what_left_the_task(shop: Callable[..., Shop]) -> None:
    there = shop()
    cls = type(there.app.tasks["shop.pay"])
    inner = cls.__call__

    def outer(self: Any, *args: Any, **kwargs: Any) -> Any:  # as instrumentation wraps every task
        return {"wrapped": inner(self, *args, **kwargs)}

    cls.__call__ = outer
    task_id = there.run("o1", "paid")
    assert there.app.backend.get_task_meta(task_id)["result"] == {"wrapped": "paid"}


def test_an_ignored_result_is_not_written(shop: Callable[..., Shop]) -> None:
    assert shop({"ignore_result": True}).stored(shop({"ignore_result": True}).run("o1", 1)) == (None, -2)
    there = shop()
    assert there.stored(there.run("o1", 1, ignore_result=True)) == (None, -2)


def test_the_parts_of_a_chord_are_counted(shop: Callable[..., Shop]) -> None:
    there = shop()
    mail = there.app.tasks["shop.mail"]
    header = group(there.task.s(n, n) for n in range(3)).freeze()
    there.app.backend.set_chord_size(header.id, 3)
    header.save(backend=there.app.backend)
    for part in header.results:
        there.run(part.id, 1, part.id, group=header.id, chord=mail.s().set(task_id="b"), group_index=0)
    with there.app.connection_for_read() as connection:
        assert connection.default_channel.basic_get("celery") is not None, "the chord's body was published"


@pytest.mark.parametrize("result", ["paid", ValueError("no money")], ids=["success", "failure"])
def test_the_answer_of_a_duplicate_is_one_exchange(
    shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch, result: Any
) -> None:
    there = shop()
    there.run("o1", result, "first")
    task_id, stored = str(uuid.uuid4()), []
    for ours in (False, True):
        with monkeypatch.context() as patch:
            if not ours:
                patch.setattr(Delivery, "replaying", lambda *_: None)
            there.client.delete(there.app.backend.get_key_for_task(task_id))
            with commands(there.client) as executed:
                there.run("o1", result, task_id, group="g1")
                names = executed()
            assert names == ["EVALSHA", *([] if ours else ["GET"]), "MULTI", "SETEX", "PUBLISH", "EXEC"]
            stored.append(there.stored(task_id))
    assert stored[0] == stored[1]


def test_a_redelivery_does_not_overwrite_its_result(shop: Callable[..., Shop]) -> None:
    there = shop()
    task_id = there.run("o1", "paid", callbacks=[there.app.tasks["shop.mail"].s()])
    before = there.stored(task_id)
    there.run("o1", "paid", task_id)
    assert there.stored(task_id)[0] == before[0], "its children are still known"
    there.run("o2", "paid", "of another intent")
    there.run("o2", "paid", task_id, delivery_info={"redelivered": True})
    assert there.stored(task_id)[0] == before[0]


def test_a_backend_of_the_tasks_own_gets_its_results(shop: Callable[..., Shop], redis_url: str) -> None:
    there = shop()
    elsewhere = redis_url.rpartition("/")[0] + "/5"
    there.task.backend = RedisBackend(app=there.app, url=elsewhere)
    task_id = there.run("o1", "paid")
    assert there.stored(task_id) == (None, -2)
    assert there.task.backend.get_task_meta(task_id)["result"] == "paid"


def test_a_success_that_the_body_has_written_stays(shop: Callable[..., Shop]) -> None:
    there = shop()

    @there.app.task(base=IdempotentTask, name="shop.say", shared=False, bind=True, intent=("order",))
    def say(self: Any, order: str) -> str:
        self.update_state(state="SUCCESS", meta="said")
        return "returned"

    request = {"id": "s1", "task": "shop.say", "headers": {}, "delivery_info": {}, "called_directly": False}
    build_tracer("shop.say", say, app=there.app)("s1", ("o1",), {}, request)
    assert there.app.backend.get_task_meta("s1")["result"] == "said"


def test_an_asyncresult_survives_pickle(shop: Callable[..., Shop]) -> None:
    there = shop()
    there.app.set_current()
    again = pickle.loads(pickle.dumps(there.task.AsyncResult(there.run("o1", "paid"))))  # noqa: S301
    assert again.get(timeout=10) == "paid"
    assert type(again.backend) is RedisBackend
