"""Bodies behind decorators: the key is computed from the arguments that the body receives."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Retry

from celery_idem import ALL_ARGUMENTS, ConfigurationError, IdempotentTask
from celery_idem.adapters.tools import tool_of
from celery_idem.core.signatures import Opaque, called
from tests.support.decorators import for_tenant, passing, traced, with_named_session, with_session

GOT: list[Any] = []
"""The orders that bodies received."""


@pytest.fixture(autouse=True)
def _nothing_yet() -> None:
    GOT.clear()


def an_app(**conf: Any) -> Celery:
    app = Celery("signatures", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(idem_store=f"memory://{uuid.uuid4().hex}", **conf)
    return app


def a_task(fun: Callable[..., Any], intent: Any = ("order",), **options: Any) -> Any:
    app = an_app()
    app.task(base=IdempotentTask, name="shop.ship", intent=intent, shared=False, **options)(fun)
    return app.tasks["shop.ship"]


# --- decorators ------------------------------------------------------------------------------


def test_another_thread_that_parses_at_the_same_time_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real, turns = ast.parse, []

    def racing(text: Any, *args: Any, **options: Any) -> Any:
        turns.append(text)
        if len(turns) == 1:
            raise SystemError("AST constructor recursion depth mismatch")
        return real(text, *args, **options)

    def ship(order: int) -> None: ...

    with monkeypatch.context() as patched:
        patched.setattr(ast, "parse", racing)
        a_task(for_tenant(ship), intent=("order",))
    assert len(turns) > 1


def as_it_is(fn: Any) -> Any:
    return fn


def with_session_in_kwargs(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        kwargs["session"] = "session"
        return fn(*args, **kwargs)

    return wrapper


def by_id(fn: Any) -> Any:
    @functools.wraps(fn)
    def load(order_id: Any, *, dry: bool = False) -> Any:
        row = {"id": order_id}
        return fn(row["id"], dry=dry)

    return load


def ship(order: Any, dry: bool = False) -> None:
    GOT.append(order)


def ship_in_session(session: Any, order: Any, dry: bool = False) -> None:
    GOT.append(order)


def ship_with_session(order: Any, dry: bool = False, session: Any = None) -> None:
    GOT.append(order)


def ship_lines(order: Any, /, *lines: Any, dry: bool = False, **more: Any) -> None:
    GOT.append(order)


CASES: dict[str, tuple[Any, list[Any]]] = {
    "plain": (ship, [((1,), {}), ((), {"order": 1}), ((1, True), {}), ((1,), {"dry": True})]),
    "passing": (passing(ship), [((1,), {}), ((), {"order": 1}), ((1, True), {})]),
    "several": (passing(traced(passing(ship))), [((1,), {}), ((), {"order": 1, "trace": 7})]),
    "session": (with_session(ship_in_session), [((1,), {}), ((), {"order": 1}), ((1, True), {})]),
    "several sessions": (passing(with_session(passing(ship_in_session))), [((1,), {}), ((), {"order": 1})]),
    "named session": (
        with_named_session(ship_with_session),
        [((1,), {}), ((), {"order": 1}), ((1, True), {})],
    ),
    "session in kwargs": (with_session_in_kwargs(ship_with_session), [((1,), {}), ((), {"order": 1})]),
    "named first": (
        with_named_session(ship_in_session),
        [((), {"order": 1}), ((), {"order": 1, "dry": True})],
    ),
    "traced": (traced(ship), [((1,), {}), ((1,), {"trace": "t"}), ((), {"order": 1, "trace": "u"})]),
    "tenant": (for_tenant(ship), [(("a", 1), {}), (("b",), {"order": 1}), ((), {"tenant": "c", "order": 1})]),
    "by id": (by_id(ship), [((1,), {}), ((), {"order_id": 1}), ((1,), {"dry": True})]),
    "several by id": (passing(by_id(passing(ship))), [((1,), {}), ((), {"order_id": 1, "dry": True})]),
    "open": (passing(ship_lines), [((1,), {}), ((1, 5, 6), {}), ((1, 5), {"extra": 2})]),
    "context manager": (
        contextlib.contextmanager(lambda: iter([None]))()(ship),
        [((1,), {}), ((), {"order": 1})],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_key_says_what_the_body_gets(case: str) -> None:
    """All calls for order 1 share a key and run once. Calls for order 2 have another key."""
    fun, calls = CASES[case]
    task = a_task(fun)
    keys = set()
    for number in (1, 2):
        for args, kwargs in calls:
            args = tuple(number if value == 1 and value is not True else value for value in args)
            kwargs = {
                name: number if value == 1 and value is not True else value for name, value in kwargs.items()
            }
            keys.add((number, task.intent_key(*args, **kwargs)))
            task.apply(args, kwargs).get()
            task(*args, **kwargs)
    assert GOT == [1, 2]
    assert len(keys) == len({key for _, key in keys}) == 2


@pytest.mark.parametrize("case", ["plain", "passing", "session", "by id", "traced"])
def test_a_body_that_is_bound(case: str) -> None:
    decorate = {"plain": as_it_is, "passing": passing, "session": None, "by id": None, "traced": traced}[case]

    def bound(self: Any, order: Any, dry: bool = False) -> None:
        assert self.name == "shop.ship"
        GOT.append(order)

    if case == "session":

        def inner(self: Any, session: Any, order: Any) -> None:
            bound(self, order)

        @functools.wraps(inner)
        def fun(self: Any, *args: Any, **kwargs: Any) -> Any:
            return inner(self, "session", *args, **kwargs)
    elif case == "by id":

        @functools.wraps(bound)
        def fun(self: Any, order_id: Any, dry: bool = False) -> Any:
            return bound(self, next(iter([order_id])), dry)
    else:
        fun = decorate(bound)
    task = a_task(fun, bind=True)
    for order in (1, 2, 1):
        task.apply((order,)).get()
    assert GOT == [1, 2]
    assert "self" not in task.idem_declaration.signature.parameters


def test_a_body_of_a_class() -> None:
    class Ship(IdempotentTask):
        name = "shop.ship"
        intent = ("order",)

        @passing
        def run(self, order: Any, dry: bool = False) -> None:
            GOT.append(order)

    class Static(IdempotentTask):
        name = "shop.static"
        intent = ("order",)
        run = staticmethod(with_session(ship_in_session))

    app = an_app()
    for task in (app.register_task(Ship()), app.register_task(Static())):
        for order in (1, 2, 1):
            task.apply((order,)).get()
    assert GOT == [1, 2, 1, 2]


@pytest.mark.parametrize("inside", [ship_in_session, passing(ship_in_session)], ids=["plain", "decorated"])
def test_a_partial_as_the_body_of_a_class(inside: Any) -> None:
    """With ``update_wrapper``, the partial names as wrapped a function whose first argument it fills in."""

    class Ship(IdempotentTask):
        name = "shop.ship"
        intent = ("order",)
        run = staticmethod(functools.update_wrapper(functools.partial(inside, "session"), inside))

    task = an_app().register_task(Ship())
    for args, kwargs in (((1,), {}), ((2,), {}), ((), {"order": 1})):
        task.apply(args, kwargs).get()
    assert GOT == [1, 2]


def test_autoretry_changes_nothing() -> None:
    task = a_task(with_session(ship_in_session), autoretry_for=(KeyError,))
    for order in (1, 2, 1):
        task.apply((order,)).get()
    assert GOT == [1, 2]


def test_defaults_are_those_of_the_function_that_is_called() -> None:
    @functools.wraps(ship)
    def wrapper(order: Any = 7, dry: bool = True) -> None:
        ship(order, dry)

    task = a_task(wrapper, ("order", "dry"))
    assert task.intent_key() == task.intent_key(7, True) != task.intent_key(7, False)


def test_must_match_and_secret_by_the_name_of_the_body() -> None:
    task = a_task(by_id(ship), ("dry",), must_match=("order",), secret=("order",))
    assert task.idem_declaration.must_match == task.idem_declaration.secret == ("order_id",)


def test_names_that_nobody_gives_are_refused_and_the_real_ones_listed() -> None:
    def loading(fn: Any) -> Any:
        @functools.wraps(fn)
        def load(tenant: str, order_id: int) -> Any:
            return fn(order_id)

        return load

    def ambient(fn: Any) -> Any:
        @functools.wraps(fn)
        def load(tenant: str, dry: bool = False) -> Any:
            current = "whatever order is current"
            return fn(current, dry)

        return load

    for fun, real in ((loading(ship), "tenant, order_id"), (ambient(ship), "tenant, dry")):
        with pytest.raises(
            ConfigurationError, match=f"names 'order', which is not a parameter. It has: {real}"
        ):
            a_task(fun)
    with pytest.raises(ConfigurationError, match="names 'session'"):
        a_task(with_session(ship_in_session), ("session",))


# --- decorators that are refused ---------------------------------------------------------------


def first_dropped(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn(*args[1:], **kwargs)

    return wrapper


def assigned(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        args = ("session", *args)
        return fn(*args, **kwargs)

    return wrapper


def behind(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, "session", **kwargs)

    return wrapper


def sometimes(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if len(args) > 1:
            return fn(*args, **kwargs)
        return fn("session", *args, **kwargs)

    return wrapper


def handed_over(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(fn, "session")(*args, **kwargs)

    return wrapper


def by_another_name(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        other = fn
        return other("session", *args, **kwargs)

    return wrapper


def rebound_by_a_loop(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for args in [("session", *args)]:  # noqa: B020
            fn(*args, **kwargs)

    return wrapper


def shadowed(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        def inner(*args: Any) -> Any:
            return fn(*args, **kwargs)

        return inner("session", *args)

    return wrapper


def popping(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn(kwargs.pop("session", None), *args, **kwargs)

    return wrapper


def without_a_closure(fn: Any) -> Any:
    class Holder:
        held = staticmethod(fn)

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return Holder.held("session", *args, **kwargs)

    return wrapper


def without_source(fn: Any) -> Any:
    space = {"fn": fn, "wraps": functools.wraps}
    exec(  # noqa: S102
        "def make(fn):\n @wraps(fn)\n def wrapper(*args, **kwargs):\n  return fn(*args, **kwargs)\n return wrapper",
        space,
    )
    return space["make"](fn)


def saying_otherwise(fn: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn("session", *args, **kwargs)

    wrapper.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]
    return wrapper


class Standing:
    def __init__(self, fn: Any) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn("session", *args, **kwargs)


class Proxy:
    """A proxy like wrapt's: all attributes, and the class, are those of the function inside."""

    def __init__(self, fn: Any) -> None:
        self._fn = fn

    @property
    def __wrapped__(self) -> Any:
        return self._fn

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._fn)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fn, name)

    @property
    def __module__(self) -> Any:  # type: ignore[override]
        return self._fn.__module__

    @property
    def __doc__(self) -> Any:  # type: ignore[override]
        return self._fn.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._fn("session", *args, **kwargs)


