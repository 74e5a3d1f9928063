"""Scope, occurrence and a caller's key reach the worker however the call was built.

Each value has one normal form. A value without one is refused.
"""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar
from enum import Enum
from typing import Any

import pytest
from celery import Celery, Task, chain, chord, group, signature

from celery_idem import ConfigurationError, IdempotentTask, IntentError, Ledger, look_up, submit
from celery_idem.core.model import CALLER_KEY, KEY, MESSAGE, OCCURRENCE, PART_OF, SCOPE
from tests.support.hand import application, deliver, drain, take

tenant: ContextVar[Any] = ContextVar("tenant", default=None)


class Place(Enum):
    ACME = "acme"


class Shop:
    """Tasks with counted effects."""

    def __init__(self, **conf: Any) -> None:
        self.app = app = application(**conf)
        self.done: Counter[str] = Counter()
        self.lines: list[int] = []
        self_ = self
        how: dict[str, Any] = {"base": IdempotentTask, "shared": False, "lazy": False}
        done = self.done

        @app.task(name="x.line", intent=("order", "line"), **how)
        def line(order: str, line: int) -> int:
            done[f"line {order}/{line}"] += 1
            return line

        @app.task(name="x.total", intent=("name",), **how)
        def total(lines: list[int], name: str) -> int:
            done[f"total {name}"] += 1
            return sum(lines)

        @app.task(name="x.split", bind=True, intent=("order",), **how)
        def split(self: Any, order: str, lines: list[int]) -> Any:
            done[f"split {order}"] += 1
            return self.replace(group(line.s(order, n) for n in self_.lines or lines) | total.s(order))

        @app.task(name="x.direct", bind=True, intent=("order",), **how)
        def direct(self: Any, order: str) -> int:
            return sum(line(order, n) for n in (1, 2, 3))

        @app.task(name="x.walk", bind=True, intent=("order", "at"), **how)
        def walk(self: Any, order: str, at: int) -> Any:
            done[f"walk {order}/{at}"] += 1
            return at if at == 3 else self.replace(self.s(order, at + 1))

        @app.task(name="x.mourn", intent=("name",), **how)
        def mourn(request: Any, error: Any, traceback: Any, name: str = "x") -> None:
            done[f"mourn {name}"] += 1

        @app.task(name="x.plain", shared=False, lazy=False)
        def plain(fail: bool = False) -> int:
            if fail:
                raise ValueError
            return 1

        self.line, self.total, self.split, self.direct = line, total, split, direct
        self.walk, self.mourn, self.plain = walk, mourn, plain


@pytest.fixture
def shop() -> Shop:
    return Shop()


