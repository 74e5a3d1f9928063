"""Events of intents, for programs: ``listen`` for your own function, and a module for each monitoring system.

Install those you want where your application is made. Never here: rules, stores, records.
"""

from __future__ import annotations

from celery_idem.engine.events import KINDS, Event, listen

__all__ = ["KINDS", "Event", "listen"]