UNTRUSTED = [
    first_dropped, assigned, behind, sometimes, handed_over, by_another_name, rebound_by_a_loop, shadowed, popping,
    without_a_closure, without_source, saying_otherwise, Standing, Proxy,
]  # fmt: skip


@pytest.mark.parametrize("decorate", UNTRUSTED, ids=lambda d: d.__name__)
@pytest.mark.parametrize("around", [as_it_is, passing], ids=["alone", "below another"])
@pytest.mark.parametrize("intent", [("order",), ALL_ARGUMENTS, lambda a: a], ids=["names", "all", "function"])
def test_what_cannot_be_known_is_refused_and_says_the_way_out(
    decorate: Any, around: Any, intent: Any
) -> None:
    app = an_app()
    with pytest.raises(ConfigurationError, match=r"shop\.ship: .*signature= a function .* without self"):
        app.task(base=IdempotentTask, name="shop.ship", intent=intent, shared=False, lazy=False)(
            around(decorate(ship_in_session))
        )
    assert "shop.ship" not in app.tasks, "it would run unguarded"


def test_a_wrapper_that_takes_what_the_wrapped_function_takes_too() -> None:
    def both(fn: Any) -> Any:
        @functools.wraps(fn)
        def wrapper(*args: Any, order: Any = None, **kwargs: Any) -> Any:
            return fn(*args, **kwargs)

        return wrapper

    with pytest.raises(Opaque, match="both take order"):
        called(both(ship))


