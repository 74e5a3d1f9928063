"""The same worker with the claim taken out of the runner: every body runs, whatever is known."""

from __future__ import annotations

from typing import Any

from celery_idem import owners
from celery_idem.claims import Claim
from celery_idem.intent import Request
from celery_idem.runner import Job, Runner
from tests.celery import apps


def run(self: Runner, job: Job) -> Any:
    return job.body(
        Claim.unguarded(job.key, Request(owners.mint(), job.task_id, job.fingerprint, job.options.policy))
    )


Runner.run = run  # type: ignore[method-assign]

app = apps.app
