"""Celery signals, one for each kind of event (``celery_idem.engine.events.KINDS``).

::

    from celery_idem.telemetry.signals import in_doubt

    @in_doubt.connect
    def page_the_operator(sender, event, **kwargs):
        ...

``sender`` is the task's name, so ``connect(sender="shop.send_invoice")`` filters. ``event`` is an ``events.Event``. A
receiver runs in the process of the event, in a separate thread, so there is no current task. See
``celery_idem.engine.events`` for a receiver that fails or blocks.
"""

from __future__ import annotations

from celery.utils.dispatch import Signal

from celery_idem.engine import events

SIGNALS: dict[str, Signal] = {
    kind: Signal(name=f"idem_{kind}", providing_args={"event"}) for kind in events.KINDS
}
"""Signals by kind."""


def __getattr__(name: str) -> Signal:
    try:
        return SIGNALS[name]
    except KeyError:
        raise AttributeError(f"there is no event {name!r}; there are: {', '.join(sorted(SIGNALS))}") from None


def _send(event: events.Event) -> None:
    SIGNALS[event.kind].send(sender=event.task, event=event)


events.listen(_send, wants=lambda event: bool(SIGNALS[event.kind].receivers))
