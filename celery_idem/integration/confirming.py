"""Publishes many messages to RabbitMQ with two waits for confirmations (``confirm_publish``) instead of one each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from celery_idem.integration.messages import PATIENCE


@contextmanager
def confirmed_together(producer: Any) -> Iterator[None]:
    """Return a context at whose end all messages of a producer are confirmed.

    It does nothing if py-amqp does not wait for each confirmation.

    Raises:
        Exception: of py-amqp. It is unknown which of the messages the broker has.
    """
    channel = producer.channel
    alone = vars(channel).get("basic_publish") if hasattr(channel, "basic_publish_confirm") else None
    if alone is None:
        yield
        return
    sent = _Sent(channel, alone)
    channel.basic_publish = sent.publish
    channel.events["basic_ack"].add(sent.acknowledged)
    channel.events["basic_nack"].add(sent.refused)
    try:
        yield
        sent.wait()
    except BaseException:
        producer.connection.collect()  # a late confirmation must not count for a later message
        raise
    finally:
        channel.basic_publish = alone
        channel.events["basic_ack"].discard(sent.acknowledged)
        channel.events["basic_nack"].discard(sent.refused)


class _Sent:
    """Messages of one channel that wait for their confirmation, by the broker's number."""

    def __init__(self, channel: Any, alone: Any) -> None:
        self._channel, self._alone = channel, alone
        self._together = type(channel).basic_publish.__get__(channel)
        self._latest = 0
        self._waiting: set[int] = set()
        self._refused = False

    def publish(self, *message: Any, **options: Any) -> Any:
        # The first message: its confirmation tells its number, and the others count on from it.
        if not self._latest:
            return self._alone(*message, **options)
        self._latest += 1
        self._waiting.add(self._latest)
        return self._together(*message, **options)

    def acknowledged(self, number: int, multiple: bool) -> None:
        self._latest = self._latest or number
        if multiple:
            self._waiting = {one for one in self._waiting if one > number}
        else:
            self._waiting.discard(number)

    def refused(self, number: int, multiple: bool) -> None:
        self._refused = True
        self.acknowledged(number, multiple)

    def wait(self) -> None:
        end = monotonic() + PATIENCE
        while self._waiting:
            left = end - monotonic()
            if self._channel.connection is None or left <= 0:
                raise ConnectionError(
                    "the broker closed the channel, or did not confirm all messages in time"
                )
            self._channel.connection.drain_events(timeout=left)
        if self._refused:
            raise ConnectionError("the broker refused a message")
