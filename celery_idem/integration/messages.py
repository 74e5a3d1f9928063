"""Makes the call of an open record from a Celery message, and publishes it as a message again."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from celery.app.routes import Router
from celery.app.task import Context
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.exceptions import OperationalError
from kombu.serialization import dumps, loads, prepare_accept_content, registry
from kombu.utils.encoding import str_to_bytes

from celery_idem.core import calls, keys
from celery_idem.core.calls import Call, Why
from celery_idem.core.errors import IdempotencyError, StoreError
from celery_idem.core.model import ACCEPTED_AT, KEY, MESSAGE, PUBLISHED, Stored
from celery_idem.core.sealing import Seal, opened, seal_of
from celery_idem.engine import events
from celery_idem.integration import publishing, republishing
from celery_idem.integration.guarded import GuardedTask, Guarding, guarded_task
from celery_idem.integration.settings import of_app

if TYPE_CHECKING:
    from celery import Celery


Published = TypeVar("Published")

BODY = "idem-body"
ENCODING = "idem-encoding"
"""Properties that the worker's main process adds for a pool process: the message's body as it was on the wire, and its
encoding. Celery passes on the same body object, so it is pickled once."""

_CANVAS = ("callbacks", "errbacks", "chain", "chord")
"""Parts of a body that are signatures."""

_HEADERS = (
    "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id", "parent_id", "origin",
    "ignore_result", "replaced_task_nesting", "stamped_headers", "stamps", "compression",
)  # fmt: skip
"""Celery's own headers that a record keeps, because they cannot be derived. They are kept unless they are None or 0,
which is what a message without them has. The 0 of a chord's first member is kept: Celery orders the results by it."""

REPRS = ("argsrepr", "kwargsrepr")

_CELERYS = frozenset({"lang", "task", "id", *REPRS, *_HEADERS})
"""All of Celery's own headers."""

_WORDS = frozenset((str, bool))
"""Types of options that a cache tells apart. With numbers it would not: True is equal to 1."""

CARRIED = "idem-carried"
"""Header of a message that is published again: owners of its earlier claims whose reply was lost."""

SHOWN = "idem-shown"
"""Header of a call whose author said how to show its arguments, with ``argsrepr`` or ``kwargsrepr``."""

_OURS = frozenset({KEY, MESSAGE, ACCEPTED_AT, PUBLISHED, "idem-waits", CARRIED})
"""Our own headers that a record does not keep: they can be derived, or belong to one delivery."""

_NO_LIMITS = [None, None]
"""Celery's header ``timelimit`` of a message without limits."""

_NOT_KEPT = frozenset({
    "connection", "producer", "retry", "retry_policy", "add_to_parent", "task_id", "countdown", "eta", "expires",
})  # fmt: skip
"""Options of ``apply_async`` that only make sense in the calling process, or that each call has of its own."""

DECIDED = "idem_decided"
"""Option of our ``apply_async``: publish this call, because the record was read already."""

PATIENCE = 3.0
"""Seconds that the broker gets to take a message that recovery can publish later. RabbitMQ stops reading from
publishers while it is short of memory or disk. A publisher that waits for a confirmation would then wait for ever."""

BRIEFLY: Mapping[str, Any] = {"retry_policy": {"max_retries": 1}, "timeout": PATIENCE}
"""Options of a message that recovery can publish later. The one retry is for a connection that has died unnoticed."""

_PROPERTIES = ("priority", "delivery_mode", "MessageGroupId")
"""Properties that the author or the sender chose. All others are the broker's."""


def of_delivery(app: Celery, guard: Guarding, request: Context, args: Any, kwargs: Any, key: str) -> bytes:
    """Return the call of a delivery, packed. It never raises: a call that cannot be kept is a ``Why``."""
    if not guard.settings.keep_call:
        return Why.OFF.packed
    try:
        return _of_delivery(app, guard, request, args, kwargs, key)
    except Exception as error:  # of any serializer
        events.diagnose(logging.DEBUG, "%s: its call is not kept", key, error=error)
        return Why.UNWRITABLE.packed


