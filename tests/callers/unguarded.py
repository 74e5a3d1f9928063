"""The shop's worker with the claim taken out of the runner: every body runs, whatever is known."""

from __future__ import annotations

from celery_idem.engine.runner import Runner
from tests.callers import shop
from tests.celery import unguarded  # importing it takes the claim out

assert Runner.run is unguarded.run

app = shop.app