def stranger(shop: Shop) -> Celery:
    """Return an application that knows only x.plain. It can still publish what follows x.plain in a canvas."""
    app = Celery("stranger", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.task_default_queue = shop.app.conf.task_default_queue

    @app.task(name="x.plain", shared=False, lazy=False)
    def plain(fail: bool = False) -> int:
        if fail:
            raise ValueError
        return 1

    return app


# --- a replacement, and a body that calls ------------------------------------------------


def test_a_replacement_under_a_callers_key_runs_all_of_it(shop: Shop) -> None:
    for _ in range(2):
        shop.split.apply_async(("a", [1, 2, 3]), idempotency_key="evt_1")
        drain(shop.app)
    assert shop.done == {"split a": 2, "line a/1": 1, "line a/2": 1, "line a/3": 1, "total a": 1}
    shop.split.apply_async(("a", [1, 2, 3]), idempotency_key="evt_2")  # another action with equal arguments
    drain(shop.app)
    assert shop.done["line a/1"] == shop.done["total a"] == 2


def test_a_redelivered_replacement_gives_each_of_its_calls_the_same_key(shop: Shop) -> None:
    """The keys do not depend on the order of the calls."""
    shop.split.apply_async(("a", [1, 2, 3]), idempotency_key="evt_1")
    message = take(shop.app)
    made = []
    for shop.lines in ([1, 2, 3], [3, 1, 2]):
        deliver(shop.app, message)
        made.append({headers[KEY] for headers in drain(shop.app) if headers["task"] == "x.line"})
    assert len(made[0]) == 3
    assert made[0] == made[1]
    assert shop.done["split a"] == 2
    assert shop.done["line a/3"] == 1


def test_a_chain_of_replacements_is_one_intent_at_each_step(shop: Shop) -> None:
    for _ in range(2):
        shop.walk.apply_async(("a", 1), idempotency_key="evt_1")
        seen = drain(shop.app)
    assert shop.done == {"walk a/1": 2, "walk a/2": 2, "walk a/3": 1}
    assert len({headers[KEY] for headers in seen}) == 3


def test_a_body_that_calls_other_tasks_does_not_give_them_its_callers_key(shop: Shop) -> None:
    assert shop.direct.apply(("a",), idempotency_key="evt_1").get() == 6
    assert [shop.done[f"line a/{n}"] for n in (1, 2, 3)] == [1, 1, 1]


def test_a_replacements_own_key_stays_its_own(shop: Shop) -> None:
    @shop.app.task(base=IdempotentTask, bind=True, shared=False, lazy=False, name="x.hands", intent=("a",))
    def hands(self: Any, a: int, how: str) -> Any:
        options = {"idempotency_key": "mine"} if how == "option" else {"headers": {CALLER_KEY: "mine"}}
        return self.replace(shop.line.s("a", 1).set(**options))

    for how in ("option", "header"):
        hands.apply_async((1, how), idempotency_key=f"evt_{how}", scope="acme")
        last = drain(shop.app)[-1]
        assert (last[CALLER_KEY], last[SCOPE]) == ("mine", "acme")
    assert shop.done["line a/1"] == 1


# --- a process that does not have the task ------------------------------------------------


def calls(shop: Shop, given: dict[str, Any]) -> dict[str, Any]:
    """Return functions that publish a call of x.line, each built in another way by a process without that task."""
    app = stranger(shop)
    line = app.signature("x.line", ("a", 1)).set(**given)
    last = app.signature("x.line", ("a", 1), immutable=True).set(**given)
    return {
        "signature": line.apply_async,
        "send_task": lambda: app.send_task("x.line", ("a", 1), **given),
        "group": lambda: group([line], app=app).apply_async(),
        "chain": lambda: chain(app.tasks["x.plain"].s(), last, app=app).apply_async(),
        "link": lambda: app.tasks["x.plain"].apply_async(link=last),
        "link_error": lambda: app.tasks["x.plain"].apply_async((True,), link_error=last),
        "chord": lambda: chord([app.tasks["x.plain"].s()], last, app=app).apply_async(),
        "group in a chain": lambda: chain(
            app.tasks["x.plain"].s(), group([last, last], app=app), app=app
        ).apply_async(),
    }


@pytest.mark.parametrize("way", list(calls(Shop(), {})))
def test_identity_is_carried_by_a_process_that_does_not_have_the_task(shop: Shop, way: str) -> None:
    """Scope and occurrence reach the worker, also through a process that does not know the task or its options."""
    given = {"scope": Place.ACME, "occurrence": 7}
    calls(shop, given)[way]()
    app = stranger(shop)
    arrived = []
    while (message := take(shop.app)) is not None:
        if message.headers["task"] == "x.line":
            arrived.append(message)
        else:
            deliver(shop.app, message, by=app)
    assert arrived
    for message in arrived:
        assert (message.headers[SCOPE], message.headers[OCCURRENCE]) == ("acme", "7")
        deliver(shop.app, message)
    assert shop.done["line a/1"] == 1
    key = shop.line.intent_key("a", 1, scope="acme", occurrence="7")
    assert [entry.key for entry in Ledger.from_app(shop.app).list()] == [key]


def test_what_is_inside_a_message_needs_nothing_of_ours_where_it_is_dispatched(shop: Shop) -> None:
    """A signature in a message contains the headers, so any process can publish it."""
    part = signature("x.line", ("a", 1), immutable=True, app=shop.app).set(scope="acme")
    nested = chain(part, group([part, part], app=shop.app), app=shop.app)
    (shop.plain.s() | nested | chord([part], part, app=shop.app)).apply_async()
    message = take(shop.app)
    found = str(message.payload[2]).count("'headers': {'idem-scope': 'acme'}")
    assert found >= 5
    assert part.options == {"scope": "acme"}, "the author's own signature was changed"


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("how", ["set", "call", "inside a group"])
def test_options_of_a_chain_hold_for_all_of_it(shop: Shop, how: str, known: bool) -> None:
    """Scope and occurrence of a chain apply to all of its parts. Celery alone gives options to the first part only."""
    app = shop.app if known else stranger(shop)

    def line(n: int) -> Any:
        return signature("x.line", ("a", n), immutable=True, app=app)

    def whole(**given: Any) -> None:
        own = line(6).set(occurrence="own")
        parts = chain(
            app.tasks["x.plain"].s(), line(1), group([line(2), line(3)], app=app), line(4), own, app=app
        )
        first = chain(line(5), line(7), app=app)
        for one in (parts, first):
            if how == "set":
                one.set(**given).apply_async()
            elif how == "call":
                one.apply_async(**given)
            else:
                group([one, app.tasks["x.plain"].s()], app=app).apply_async(**given)

    for given in ({"scope": "acme"}, {"scope": Place.ACME}, {"scope": "globex"}, {"occurrence": 7}):
        whole(**given)
        drain(shop.app)
    assert {shop.done[f"line a/{n}"] for n in (1, 2, 3, 4, 5, 7)} == {3}
    for n in (1, 2, 3, 4, 5, 7):
        key = shop.line.intent_key("a", n, scope="globex")
        assert look_up(shop.app, key, "globex") is not None
    assert shop.done["line a/6"] == 3, "one for each scope: it has its own occurrence"
    assert look_up(shop.app, shop.line.intent_key("a", 6, occurrence="own")) is not None


def test_a_callers_key_of_a_chain(shop: Shop) -> None:
    """The first part of a chain has the caller's key. Later parts have keys derived from it and their arguments."""
    for key in ("evt_1", "evt_1", "evt_2"):
        chain(shop.line.si("a", 1), shop.line.si("a", 2), shop.line.si("a", 3), app=shop.app).apply_async(
            idempotency_key=key
        )
        drain(shop.app)
    assert [shop.done[f"line a/{n}"] for n in (1, 2, 3)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("known", "eager"),
    [(True, False), (False, False), (True, True)],
    ids=["published", "published without the task", "in place"],
)
def test_a_callers_key_of_a_group(shop: Shop, known: bool, eager: bool) -> None:
    """Each call of a group has a key derived from the caller's. With one key for all, only one call would run."""
    app = shop.app if known else stranger(shop)
    name = shop.line.name
    for key in ("evt_1", "evt_1", "evt_2"):
        lines = [signature(name, args=("a", n), immutable=True, app=app) for n in (1, 2, 3)]
        lines[2].set(idempotency_key="its own")
        whole = group(lines, app=app)
        whole.apply(idempotency_key=key) if eager else whole.apply_async(idempotency_key=key)
        drain(shop.app)
    assert [shop.done[f"line a/{n}"] for n in (1, 2, 3)] == [2, 2, 1]


def test_a_callers_key_of_a_chord(shop: Shop) -> None:
    for _ in range(2):
        header = [shop.line.si("a", n) for n in (1, 2)]
        chord(header, shop.total.s("a"), app=shop.app).apply_async(idempotency_key="evt_1")
        drain(shop.app)
    assert [shop.done[f"line a/{n}"] for n in (1, 2)] == [1, 1]


def test_a_scope_of_a_chain_that_has_no_form_is_refused(shop: Shop) -> None:
    chain(shop.plain.s(), shop.line.si("a", 1), app=shop.app).apply_async(scope="")
    drain(shop.app)
    assert not shop.done


def test_a_property_that_arrives_is_read(shop: Shop) -> None:
    """A scope in the message's properties is used. A process without this package may send it there."""
    shop.app.send_task("x.line", ("a", 1), scope="acme")
    message = take(shop.app)
    assert message.properties["scope"] == "acme"  # an ordinary task may use it for something else
    for name in (SCOPE, MESSAGE):
        del message.headers[name]
    deliver(shop.app, message)
    assert look_up(shop.app, shop.line.intent_key("a", 1, scope="acme"), "acme") is not None


def test_what_has_no_form_is_refused_not_dropped(shop: Shop) -> None:
    for wrong in (True, "", ["acme"]):
        with pytest.raises(IntentError, match="scope"):
            shop.line.apply_async(("a", 1), scope=wrong)
        with pytest.raises(IntentError, match="scope"):
            submit(stranger(shop), "x.line", ("a", 1), scope=wrong)  # type: ignore[arg-type]
        shop.app.send_task("x.line", ("a", 1), scope=wrong)
        assert isinstance(deliver(shop.app, take(shop.app)).exception, IntentError)
    assert not shop.done


# --- errbacks of the new kind, and signatures that are called ------------------------------


def test_an_errback_that_is_called_in_the_worker_keeps_its_identity(shop: Shop) -> None:
    for scope in ("acme", "globex", "acme"):
        shop.plain.apply_async((True,), link_error=shop.mourn.s().set(scope=scope))
        drain(shop.app)
    assert shop.done["mourn x"] == 2
    both = [shop.mourn.s().set(occurrence=n) for n in (1, 2)]
    shop.plain.apply_async((True,), link_error=both)
    drain(shop.app)
    assert shop.done["mourn x"] == 4


def test_a_signature_that_is_called_keeps_its_identity(shop: Shop) -> None:
    call = shop.line.s("a", 1).set(scope="acme")
    assert (call(), call()) == (1, 1)
    assert shop.done["line a/1"] == 1
    assert look_up(shop.app, shop.line.intent_key("a", 1, scope="acme"), "acme") is not None


def test_a_task_called_inside_a_called_signature_does_not_get_its_identity(shop: Shop) -> None:
    @shop.app.task(name="x.outer", shared=False, lazy=False)
    def outer() -> int:
        return shop.line("a", 1)

    outer.s().set(scope="acme")()
    assert look_up(shop.app, shop.line.intent_key("a", 1)) is not None


@pytest.mark.parametrize("set_on", ["signature", "call"])
@pytest.mark.parametrize("task_cls", [Task, IdempotentTask])
def test_loops_hand_their_identity_to_every_call(set_on: str, task_cls: Any) -> None:
    shop = Shop()
    shop.app.task_cls = task_cls
    given = {"scope": "acme"}
    for build in (
        lambda: shop.line.starmap([("a", 1)]),
        lambda: shop.line.chunks([("a", 2), ("a", 3)], 1),
        lambda: chain(shop.plain.si(), shop.line.chunks([("a", 4)], 1).set(**given), app=shop.app),
    ):
        loop = build()
        if set_on == "signature":
            loop.set(**given).apply_async()
        else:
            loop.apply_async(**given)
        drain(shop.app)
    assert sum(shop.done.values()) == 4
    for n in (1, 2, 3, 4):
        assert look_up(shop.app, shop.line.intent_key("a", n, scope="acme"), "acme") is not None


# --- headers of another message ---------------------------------------------------------


def test_copied_headers_give_no_call_anothers_key(shop: Shop) -> None:
    """A body that copies its headers into other calls gives them its scope and not its key.

    This holds for calls by task and for `send_task`, which does not use the task class.
    """
    shop.line.apply_async(("a", 1), scope="acme", idempotency_key="evt_1")
    message = take(shop.app)
    copied = {**message.headers, "trace": "t1"}
    copied = {name: copied[name] for name in (KEY, SCOPE, CALLER_KEY, MESSAGE, "trace")}
    deliver(shop.app, message)
    for n in (2, 3):
        shop.line.apply_async(("a", n), headers=copied)
        shop.app.send_task("x.line", ("a", n), headers=copied)
    seen = drain(shop.app)
    assert [shop.done[f"line a/{n}"] for n in (1, 2, 3)] == [1, 1, 1]
    assert all(headers[SCOPE] == "acme" and headers["trace"] == "t1" for headers in seen)
    assert all(CALLER_KEY not in headers and headers[PART_OF] == copied[KEY] for headers in seen)
    # A producer in another language copies them too, without Celery's signals.
    shop.app.send_task("x.line", ("a", 4))
    foreign = take(shop.app)
    foreign.headers.update(copied)
    deliver(shop.app, foreign)
    assert shop.done["line a/4"] == 1


def test_a_message_that_comes_back_is_its_own(shop: Shop) -> None:
    """A retry keeps the key of the first delivery, also if its arguments change."""

    @shop.app.task(base=IdempotentTask, bind=True, shared=False, lazy=False, name="x.retry", intent=("a",))
    def retries(self: Any, a: int) -> int:
        if self.request.retries == 0:
            raise self.retry(args=(a + 1,), countdown=0)
        return a

    shop.app.send_task("x.retry", (1,), occurrence="x")
    first = take(shop.app)
    deliver(shop.app, first)
    again = take(shop.app)
    assert again.headers[KEY] == retries.intent_key(1, occurrence="x")
    assert again.headers[MESSAGE] == again.headers["id"] == first.headers["id"]


# --- one normal form ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"), [(7, "7"), (Place.ACME, "acme"), ("gro\u0308ße", "größe"), (10**30, "1" + "0" * 30)]
)
@pytest.mark.parametrize("audit", [True, False])
def test_every_entrance_agrees_on_the_form(one: Any, other: str, audit: bool) -> None:
    shop = Shop(idem_audit=audit)
    shop.line.apply_async(("a", 1), scope=one, occurrence=one)
    headers = take(shop.app).headers
    assert (headers[SCOPE], headers[OCCURRENCE]) == (other, other)
    assert shop.line.apply(("a", 1), scope=one).get() == 1
    key = shop.line.intent_key("a", 1, scope=other)
    assert shop.line.intent_key("a", 1, scope=one) == key
    for scope in (one, other):
        told = look_up(shop.app, key, scope)
        assert told is not None
        assert told.status == "replayed"
        assert shop.line.submit("a", 1, scope=scope).status == "replayed"
    assert look_up(shop.app, key) is None
    # A foreign producer's headers, without a key and with one.
    for line in (2, 3):
        key = shop.line.intent_key("a", line, scope=other)
        shop.app.send_task("x.line", ("a", line))
        message = take(shop.app)
        message.headers[SCOPE] = one.value if isinstance(one, Enum) else one
        message.headers.update({KEY: key} if line == 3 else {})
        deliver(shop.app, message)
        assert shop.done[f"line a/{line}"] == 1
        assert look_up(shop.app, key, one) is not None