def _of_delivery(app: Celery, guard: Guarding, request: Context, args: Any, kwargs: Any, key: str) -> bytes:
    known = vars(request)
    task_id = str(request.id or "")
    properties = request.properties or {}
    headers, alike = _kept(known, request.headers or {}, task_id)
    info = request.delivery_info or {}
    kept = {name: properties[name] for name in filter(properties.get, _PROPERTIES)}
    if request.reply_to:
        kept["reply_to"] = request.reply_to
    canvas = {name: known[name] for name in filter(known.get, _CANVAS)}
    body = properties.get(BODY)
    content_type, encoding = properties.get("content_type") or "", properties.get(ENCODING) or "utf-8"
    hidden = _hides(app, guard, canvas)
    if hidden or not isinstance(body, (bytes, str)):
        if hidden:
            args, kwargs, canvas = *publishing.without_secrets(guard.declaration, args, kwargs), {}
        name = registry.type_to_name.get(content_type) or app.conf.task_serializer
        written, encoding, body = dumps((args, kwargs, canvas), serializer=name)
        content_type = "" if request.is_eager or request.called_directly else written
    if isinstance(body, str):
        body = body.encode()
    call = Call(
        task_id,
        headers,
        kept,
        content_type,
        encoding,
        info.get("exchange") or "",
        info.get("routing_key") or "",
        guard.broker,
        hidden,
        None,
        body,
    )
    return _kept_as(guard, key, call, alike)


def _kept(known: Mapping[str, Any], others: Mapping[str, Any], task_id: str) -> tuple[dict[str, Any], bool]:
    """Return the headers to keep, and whether none of them is the author's.

    Args:
        known: Celery's headers, among other things.
        others: the author's headers, and ours.
    """
    headers = {name: known[name] for name in filter(known.get, _HEADERS)}
    if known.get("group_index") == 0:
        headers["group_index"] = 0
    if headers.get("timelimit") == _NO_LIMITS:
        del headers["timelimit"]
    if headers.get("root_id") == task_id:
        del headers["root_id"]
    if _OURS.issuperset(others):
        return headers, True
    headers.update((name, value) for name, value in others.items() if name not in _OURS)
    if SHOWN in others:
        headers.update((name, known[name]) for name in filter(known.get, REPRS))
    return headers, False


def _kept_as(guard: Guarding, key: str, call: Call, alike: bool) -> bytes:
    packed, seal = calls.pack(call, alike), guard.ledger.codec.seal
    if len(packed) > guard.settings.max_call_bytes:
        return Why.TOO_LARGE.packed
    return packed if seal is None else seal.close(packed, key)


def _hides(app: Celery, guard: Guarding, canvas: Any) -> bool:
    """Whether secret values have to be left out of a call, because it is kept in clear."""
    secret = guard.declaration.secret or (
        canvas and any(publishing.has_secrets(app, name) for name in _tasks_in(canvas))
    )
    return bool(secret and guard.ledger.codec.seal is None)


def _tasks_in(value: Any) -> Iterator[str]:
    """Return the names of the tasks of all signatures in a canvas."""
    if isinstance(value, Mapping):
        if isinstance(value.get("task"), str):
            yield value["task"]
        for one in value.values():
            yield from _tasks_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tasks_in(one)


def broker_of(app: Celery) -> str:
    """Return a digest of the broker's address, without user and password. 32 bits tell a company's brokers apart."""
    at = app.connection_for_write()
    parts = (at.transport_cls, at.hostname, at.port, at.virtual_host)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


@lru_cache(maxsize=16)  # a process has one worker's name, or a handful
def place_of(hostname: str, pid: int) -> str:
    """Return where an execution runs, for people."""
    return f"{hostname}, process {pid}"


def place(request: Context) -> str:
    return place_of(request.hostname or "", os.getpid())


class Recorder:
    """A producer that keeps the call which it published, for the record of the intent that the message continues."""

    def __init__(self, producer: Any, task: GuardedTask) -> None:
        self._producer = producer
        self._task = task
        self.call = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, body: Any, **options: Any) -> Any:
        published = self._producer.publish(body, **options)
        self.call = of_message(self._task, body, **options)
        return published


