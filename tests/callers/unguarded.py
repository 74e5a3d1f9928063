"""The shop's worker without the claim in its runner: every message runs its body."""

from __future__ import annotations

from celery_idem.engine.runner import Runner
from tests.callers import shop
from tests.celery import unguarded  # importing it removes the claim

assert Runner.run is unguarded.run

app = shop.app