# --- an ambient tenant ----------------------------------------------------------------------


def ambient() -> Any:
    if tenant.get() == "broken":
        raise LookupError("no tenant")
    return tenant.get()


@pytest.fixture
def acme() -> Any:
    token = tenant.set("acme")
    yield "acme"
    tenant.reset(token)


WAYS: dict[str, Any] = {
    "apply_async": lambda shop: shop.line.apply_async(("a", 1)),
    "delay": lambda shop: shop.line.delay("a", 1),
    "submit": lambda shop: shop.line.submit("a", 1),
    "submit by name": lambda shop: submit(shop.app, "x.line", ("a", 1)),
    "apply": lambda shop: shop.line.apply(("a", 1)),
    "call": lambda shop: shop.line("a", 1),
    "signature": lambda shop: shop.line.s("a", 1).apply_async(),
    "chain": lambda shop: (shop.plain.s() | shop.line.si("a", 1)).apply_async(),
    "chain by name": lambda shop: (
        shop.plain.s() | shop.app.signature("x.line", ("a", 1), immutable=True)
    ).apply_async(),
    "chord": lambda shop: chord([shop.plain.s()], shop.line.si("a", 1), app=shop.app).apply_async(),
    "link": lambda shop: shop.plain.apply_async(link=shop.line.si("a", 1)),
    "link_error": lambda shop: shop.plain.apply_async((True,), link_error=shop.line.si("a", 1)),
    "starmap": lambda shop: shop.line.starmap([("a", 1)]).apply_async(),
    "chunks": lambda shop: (shop.plain.si() | shop.line.chunks([("a", 1)], 1)).apply_async(),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_ambient_scope_holds_for_every_way_of_calling(way: str, acme: str) -> None:
    shop = Shop(idem_scope=ambient)
    WAYS[way](shop)
    tenant.set(None)  # a worker has no tenant
    drain(shop.app)
    assert shop.done["line a/1"] == 1
    key = shop.line.intent_key("a", 1, scope=acme)
    assert look_up(shop.app, key, acme) is not None
    assert look_up(shop.app, key) is None
    tenant.set(acme)
    assert shop.line.intent_key("a", 1) == key
    assert look_up(shop.app, key) is not None


@pytest.mark.parametrize("eager", [True, False])
def test_an_ambient_scope_holds_for_loops_that_run_in_place(acme: str, eager: bool) -> None:
    shop = Shop(idem_scope=ambient, task_always_eager=eager)
    for name in (acme, "globex"):
        tenant.set(name)
        loops = [shop.line.starmap([("a", 1)]), shop.line.chunks([("a", 2)], 1)]
        if eager:
            for loop in loops:
                loop.apply_async()
        else:
            loops[0]()
            shop.line.starmap([("a", 2)]).apply()
        assert [shop.line.submit("a", n).status for n in (1, 2)] == ["replayed"] * 2
    assert [shop.done[f"line a/{n}"] for n in (1, 2)] == [2, 2]


@pytest.mark.parametrize("task_cls", [Task, IdempotentTask])
@pytest.mark.parametrize("eager", [True, False])
def test_a_loop_that_runs_in_place_hands_its_identity_to_every_call(task_cls: Any, eager: bool) -> None:
    shop = Shop(task_always_eager=eager)
    shop.app.task_cls = task_cls
    for given in (
        {"scope": "acme"},
        {"scope": "globex"},
        {"idempotency_key": "evt_1"},
        {"idempotency_key": "evt_1"},
    ):
        items = [[("a", n), ("a", n + 1)] for n in (1, 3, 5)]
        shop.line.starmap(items[0]).set(**given)()
        shop.line.starmap(items[1]).set(**given).apply()
        shop.line.starmap(items[2]).set(**given).apply_async()
        drain(shop.app)
    assert [shop.done[f"line a/{n}"] for n in range(1, 7)] == [3] * 6


def test_an_ambient_scope_gives_way_and_is_asked_where_the_call_is_made(acme: str) -> None:
    shop = Shop(idem_scope="tests.celery.test_identity:ambient")
    assert shop.line.apply_async(("a", 1), scope="other")
    assert take(shop.app).headers[SCOPE] == "other"
    shop.line.apply_async(("a", 1), headers={SCOPE: "other"})
    assert take(shop.app).headers[SCOPE] == "other"
    tenant.set(None)
    shop.line.delay("a", 1)
    message = take(shop.app)
    assert SCOPE not in message.headers
    tenant.set(acme)  # the worker's tenant
    deliver(shop.app, message)
    assert look_up(Shop(idem_store=shop.app.conf.idem_store).app, shop.line.intent_key("a", 1)) is None
    assert Ledger.from_app(shop.app).get(message.headers[KEY]).record.scope == b""  # type: ignore[union-attr]
    tenant.set("broken")
    with pytest.raises(LookupError, match="no tenant"):
        shop.line.delay("a", 2)
    (shop.plain.s() | shop.line.si("a", 2)).apply_async()
    tenant.set(acme)
    drain(shop.app)
    assert shop.done["line a/2"] == 0, "it was published without a scope, which could not be read"


def test_a_foreign_message_is_given_no_scope_by_its_worker(acme: str) -> None:
    shop = Shop(idem_scope=ambient)
    Celery("foreign", broker="memory://", set_as_current=False).send_task(
        "x.line", ("a", 1), queue=shop.app.conf.task_default_queue
    )
    drain(shop.app)
    (entry,) = Ledger.from_app(shop.app).list()
    assert entry.record.scope == b""


def test_what_was_built_outside_of_any_tenant_stays_there(acme: str) -> None:
    """A call that was built without a tenant gets none from the worker that publishes it later."""
    shop = Shop(idem_scope=ambient)
    tenant.set(None)
    (shop.plain.s() | shop.line.si("a", 1)).apply_async()
    shop.split.delay("a", [2])
    tenant.set(acme)
    assert all(SCOPE not in headers for headers in drain(shop.app))
    assert shop.done["line a/1"] == shop.done["line a/2"] == 1


def test_a_task_may_have_its_own() -> None:
    shop = Shop(idem_scope=ambient)

    @shop.app.task(
        base=IdempotentTask,
        shared=False,
        lazy=False,
        name="x.own",
        intent=("a",),
        scope=lambda: "of the task",
    )
    def own(a: int) -> None: ...

    own.delay(1)
    assert take(shop.app).headers[SCOPE] == "of the task"
    with pytest.raises(ConfigurationError, match="takes no arguments"):

        @shop.app.task(
            base=IdempotentTask,
            shared=False,
            lazy=False,
            name="x.bad",
            intent=("a",),
            scope=lambda request: 1,
        )
        def bad(a: int) -> None: ...


# --- ordinary tasks --------------------------------------------------------------------------


def test_an_option_of_that_name_stays_what_it_is_for_an_ordinary_task(shop: Shop) -> None:
    shop.plain.apply_async(scope="theirs")
    message = take(shop.app)
    assert message.properties["scope"] == "theirs"
    assert deliver(shop.app, message) == 1
