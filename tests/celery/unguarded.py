"""The same worker with the claim taken out of the runner: every body runs, whatever is known."""

from __future__ import annotations

from typing import Any

from celery_idem.core.model import Request
from celery_idem.engine import owners
from celery_idem.engine.claim import Claim
from celery_idem.engine.runner import Job, Runner
from tests.celery import apps


def run(self: Runner, job: Job) -> Any:
    return job.body(
        Claim.unguarded(job.key, Request(owners.mint(), job.task_id, job.fingerprint, job.options.policy))
    )


Runner.run = run  # type: ignore[method-assign]

app = apps.app