# --- signature= ---------------------------------------------------------------------------------


def as_callers_see_it(order: Any, dry: bool = False) -> None: ...


@pytest.mark.parametrize("bind", [False, True])
@pytest.mark.parametrize(
    "given",
    [as_callers_see_it, inspect.signature(as_callers_see_it), f"{__name__}:as_callers_see_it"],
    ids=["function", "signature", "text"],
)
@pytest.mark.parametrize("where", ["option", "annotation"])
def test_signature_is_the_way_out(given: Any, bind: bool, where: str) -> None:
    conf = {"task_annotations": {"shop.ship": {"signature": given}}} if where == "annotation" else {}
    app = an_app(**conf)
    options = {"signature": given} if where == "option" else {}
    fun = self_first(ship_in_session) if bind else handed_over(ship_in_session)
    app.task(base=IdempotentTask, name="shop.ship", intent=("order",), shared=False, bind=bind, **options)(
        fun
    )
    task = app.tasks["shop.ship"]
    for args, kwargs in (((1,), {}), ((2,), {}), ((1, True), {})):
        task.apply(args, kwargs).get()
    assert GOT == [1, 2]
    assert task.intent_key(1) == task.intent_key(order=1, dry=True) != task.intent_key(2)
    # Celery's own method of that name is unchanged.
    assert task.signature((1,), immutable=True) == task.si(1)


