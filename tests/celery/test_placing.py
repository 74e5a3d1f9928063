"""The guard surrounds everything that a task's base classes call, and no call can bypass it.

Ordinary tasks have no guard.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, Task
from celery.app.registry import TaskRegistry
from celery.app.trace import task_has_custom, trace_task
from celery.worker.request import Request

from celery_idem import ALL_ARGUMENTS, ConfigurationError, IdempotentTask
from celery_idem.core import keys
from celery_idem.integration.deaths import IdempotentRequest, request_class

done: list[str] = []
contexts: list[str] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    done.clear()
    contexts.clear()


def make(**options: Any) -> Celery:
    store = f"memory://{uuid.uuid4().hex}"
    app = Celery("placing", set_as_current=False, broker="memory://", backend="cache+memory://", **options)
    app.conf.idem_store = store
    return app


@contextlib.contextmanager
def context() -> Iterator[None]:
    """A stand-in for Flask's ``app.app_context()``."""
    contexts.append("opened")
    try:
        yield
    finally:
        contexts.append("closed")


def calls_run(self: Any, *args: Any, **kwargs: Any) -> Any:
    with context():
        return self.run(*args, **kwargs)


class CallsRun(Task):
    abstract = True
    __call__ = calls_run


class CallsSuper(Task):
    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with context():
            return super().__call__(*args, **kwargs)


# --- a guarded task -------------------------------------------------------------------------


def charge(self: Any, order: str, again: str = "") -> Any:
    assert contexts[-1] == "opened", "the body must run inside its base classes' __call__"
    done.append(order)
    if again:
        self(again)
    return [self.claim.key, self.request.id]


def subclass_of_ours(how: type[Task]) -> type[Task]:
    return type("Base", (IdempotentTask,), {"__call__": vars(how)["__call__"], "abstract": True})


def that_calls_super(_: type[Task]) -> type[Task]:
    class Base(IdempotentTask):
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with context():
                return super().__call__(*args, **kwargs)

    return Base


def before_ours(how: type[Task]) -> type[Task]:
    return type("Base", (how, IdempotentTask), {})


def behind_ours(how: type[Task]) -> type[Task]:
    return type("Base", (IdempotentTask, how), {})


PLACES: dict[str, tuple[Callable[[type[Task]], type[Task]], type[Task]]] = {
    "flask's pattern": (subclass_of_ours, CallsRun),
    "super().__call__": (that_calls_super, CallsSuper),
    "a base before ours, run": (before_ours, CallsRun),
    "a base before ours, super": (before_ours, CallsSuper),
    "a base behind ours, run": (behind_ours, CallsRun),
    "a base behind ours, super": (behind_ours, CallsSuper),
}


@pytest.fixture(params=PLACES)
def charged(request: pytest.FixtureRequest) -> Any:
    place, how = PLACES[request.param]
    return make().task(base=place(how), bind=True, name="charge", intent=("order",), shared=False)(charge)


def test_what_a_base_class_calls_runs_inside_the_guard(charged: Any) -> None:
    first = charged.apply(("a",))
    assert [charged.apply(("a",)).get(), charged("a")] == [first.get()] * 2
    assert first.get() == [charged.intent_key("a"), first.id], "the body must have this request"
    assert done == ["a"]
    assert contexts == ["opened", "closed"]


def test_so_it_does_in_a_plain_call(charged: Any) -> None:
    assert charged("a") == charged.apply(("a",)).get() == [charged.intent_key("a"), None]
    assert done == ["a"]
    assert charged.request_stack.top is None


class BoundByItsAuthor:
    """Celery's ``on_bound`` does nothing, so overrides do not call it."""

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        contexts.append("bound")


@pytest.mark.parametrize("bases", [(BoundByItsAuthor, IdempotentTask), (IdempotentTask, BoundByItsAuthor)])
def test_an_on_bound_of_the_authors_takes_no_guard_away(bases: tuple[type, ...]) -> None:
    base = type("Base", bases, {"abstract": True, "on_bound": vars(BoundByItsAuthor)["on_bound"]})

    @make().task(base=base, name="charge", intent=("order",), shared=False)
    def charged(order: str) -> None:
        done.append(order)

    charged.apply(("a",))
    charged.apply(("a",))
    assert (done, contexts) == (["a"], ["bound"])


