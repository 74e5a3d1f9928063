"""The same worker without the claim in its runner: every message runs its body."""

from __future__ import annotations

from typing import Any

from celery_idem.core.model import Request
from celery_idem.engine import owners
from celery_idem.engine.runner import Job, Runner
from tests.celery import apps


def run(self: Runner, job: Job) -> Any:
    request = Request(owners.mint(), job.task_id, job.fingerprint, job.options.policy)
    return job.body(self.ledger.unwritten(job.key, request))


Runner.run = run  # type: ignore[method-assign]

app = apps.app
