"""The soak's worker without the claim in its runner: every message runs its body."""

from __future__ import annotations

from typing import Any

from celery_idem.engine.runner import Job, Runner
from tests.celery import unguarded
from tests.chaos import shop


def run(self: Runner, job: Job) -> Any:
    """Run the body, then delete the record that `submit` accepted. Otherwise its callers would wait for ever."""
    try:
        return unguarded.run(self, job)
    finally:
        self.ledger.forget(job.key)


Runner.run = run  # type: ignore[method-assign]

app = shop.app