def test_apply_takes_its_options_by_position() -> None:
    @make().task(base=IdempotentTask, bind=True, name="charge", intent=("order",), shared=False)
    def charged(self: Any, order: str) -> Any:
        return self.request.id, self.request.headers["own"]

    positional = (None, None, "id", 0, True, None, None, {"own": 1})
    assert charged.apply(("a",), None, *positional).get() == ["id", 1]


def test_a_body_that_calls_its_own_task_is_guarded_there(charged: Any) -> None:
    for _ in range(2):
        charged.apply(("a", "b"))
    charged("b")
    charged.apply(("c", "c"))  # it calls its own intent, for which it has the claim
    assert done == ["a", "b", "c", "c"]


def test_a_second_body_in_one_context_is_guarded_as_well() -> None:
    """The body is guarded if its base class's ``__call__`` runs another intent first."""
    app = make()

    class Base(IdempotentTask):
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            other(args[0])
            return self.run(*args, **kwargs)

    @app.task(base=Base, name="own", intent=("order",), shared=False)
    def own(order: str) -> None:
        done.append(f"own {order}")

    @app.task(base=IdempotentTask, name="other", intent=("order",), shared=False)
    def other(order: str) -> None:
        done.append(f"other {order}")

    own.apply(("a",))
    own.apply(("a",))
    other("a")
    assert done == ["other a", "own a"]


def test_automatic_retries_stay_inside() -> None:
    app = make()

    @app.task(
        base=subclass_of_ours(CallsRun),
        name="flaky",
        intent=("order",),
        autoretry_for=(OSError,),
        retry_backoff=False,
        default_retry_delay=0,
        shared=False,
    )
    def flaky(order: str) -> int:
        done.append(order)
        if len(done) < 3:
            raise OSError("busy")
        return len(done)

    assert [flaky.apply(("a",)).get(), flaky.apply(("a",)).get()] == [3, 3]
    assert done == ["a"] * 3
    assert contexts == ["opened", "closed"] * 3


def test_a_decorator_from_the_annotations_runs_inside() -> None:
    app = make()

    def within(call: Any) -> Any:
        @functools.wraps(call)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            with context():
                return call(self, *args, **kwargs)

        return wrapper

    app.conf.task_annotations = {"charge": {"@__call__": within}}
    task = app.task(base=IdempotentTask, bind=True, name="charge", intent=("order",), shared=False)(charge)
    assert task.apply(("a",)).get() == task.apply(("a",)).get()
    assert done == ["a"]


def replaced_on_the_class(task: Any) -> Callable[[str], Any]:
    type(task).__call__ = calls_run
    return lambda order: task.apply((order,)).get()


def wrapped_on_the_class(task: Any) -> Callable[[str], Any]:
    """Wrap ``__call__`` as tracing tools do."""
    call = type(task).__call__

    @functools.wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with context():
            return call(*args, **kwargs)

    type(task).__call__ = wrapper
    return lambda order: task.apply((order,)).get()


def called_by_a_tracer(task: Any) -> Callable[[str], Any]:
    def trace(order: str) -> Any:
        task.push_request(id=order, called_directly=False)
        try:
            return calls_run(task, order)
        finally:
            task.pop_request()

    return trace


def subclassed_when_bound(task: Any) -> Callable[[str], Any]:
    later = type("Later", (type(task),), {"__call__": calls_run, "name": "later"})
    later = task.app.register_task(later())
    return lambda order: later.apply((order,)).get()


@pytest.mark.parametrize(
    "how", [replaced_on_the_class, wrapped_on_the_class, called_by_a_tracer, subclassed_when_bound]
)
def test_nothing_gets_past_the_guard_later_either(how: Any) -> None:
    task = make().task(base=IdempotentTask, bind=True, name="charge", intent=("order",), shared=False)(charge)
    deliver = how(task._get_current_object())
    assert deliver("a") == deliver("a")
    assert done == ["a"]


