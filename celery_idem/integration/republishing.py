"""Options that publish a message again as it was, to the queue that it came from.

A delivery knows the exchange and the routing key of its message, but not its queue. A message that is published to that
exchange again goes to every queue bound there. On a fanout exchange, each waiting copy would become one copy per
worker. So we look for the queue among those that this worker consumes, and send the message only to that queue, through
the broker's default exchange.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from celery import Celery
from celery.app.task import Context
from kombu.common import Broadcast
from kombu.entity import Exchange, Queue
from kombu.serialization import registry

try:
    from celery.utils.quorum_queues import detect_quorum_queues
except ImportError:  # before Celery 5.5 there is no native delayed delivery

    def detect_quorum_queues(app: Celery, driver_type: str) -> tuple[bool, str]:
        return False, ""


AMQP = "amqp"
"""kombu's name for RabbitMQ, where every queue is bound to the default exchange. Other transports emulate that for
queues, but a fanout goes through channels that are not queues."""

DELAYED = "celery_delayed_delivery"
"""End of the name of the exchange from which a message with a native delay comes."""

DELAY = r"(?:[01]\.){28}"
"""Pattern of what a native delay adds in front of the routing key."""

KEPT = ("delivery_mode", "MessageGroupId")
"""Message properties that Celery does not copy: RabbitMQ's persistence, and the group of an SQS FIFO queue. Without
``MessageDeduplicationId``, because SQS would drop the second message."""

X_DEATH = frozenset(
    (
        "x-death",
        *(
            f"x-{which}-death-{what}"
            for which in ("first", "last")
            for what in ("exchange", "queue", "reason")
        ),
    )
)
"""RabbitMQ's history of a dead-lettered message. RabbitMQ takes a message with this history for a cycle. Celery removes
it since 5.7."""


def restore(options: dict[str, Any], request: Context, ignore_result: bool, given: Mapping[str, Any]) -> None:
    """Add the options of a message that Celery's ``signature_from_request`` does not copy.

    Args:
        ignore_result: the task's own.
        given: options that the author asked for, which stay.
    """
    properties = request.properties or {}
    was = {name: properties.get(name) for name in KEPT}
    was["serializer"] = registry.type_to_name.get(properties.get("content_type"))
    was["compression"] = getattr(request, "compression", None)
    # From __dict__, because the class has a default, and the caller did not say that. Celery copies it since 5.7.
    was["ignore_result"] = request.__dict__.get("ignore_result", ignore_result)
    options.update({name: value for name, value in was.items() if value is not None and name not in given})
    options.pop("redelivered", None)  # a fact of the old delivery
    headers = options.get("headers") or {}
    options["headers"] = {name: headers[name] for name in headers if name not in X_DEATH}


class _Silent:
    """Sends no ``task-sent`` event, because a message that is published again is no new call."""

    def publish(self, *args: Any, **kwargs: Any) -> None:
        pass


_SILENT = _Silent()


def to_its_queue(app: Celery, request: Context) -> dict[str, Any] | None:
    """Return options that publish to the queue that a delivery came from, and to no other.

    None if there are none: for a fanout of a broker that does not use queues for it (Redis), and for an exchange that
    this worker does not know well enough.
    """
    info = request.delivery_info or {}
    exchange, routing_key = info.get("exchange") or "", info.get("routing_key") or ""
    driver = app.connection_for_write().transport.driver_type
    delays = detect_quorum_queues(app, driver)[0]
    consumed: Mapping[str, Queue] = app.amqp.queues.consume_from
    quiet = {"event_dispatcher": _SILENT}
    if not exchange:
        queue = consumed.get(routing_key)
        if queue is None:  # it was added while the worker runs; only the main process knows it, and it exists
            return {**quiet, **_direct(routing_key, [])} if routing_key else None
    else:
        queue = _source(consumed, exchange, routing_key)
        if queue is None:
            if not routing_key or delays:  # with native delays, Celery would route it elsewhere
                return None
            return {**quiet, "exchange": exchange, "routing_key": routing_key}
    kind = queue.exchange.type if queue.exchange else "direct"
    if kind == "fanout" and driver != AMQP:
        return None
    if delays and kind not in ("direct", "fanout") and _alone(app, queue):
        return {**quiet, "queue": queue, "exchange": queue.exchange.name, "routing_key": queue.routing_key}
    # A broadcast queue exists as long as its worker, and only the main process declares it.
    declare = [] if isinstance(queue, Broadcast) else [queue]
    return {**quiet, **_direct(queue.name, declare)}


def _alone(app: Celery, queue: Queue) -> bool:
    """Whether a message with a native delay and a queue's own routing key comes only to that queue.

    Such messages come from one exchange. Celery binds the exchange of every queue to it, and every queue to its
    exchange, with ``#.`` before the key and without other arguments. So a headers exchange gives a copy to each of its
    queues.
    """
    if not queue.routing_key or queue.exchange.type != "topic":
        return False
    words = queue.routing_key.split(".")
    return not any(
        _matches(["#", *(binding.routing_key or "").split(".")], words)
        for other in app.amqp.queues.values()
        if other.name != queue.name
        for binding in (other, *(other.bindings or ()))
        if binding.exchange and binding.exchange.type != "direct"
    )


def _direct(name: str, declare: list[Queue]) -> dict[str, Any]:
    """Return options that publish through the default exchange, which has a binding for each queue's name."""
    return {
        "queue": Queue(name, Exchange("", type="direct"), routing_key=name),
        "exchange": "",  # explicit, because task_routes may name another one
        "routing_key": name,
        "declare": declare,
    }


def _source(consumed: Mapping[str, Queue], exchange: str, routing_key: str) -> Queue | None:
    """Return the queue of this worker from which a message of an exchange came.

    If several queues are bound in the same way, each got a copy, and any of them will do.
    """
    if exchange.endswith(DELAYED):
        exchange, routing_key = "", re.sub(DELAY, "", routing_key)
    bound = [
        (queue, binding.exchange, binding.routing_key)
        for queue in consumed.values()
        for binding in (queue, *(queue.bindings or ()))
        if binding.exchange and (not exchange or binding.exchange.name == exchange)
    ]
    for queue, _, pattern in bound:
        if pattern == routing_key:
            return queue
    for queue, source, pattern in bound:
        if source.type == "topic" and _matches((pattern or "").split("."), routing_key.split(".")):
            return queue
    if not exchange:
        return None
    # The routing key does not matter if the exchange does not use it (fanout, headers, a hash), or has one queue.
    others = [queue for queue, source, _ in bound if source.type not in ("direct", "topic")]
    return others[0] if others else bound[0][0] if len(bound) == 1 else None


def _matches(pattern: list[str], words: list[str]) -> bool:
    """Whether words match a topic pattern of AMQP: ``*`` is one word, ``#`` is any number of words."""
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_matches(pattern[1:], words[n:]) for n in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _matches(pattern[1:], words[1:])
