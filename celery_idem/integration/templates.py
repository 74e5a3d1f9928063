"""Makes the messages of calls of one task. Celery makes the first, and the others are made from it.

So some work is done once, and not for each call: routing, options of the task, and declaring the queue. Subscribing to
the result is left out, because a caller that waits for a result subscribes then. That helps a single call too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from celery import Celery
from celery.app.routes import MapRoute, Router
from celery.app.task import Task
from celery.utils.nodenames import anon_nodename

from celery_idem.core import keys
from celery_idem.integration import publishing
from celery_idem.integration.confirming import confirmed_together
from celery_idem.integration.guarded import GuardedTask
from celery_idem.integration.messages import BRIEFLY
from celery_idem.integration.transactions import warn_if_open

UNFLUSHED = 1 << 20
"""Commands that kombu may buffer. A hundred calls make fewer, so kombu sends them together at the end."""


def fits(task: GuardedTask, options: Mapping[str, Any]) -> bool:
    """Whether a template may be used: no code of the author takes part in making a message.

    Args:
        options: options of ``apply_async`` for all calls.
    """
    app, headers = task.app, options.get("headers") or {}
    router, dumped = app.amqp.router, getattr(task, "_dump_pydantic_arguments", None)
    return (
        dumped is None
        and not {"producer", "connection", "task_id"} & options.keys()
        and keys.IDENTITY.isdisjoint(headers)
        and keys.MADE.isdisjoint(headers)
        and _only(task, "apply_async", ("celery.app.task", "celery_idem.integration.task"))
        and _only(task, "shadow_name", ("celery.app.task",))
        and _only(app, "send_task", ("celery.app.base",))
        and type(router) is Router
        and all(type(route) is MapRoute for route in router.routes or ())
        and type(app.backend).on_task_call.__module__.startswith("celery.")
    )


def _only(owner: Any, name: str, modules: tuple[str, ...]) -> bool:
    """Whether a method is defined in these modules only, and not by a subclass, a patch or a wrapper."""
    found = [vars(one)[name] for one in (owner, *type(owner).__mro__) if name in vars(one)]
    return all(
        getattr(one, "__module__", None) in modules and not hasattr(one, "__wrapped__") for one in found
    )


class Template:
    """Publishes the messages of one ``submit_many``, or of one ``submit``.

    Args:
        options: of ``apply_async``, for all calls.
        single: there is one call, whose message is sent as Celery sends it.

    Attributes:
        buffers: the broker's transport takes many messages at once.
    """

    def __init__(
        self, task: GuardedTask, options: Mapping[str, Any], producer: Any, single: bool = False
    ) -> None:
        self._task, self._options, self._amqp = task, options, task.app.amqp
        # What Celery would find out again for each message.
        self._levels = task.app.conf.get("task_repr_maxlevels", 3)
        self._origin = anon_nodename()
        self._parent = task.app.current_worker_task if options.get("add_to_parent", True) else None
        self.buffers = bool(getattr(producer, "supports_batch_publish", False))  # kombu 5.7
        self._real = producer
        self._producer = producer if single else _Declared(producer)
        self._first: _Amqp | None = None

    def together(self) -> Any:
        """Return a context at whose end all its messages are sent, or confirmed, together, if the transport can."""
        return self._real.batch(UNFLUSHED) if self.buffers else confirmed_together(self._real)

    def publish(
        self, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any], headers: Mapping[str, Any]
    ) -> None:
        """Publish one call.

        Raises:
            Exception: of the driver, the serializer or a receiver of a signal.
        """
        task, amqp = self._task, self._amqp
        shown = publishing.shown(task.guard.declaration, args, kwargs, amqp, self._levels)
        if self._first is None:
            self._first = self._made_by_celery(task_id, args, kwargs, headers)
        options = {"origin": self._origin, **shown, **self._first.options, "headers": headers}
        message = amqp.create_task_message(task_id, task.name, args, kwargs, *self._first.rest, **options)
        # Our apply_async gives Celery these texts if there are secrets. Celery then sends them as properties too.
        texts = shown if task.guard.declaration.secret else {}
        sent = {**texts, **self._first.sent, "headers": headers}
        amqp.send_task_message(self._producer, task.name, message, **sent)
        if self._parent is not None:
            self._parent.add_trail(task.app.AsyncResult(task_id))

    def _made_by_celery(
        self, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any], headers: Mapping[str, Any]
    ) -> _Amqp:
        warn_if_open(self._task.name)
        app = _App(self._task.app)
        own = {"headers": headers, "add_to_parent": False, "task_id": task_id}
        options = {**BRIEFLY, **self._options, **own}
        Task.apply_async(_Task(self._task, app), args, kwargs, producer=self._producer, **options)
        return app.amqp


class _StandIn:
    """Replaces one of Celery's objects, and passes on to it what a subclass does not define."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Task(_StandIn):
    def __init__(self, real: Any, app: _App) -> None:
        super().__init__(real)
        self._get_app = lambda: app
        # Nobody gets the result object. Celery's own one sends an UNSUBSCRIBE when it is deleted.
        self.AsyncResult = lambda task_id: SimpleNamespace()


class _App(_StandIn):
    def __init__(self, real: Any) -> None:
        super().__init__(real)
        self.amqp = _Amqp(real.amqp)
        if type(real.backend).on_task_call.__module__ == "celery.backends.redis":
            self.backend = _Backend()  # other backends prepare what the answer needs, such as a queue

    def send_task(self, *args: Any, **options: Any) -> Any:
        return Celery.send_task(self, *args, **options)


class _Backend:
    """Replaces Redis as result backend, which would subscribe to the result."""

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do nothing."""


class _Amqp(_StandIn):
    """Keeps how Celery makes and sends a message, and sends nothing.

    Attributes:
        rest, options: arguments of ``create_task_message`` beside the call.
        sent: options of ``send_task_message``.
    """

    def create_task_message(
        self, task_id: str, name: str, args: Any, kwargs: Any, *rest: Any, **options: Any
    ) -> Any:
        self.rest, self.options = rest, options

    def send_task_message(self, producer: Any, name: str, message: Any, **options: Any) -> None:
        self.sent = options


class _Declared(_StandIn):
    """A producer that declares each queue once, and never retries: a message that fails is published alone then."""

    def __init__(self, real: Any) -> None:
        super().__init__(real)
        self._known: dict[int, Any] = {}

    def publish(self, body: Any, declare: Any = None, retry: Any = False, **options: Any) -> Any:
        new = [entity for entity in declare or () if id(entity) not in self._known]
        try:
            published = self._real.publish(body, declare=new, retry=False, **options)
        except BaseException:
            self._known.clear()  # of a connection that may be lost
            raise
        self._known.update((id(entity), entity) for entity in new)
        return published