def self_first(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(fn, "session")(*args[1:], **kwargs)

    return wrapper


def test_signature_of_a_class_and_of_what_inherits_it() -> None:
    class Base(IdempotentTask):
        abstract = True
        signature = inspect.signature(as_callers_see_it)
        intent = ("order",)

    class Ship(Base):
        name = "shop.ship"

        def run(self, *args: Any, **kwargs: Any) -> None:
            GOT.append(args[0])

    class Overriding(IdempotentTask):
        name = "shop.other"
        intent = ("order",)

        def signature(self, args: Any = None, *more: Any, **options: Any) -> Any:
            return super().signature(args, *more, **options).set(queue="mine")

        def run(self, order: Any) -> None: ...

    app = an_app()
    task, other = app.register_task(Ship()), app.register_task(Overriding())
    for order in (1, 2, 1):
        task.apply((order,)).get()
    assert GOT == [1, 2]
    assert task.s(1).args == (1,)
    assert other.s(1).options["queue"] == "mine", "an override of Celery's method is no option"


@pytest.mark.parametrize("wrong", [5, {"order": 1}, handed_over(ship)])
def test_a_signature_that_is_none(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="signature= must be a function"):
        a_task(ship, signature=wrong)


# --- other users of the parameters ---------------------------------------------------------------


def test_a_tool_offers_the_parameters_that_callers_give() -> None:
    def sold(session: Any, order: int, dry: bool = False) -> None: ...

    task = a_task(with_session(sold))
    schema = tool_of(task.app, "shop.ship").schema()
    assert schema["properties"]["order"]["type"] == "integer"
    assert list(schema["properties"]) == ["order", "dry"]


def test_a_retry_of_a_decorated_body() -> None:
    def body(self: Any, session: Any, order: Any) -> None:
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        GOT.append(order)

    @functools.wraps(body)
    def fun(self: Any, *args: Any, **kwargs: Any) -> Any:
        return body(self, "session", *args, **kwargs)

    task = a_task(fun, bind=True)
    with contextlib.suppress(Retry):
        task.apply((1,)).get()
    task.apply((2,)).get()
    assert GOT == [1, 2]