def test_where_that_would_break_automatic_retries_nothing_runs() -> None:
    app = make()

    @app.task(base=IdempotentTask, name="flaky", intent=("order",), autoretry_for=(OSError,), shared=False)
    def flaky(order: str) -> None:
        done.append(order)

    type(flaky._get_current_object()).__call__ = calls_run
    with pytest.raises(ConfigurationError, match=r"past its guard.*Nothing was run"):
        flaky.apply(("a",)).get()
    assert done == []


def test_run_is_the_body_alone_and_reads_like_it() -> None:
    import inspect

    app = make()

    @app.task(base=IdempotentTask, name="plain", intent=("order",), shared=False)
    def plain(order: str, cents: int = 5) -> None:
        """What it does."""
        done.append(order)

    @app.task(base=IdempotentTask, bind=True, name="bound", intent=("order",), shared=False)
    def bound(self: Any, order: str, cents: int = 5) -> None:
        done.append(order)

    for task in (plain, bound):
        task.run("a")
        task.run("a")
        assert list(inspect.signature(task.run).parameters) == ["order", "cents"]
        task.bind(make())  # reads the signature again
        assert list(task.idem_declaration.signature.parameters) == ["order", "cents"]
    assert done == ["a"] * 4
    assert plain.run.__doc__ == "What it does."


class Opaque:
    """A callable without a readable signature."""

    __signature__ = "none"

    def __call__(self, order: str) -> str:
        done.append(order)
        return order


def test_a_body_that_is_no_function() -> None:
    parts = {"name": "built", "intent": ("order",), "signature": nothing, "run": staticmethod(Opaque())}
    task = make().register_task(type("Built", (IdempotentTask,), parts)())
    assert [task.apply(("a",)).get(), task.apply(("a",)).get()] == ["a", "a"]
    assert done == ["a"]


# --- an ordinary task -----------------------------------------------------------------------


def nothing(order: str) -> None: ...


def ordinary_app() -> Celery:
    return make(task_cls=IdempotentTask)


def test_an_ordinary_task_is_what_its_bases_made_it() -> None:
    class Own(Request):
        pass

    class Base(IdempotentTask):
        abstract = True
        __call__ = calls_run
        Request = Own

    app = make(task_cls=Base)

    @app.task(name="ordinary", shared=False)
    def ordinary(order: str) -> None:
        done.append(order)

    assert ordinary.Request is Own
    for _ in range(2):
        ordinary.apply(("a",))
    assert done == ["a", "a"]
    assert contexts == ["opened", "closed"] * 2


def test_celery_takes_its_own_way_to_an_ordinary_task() -> None:
    app = ordinary_app()

    @app.task(name="ordinary", shared=False)
    def ordinary() -> None: ...

    assert not task_has_custom(ordinary, "__call__")
    assert ordinary.Request == Task.Request
    assert not {"__call__", "Request", "idem_declaration", "_guard_made"} & set(vars(type(ordinary)))


def test_an_ordinary_tasks_attribute_may_have_any_name() -> None:
    app = ordinary_app()
    app.conf.task_eager_propagates = True

    class Form(app.Task):  # type: ignore[name-defined,misc]
        name = "form"
        declaration = "customs"

        def run(self) -> Any:
            return self.declaration, self.request.headers

    form = app.register_task(Form())
    assert form.apply().get() == ("customs", None)
    assert not hasattr(Task, "idem_declaration")


def test_a_task_without_an_intent_may_have_a_guarded_one_as_its_base() -> None:
    app = ordinary_app()

    class Charge(app.Task):  # type: ignore[name-defined,misc]
        name, intent, throws = "charge", ("order",), (KeyError,)

        def run(self, order: str) -> str:
            done.append(order)
            return order

    class Free(Charge):
        name, intent = "free", None  # type: ignore[assignment]

    class Wider(Charge):
        name, intent = "wider", None  # type: ignore[assignment]

        def run(self, order: str) -> str:
            return super().run(order) + "!"

    charge, free, wider = (app.register_task(each()) for each in (Charge, Free, Wider))
    results = [task.apply((order,)).get() for task, order in ((free, "f"), (wider, "w"), (charge, "c")) * 2]
    assert results == ["f", "w!", "c"] * 2
    assert sorted(done) == ["c", "f", "f", "w", "w"]
    assert free("f") == "f"
    assert free.throws == vars(type(free))["throws"] == (KeyError,)