def of_message(
    task: GuardedTask,
    body: Any,
    routing_key: Any = None,
    exchange: Any = None,
    headers: Any = None,
    serializer: Any = None,
    compression: Any = None,
    priority: Any = None,
    reply_to: Any = None,
    delivery_mode: Any = None,
    **properties: Any,
) -> bytes:
    """Return the call in the arguments of a producer's ``publish``, packed."""
    settings = task.guard.settings
    if not settings.keep_call:
        return Why.OFF.packed
    try:
        args, kwargs, canvas = body
        kept = {"priority": priority, "reply_to": reply_to, "delivery_mode": delivery_mode}
        hidden = _hides(task.app, task.guard, canvas)
        if hidden:
            args, kwargs, canvas = *publishing.without_secrets(task.guard.declaration, args, kwargs), {}
        content_type, encoding, written = dumps((args, kwargs, canvas), serializer=serializer)
        others = {name: value for name, value in headers.items() if name not in _CELERYS}
        task_id = str(headers["id"])
        celerys, alike = _kept({**headers, "compression": compression}, others, task_id)
        call = Call(
            task_id,
            celerys,
            {n: v for n, v in kept.items() if v},
            content_type,
            encoding,
            getattr(exchange, "name", exchange) or "",
            routing_key or "",
            task.guard.broker,
            hidden,
            None,
            str_to_bytes(written),
        )
        return _kept_as(task.guard, headers[KEY], call, alike)
    except Exception as error:
        events.diagnose(logging.DEBUG, "%s: the call of its retry is not kept", task.name, error=error)
        return Why.UNWRITABLE.packed


def accepted_at(owner: bytes, stamp: int, seal: Seal | None) -> str:
    """Return the header ``ACCEPTED_AT`` of a message whose call is accepted."""
    named = f"{stamp:x}.{owner.hex()}"
    return named if seal is None else f"{named}.{seal.newest}"


def accepted_in(header: Any, seal: Seal | None) -> Stored | None:
    """Return the write that a header ``ACCEPTED_AT`` names; None if the header is malformed.

    None too if the record is sealed with a key that this process does not have. Then the claim reads the record, and is
    refused.
    """
    try:
        stamp, owner, *sealed = header.split(".")
        if sealed and (seal is None or sealed[0] not in seal.ids):
            return None
        return Stored(bytes.fromhex(owner), int(stamp, 16))
    except (AttributeError, ValueError):
        return None


def kept_options(
    task: GuardedTask, options: Mapping[str, Any], args: Any, kwargs: Any
) -> Mapping[str, Any] | None:
    """Return options of ``apply_async`` as a record keeps them; None if one cannot be kept. It never raises.

    Args:
        args, kwargs: only a router with routes sees them.
    """
    try:
        kept = {
            name: value.isoformat() if isinstance(value, datetime) else value
            for name, value in options.items()
            if value is not None and name not in _NOT_KEPT
        }
        if not isinstance(kept.get("queue", ""), str):
            kept |= _place(kept.pop("queue"), kept)
        if "exchange" in kept:
            kept["exchange"] = getattr(kept["exchange"], "name", kept["exchange"])
        if not kept.keys() & {"queue", "exchange"}:  # recovery runs in a worker, which may have other routes
            routed, router = {**task._get_exec_options(), **kept}, task.app.amqp.router
            if type(router) is not Router or router.routes or routed.get("queue") is not None:
                routed = router.route(routed, task.name, args, kwargs, task_type=task)
            else:  # what most applications have: nothing to look for
                routed["queue"] = task.app.conf.task_default_queue
            for name in ("queue", "exchange", "routing_key", "priority"):
                if routed.get(name) is not None:
                    kept[name] = getattr(routed[name], "name", routed[name])
        return kept
    except Exception as error:  # of a router, or of a value of any kind
        events.diagnose(logging.DEBUG, "%s: the options of its calls are not kept", task.name, error=error)
        return None


def of_submission(
    task: GuardedTask,
    key: str,
    args: Any,
    kwargs: Any,
    task_id: str,
    options: Mapping[str, Any] | None,
    own: Mapping[str, Any],
) -> bytes:
    """Return the call that ``submit`` accepts, packed. Its message is made later. It never raises.

    Args:
        options: of ``kept_options``.
        own: more options, of this call only.
    """
    settings, declaration = task.guard.settings, task.guard.declaration
    if not settings.keep_call:
        return Why.OFF.packed
    if options is None:
        return Why.UNWRITABLE.packed
    try:
        kept = {**options, **{name: value for name, value in own.items() if value is not None}}
        links = {name: kept[name] for name in ("link", "link_error") if name in kept}
        hidden = _hides(task.app, task.guard, links)
        serializer = kept.get("serializer") or task.serializer
        dump = getattr(task, "_dump_pydantic_arguments", None)  # since Celery 5.7
        if dump is not None and serializer != "pickle":
            args, kwargs = dump(args, kwargs)
        if hidden:
            args, kwargs = publishing.without_secrets(declaration, args, kwargs)
            kept = {name: value for name, value in kept.items() if name not in links}
        content_type, encoding, body = dumps((args, kwargs, {}), serializer=serializer)
        body = str_to_bytes(body)
        call = Call(task_id, {}, {}, content_type, encoding, "", "", "", hidden, kept, body)
        return _kept_as(task.guard, key, call, _WORDS.issuperset(map(type, kept.values())))
    except Exception as error:  # of any serializer
        events.diagnose(logging.DEBUG, "%s: its call is not kept", task_id, error=error)
        return Why.UNWRITABLE.packed


