"""What happens to intents, for programs: ``listen`` for a function of your own, and a module for each system.

Install the ones you want where your application is made. Never here: rules, stores, records.
"""

from __future__ import annotations

from celery_idem.engine.events import KINDS, Event, listen

__all__ = ["KINDS", "Event", "listen"]