def delivered(task: Any, number: str, **request: Any) -> None:
    """Run the task as a worker does."""
    message = {"id": number, "delivery_info": {}, **request}
    outcome = trace_task(task._get_current_object(), number, (), {}, message, app=task.app)
    assert outcome.info is None, outcome


@pytest.mark.parametrize("guarded", [False, True])
def test_a_body_has_the_request_of_its_delivery(guarded: bool) -> None:
    """Calls that the body publishes become its children, and it can stop its chain."""
    app = make(task_cls=IdempotentTask) if not guarded else make()
    number = uuid.uuid4().hex
    app.conf.task_default_queue = number  # all tests of the process share one broker in memory
    options = {"base": that_calls_super(Task), "intent": ALL_ARGUMENTS} if guarded else {}

    @app.task(bind=True, name="publishes", shared=False, **options)
    def publishes(self: Any) -> None:
        then.delay()
        self.request.chain = None

    @app.task(name="then", shared=False)
    def then() -> None: ...

    delivered(publishes, number, chain=[then.si()])
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        assert channel.queue_purge(number) == 1
    (child,) = app.AsyncResult(number).children
    assert child.id


def test_an_ordinary_task_can_be_bound_to_another_application() -> None:
    app = ordinary_app()

    @app.task(name="ordinary", shared=False)
    def ordinary() -> None: ...

    for other in (make(), ordinary_app()):
        for task in (ordinary._get_current_object(), app.tasks["celery.chord"]):
            other.tasks.register(task)
            task.bind(other)
            assert task._app is other
            assert not task_has_custom(task, "__call__")


def test_a_guarded_task_bound_where_it_has_no_intent_is_ordinary_and_guarded_again_later() -> None:
    app = ordinary_app()
    app.conf.task_annotations = {"charge": {"intent": ("order",)}}

    @app.task(name="charge", shared=False)
    def charged(order: str) -> None:
        done.append(order)

    cls = type(charged._get_current_object())
    run = cls.run
    intent, cls.intent = cls.intent, None
    other = ordinary_app()
    other.tasks.register(charged._get_current_object())
    charged.bind(other)
    assert charged.idem_declaration is None
    assert not task_has_custom(charged, "__call__")
    charged.apply(("a",))
    charged.apply(("a",))
    assert done == ["a", "a"]
    cls.intent = intent
    charged.bind(app)
    charged.apply(("a",))
    charged.apply(("a",))
    assert done == ["a", "a", "a"]
    assert cls.run is not run


def test_a_task_that_cannot_be_bound_again_keeps_its_guard() -> None:
    app = make()

    @app.task(base=IdempotentTask, name="charge", intent=("order",), shared=False)
    def charged(order: str) -> None:
        done.append(order)

    charged.apply(("a",))
    with pytest.raises(ConfigurationError):
        charged.bind(make(changes={"idem_laese": 5}))
    charged.bind(app)
    charged.apply(("a",))
    assert done == ["a"]


def test_binding_the_applications_own_class_takes_no_guard_away() -> None:
    app = ordinary_app()
    assert app.Task.app is app  # binds it

    @app.task(name="charge", intent=("order",), shared=False)
    def charged(order: str) -> None:
        done.append(order)

    charged("a")
    charged("a")
    assert done == ["a"]


@pytest.mark.parametrize(
    "attributes",
    [
        {"secrets": ("a",)},
        {"stores": ["main"]},
        {"lease": "flat 7"},
        {"store": object()},
        {"intents": ["hello"]},
    ],
    ids=lambda attributes: next(iter(attributes)),
)
def test_attributes_of_an_ordinary_task_are_its_own(attributes: dict[str, Any]) -> None:
    app = ordinary_app()
    cls = type("Rotate", (app.Task,), {"name": "rotate", "run": lambda self, n: n, **attributes})
    task = app.register_task(cls())
    assert task.apply((1,)).get() == 1
    assert {name: getattr(task, name) for name in attributes} == attributes