def _place(queue: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return where Celery sends a call whose queue is an object of kombu, as names.

    Recovery may run in an application without a queue of that name. Celery then makes one, with a direct exchange.
    """
    exchange = queue.exchange
    if given.get("exchange") or exchange is None or not exchange.name or exchange.type == "direct":
        return {"queue": queue.name}
    return {"exchange": exchange.name, "routing_key": given.get("routing_key") or queue.routing_key}


def arguments(app: Celery, call: Call) -> tuple[Any, Any, Any]:
    """Return positional and named arguments, and the canvas.

    Raises:
        Exception: of the serializer; also for a serializer that the application does not accept.
    """
    accept = prepare_accept_content({*app.conf.accept_content, app.conf.task_serializer})
    args, kwargs, canvas = loads(
        call.body, call.content_type or _plain(app), call.content_encoding, accept=accept
    )
    return args, kwargs, canvas


def _plain(app: Celery) -> str:
    return str(registry.name_to_type.get(app.conf.task_serializer, app.conf.task_serializer))


def publish(app: Celery, key: str, call: Call) -> None:
    """Publish the same message again, with the same task id and number of retries, to the queue that it came from.

    Raises:
        Exception: of the broker's driver.
    """
    task = keys.task_of(key) or ""
    if call.options is not None:
        args, kwargs, _ = arguments(app, call)
        times = {
            name: maybe_iso8601(call.options[name]) for name in ("eta", "expires") if call.options.get(name)
        }
        options = {**call.options, **times, DECIDED: True}
        options["headers"] = {**(options.get("headers") or {}), CARRIED: [], MESSAGE: call.task_id}
        in_time(
            app,
            lambda **more: app.tasks[task].apply_async(
                args, kwargs, task_id=call.task_id, **{**options, **more}
            ),
        )
        return
    headers = _headers(app, task, key, call)
    headers["expires"] = None  # an execution had begun, so the expiry does not count any more
    compression = headers.pop("compression", None)
    context = Context({"delivery_info": {"exchange": call.exchange, "routing_key": call.routing_key}})
    route = republishing.to_its_queue(app, context) or {}
    in_time(
        app,
        lambda producer, retry_policy, **more: producer.publish(
            call.body,
            content_type=call.content_type,
            content_encoding=call.content_encoding,
            compression=compression,
            headers=headers,
            exchange=route.get("exchange", call.exchange),
            routing_key=route.get("routing_key", call.routing_key),
            correlation_id=call.task_id,
            retry=True,
            retry_policy={**app.conf.task_publish_retry_policy, **retry_policy},
            **{"delivery_mode": app.conf.task_default_delivery_mode, **call.properties, **more},
        ),
    )


def in_time(app: Celery, publish: Callable[..., Published], producer: Any = None) -> Published:
    """Publish a message that recovery can publish later, and do not wait long for a broker that does not read.

    Args:
        publish: is called with a producer, a retry policy and a timeout, as named arguments.
        producer: the caller's own; None: one of the application's.
    """
    with app.producer_or_acquire(producer) as real:
        try:
            return publish(producer=real, **BRIEFLY)
        except Exception:
            real.connection.collect()  # closed by its pool, the connection would wait for the broker's reply
            raise


def expired(app: Celery, call: Call) -> bool:
    """Whether a call that was accepted, and has not begun, has expired."""
    expires = (call.options or {}).get("expires")
    return expires is not None and bool(maybe_make_aware(maybe_iso8601(expires), app.timezone) <= app.now())


def answer(app: Celery, key: str, packed: bytes) -> None:
    """Publish the call of a dead execution, so that its caller gets an answer, as a duplicate. It never raises."""
    try:
        call = calls.unpack(opened(_seal(app, key), packed, key))
        if call.publishable:
            publish(app, key, call)
    except Exception as error:
        events.diagnose(logging.WARNING, "%s: its first call could not be published again", key, error=error)


def _headers(app: Celery, task: str, key: str, call: Call) -> dict[str, Any]:
    """Return all headers of a message in Celery's second protocol."""
    args, kwargs, _ = arguments(app, call)
    known = guarded_task(app, task)
    return {
        "lang": "py",
        "task": task,
        "id": call.task_id,
        "root_id": call.task_id,
        **dict.fromkeys(("shadow", "eta", "expires", "group", "group_index", "parent_id", "stamped_headers")),
        "retries": 0,
        "timelimit": [None, None],
        "ignore_result": False,
        "replaced_task_nesting": 0,
        "stamps": {},
        **({} if known is None else publishing.shown(known.idem_declaration, args, kwargs)),
        **call.headers,
        KEY: key,
        MESSAGE: call.task_id,
        CARRIED: [],
        # The intent is open, so no record of an outcome has expired: this message is not too late.
        PUBLISHED: int(time.time()),
    }


def request_of(app: Celery, key: str, call: Call) -> Context:
    """Return the request that a delivery of the call would have: Celery needs it to answer the caller.

    Raises:
        Exception: of the serializer.
    """
    args, kwargs, canvas = arguments(app, call)
    return Context({**_headers(app, keys.task_of(key) or "", key, call), **canvas}, args=args, kwargs=kwargs)


def of_the_broker(app: Celery, error: Exception) -> bool:
    """Whether an error says that the broker did not take a message. Any other error is about the call."""
    at = app.connection_for_write()
    known = (*at.transport.connection_errors, *at.transport.channel_errors, *at.recoverable_connection_errors)
    return isinstance(error, (OperationalError, OSError, *known))


def of_its_place(error: Exception) -> bool:
    """Whether RabbitMQ refuses the queue or exchange of one call: there is none, or it was declared in another way."""
    return getattr(error, "code", None) in (404, 406)


class BrokerError(IdempotencyError):
    """The broker did not take a call. Recovery goes on later."""


NO_SECRETS = "its secret values are not in the record (idem_seal_keys would keep them, sealed)"
"""Why a call that can be shown cannot be published."""


def call_in(app: Celery, key: str, packed: bytes) -> tuple[Call | None, str]:
    """Return the call in packed bytes, or None and why there is none, for people."""
    if not packed:
        return None, "its record holds no call"
    missing = calls.missing(packed)
    if missing is not None:
        return None, WHY_NOT_KEPT[missing]
    try:
        return calls.unpack(opened(_seal(app, key), packed, key)), ""
    except ValueError as error:
        return None, f"its call cannot be read ({error})"
    except StoreError as error:
        return None, str(error).removesuffix(".")


def _seal(app: Celery, key: str) -> Seal | None:
    """Return the seal of the records of an intent's task; None if they are in clear."""
    task = guarded_task(app, keys.task_of(key) or key)
    return seal_of(tuple(of_app(app.conf).seal_keys)) if task is None else task.guard.ledger.codec.seal


WHY_NOT_KEPT = {
    calls.Why.OFF: "its call was not kept (keep_call=False)",
    calls.Why.TOO_LARGE: "its call was not kept: it is larger than max_call_bytes",
    calls.Why.UNWRITABLE: "its call was not kept: its serializer refuses an argument or a header",
    calls.Why.KEY_LOST: "the key that it was sealed with is lost",
}


def publisher(app: Celery, key: str, packed: bytes) -> Callable[[], object] | None:
    """Return a function that publishes a packed call; None if it cannot be published.

    The function raises ``BrokerError``: the broker did not take the message.
    """
    found, _ = call_in(app, key, packed)
    if found is None or not found.publishable:
        return None
    call = found

    def again() -> None:
        try:
            publish(app, key, call)
        except Exception as error:  # of any driver
            raise BrokerError(
                f"{key} is decided, and the broker did not take its call ({type(error).__name__}). A worker's recovery "
                "publishes it when the broker is back; so does the same decision once more.",
                key,
            ) from error

    return again