def test_a_slip_of_the_pen_leaves_no_task_without_a_guard() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean intent="):
        ordinary_app().task(name="charge", intents=("order",), lazy=False, shared=False)(nothing)
    app = ordinary_app()
    app.conf.task_annotations = {"charge": {"intnet": ["order"]}}
    with pytest.raises(ConfigurationError, match="Did you mean intent="):
        app.task(name="charge", lazy=False, shared=False)(nothing)
    with pytest.raises(ConfigurationError, match="Did you mean secret="):
        make().task(base=IdempotentTask, name="charge", intent=("order",), secrets=("order",), lazy=False)(
            nothing
        )


# --- the worker's request ---------------------------------------------------------------------


def test_a_request_of_ones_own_stands_above_ours() -> None:
    class Own(Request):
        pass

    class Ours(IdempotentRequest):
        pass

    declares = keys.declare("t", inspect.signature(lambda order: None), "order")
    task: Any = type("T", (), {"name": "t", "Request": Task.Request, "idem_declaration": declares})
    assert request_class(task) is IdempotentRequest
    task.Request = Own
    both = request_class(task)
    assert both.__mro__[1:4] == (Own, IdempotentRequest, Request)
    for own in (Ours, both):
        task.Request = own
        assert request_class(task) is own
    task.Request = object
    with pytest.raises(ConfigurationError, match="no subclass of"):
        request_class(task)


# --- throws ------------------------------------------------------------------------------------


def test_an_answer_is_expected_of_a_task_and_its_own_errors_are_as_its_author_said() -> None:
    """During a replay ``throws`` contains the replayed error, so Celery's log and Sentry treat it as expected.

    Otherwise ``throws`` is what the author declared.
    """
    app = make(task_annotations={"by.annotation": {"throws": (OSError,)}})
    asked: list[Any] = []

    class Asked(IdempotentTask):
        abstract = True
        throws = (KeyError,)

        def on_failure(self, exc: Any, *_: Any) -> None:
            asked.append((type(exc), self.throws))

    def fail(what: str) -> None:
        raise ValueError(what)

    task = app.task(base=Asked, shared=False, name="fails", intent=ALL_ARGUMENTS)(fail)
    assert task.throws == task.__class__.throws == (KeyError,)
    for _ in range(2):
        task.apply(("a",))
    assert asked == [(ValueError, (KeyError,)), (ValueError, (KeyError, ValueError))]
    assert task.throws == (KeyError,)

    alone = app.task(base=IdempotentTask, shared=False, name="one", intent=ALL_ARGUMENTS, throws=KeyError)(
        fail
    )
    alone.push_request(args=("a",), idem_answer=ValueError)
    assert alone.throws == (KeyError, ValueError)
    alone.pop_request()
    annotated = app.task(base=IdempotentTask, shared=False, name="by.annotation", intent=ALL_ARGUMENTS)(fail)
    assert annotated.throws == (OSError,)

    other = app.task(
        base=task.__class__, shared=False, name="other", intent=ALL_ARGUMENTS, throws=(OSError,)
    )(fail)
    assert other.throws == (OSError,)


@pytest.mark.parametrize("own", ["inherited", "own"])
def test_an_ordinary_task_keeps_its_throws(own: str) -> None:
    app = make(task_cls=IdempotentTask)
    options = {"throws": (KeyError,)} if own == "own" else {}

    def nothing() -> None: ...

    task = app.task(shared=False, name="ordinary", **options)(nothing)
    assert task.throws == task.__class__.throws == options.get("throws", Task.throws)
    assert ("throws" in vars(task.__class__)) == (own == "own")


def test_a_task_is_whole_before_another_thread_can_find_it() -> None:
    found = []

    class Registry(TaskRegistry):  # type: ignore[misc]
        def __setitem__(self, name: str, task: Any) -> None:
            if name == "early":
                found.append((task.idem_declaration is not None, task("x")))
            super().__setitem__(name, task)

    app = Celery("early", set_as_current=False, tasks=Registry())
    app.conf.idem_store = f"memory://{uuid.uuid4().hex}"
    ran = []

    @app.task(base=IdempotentTask, shared=False, name="early", intent=("n",))
    def early(n: str) -> str:
        ran.append(n)
        return n

    assert early("x") == "x"
    assert found == [(True, "x")]
    assert ran == ["x"]
